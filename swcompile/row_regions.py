"""What one kernel over rows can compute around a quantisation, without reading what depends on it."""

import dataclasses
import heapq
import math
from collections.abc import Iterable

import torch
from torch import fx

from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.row_program import Shape
from swcompile.row_steps import Frame, constant, sources
from swcompile.values import VIEWS

aten = torch.ops.aten

MAX_INPUTS = 6
"""Matrices that a kernel reads at most: their rows wait in registers."""
MAX_OUTPUTS = 8
"""Values that a kernel leaves at most; others are left to be computed where they are read."""
MAX_SUMMED = 16384
"""Features of all sums over rows that a kernel makes: a multiprocessor has registers for so many running sums."""
MAX_MEMBERS = 64
"""Nodes that a region grows by at most for a second quantisation: what is further away has no inputs in common."""


@dataclasses.dataclass
class Region:
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


def grow_region(root: fx.Node, order: dict[fx.Node, float]) -> Region | None:
    """All that leads to a quantisation and that its kernel can compute before anything outside needs to run in between."""
    value = root.all_input_nodes[0].meta["val"]
    frame = Frame(value.shape[0], value.shape[1])
    stops: set[fx.Node] = set()
    while True:
        region = Region(frame, [root], *_closure(root.all_input_nodes, frame, stops))
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


def roots_nearby(region: Region, order: dict[fx.Node, float]) -> list[fx.Node]:
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


def _entangled(region: Region, order: dict[fx.Node, float]) -> set[fx.Node]:
    """Members that something outside reads to compute what the region reads: they cannot be in one kernel with it."""
    last = max((order[node] for node in region.inputs), default=0)
    return {member for member in region.members if _leads_back(member, region, order, last)}


def _leads_back(member: fx.Node, region: Region, order: dict[fx.Node, float], last: float) -> bool:
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


def merged(region: Region, root: fx.Node, order: dict[fx.Node, float]) -> Region:
    """The region with another quantisation that reads mostly what it reads; the region itself if there is no gain."""
    value = root.all_input_nodes[0].meta["val"]
    if region.frame.shape_of(value) is not Shape.MATRIX:
        return region
    members, inputs = _closure(root.all_input_nodes, region.frame, region.inputs, MAX_MEMBERS)
    if len(members) > MAX_MEMBERS:
        return region
    both = Region(
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


def _has_cycle(region: Region, order: dict[fx.Node, float]) -> bool:
    """Whether a region of several results cannot be one kernel, as it would read what depends on it."""
    last = max((order[node] for node in region.inputs), default=0)
    results = [*region.roots, *region.sums]
    return bool(_entangled(region, order)) or any(_leads_back(node, region, order, last) for node in results)


def absorb_neighbours(region: Region, order: dict[fx.Node, float]) -> None:
    """Add what the kernel can do beside: sums over its rows, and values for others that need no further input."""
    known = region.members | region.inputs
    computable: dict[fx.Node, None] = {}
    summed: list[fx.Node] = []
    pending = sorted(known, key=order.__getitem__)
    while pending:
        for user in pending.pop(0).users:
            if user in known or user in computable or user in region.roots or user.op != "call_function":
                continue
            if not all(source in known or source in computable for source in sources(user)):
                continue
            if region.frame.sums_rows(user):
                summed.append(user)
            elif region.frame.computes(user) and region.frame.shape_of(user.meta["val"]) is Shape.MATRIX:
                computable[user] = None
                pending.append(user)
    for node in sorted(dict.fromkeys(summed), key=lambda node: node.all_input_nodes[0] in region.inputs):
        _absorb(region, node, order)  # what others would have to compute again comes first
    for node in computable:
        value = node.meta["val"]
        is_read = any(not region.frame.computes(user) for user in node.users if user not in region.sums)
        if is_read and value.dtype.itemsize <= 2 and value.is_floating_point() and node.target not in VIEWS:
            _absorb(region, node, order)


def _absorb(region: Region, node: fx.Node, order: dict[fx.Node, float]) -> None:
    """Let the region compute a node from what it has, unless that ties a knot."""
    is_sum = region.frame.sums_rows(node)
    if is_sum and len(region.sums) >= min(MAX_OUTPUTS - len(region.roots), MAX_SUMMED // region.frame.num_columns):
        return
    members, inputs = _closure(node.all_input_nodes if is_sum else [node], region.frame, region.inputs)
    if not inputs <= region.inputs | region.members or len(region.sums) + len(members) > 64:
        return
    grown = dataclasses.replace(region, members=region.members | members, sums=[*region.sums, *([node] if is_sum else [])])
    if not _has_cycle(grown, order):
        region.members, region.sums = grown.members, grown.sums
