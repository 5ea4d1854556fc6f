# mypy: allow-untyped-defs
"""Tensor-wise int8 quantisation, as it is, transposed, or both. Shapes: N rows (out features), K columns (in features)."""

import torch
from swcompile.kernels.int8 import (
    absmax_reference,
    check_quantizer_input,
    round_reference,
    scale_and_inverse_reference,
)
from swcompile.kernels.library import Work, define_op


def quantize_tensorwise(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix to int8 by its absmax: ``x ~= x_q * scale``.

    Tensor-wise quantisation of weights in SwitchBack (arXiv 2304.13013, section 2.2).

    Args:
        x_NK: [N, K] bfloat16, float16 or float32, any strides.

    Returns:
        x_q [N, K] int8, contiguous, and scale [1, 1] float32, which is NaN if x holds a NaN or Inf.

    Raises:
        ValueError: x is of another dtype, or not a matrix.
    """
    return QUANTIZE_TENSORWISE(x_NK)


def quantize_tensorwise_transpose(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise`, with x_q transposed: [K, N] contiguous, the same bits. For the backward's matmul."""
    return QUANTIZE_TENSORWISE_TRANSPOSE(x_NK)


def quantize_tensorwise_both(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise` and its transpose from one pass: x_q [N, K], x_q transposed [K, N], scale [1, 1]."""
    return QUANTIZE_TENSORWISE_BOTH(x_NK)


def quantize_tensorwise_reference(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise` in plain PyTorch, bit for bit."""
    check_quantizer_input("quantize_tensorwise", x_NK)
    scale_11, inverse_11 = scale_and_inverse_reference(absmax_reference(x_NK, (0, 1)))
    return round_reference(x_NK, inverse_11).contiguous(), scale_11


def quantize_tensorwise_transpose_reference(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise_transpose` in plain PyTorch, bit for bit."""
    return quantize_tensorwise_reference(x_NK.t())


def quantize_tensorwise_both_reference(
    x_NK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise_both` in plain PyTorch, bit for bit."""
    x_q_NK, scale_11 = quantize_tensorwise_reference(x_NK)
    return x_q_NK, x_q_NK.t().clone(memory_format=torch.contiguous_format), scale_11


def quantize_tensorwise_work(num_rows: int, num_columns: int, itemsize: int, *, num_outputs: int = 1) -> Work:
    """One comparison and one multiplication an element; `num_outputs` is 2 for `quantize_tensorwise_both`.

    x counts as read twice: its last element may decide what its first becomes, and it need not fit a cache.
    """
    num_elements = num_rows * num_columns
    return Work(flops=2 * num_elements, bytes=num_elements * (2 * itemsize + num_outputs) + 4)


def quantize_tensorwise_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def quantize_tensorwise_transpose_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def quantize_tensorwise_both_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def _fake(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantizer_input("quantize_tensorwise", x_NK)
    num_rows, num_columns = x_NK.shape
    return (
        x_NK.new_empty((num_rows, num_columns), dtype=torch.int8),
        x_NK.new_empty((1, 1), dtype=torch.float32),
    )


def _fake_transpose(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(x_NK.t())


def _fake_both(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_q_NK, scale_11 = _fake(x_NK)
    return x_q_NK, _fake(x_NK.t())[0], scale_11


QUANTIZE_TENSORWISE = define_op(
    "quantize_tensorwise(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_tensorwise_reference,
    cuda=quantize_tensorwise_triton,
    fake=_fake,
)
QUANTIZE_TENSORWISE_TRANSPOSE = define_op(
    "quantize_tensorwise_transpose(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_tensorwise_transpose_reference,
    cuda=quantize_tensorwise_transpose_triton,
    fake=_fake_transpose,
)
QUANTIZE_TENSORWISE_BOTH = define_op(
    "quantize_tensorwise_both(Tensor x) -> (Tensor, Tensor, Tensor)",
    reference=quantize_tensorwise_both_reference,
    cuda=quantize_tensorwise_both_triton,
    fake=_fake_both,
)
