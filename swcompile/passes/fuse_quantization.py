"""Quantise a value in the kernel that computes it."""

from collections.abc import Iterable, Sequence
from operator import getitem

import torch
from torch import fx

from swcompile.kernels.map_rows import MAP_ROWS
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.row_program import Action, Output, Ref, RowProgram, Shape, parse
from swcompile.kernels.row_program_triton import MAX_COLUMNS, compile_in_background
from swcompile.pipeline import PassResult, emit
from swcompile.row_regions import MAX_OUTPUTS, Region, absorb_neighbours, grow_region, merged, roots_nearby
from swcompile.row_steps import Frame, ProgramWriter
from swcompile.values import ALIASES, CASTS, RESHAPES, viewed

aten = torch.ops.aten

def fuse_quantization(graph: fx.Graph, *, devices: Sequence[str] = ("cuda",)) -> PassResult:
    """Rewrite ``quantize_rowwise(f(x, ...))`` to one `map_rows` that computes f, too: the same to float32's last bits.

    Before::

        %2: f32[4, 16, 64] = prims.convert_element_type(%0, f32)
        %3: f32[4, 16, 64] = aten.mul.Tensor(%2, %1)
        %4: bf16[4, 16, 64] = prims.convert_element_type(%3, bf16)
        %5: bf16[64, 64] = aten.reshape(%4, [64, 64])
        %6: (i8[64, 64], f32[64, 1]) = swcompile.quantize_rowwise(%5)

    After::

        %2: (i8[64, 64], f32[64, 1]) = swcompile.map_rows([%0, %1], "...; quantize %4")

    f is what lies between the quantisation and the last values that something else has computed: pointwise ops, and
    reductions over the features (norms). Its values that are read elsewhere are written by the same kernel; so are sums
    over the rows (gradients of biases and of a norm's weight), values for other readers that need no further input, and
    a second quantised value that mostly reads the same inputs (both gradients of SwiGLU). A 16-bit value that nobody
    else reads is never written.

    Args:
        graph: a forward or backward graph after the partitioner.
        devices: types of devices to do it on. On a CPU Inductor's own loops are faster than the op's reference.
    """
    result = PassResult()
    roots = [node for node in graph.find_nodes(op="call_function", target=QUANTIZE_ROWWISE) if _fits(node, devices)]
    order = {node: float(number) for number, node in enumerate(graph.nodes)}
    done: set[fx.Node] = set()
    for root in roots:
        if root in done:
            continue
        region = grow_region(root, order)
        if region is None:
            continue
        for other in roots_nearby(region, order):
            if other in roots and other not in done:
                region = merged(region, other, order)
        absorb_neighbours(region, order)
        if region.is_worthwhile and _replace(graph, region, order):
            done.update(region.roots)
            result.rewrites += len(region.roots)
    if result.rewrites:
        from torch._inductor.pattern_matcher import stable_topological_sort  # 1.5 s, as in the backend

        stable_topological_sort(graph)
    return result


def _fits(root: fx.Node, devices: Sequence[str]) -> bool:
    value = root.all_input_nodes[0].meta["val"]
    num_columns = value.shape[1]
    return value.device.type in devices and isinstance(num_columns, int) and 2 <= num_columns <= MAX_COLUMNS


def _replace(graph: fx.Graph, region: Region, order: dict[fx.Node, float]) -> bool:
    """Put one `map_rows` in the place of a region; False where no program says what it does."""
    inputs = sorted(region.inputs, key=order.__getitem__)
    writer = ProgramWriter(region.frame, inputs)
    for member in sorted(region.members, key=order.__getitem__):
        writer.add(member)
    quantized = [writer.ref(root.all_input_nodes[0]) for root in region.roots]
    summed = [writer.ref(node.all_input_nodes[0]) for node in region.sums]
    stored: dict[Ref, list[fx.Node]] = {}
    for member in sorted(region.members, key=order.__getitem__):
        ref = writer.ref(member) if member.target is not aten.var_mean.correction else None
        if ref is None or ref.index < len(inputs) or not _is_stored(member, region, writer.value(ref).shape):
            continue
        alike = stored.setdefault(ref, [])
        # Of equal values that are not views of one another each has memory of its own, which somebody may write to.
        if not alike or viewed(alike[0], ALIASES | RESHAPES) is viewed(member, ALIASES | RESHAPES):
            alike.append(member)
    symbols = _symbols(graph)
    num_stored = MAX_OUTPUTS - len(quantized) - len(summed)
    stored = dict(list(stored.items())[:num_stored])
    kept = [node for nodes in stored.values() for node in nodes] + region.sums
    if None in quantized or None in summed or not all(_sizes(node, symbols) for node in kept):
        return False
    outputs = [Output(Action.STORE, ref) for ref in stored]
    outputs += [Output(Action.QUANTIZE, ref) for ref in quantized if ref is not None]
    outputs += [
        Output(Action.SUM_ROWS, ref, node.meta["val"].dtype)
        for ref, node in zip(summed, region.sums, strict=True)
        if ref is not None
    ]
    try:
        program = writer.finish(outputs)
    except ValueError:  # a value of one number a row that is to be summed or quantised as if it were a matrix
        return False
    results = _emit(graph, region, inputs, program, list(stored.values()), symbols)
    if results.meta["val"][0].is_cuda:
        num_rows = region.frame.num_rows if isinstance(region.frame.num_rows, int) else None
        device = results.meta["val"][0].device
        compile_in_background(parse(program.text), num_rows, region.frame.num_columns, device)
    _extend(order, [results])
    return True


