"""Compute the sines and cosines of rotary embeddings once."""

from collections.abc import Iterator, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from swcompile.kernels.materialize import MATERIALIZE
from swcompile.pipeline import PassResult, emit
from swcompile.values import ALIASES, CASTS, RESHAPES, viewed

aten = torch.ops.aten
_JOINED = ALIASES | RESHAPES | CASTS | {aten.cat.default, aten.clone.default}
_MUCH_LARGER = 4
"""Times: two halves of a table may be put together."""


def materialize_sines(graph: fx.Graph, *, devices: Sequence[str] = ("cuda",)) -> PassResult:
    """Write what is computed of sines and cosines to memory where it is spread over something larger.

    Before::

        %2: f32[1, 512, 64] = aten.cos(%1)
        %3: bf16[1, 512, 64] = prims.convert_element_type(%2, bf16)
        %4: bf16[1, 1, 512, 64] = aten.unsqueeze(%3, 1)
        %5: bf16[8, 32, 512, 64] = aten.mul.Tensor(%0, %4)

    After::

        %3: bf16[1, 512, 64] = prims.convert_element_type(%2, bf16)
        %4: bf16[1, 512, 64] = swcompile.materialize(%3)
        %5: bf16[1, 1, 512, 64] = aten.unsqueeze(%4, 1)
        %6: bf16[8, 32, 512, 64] = aten.mul.Tensor(%0, %5)

    Inductor else computes both for every head of every sequence again: some 100 instructions an element, so that turning
    queries and keys, and their gradients before they are quantised, takes two to four times as long as moving them.
    Rounded to 16 bits they are as in eager mode.

    Args:
        graph: a forward or backward graph after the partitioner. One without an op of ours stays as it is.
        devices: types of devices to do it on.
    """
    result = PassResult()
    if not any(target.namespace == "swcompile" for target in _ops(graph)):
        return result
    tables = dict.fromkeys(
        table
        for target in (aten.sin.default, aten.cos.default)
        for node in graph.find_nodes(op="call_function", target=target)
        if node.meta["val"].device.type in devices
        for table in _spread(node)
    )
    for table in tables:
        readers = list(table.users)
        with graph.inserting_after(table):
            written = emit(graph, MATERIALIZE, table, like=table)
        for reader in readers:
            reader.replace_input_with(table, written)
        result.rewrites += 1
    return result


def _ops(graph: fx.Graph) -> Iterator[torch._ops.OpOverload]:
    return (node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _spread(node: fx.Node) -> Iterator[fx.Node]:
    """The values, views left aside, where what is computed of a node element by element becomes much larger than it."""
    size = node.meta["val"].numel()
    pending, seen = [node], {node}
    while pending and not statically_known_true(size == 0):
        value = pending.pop()
        for user in value.users:
            if user in seen or not _is_pointwise(user):
                continue
            if statically_known_true(user.meta["val"].numel() // size >= _MUCH_LARGER):
                yield viewed(value)
            else:
                seen.add(user)
                pending.append(user)


def _is_pointwise(node: fx.Node) -> bool:
    """Whether Inductor computes a node where it is read, and with it what it is computed of."""
    target, value = node.target, node.meta.get("val")
    has_tag = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return isinstance(value, torch.Tensor) and (has_tag or target in _JOINED)
