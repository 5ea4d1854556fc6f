"""Quantise a value in the kernel that computes it."""

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence
from operator import getitem

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from swcompile.kernels.map_rows import MAP_ROWS
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.row_program import Action, Output, Ref, RowProgram, Shape
from swcompile.kernels.row_program_triton import MAX_COLUMNS
from swcompile.pipeline import PassResult, emit
from swcompile.row_steps import Frame, ProgramWriter, constant, sources
from swcompile.values import ALIASES, CASTS, RESHAPES, VIEWS

aten = torch.ops.aten

MAX_INPUTS = 6
"""Matrices that a kernel reads at most: their rows wait in registers."""
MAX_OUTPUTS = 8
"""Values that a kernel leaves at most; others are left to be computed where they are read."""
MAX_MEMBERS = 64
"""Nodes that a region grows by at most for a second quantisation: what is further away has no inputs in common."""


def fuse_quantization(graph: fx.Graph, *, devices: Sequence[str] = ("cuda",)) -> PassResult:
    """Rewrite ``quantize_rowwise(f(x, ...))`` to one `map_rows` that computes f, too. Exact but for the order of sums.

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
        region = _grow_region(root, order)
        if region is None:
            continue
        for other in _roots_nearby(region, order):
            if other in roots and other not in done:
                region = _merged(region, other, order)
        _absorb_neighbours(region, order)
        if region.is_worthwhile and _replace(graph, region, order):
            done.update(region.roots)
            result.rewrites += len(region.roots)
    if result.rewrites:
        stable_topological_sort(graph)
    return result


def _fits(root: fx.Node, devices: Sequence[str]) -> bool:
    value = root.all_input_nodes[0].meta["val"]
    num_columns = value.shape[1]
    return value.device.type in devices and isinstance(num_columns, int) and 2 <= num_columns <= MAX_COLUMNS


@dataclasses.dataclass
class _Region:
    """What one kernel computes."""

    frame: Frame
    roots: list[fx.Node]
    """The quantisations."""
    members: set[fx.Node]
    """The nodes that the kernel computes."""
    inputs: set[fx.Node]
    """The nodes that it reads."""
    sums: list[fx.Node] = dataclasses.field(default_factory=list)
    """Sums over the rows that it computes."""

    @property
    def matrices(self) -> set[fx.Node]:
        """The matrices among the inputs."""
        return {node for node in self.inputs if self.frame.shape_of(node.meta["val"]) is Shape.MATRIX}

    @property
    def is_worthwhile(self) -> bool:
        """Whether there is more to do than to quantise what is there."""
        computes = any(node.target not in VIEWS for node in self.members)
        return (computes or bool(self.sums)) and len(self.matrices) <= MAX_INPUTS


def _grow_region(root: fx.Node, order: dict[fx.Node, float]) -> _Region | None:
    """All that leads to a quantisation and that its kernel can compute before anything outside needs to run in between."""
    value = root.all_input_nodes[0].meta["val"]
    frame = Frame(value.shape[0], value.shape[1])
    stops: set[fx.Node] = set()
    while True:
        region = _Region(frame, [root], *_closure(root.all_input_nodes, frame, stops))
        entangled = _entangled(region, order)
        if not entangled:
            return region if region.matrices else None
        if entangled <= stops:
            return None
        stops |= entangled


def _closure(
    ends: Iterable[fx.Node], frame: Frame, stops: set[fx.Node], most: float = math.inf
) -> tuple[set[fx.Node], set[fx.Node]]:
    """(the nodes that a program for `ends` computes, those that it reads); cut off beyond so many members."""
    members: set[fx.Node] = set()
    inputs: set[fx.Node] = set()
    pending = list(ends)
    while pending and len(members) <= most:
        node = pending.pop()
        if node in members or node in inputs or constant(node) is not None:
            continue
        if node in stops or not frame.computes(node):
            inputs.add(node)
            continue
        members.add(node)
        pending += sources(node)
        if node.target is aten.var_mean.correction:  # both of its results are there
            members.update(set(node.users) - inputs)
    return members, inputs


def _roots_nearby(region: _Region, order: dict[fx.Node, float]) -> list[fx.Node]:
    """Quantisations of what one kernel could compute of the region's matrices, with hardly anything else to read."""
    nothing: frozenset[fx.Node] = frozenset()
    strangers = dict.fromkeys(region.members | region.inputs, nothing)  # what a node needs beside the region's values
    found = []
    pending = [(order[user], user.name, user) for node in region.members | region.matrices for user in node.users]
    heapq.heapify(pending)
    for _ in range(_MOST_VISITS):
        if not pending:
            break
        *_, node = heapq.heappop(pending)
        if node in strangers:
            continue
        if node.target == QUANTIZE_ROWWISE:
            found += [] if node in found or node in region.roots else [node]
        elif region.frame.computes(node):
            needs = nothing.union(*(strangers.get(source, {source}) for source in sources(node)))
            if len(needs) <= _MOST_STRANGERS:
                strangers[node] = needs
                for user in node.users:
                    heapq.heappush(pending, (order[user], user.name, user))
    return found


_MOST_VISITS, _MOST_STRANGERS = 100, 2
"""Enough to get from the operands of a gated activation to both of its gradients."""


def _entangled(region: _Region, order: dict[fx.Node, float]) -> set[fx.Node]:
    """Members that something outside reads to compute what the region reads: they cannot be in one kernel with it."""
    last = max((order[node] for node in region.inputs), default=0)
    return {member for member in region.members if _leads_back(member, region, order, last)}


