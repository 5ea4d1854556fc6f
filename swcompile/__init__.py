"""swcompile: stable low-precision training by graph rewriting.

``torch.compile(model, backend="switchback")`` is all that most programs need, without importing this package.
"""

from swcompile.backend import reports, switchback
from swcompile.capture import JointGraph, capture, explain
from swcompile.forward import ForwardGraph, capture_forward
from swcompile.joint import StrictError
from swcompile.kernels.held_weights import Accumulation, gradient_accumulation
from swcompile.optim import StableAdamW, split_decay_groups
from swcompile.passes import joint_passes, post_grad_passes
from swcompile.passes.fuse_quantization import fuse_quantization
from swcompile.passes.hold_weights import hold_weights
from swcompile.passes.insert_layer_scale import insert_layer_scale
from swcompile.passes.insert_qk_layernorm import insert_qk_layernorm
from swcompile.passes.materialize_sines import materialize_sines
from swcompile.passes.quantize_matmuls import quantize_matmuls
from swcompile.passes.save_int8_activations import save_int8_activations
from swcompile.pipeline import PassResult, format_graph, run_passes
from swcompile.prepare import merge_layer_scale, prepare, prepared, strip
from swcompile.recipe import RECIPES, GemmFormat, Recipe, Role, Scaling, Stabilizer, make_recipe
from swcompile.report import Decision, Report
from swcompile.stabilizers import LayerScale, LayerScaleOptions, Norm, Over, QKLayernormOptions, QKNorm

__all__ = [
    "RECIPES",
    "Accumulation",
    "Decision",
    "ForwardGraph",
    "GemmFormat",
    "JointGraph",
    "LayerScale",
    "LayerScaleOptions",
    "Norm",
    "Over",
    "PassResult",
    "QKLayernormOptions",
    "QKNorm",
    "Recipe",
    "Report",
    "Role",
    "Scaling",
    "Stabilizer",
    "StableAdamW",
    "StrictError",
    "capture",
    "capture_forward",
    "explain",
    "format_graph",
    "fuse_quantization",
    "gradient_accumulation",
    "hold_weights",
    "insert_layer_scale",
    "insert_qk_layernorm",
    "joint_passes",
    "make_recipe",
    "materialize_sines",
    "merge_layer_scale",
    "post_grad_passes",
    "prepare",
    "prepared",
    "quantize_matmuls",
    "reports",
    "run_passes",
    "save_int8_activations",
    "split_decay_groups",
    "strip",
    "switchback",
]
