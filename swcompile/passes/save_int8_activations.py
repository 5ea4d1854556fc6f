"""Keep activations for the backward in int8: the rewrite that makes SwitchBack SwitchBackM."""

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from swcompile import graph as facts
from swcompile.kernels.dequantize import DEQUANTIZE
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.pipeline import PassResult, emit
from swcompile.recipe import Role
from swcompile.values import ALIASES, memory_of, viewed

aten = torch.ops.aten


def save_int8_activations(graph: fx.Graph) -> PassResult:
    """Rewrite ``mm(g.T, x)`` to ``mm(g.T, dequantize(x_q))`` where the forward has quantised ``x``. Changes numerics.

    Before::

        %2: (i8[8, 32], f32[8, 1]) = swcompile.quantize_rowwise(%x)
        ...
        %9: f32[64, 32] = aten.mm(%g_t, %x)

    After::

        %2: (i8[8, 32], f32[8, 1]) = swcompile.quantize_rowwise(%x)
        ...
        %9: f32[8, 32] = swcompile.dequantize(%x_q, %x_scale, f32)
        %10: f32[64, 32] = aten.mm(%g_t, %9)

    A matmul in 8 bit with scales by block quantises from the int8 activation, by both scales of a token::

        %9: f32[8, 1] = aten.mul.Tensor(%g_scale, %x_scale)
        %10: (i8[32, 16], f32[1, 32]) = swcompile.quantize_blockwise_transpose(%x_q, %9)

    The partitioner then keeps the int8 tensor and its scales from forward to backward and lets ``x`` go, unless the
    backward needs ``x`` for something else (attention's output, for attention's own backward): there it quantises
    ``x`` again.
    """
    backward = facts.backward_nodes(graph)
    quantized = {
        # The op transposes what it quantises, so its result is the transpose of its argument, in int8.
        memory_of(pair.args[0], transposed=pair.target == QUANTIZE_COLUMNWISE_TRANSPOSE): pair
        for op in (QUANTIZE_ROWWISE, QUANTIZE_COLUMNWISE_TRANSPOSE)
        for pair in graph.find_nodes(op="call_function", target=op)
        if pair not in backward and pair.meta.get("partitioner_tag") != "must_be_in_backward"
    }
    result = PassResult()
    read_before: dict[fx.Node, list[fx.Node]] = {}
    for matmul in facts.matmuls(graph):
        reader = _reader(matmul)
        if reader is None:
            continue
        decided = matmul.node.meta.get("rewritten_from", matmul.node.name)
        operand = matmul.weight_operand
        if reader is not matmul.node:
            operand, token_scale = reader.all_input_nodes
            if operand.meta["val"].dtype == torch.int8:  # for another matmul of the same two
                result.notes[decided] = "reads the int8 activation"
                continue
        if operand.meta["val"].dim() == 3:
            result.notes[decided] = "a batch of products reads its activation as it is"
            continue
        pair, transposed = quantized.get(memory_of(operand)), False
        if pair is None and reader is matmul.node:
            pair, transposed = quantized.get(memory_of(operand, transposed=True)), True
        if pair is None:
            result.notes[decided] = "its activation is not in int8"
            continue
        q, scale = _parts(pair)
        with graph.inserting_before(reader):
            if reader is matmul.node:
                x = emit(graph, DEQUANTIZE, q, scale, operand.meta["val"].dtype, like=reader, only_in_backward=True)
                if transposed:
                    x = emit(graph, aten.permute.default, x, [1, 0], like=reader)
                reader.replace_input_with(operand, x)
            else:
                reader.args = q, emit(graph, aten.mul.Tensor, token_scale, scale, like=reader)
        read_before.setdefault(pair, []).append(operand)
        result.rewrites += 1
        result.notes[decided] = "reads the int8 activation"
    for pair, operands in read_before.items():
        if any(_is_read_in(backward, operand) for operand in operands):
            for node in (pair, *_parts(pair)):
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return result


def _reader(matmul: facts.Matmul) -> fx.Node | None:
    """What reads a ``grad_weight``'s activation before it is in int8: the matmul itself, or what quantises by block for it."""
    if matmul.role is not Role.GRAD_WEIGHT:
        return None
    if matmul.number_format is None:
        return matmul.node
    (pair, *_) = matmul.rhs.all_input_nodes
    return pair if pair.target == QUANTIZE_BLOCKWISE_TRANSPOSE else None


def _parts(pair: fx.Node) -> list[fx.Node]:
    """A quantiser's two results: the int8 values, the scales."""
    items = {item.args[1]: item for item in pair.users}
    return [items[0], items[1]]


def _is_read_in(backward: set[fx.Node], value: fx.Node) -> bool:
    """Whether anything in the backward reads the memory of a value."""
    pending = [viewed(value)]
    while pending:
        for user in pending.pop().users:
            if user in backward:
                return True
            if user.target in ALIASES:
                pending.append(user)
    return False
