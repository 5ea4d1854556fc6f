"""Keep activations for the backward in int8: the rewrite that makes SwitchBack SwitchBackM."""

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from swcompile import graph as facts
from swcompile.kernels.dequantize import DEQUANTIZE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.pipeline import PassResult, emit
from swcompile.recipe import Role

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
        facts.memory_of(pair.args[0]): pair
        for pair in graph.find_nodes(op="call_function", target=QUANTIZE_ROWWISE)
        if pair not in backward and pair.meta.get("partitioner_tag") != "must_be_in_backward"
    }
    result = PassResult()
    for matmul in facts.matmuls(graph):
        if matmul.role is not Role.GRAD_WEIGHT:
            continue
        operand = matmul.lhs if matmul.weight_on_left else matmul.rhs
        source, transposed = _untransposed(operand)
        pair = quantized.get(facts.memory_of(source))
        if pair is None:
            result.notes[matmul.node.name] = "its activation is not in int8"
            continue
        with graph.inserting_before(matmul.node):
            dtype = source.meta["val"].dtype
            q, scale = sorted(pair.users, key=lambda item: item.args[1])
            if _is_saved_anyway(source, matmul.node, backward):
                for node in (pair, q, scale):
                    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            x = emit(graph, DEQUANTIZE, q, scale, dtype, like=matmul.node, only_in_backward=True)
            if transposed:
                x = emit(graph, aten.permute.default, x, [1, 0], like=matmul.node)
        matmul.node.replace_input_with(operand, x)
        result.rewrites += 1
        result.notes[matmul.node.name] = "reads the int8 activation"
    return result


def _is_saved_anyway(source: fx.Node, reader: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether something else in the backward reads the memory of `source`."""
    while source.op == "call_function" and source.target in facts.ALIASES:
        (source, *_) = source.all_input_nodes
    pending = [source]
    while pending:
        for user in pending.pop().users:
            if user in backward and user is not reader:
                return True
            if user.target in facts.ALIASES:
                pending.append(user)
    return False


def _untransposed(operand: fx.Node) -> tuple[fx.Node, bool]:
    if operand.target == aten.permute.default and operand.args[1] == [1, 0]:
        return operand.all_input_nodes[0], True
    return operand, False
