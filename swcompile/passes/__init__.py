"""The passes, in the order in which they run."""

from functools import partial

from swcompile.passes.fuse_quantization import fuse_quantization
from swcompile.passes.hold_weights import hold_weights
from swcompile.passes.materialize_sines import materialize_sines
from swcompile.passes.quantize_matmuls import quantize_matmuls
from swcompile.passes.save_int8_activations import save_int8_activations
from swcompile.pipeline import Pass
from swcompile.recipe import Recipe, fused_devices


def joint_passes(recipe: Recipe, *, is_whole: bool = True) -> list[Pass]:
    """The passes over the joint graph of forward and backward.

    Args:
        recipe: what to rewrite.
        is_whole: the graph ends where the model does, not at a graph break.
    """
    passes: list[Pass] = [partial(quantize_matmuls, recipe=recipe, is_whole=is_whole)]
    if recipe.save_int8_activations:
        passes.append(save_int8_activations)
    return passes


def post_grad_passes(recipe: Recipe) -> list[Pass]:
    """The passes over the forward graph, and over the backward graph, that the partitioner makes of the joint graph.

    Args:
        recipe: what to rewrite.
    """
    devices = fused_devices(recipe)
    passes: list[Pass] = []
    if devices:
        passes += [partial(rewrite, devices=devices) for rewrite in (fuse_quantization, materialize_sines)]
    if recipe.micro_batches > 1:
        passes.append(hold_weights)
    return passes
