"""Whether a recipe rewrites a matmul, and the reason, with the number that decided."""

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import fx

from swcompile import graph as facts
from swcompile.cost import MIN_SPEEDUP, Prediction
from swcompile.graph import Matmul
from swcompile.kernels.formats import INT8
from swcompile.kernels.scaled_mm import MAX_K, OUTPUT_DTYPES
from swcompile.recipe import GemmFormat, Recipe, Role, Scaling
from swcompile.report import Decision
from swcompile.values import is_precision_cast, parameter_root

aten = torch.ops.aten


def decide(
    matmul: Matmul, recipe: Recipe, *, heads: Collection[fx.Node], alone: Mapping[fx.Node, frozenset[str]]
) -> Decision:
    """Whether the recipe rewrites a matmul, whatever the cost.

    Args:
        matmul: of a graph whose parameters are known.
        recipe: which matmul in which format.
        heads: the matmuls that stay as they are unless `include` asks for them.
        alone: `swcompile.values.parameters_alone` of the graph.
    """
    value = matmul.node.meta["val"]
    kept = Decision(
        node=matmul.node.name,
        role=matmul.role,
        parameter=matmul.parameter,
        shape=matmul.shape,
        dtype=str(value.dtype).removeprefix("torch."),
        rewritten=False,
        reason="",
    )
    if matmul.number_format:
        name = matmul.number_format.name
        return dataclasses.replace(kept, rewritten=True, number_format=name, reason=f"{name} already")
    if matmul.role is Role.OTHER or matmul.parameter is None:
        reason, violation = _no_weight(matmul, recipe, alone)
        return dataclasses.replace(kept, reason=reason, violation=violation)
    gemm = recipe.format_of(matmul.role)
    if gemm is None:
        sums = f" (sums over {matmul.shape[2]} tokens)" if matmul.role is Role.GRAD_WEIGHT else ""
        return dataclasses.replace(kept, reason=f"recipe {recipe.name} leaves {matmul.role.value}{sums}")
    pattern = recipe.excluded_by(matmul.parameter)
    if pattern is not None:
        return dataclasses.replace(kept, reason=f"excluded by {pattern!r}")
    asked = recipe.included_by(matmul.parameter)
    if not asked and recipe.include is not None:
        return dataclasses.replace(kept, reason="no include pattern matches")
    if not asked and matmul.node in heads:
        return dataclasses.replace(kept, reason="last matmul before the output; include='*' asks for it")
    if value.dim() == 3 and facts.sizes(matmul.node)[0] == 0:
        return dataclasses.replace(kept, reason="an empty batch: nothing to multiply")
    impossible = _impossible(matmul, gemm)
    if impossible:
        return dataclasses.replace(kept, reason=impossible, violation=True)
    return dataclasses.replace(kept, rewritten=True, number_format=INT8.name, reason=_describe(gemm))


def weigh(decision: Decision, prediction: Prediction, *, asked: bool) -> Decision:
    """Take a decision back where 8 bit would be slower, or hardly faster."""
    decision = dataclasses.replace(decision, speedup=prediction.speedup)
    if prediction.speedup >= MIN_SPEEDUP:
        return decision
    verdict = "slower" if prediction.speedup < 1 else "hardly faster"
    how = "measured" if prediction.is_measured else "predicted"
    reason = f"{decision.number_format} would be {verdict}: {how} {prediction.speedup:.2f} times as fast"
    if prediction.launches_decide:
        reason += ", for the time to launch it (none in a CUDA graph: mode='reduce-overhead')"
    return dataclasses.replace(decision, rewritten=False, number_format=None, reason=reason, violation=asked)


def _no_weight(matmul: Matmul, recipe: Recipe, alone: Mapping[fx.Node, frozenset[str]]) -> tuple[str, bool]:
    """(why no operand is a weight, whether `include` asks for a parameter that is in one)."""
    names = facts.parameters(matmul.node.graph)
    if not names:
        return "no parameter is known in this graph", False
    from_parameters = [operand for operand in facts.operands(matmul.node) if alone.get(operand)]
    if not from_parameters:
        return "neither operand is a parameter", False
    origins = sorted(frozenset().union(*(alone[operand] for operand in from_parameters)))
    listed = ", ".join(origins[:_MOST_NAMES])
    if len(origins) > _MOST_NAMES:
        listed += f" and {len(origins) - _MOST_NAMES} more"
    asked = any(map(recipe.included_by, origins)) and not any(map(recipe.excluded_by, origins))
    if len(from_parameters) == 2:
        return f"a product of parameters alone: {listed}", asked
    if parameter_root(from_parameters[0], names):  # in the backward: of a product of parameters, for example
        return f"{listed} is the weight of no matmul in the forward", False
    return f"an operand is computed from {listed}; only a parameter itself is quantised", asked


_MOST_NAMES = 4


def _impossible(matmul: Matmul, gemm: GemmFormat) -> str:
    """Why no 8-bit kernel computes this matmul, or an empty string."""
    value = matmul.node.meta["val"]
    if value.dtype not in OUTPUT_DTYPES:
        return f"{value.dtype} has no int8 form; bfloat16, float16 and float32 have"
    if value.device.type not in ("cpu", "cuda"):
        return f"no int8 kernel for device {value.device.type}"
    if matmul.node.target in (aten.mv.default, aten.addmv.default):
        return "a matrix-vector product: bound by reading the weight once"
    if not gemm.is_by_block and matmul.shape[2] > MAX_K:
        return f"sums over {matmul.shape[2]} > {MAX_K} products, which may overflow int32"
    if value.dim() == 3 and facts.sizes(matmul.node)[0] != 1:
        batch = facts.sizes(matmul.node)[0]
        if matmul.role is Role.GRAD_WEIGHT:
            return f"a batch of {batch} products: the int8 kernel computes one"
        if not _is_one_matrix(matmul.weight_operand):
            return f"a batch of {batch} weights: the int8 kernel multiplies one"
    return ""


def _is_one_matrix(batch: fx.Node) -> bool:
    """Whether all matrices of a batch are one, expanded and perhaps cast."""
    while is_precision_cast(batch):
        (batch, *_) = batch.all_input_nodes
    stride = batch.meta["val"].stride(0)
    return isinstance(stride, int) and stride == 0


def _describe(gemm: GemmFormat) -> str:
    kinds = {Scaling.VECTOR: "row", Scaling.TENSOR: "tensor", Scaling.BLOCK: "block", Scaling.TOKEN: "token"}
    return f"int8, scales by {kinds[gemm.other]} x {kinds[gemm.weight]}"
