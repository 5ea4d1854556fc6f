"""A linear layer that rounds as a recipe does, in plain eager ops: the tight oracle for rewritten graphs."""

from typing import Any

import torch

import swcompile
from swcompile import GemmFormat, Scaling


def fake_quantize(x: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """float64 values of x [outer, contracted] after rounding to int8, by the rule that `kernels/int8.py` states."""
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) if scaling is Scaling.VECTOR else x.abs().amax()) / torch.tensor(127.0)
    return (x * (torch.tensor(1.0) / scale)).round().double() * scale.double()


def fake_quantize_by_block(x: torch.Tensor) -> torch.Tensor:
    """float64 values of x [outer, contracted] after rounding to int8 with a scale for each 1024 elements of a row."""
    return torch.cat([fake_quantize(block, Scaling.VECTOR) for block in x.split(1024, 1)], 1)


def gemm(a: torch.Tensor, b: torch.Tensor, gemm_format: GemmFormat | None) -> torch.Tensor:
    """``a @ b.T`` of [outer, contracted] operands, b the weight, in float64."""
    if gemm_format is None:
        return a.double() @ b.double().T
    if gemm_format.is_by_block:
        # Rounded with a scale a token; these scales then decide how b is rounded, and change its product by rounding alone.
        sizes = a.float().abs().amax(0, keepdim=True).clamp(min=1e-30) / torch.tensor(127.0)
        codes = fake_quantize(a.T, Scaling.VECTOR).T / sizes.double()
        return codes @ fake_quantize_by_block(b.float() * sizes).T
    return fake_quantize(a, gemm_format.other) @ fake_quantize(b, gemm_format.weight).T


class OracleLinear(torch.autograd.Function):
    """``x @ w.T + bias`` of x [tokens, in] and w [out, in] with a recipe's rounding (facts: Algorithm 1 and variants)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, recipe: str) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.recipe = swcompile.RECIPES[recipe]()
        ctx.dtypes = x.dtype, w.dtype, None if bias is None else bias.dtype
        out = gemm(x, w, ctx.recipe.output)
        return (out if bias is None else out + bias.double()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        x_dtype, w_dtype, bias_dtype = ctx.dtypes
        grad_x = gemm(grad, w.T, ctx.recipe.grad_input).to(x_dtype)
        x_read = fake_quantize(x, Scaling.VECTOR) if ctx.recipe.save_int8_activations else x
        grad_w = gemm(grad.T, x_read.T, ctx.recipe.grad_weight).to(w_dtype)
        grad_bias = None if bias_dtype is None else grad.double().sum(0).to(bias_dtype)
        return grad_x, grad_w, grad_bias, None


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, recipe: str = "switchback") -> torch.Tensor:
    """`torch.nn.functional.linear` with a recipe's rounding, for x of any number of dimensions."""
    out = OracleLinear.apply(x.reshape(-1, x.shape[-1]), w, bias, recipe)
    return out.reshape(*x.shape[:-1], w.shape[0])
