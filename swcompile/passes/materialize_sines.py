"""Compute the sines and cosines of rotary embeddings once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from swcompile.kernels.materialize import COS, MATERIALIZE, SIN
from swcompile.pipeline import PassResult, emit
from swcompile.values import ALIASES, CASTS, RESHAPES, viewed

aten = torch.ops.aten
_SINES: dict[Any, torch._ops.OpOverload] = {aten.sin.default: SIN, aten.cos.default: COS}
"""What computes them in the place of Inductor."""
_VIEWS = (ALIASES | RESHAPES) - {aten.slice.Tensor, aten.select.int}
"""Of all elements."""
_JOINED = ALIASES | RESHAPES | CASTS | {aten.cat.default, aten.clone.default}
_MUCH_LARGER = 4
"""Times: two halves of a table may be put together."""


def materialize_sines(graph: fx.Graph, *, devices: Sequence[str] = ("cuda",)) -> PassResult:
    """Write what is computed of sines and cosines alone to memory where it is spread over something larger.

    Before::

        %2: f32[1, 512, 64] = aten.cos(%1)
        %3: bf16[1, 512, 64] = prims.convert_element_type(%2, bf16)
        %4: bf16[1, 1, 512, 64] = aten.unsqueeze(%3, 1)
        %5: bf16[8, 32, 512, 64] = aten.mul.Tensor(%0, %4)

    After::

        %2: f32[1, 512, 64] = swcompile.cos(%1)
        %3: bf16[1, 512, 64] = prims.convert_element_type(%2, bf16)
        %4: bf16[1, 512, 64] = swcompile.materialize(%3)
        %5: bf16[1, 1, 512, 64] = aten.unsqueeze(%4, 1)
        %6: bf16[8, 32, 512, 64] = aten.mul.Tensor(%0, %5)

    Otherwise Inductor computes both again for every head of every sequence (benchmarks/results/train_step_h200.md has
    what that takes). The sines themselves are left to PyTorch's kernels: a kernel of Inductor's that computes a table takes
    3 seconds to compile (benchmarks/results/compile_time.md). Changes numerics: a table in 16 bits is rounded, as in eager
    mode, where Inductor uses its float32.

    Args:
        graph: a forward or backward graph after the partitioner. One without an op of ours stays as it is.
        devices: types of devices to do it on.
    """
    result = PassResult()
    targets = {node.target for node in graph.nodes}
    if not any(isinstance(target, torch._ops.OpOverload) and target.namespace == "swcompile" for target in targets):
        return result
    alone, tables = _alone_and_tables(graph)
    tables = [table for table in tables if table.meta["val"].device.type in devices]
    sines = {sine for table in tables for sine in _sines_of(table, alone)}
    for table in tables:
        readers = list(table.users)
        with graph.inserting_after(table):
            written = emit(graph, MATERIALIZE, table, like=table)
        for reader in readers:
            reader.replace_input_with(table, written)
        result.rewrites += 1
    for sine in sines:
        sine.target = _SINES[sine.target]
    return result


def _alone_and_tables(graph: fx.Graph) -> tuple[set[fx.Node], list[fx.Node]]:
    """The values that come of sines and cosines alone; and those of them, views left aside, that are read where something
    much larger is computed.
    """
    alone: set[fx.Node] = set()
    tables: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if not _is_pointwise(node):
            continue
        sources = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
        spread = [source for source in sources if source in alone and _is_much_larger(node, source)]
        tables.update((viewed(source, _VIEWS), None) for source in spread)
        known = all(source in alone or statically_known_true(source.meta["val"].numel() == 1) for source in sources)
        if node.target in _SINES or (known and not spread and not alone.isdisjoint(sources)):
            alone.add(node)
    return alone, list(tables)


def _sines_of(table: fx.Node, alone: set[fx.Node]) -> set[fx.Node]:
    """The sines and cosines from which a table is computed; not those of which it takes a part alone."""
    found: set[fx.Node] = set()
    seen, pending = {table}, [table]
    while pending:
        node = pending.pop()
        if node.target in _SINES:
            if statically_known_true(node.meta["val"].numel() <= table.meta["val"].numel()):
                found.add(node)
            continue
        new = alone.intersection(node.all_input_nodes) - seen
        seen |= new
        pending += new
    return found


def _is_pointwise(node: fx.Node) -> bool:
    """Whether Inductor computes a node where it is read, and with it what it is computed of."""
    target, value = node.target, node.meta.get("val")
    has_tag = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return isinstance(value, torch.Tensor) and (has_tag or target in _JOINED)


def _is_much_larger(node: fx.Node, source: fx.Node) -> bool:
    try:
        ratio = node.meta["val"].numel() // source.meta["val"].numel()
    except ZeroDivisionError:  # no position at all
        return False
    return statically_known_true(ratio >= _MUCH_LARGER)
