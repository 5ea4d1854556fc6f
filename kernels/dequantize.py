# mypy: allow-untyped-defs
"""int8 back to a floating dtype. Shapes: M rows, K columns; the scale is [M, 1], [1, K] or [1, 1]."""

import torch
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
        ValueError: a dtype other than these, or an operand that is not a matrix.
    """
    return DEQUANTIZE(x_q_MK, scale, dtype)


def dequantize_reference(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize` in plain PyTorch, bit for bit."""
    _check(x_q_MK, scale, dtype)
    return (x_q_MK.float() * scale).to(dtype).contiguous()


def dequantize_work(num_rows: int, num_columns: int, itemsize: int, *, num_scales: int = 1) -> Work:
    """One multiplication an element; x_q and the scales read once, `itemsize` bytes an element written once."""
    num_elements = num_rows * num_columns
    return Work(flops=num_elements, bytes=num_elements * (1 + itemsize) + 4 * num_scales)


def dequantize_triton(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    raise NotImplementedError


def _check(x_q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    if x_q.dtype != torch.int8 or scale.dtype != torch.float32:
        raise ValueError(f"dequantize: wants int8 with a float32 scale, got {x_q.dtype} with {scale.dtype}")
    if x_q.dim() != 2 or scale.dim() != 2:
        raise ValueError(f"dequantize: wants two matrices, got {x_q.dim()} and {scale.dim()} dimensions")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dequantize: dtype is {dtype}, but must be bfloat16, float16 or float32")


def _fake(x_q_MK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check(x_q_MK, scale, dtype)
    return x_q_MK.new_empty((x_q_MK.shape[0], x_q_MK.shape[1]), dtype=dtype)


DEQUANTIZE = define_op(
    "dequantize(Tensor x_q, Tensor scale, ScalarType dtype) -> Tensor",
    reference=dequantize_reference,
    cuda=dequantize_triton,
    fake=_fake,
)
