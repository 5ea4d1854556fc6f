"""Keep activations for the backward in int8: the rewrite that makes SwitchBack SwitchBackM."""

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from swcompile import graph as facts
from swcompile.kernels.dequantize import DEQUANTIZE
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.pipeline import PassResult, emit
from swcompile.recipe import Role
from swcompile.values import ALIASES, memory_of

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
        if matmul.role is not Role.GRAD_WEIGHT or matmul.number_format:
            continue
        operand = matmul.lhs if matmul.weight_on_left else matmul.rhs
        if operand.meta["val"].dim() == 3:
            result.notes[matmul.node.name] = "a batch of products reads its activation as it is"
            continue
        pair, transposed = quantized.get(memory_of(operand)), False
        if pair is None:
            pair, transposed = quantized.get(memory_of(operand, transposed=True)), True
        if pair is None:
            result.notes[matmul.node.name] = "its activation is not in int8"
            continue
        with graph.inserting_before(matmul.node):
            dtype = operand.meta["val"].dtype
            x = emit(graph, DEQUANTIZE, *_parts(pair), dtype, like=matmul.node, only_in_backward=True)
            if transposed:
                x = emit(graph, aten.permute.default, x, [1, 0], like=matmul.node)
        matmul.node.replace_input_with(operand, x)
        read_before.setdefault(pair, []).append(operand)
        result.rewrites += 1
        result.notes[matmul.node.name] = "reads the int8 activation"
    for pair, operands in read_before.items():
        if any(_is_read_in(backward, operand) for operand in operands):
            for node in (pair, *_parts(pair)):
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    return result


def _parts(pair: fx.Node) -> list[fx.Node]:
    """A quantiser's two results: the int8 values, the scales."""
    items = {item.args[1]: item for item in pair.users}
    return [items[0], items[1]]


def _is_read_in(backward: set[fx.Node], value: fx.Node) -> bool:
    """Whether anything in the backward reads the memory of a value."""
    while value.op == "call_function" and value.target in ALIASES:
        (value, *_) = value.all_input_nodes
    pending = [value]
    while pending:
        for user in pending.pop().users:
            if user in backward:
                return True
            if user.target in ALIASES:
                pending.append(user)
    return False
