"""The pass that puts a layer-scale on every residual branch of a forward graph."""

from collections.abc import Container

from torch import fx

from swcompile.attention import attentions
from swcompile.pipeline import PassResult, emit_module
from swcompile.recipe import Stabilizer
from swcompile.report import Decision
from swcompile.residual import branch_module, branch_places, residual_branches
from swcompile.stabilizers import LayerScale, LayerScaleOptions, left_out

DEFAULT = LayerScaleOptions()


def insert_layer_scale(
    graph: fx.Graph, *, options: LayerScaleOptions = DEFAULT, only: Container[str] | None = None
) -> PassResult:
    """Rewrite ``x + branch(x)`` to ``x + gamma * branch(x)``, with a new parameter gamma for each branch.

    Changes numerics, unless gamma is 1. The product stands at the branch's end, before dropout and drop-path. The
    new modules are registered in the graph's own, beside the module that makes the branch:
    ``layers.0.mlp_layer_scale``::

        %5: f32[8, 64] = aten.linear(%4, %1, %2)      ->   %5: f32[8, 64] = aten.linear(%4, %1, %2)
        %6: f32[8, 64] = aten.add.Tensor(%0, %5)           %6: f32[8, 64] = mlp_layer_scale(%5)
                                                           %7: f32[8, 64] = aten.add.Tensor(%0, %6)

    Args:
        graph: a forward graph, from `swcompile.capture_forward`.
        options: which branches, and the start of gamma.
        only: names of the new modules to insert; None inserts all.
    """
    branches = residual_branches(graph, attentions(graph))
    result = PassResult()
    for branch, place in zip(branches, branch_places(branches), strict=True):
        if only is not None and place not in only:
            continue
        module, weight = branch_module(branch), branch.weight.meta["val"]
        num_features = int(branch.end.meta["val"].shape[-1])
        reason = left_out(options, module)
        if branch.has_layer_scale:
            reason = "has a layer-scale already"
        elif not branch.has_features_last:
            reason = "its last dimension does not hold the features"
        if reason is None:
            gamma = LayerScale(num_features, init=options.init, device=weight.device, dtype=weight.dtype)
            with graph.inserting_after(branch.end):
                scaled = emit_module(graph, place, gamma, branch.end)
            for reader in branch.readers:
                reader.replace_input_with(branch.end, scaled)
            result.rewrites += 1
        result.decisions.append(
            Decision(
                node=branch.end.name,
                role=Stabilizer.LAYER_SCALE,
                parameter=module,
                shape=(num_features,),
                dtype=str(weight.dtype).removeprefix("torch."),
                rewritten=reason is None,
                reason=reason or f"{place.rpartition('.')[-1]}, starts at {options.init:g}",
                violation=reason is not None and options.include is not None and left_out(options, module) is None,
            )
        )
    return result