def _extend(order: dict[fx.Node, float], new: Iterable[fx.Node]) -> None:
    """Number new nodes, and move up those that read them: a node's number exceeds its sources'."""
    pending, num_moves = list(new), 0
    while pending:
        node = pending.pop()
        num_moves += 1
        assert num_moves <= 100 * len(order), f"{node} reads what is computed from it"
        missing = [source for source in node.all_input_nodes if source not in order]
        if missing:  # a view of an input, new itself
            pending += [node, *missing]
            continue
        least = max((order[source] for source in node.all_input_nodes), default=0.0) + _STEP
        if order.get(node, 0.0) < least:
            order[node] = least
            pending += node.users


_STEP = 2.0**-20
"""What a node is put behind its last source by; the graph's own nodes are 1 apart."""


def _is_stored(member: fx.Node, region: Region, shape: Shape) -> bool:
    """Whether the kernel writes a value for those who read it elsewhere; if not, they compute it again themselves."""
    replaced = region.members.union(region.roots, region.sums)
    readers = [user for user in member.users if user not in replaced]
    value = member.meta["val"]
    if not readers or shape is Shape.ROW or region.frame.shape_of(value) is not shape or member.target is aten.clone.default:
        return False  # also of a column that a node has spread over a matrix
    if shape is Shape.COLUMN:
        return True
    if member.target in CASTS and member.all_input_nodes[0].meta["val"].dtype.itemsize < value.dtype.itemsize:
        return False
    widest = max(node.meta["val"].dtype.itemsize for node in region.matrices)
    return value.dtype.itemsize <= widest or any(not region.frame.computes(reader) for reader in readers)


def _emit(
    graph: fx.Graph, region: Region, inputs: Sequence[fx.Node], program: RowProgram,
    stored: Sequence[list[fx.Node]], symbols: dict[str, fx.Node],
) -> fx.Node:
    like = region.roots[0]
    old: list[fx.Node] = []
    with graph.inserting_before(like):
        arguments = [_as_rows(graph, node, value.shape, region.frame, like) for node, value in zip(inputs, program.inputs, strict=True)]
        results = emit(graph, MAP_ROWS, arguments, program.text, like=like)
        outputs = iter(range(len(results.meta["val"])))

        def take(like: fx.Node) -> fx.Node:
            return emit(graph, getitem, results, next(outputs), like=like)

        for nodes in stored:
            value = take(nodes[0])
            for node in nodes:
                node.replace_all_uses_with(_as_shaped(graph, value, node, symbols))
        for root in region.roots:
            q, scale = take(root), take(root)
            q.meta["quantized_with"] = scale
            for user in list(root.users):
                assert user.target is getitem, f"{user.format_node()} reads both results of {root} at once"
                user.replace_all_uses_with(q if user.args[1] == 0 else scale)
                old.append(user)
            old.append(root)
        for node in region.sums:
            node.replace_all_uses_with(_as_shaped(graph, take(node), node, symbols))
            old.append(node)
    for node in old:
        graph.erase_node(node)
    return results


def _as_rows(graph: fx.Graph, node: fx.Node, shape: Shape, frame: Frame, like: fx.Node) -> fx.Node:
    """An input as a matrix [M, K], a column [M, 1] or a row [K]."""
    value = node.meta["val"]
    wanted = {Shape.MATRIX: [-1, frame.num_columns], Shape.COLUMN: [-1, 1], Shape.ROW: [frame.num_columns]}[shape]
    return node if value.dim() == len(wanted) else emit(graph, aten.reshape.default, node, wanted, like=like)


def _as_shaped(graph: fx.Graph, value: fx.Node, node: fx.Node, symbols: dict[str, fx.Node]) -> fx.Node:
    """A result in the shape of the node that it replaces."""
    if value.meta["val"].dim() == node.meta["val"].dim():
        return value
    return emit(graph, aten.reshape.default, value, _sizes(node, symbols), like=node)


def _symbols(graph: fx.Graph) -> dict[str, fx.Node]:
    """Expression -> the input of the graph that is this size."""
    placeholders = [(node, node.meta.get("val")) for node in graph.find_nodes(op="placeholder")]
    return {str(value.node.expr): node for node, value in placeholders if isinstance(value, torch.SymInt)}


def _sizes(node: fx.Node, symbols: dict[str, fx.Node]) -> list[int | fx.Node]:
    """The shape of a node for a graph's arguments, with -1 for one size that no input is; none if there are more."""
    sizes = [
        size if isinstance(size, int) else symbols.get(str(size.node.expr), -1) for size in node.meta["val"].shape
    ]
    return sizes if sizes.count(-1) <= 1 else []


