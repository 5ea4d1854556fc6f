"""The passes, in the order in which they run."""

from functools import partial

from swcompile.passes.quantize_matmuls import quantize_matmuls
from swcompile.passes.save_int8_activations import save_int8_activations
from swcompile.pipeline import Pass
from swcompile.recipe import Recipe


def joint_passes(recipe: Recipe) -> list[Pass]:
    """The passes over the joint graph of forward and backward."""
    passes: list[Pass] = [partial(quantize_matmuls, recipe=recipe)]
    if recipe.save_int8_activations:
        passes.append(save_int8_activations)
    return passes
