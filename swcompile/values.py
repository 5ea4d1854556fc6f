"""Facts about single values of a graph: what they are views or casts of, and which parameters they come from."""

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.quantize_tensorwise import (
    QUANTIZE_BY_SCALE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_TRANSPOSE,
)
from swcompile.kernels.scaled_mm import OUTPUT_DTYPES
from swcompile.kernels.transpose import TRANSPOSE

aten = torch.ops.aten
prims = torch.ops.prims

ALIASES = {
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
"""Ops whose result shares its first argument's memory."""

RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, operator.getitem}
VIEWS = ALIASES | RESHAPES | _SPLITS | {aten.clone.default}
"""Ops that move or rename elements of their first argument, and do nothing else."""

CASTS = {prims.convert_element_type.default, aten._to_copy.default}
QUANTIZERS = {
    QUANTIZE_BLOCKWISE_TRANSPOSE,
    QUANTIZE_BY_SCALE,
    QUANTIZE_COLUMNWISE_TRANSPOSE,
    QUANTIZE_ROWWISE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_TRANSPOSE,
    TRANSPOSE,
}
"""Ops that give their first argument in int8, and one that moves what they gave."""


def viewed(node: fx.Node, views: Collection[Any] = ALIASES) -> fx.Node:
    """What a node is a view of, through these ops."""
    while node.op == "call_function" and node.target in views:
        (node, *_) = node.all_input_nodes
    return node


def derivation(node: fx.Node) -> Iterator[fx.Node]:
    """The node, then what it is a view, cast or quantised form of, and so on to the first node that is none."""
    yield node
    while node.op == "call_function" and node.target in VIEWS | CASTS | QUANTIZERS:
        (node, *_) = node.all_input_nodes
        yield node


def parameter_root(node: fx.Node, names: Mapping[fx.Node, str]) -> fx.Node | None:
    """The parameter that a node derives from through views and casts alone."""
    *_, root = derivation(node)
    return root if root in names else None


def is_precision_cast(node: fx.Node) -> bool:
    """Whether a node casts between the dtypes of autocast on one device, which says nothing about its values.

    A cast to anything else does (a model rounds to integers or to 8 bit by it), and one from anything else makes
    the first form that can be quantised.
    """
    if node.target not in CASTS:
        return False
    (source, *_) = node.all_input_nodes
    before, after = source.meta["val"], node.meta["val"]
    return before.device == after.device and {before.dtype, after.dtype} <= set(OUTPUT_DTYPES)


def unrounded(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """(what a node is a view of, but for precision casts; the views that lead from there to it, in order).

    Without such a cast it is the node itself, and no view.
    """
    chain, source = [], node
    while source.op == "call_function" and (source.target in VIEWS or is_precision_cast(source)):
        chain.append(source)
        (source, *_) = source.all_input_nodes
    if not any(map(is_precision_cast, chain)):
        return node, []
    return source, [step for step in reversed(chain) if step.target in VIEWS]


def source_of(node: fx.Node) -> Any:
    """A key that is equal for two nodes if both view the same memory, or equal casts of the same elements."""
    node = viewed(node)
    if node.target not in CASTS:
        return node
    (source, *_) = node.all_input_nodes
    value = node.meta["val"]
    return memory_of(source), value.dtype, value.device, str(value.stride())


def memory_of(node: fx.Node, *, transposed: bool = False) -> tuple[Any, ...]:
    """A key that is equal for two nodes exactly if both are the same elements in the same layout.

    Equal casts of the same elements count as the same: autocast makes one for each reader.

    Args:
        node: the value.
        transposed: give the key of its transpose.
    """
    value = node.meta["val"]
    sizes, strides = tuple(value.shape), tuple(value.stride())
    if transposed:
        sizes, strides = sizes[::-1], strides[::-1]
    return source_of(node), str((sizes, strides, value.storage_offset()))


def parameters_alone(graph: fx.Graph, names: Mapping[fx.Node, str]) -> dict[fx.Node, frozenset[str]]:
    """Node -> the parameters that it is computed from, for nodes that depend on no other input.

    Sizes count as constants, which come from no parameter.
    """
    nothing: frozenset[str] = frozenset()
    found: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node in names:
            found[node] = frozenset({names[node]})
        elif isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
            found[node] = nothing
        elif node.op != "placeholder" and all(source in found for source in node.all_input_nodes):
            found[node] = nothing.union(*(found[source] for source in node.all_input_nodes))
    return found


def is_column_major(value: torch.Tensor) -> bool:
    """Whether a matrix, or each of a batch, lies in memory as its transpose."""
    row, column = value.stride()[-2:]
    return isinstance(row, int) and row == 1 and not (isinstance(column, int) and column == 1)
