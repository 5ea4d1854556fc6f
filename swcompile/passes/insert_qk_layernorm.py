"""The pass that normalises the queries and keys of every attention of a forward graph."""

import math
from collections.abc import Container

import torch
from torch import fx

from swcompile.attention import HeadSplit, attention_places, attentions
from swcompile.forward import called_in, path_of
from swcompile.pipeline import PassResult, emit, emit_module
from swcompile.recipe import Stabilizer
from swcompile.report import Decision
from swcompile.stabilizers import Over, QKLayernormOptions, QKNorm, left_out

aten = torch.ops.aten
DEFAULT = QKLayernormOptions()


def insert_qk_layernorm(
    graph: fx.Graph, *, options: QKLayernormOptions = DEFAULT, only: Container[str] | None = None
) -> PassResult:
    """Rewrite ``softmax(q @ k.T)`` to ``softmax(norm(q) @ norm(k).T)``, with a new scale for q and one for k.

    Changes numerics. The norms stand where heads are split: before a rotary embedding, and before grouped keys are
    repeated. The new modules are registered in the graph's own: ``layers.0.self_attn.q_norm`` and ``k_norm``.

    Args:
        graph: a forward graph, from `swcompile.capture_forward`.
        options: which attentions, which norm.
        only: names of the new modules to insert; None inserts all.
    """
    found = attentions(graph)
    result = PassResult()
    for attention, names in zip(found, attention_places(found), strict=True):
        if only is not None and names[0] not in only:
            continue
        module = path_of(called_in(attention.node))
        splits = {"queries": attention.query, "keys": attention.key}
        reason = left_out(options, module)
        reason = reason or next((f"{what}: {why}" for what, why in splits.items() if isinstance(why, str)), None)
        if options.over is Over.MODEL:
            indexed = (what for what, split in splits.items() if isinstance(split, HeadSplit) and split.is_indexed)
            reason = reason or next((f"{what}: their heads are picked by an index" for what in indexed), None)
        shape: tuple[int, ...] = ()
        for name, split in zip(names, splits.values(), strict=True):
            if isinstance(split, HeadSplit):
                shape = tuple(split.columns.shape[-1:]) if options.over is Over.HEAD else (split.columns.numel(),)
                if reason is None:
                    _insert(graph, split, name, options)
        result.rewrites += reason is None
        result.decisions.append(
            Decision(
                node=attention.node.name,
                role=Stabilizer.QK_LAYERNORM,
                parameter=module,
                shape=shape,
                dtype=str(attention.node.meta["val"].dtype).removeprefix("torch."),
                rewritten=reason is None,
                reason=reason or f"{' and '.join(name.rpartition('.')[-1] for name in names)}, over the {options.over.value}",
                violation=reason is not None and options.include is not None and left_out(options, module) is None,
            )
        )
    return result


def _insert(graph: fx.Graph, split: HeadSplit, name: str, options: QKLayernormOptions) -> None:
    weight = split.weight.meta["val"]
    norm = QKNorm(
        *split.columns.shape,
        over=options.over,
        norm=options.norm,
        eps=options.eps,
        device=weight.device,
        dtype=weight.dtype,
    )
    over_head = options.over is Over.HEAD
    value = split.value if over_head else split.joint
    dims = [split.channel_dim] if over_head else list(split.joint_dims)
    readers = split.readers_of(value)
    with graph.inserting_before(min(readers, key=list(graph.nodes).index)):
        # Features last and in one dimension, and back.
        ndim = value.meta["val"].ndim
        order = [dim for dim in range(ndim) if dim not in dims] + dims
        is_last = order == list(range(ndim))
        new = value if is_last else emit(graph, aten.permute.default, value, order, like=value)
        sizes = [int(value.meta["val"].shape[dim]) for dim in dims]
        if len(dims) > 1:
            new = emit(graph, aten.flatten.using_ints, new, ndim - len(dims), like=value)
        new = emit_module(graph, name, norm, new)
        if len(dims) > 1:
            new = emit(graph, aten.unflatten.int, new, -1, sizes, like=value)
        if not is_last:
            new = emit(graph, aten.permute.default, new, [order.index(dim) for dim in range(ndim)], like=value)
    assert math.prod(sizes) == norm.num_features
    split.replace(value, new)