def _leads_back(member: fx.Node, region: _Region, order: dict[fx.Node, float], last: float) -> bool:
    """Whether what something outside computes of a node is an input of the region, none of which comes after `last`."""
    pending = [user for user in member.users if user not in region.members]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node in region.inputs:
            return True
        if order[node] >= last:
            continue
        for user in node.users:
            if user not in seen and user not in region.members:
                seen.add(user)
                pending.append(user)
    return False


def _merged(region: _Region, root: fx.Node, order: dict[fx.Node, float]) -> _Region:
    """The region with another quantisation that reads mostly what it reads; the region itself if there is no gain."""
    value = root.all_input_nodes[0].meta["val"]
    if region.frame.shape_of(value) is not Shape.MATRIX:
        return region
    members, inputs = _closure(root.all_input_nodes, region.frame, region.inputs, MAX_MEMBERS)
    if len(members) > MAX_MEMBERS:
        return region
    both = _Region(
        region.frame,
        [*region.roots, root],
        region.members | members,
        (region.inputs | inputs) - region.members - members,
    )
    is_new = both.matrices - region.matrices
    shared = inputs & region.matrices
    if len(shared) <= len(is_new) or len(both.matrices) > MAX_INPUTS or _has_cycle(both, order):
        return region
    return both


def _has_cycle(region: _Region, order: dict[fx.Node, float]) -> bool:
    """Whether a region of several results cannot be one kernel, as it would read what depends on it."""
    last = max((order[node] for node in region.inputs), default=0)
    results = [*region.roots, *region.sums]
    return bool(_entangled(region, order)) or any(_leads_back(node, region, order, last) for node in results)


def _absorb_neighbours(region: _Region, order: dict[fx.Node, float]) -> None:
    """Add what the kernel can do beside: sums over its rows, and values for others that need no further input."""
    known = region.members | region.inputs
    computable: dict[fx.Node, None] = {}
    pending = sorted(known, key=order.__getitem__)
    while pending:
        for user in pending.pop(0).users:
            if user in known or user in computable or user in region.roots or user.op != "call_function":
                continue
            if not all(source in known or source in computable for source in sources(user)):
                continue
            if region.frame.sums_rows(user):
                _absorb(region, user, order)
            elif region.frame.computes(user) and region.frame.shape_of(user.meta["val"]) is Shape.MATRIX:
                computable[user] = None
                pending.append(user)
    for node in computable:
        value = node.meta["val"]
        is_read = any(not region.frame.computes(user) for user in node.users if user not in region.sums)
        if is_read and value.dtype.itemsize <= 2 and value.is_floating_point() and node.target not in VIEWS:
            _absorb(region, node, order)


def _absorb(region: _Region, node: fx.Node, order: dict[fx.Node, float]) -> None:
    """Let the region compute a node from what it has, unless that ties a knot."""
    is_sum = region.frame.sums_rows(node)
    members, inputs = _closure(node.all_input_nodes if is_sum else [node], region.frame, region.inputs)
    if not inputs <= region.inputs | region.members or len(region.sums) + len(members) > 64:
        return
    grown = dataclasses.replace(region, members=region.members | members, sums=[*region.sums, *([node] if is_sum else [])])
    if not _has_cycle(grown, order):
        region.members, region.sums = grown.members, grown.sums


def _replace(graph: fx.Graph, region: _Region, order: dict[fx.Node, float]) -> bool:
    """Put one `map_rows` in the place of a region; False where no program says what it does."""
    inputs = sorted(region.inputs, key=order.__getitem__)
    writer = ProgramWriter(region.frame, inputs)
    for member in sorted(region.members, key=order.__getitem__):
        writer.add(member)
    quantized = [writer.ref(root.all_input_nodes[0]) for root in region.roots]
    region.sums = region.sums[: MAX_OUTPUTS - len(quantized)]
    summed = [writer.ref(node.all_input_nodes[0]) for node in region.sums]
    stored: dict[Ref, list[fx.Node]] = {}
    for member in sorted(region.members, key=order.__getitem__):
        ref = writer.ref(member) if member.target is not aten.var_mean.correction else None
        if ref is None or ref.index < len(inputs) or not _is_stored(member, region, writer.value(ref).shape):
            continue
        alike = stored.setdefault(ref, [])
        # Of equal values that are not views of one another each has memory of its own, which somebody may write to.
        if not alike or _viewed(alike[0]) is _viewed(member):
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
    _extend(order, [results])
    return True


def _extend(order: dict[fx.Node, float], new: Iterable[fx.Node]) -> None:
    """Number new nodes, and move up those that read them: a node's number exceeds its sources'."""
    pending = list(new)
    while pending:
        node = pending.pop()
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


def _is_stored(member: fx.Node, region: _Region, shape: Shape) -> bool:
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


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.target in ALIASES | RESHAPES:
        (node,) = sources(node)
    return node


def _emit(
    graph: fx.Graph, region: _Region, inputs: Sequence[fx.Node], program: RowProgram,
    stored: Sequence[list[fx.Node]], symbols: dict[str, fx.Node],
) -> fx.Node:
    like = region.roots[0]
    old: list[fx.Node] = []
    with graph.inserting_before(like):
        arguments = [_as_rows(graph, node, value.shape, region.frame, like) for node, value in zip(inputs, program.inputs, strict=True)]
        results = emit(graph, MAP_ROWS, arguments, str(program), like=like)
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


