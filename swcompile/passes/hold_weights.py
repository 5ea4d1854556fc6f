"""Let a matmul look for a weight that is quantised already."""

from operator import getitem

from torch import fx

from swcompile import graph as facts
from swcompile.kernels.scaled_mm import SCALED_MM
from swcompile.kernels.scaled_mm_held import SCALED_MM_HELD, WEIGHT_QUANTIZERS
from swcompile.pipeline import PassResult, emit

_NAMES = {op: name for name, op in WEIGHT_QUANTIZERS.items()}


def hold_weights(graph: fx.Graph) -> PassResult:
    """Rewrite ``scaled_mm(x_q, quantize(w))`` to `scaled_mm_held`, where ``w`` is a parameter. Exact.

    Before::

        %3: (i8[128, 64], f32[1, 1]) = swcompile.quantize_tensorwise(%w)
        %4: i8[128, 64] = getitem(%3, 0)
        %5: f32[1, 1] = getitem(%3, 1)
        %6: f32[32, 128] = swcompile.scaled_mm(%x_q, %4, %x_scale, %5, %bias, f32)

    After::

        %3: f32[32, 128] = swcompile.scaled_mm_held(%x_q, %x_scale, %w, quantize_tensorwise, %bias, f32)

    Within `swcompile.gradient_accumulation` that op quantises the weight the first time only. An op of its own, because
    Inductor uses the memory of a tensor in the graph again once the graph has read it. A weight that several matmuls
    of the graph read stays as it is: it is quantised once for all of them.

    Args:
        graph: a forward or backward graph after the partitioner.
    """
    result = PassResult()
    parameters = facts.parameters(graph)
    for matmul in graph.find_nodes(op="call_function", target=SCALED_MM):
        a_q, b_q, scale_a, scale_b, bias, dtype = matmul.args
        pair = b_q.args[0] if b_q.target is getitem else b_q
        if pair.target not in _NAMES or pair.args[0] not in parameters or list(b_q.users) != [matmul]:
            continue
        assert list(scale_b.users) == [matmul], f"{b_q} and {scale_b} of {pair} have other readers"
        with graph.inserting_before(matmul):
            arguments = a_q, scale_a, pair.args[0], _NAMES[pair.target], bias, dtype
            held = emit(graph, SCALED_MM_HELD, *arguments, like=matmul)
        matmul.replace_all_uses_with(held)
        graph.erase_node(matmul)
        result.rewrites += 1
    return result
