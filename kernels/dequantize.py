# mypy: allow-untyped-defs
"""int8 back to a floating dtype. Shapes: M rows, K columns; the scale is [M, 1], [1, K] or [1, 1]."""

from collections.abc import Callable

import torch

from swcompile.kernels.int8 import has_unit_inner_stride
from swcompile.kernels.launch import Launcher, Plans, empty, nothing, tl, triton
from swcompile.kernels.library import Work, define_op

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x_q * scale`` in float32, cast once to `dtype`.

    The activation that SwitchBackM saved, on its way to the 16-bit grad_weight (arXiv 2304.13013, appendix).

    Args:
        x_q_MK: [M, K] int8, any strides.
        scale: [M, 1], [1, K] or [1, 1] float32.
        dtype: bfloat16, float16 or float32.

    Returns:
        [M, K] of `dtype`, contiguous.

    Raises:
        ValueError: a dtype or a shape other than these.
    """
    return DEQUANTIZE(x_q_MK, scale, dtype)


def dequantize_reference(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize` in plain PyTorch, bit for bit."""
    _check_dtypes(x_q_MK, scale, dtype)
    _check_shapes(x_q_MK, scale)
    return (x_q_MK.float() * scale).to(dtype).contiguous()


def dequantize_work(num_rows: int, num_columns: int, itemsize: int, *, num_scales: int = 1) -> Work:
    """One multiplication an element; x_q and the scales read once, `itemsize` bytes an element written once."""
    num_elements = num_rows * num_columns
    return Work(flops=num_elements, bytes=num_elements * (1 + itemsize) + 4 * num_scales)


def dequantize_triton(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize` by the Triton kernel: what the op does on CUDA."""
    launch = PLANS.find([x_q_MK, scale], dtype)
    if launch is None:
        return dequantize_triton(x_q_MK.contiguous(), scale, dtype)
    out_MK = empty(x_q_MK.shape, dtype, x_q_MK.device)
    launch(x_q_MK, scale, out_MK)
    return out_MK


def _prepare(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Callable[..., None] | None:
    """Launches the kernel on (x_q, scale, out); None where x_q must be laid out anew."""
    _check_dtypes(x_q_MK, scale, dtype)
    _check_shapes(x_q_MK, scale)
    if not has_unit_inner_stride(x_q_MK):
        return None
    num_rows, num_columns = x_q_MK.shape
    if not x_q_MK.numel():
        return nothing
    per_column = scale.shape[1] != 1
    return Launcher(
        _dequantize_kernel,
        (triton.cdiv(num_rows, _BLOCK_M), triton.cdiv(num_columns, _BLOCK_K)),
        num_rows,
        num_columns,
        x_q_MK.stride(0),
        scale.stride(1 if per_column else 0) if scale.numel() > 1 else 0,
        PER_COLUMN=per_column,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
    )


PLANS = Plans(_prepare)
_BLOCK_M, _BLOCK_K = 4, 1024


@triton.jit(do_not_specialize=["num_rows"])
def _dequantize_kernel(
    x_q_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    num_columns,
    x_q_stride,
    scale_stride,
    PER_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64), num_rows - 1)[:, None]
    columns = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = columns < num_columns
    x_q = tl.load(x_q_ptr + rows * x_q_stride + columns, mask=mask, other=0)
    if PER_COLUMN:
        scale = tl.load(scale_ptr + columns * scale_stride, mask=mask, other=0.0)
    else:
        scale = tl.load(scale_ptr + rows * scale_stride)  # a stride of 0 serves a single scale
    out = x_q.to(tl.float32) * scale
    tl.store(out_ptr + rows * num_columns + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def _check_dtypes(x_q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise `ValueError` on a wrong dtype or rank. Looks at no size: sizes may be symbolic."""
    if x_q.dtype != torch.int8 or scale.dtype != torch.float32:
        raise ValueError(f"dequantize: wants int8 with a float32 scale, got {x_q.dtype} with {scale.dtype}")
    if x_q.dim() != 2 or scale.dim() != 2:
        raise ValueError(f"dequantize: wants two matrices, got {x_q.dim()} and {scale.dim()} dimensions")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dequantize: dtype is {dtype}, but must be bfloat16, float16 or float32")


def _check_shapes(x_q: torch.Tensor, scale: torch.Tensor) -> None:
    num_rows, num_columns = x_q.shape
    shapes = ((num_rows, 1), (1, num_columns), (1, 1))
    if scale.shape not in shapes:
        allowed = ", ".join(map(str, shapes))
        raise ValueError(f"dequantize: scale is {tuple(scale.shape)}, but must be one of {allowed}")


def _fake(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check_dtypes(x_q_MK, scale, dtype)
    return x_q_MK.new_empty((x_q_MK.shape[0], x_q_MK.shape[1]), dtype=dtype)


DEQUANTIZE = define_op(
    "dequantize(Tensor x_q, Tensor scale, ScalarType dtype) -> Tensor",
    reference=dequantize_reference,
    cuda=dequantize_triton,
    fake=_fake,
)
