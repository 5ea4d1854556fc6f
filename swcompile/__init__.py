"""swcompile: stable low-precision training by graph rewriting.

``torch.compile(model, backend="switchback")`` is all that most programs need, without importing this package.
"""

from swcompile.backend import reports, switchback
from swcompile.capture import JointGraph, capture, explain
from swcompile.joint import StrictError
from swcompile.passes import joint_passes
from swcompile.passes.quantize_matmuls import quantize_matmuls
from swcompile.passes.save_int8_activations import save_int8_activations
from swcompile.pipeline import PassResult, format_graph, run_passes
from swcompile.recipe import RECIPES, GemmFormat, Recipe, Role, Scaling, make_recipe
from swcompile.report import Decision, Report

__all__ = [
    "RECIPES",
    "Decision",
    "GemmFormat",
    "JointGraph",
    "PassResult",
    "Recipe",
    "Report",
    "Role",
    "Scaling",
    "StrictError",
    "capture",
    "explain",
    "format_graph",
    "joint_passes",
    "make_recipe",
    "quantize_matmuls",
    "reports",
    "run_passes",
    "save_int8_activations",
    "switchback",
]
