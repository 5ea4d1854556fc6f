# mypy: allow-untyped-defs
"""Column-wise int8 quantisation with a transpose. Shapes: N rows, K columns, one scale a column."""

import torch
from swcompile.kernels.int8 import check_quantizer_input
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.quantize_rowwise import quantize_rowwise_reference


def quantize_columnwise_transpose(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each column to int8 by its own absmax and transpose: ``x ~= (x_q * scale).T``.

    The weight in the backward of SwitchBackQ (arXiv 2304.13013, appendix), and an operand of a grad_weight matmul,
    which sums over rows.

    Args:
        x_NK: [N, K] bfloat16, float16 or float32, any strides.

    Returns:
        x_q [K, N] int8, contiguous, and scale [K, 1] float32. A column with a NaN or Inf gets scale NaN.

    Raises:
        ValueError: x is of another dtype, or not a matrix.
    """
    return QUANTIZE_COLUMNWISE_TRANSPOSE(x_NK)


def quantize_columnwise_transpose_reference(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columnwise_transpose` in plain PyTorch, bit for bit."""
    return quantize_rowwise_reference(x_NK.t())


def quantize_columnwise_transpose_work(num_rows: int, num_columns: int, itemsize: int) -> Work:
    """One comparison and one multiplication an element; x read twice, as its last row may hold the absmax."""
    num_elements = num_rows * num_columns
    return Work(flops=2 * num_elements, bytes=num_elements * (2 * itemsize + 1) + 4 * num_columns)


def quantize_columnwise_transpose_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def _fake(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantizer_input("quantize_columnwise_transpose", x_NK)
    num_rows, num_columns = x_NK.shape
    return (
        x_NK.new_empty((num_columns, num_rows), dtype=torch.int8),
        x_NK.new_empty((num_columns, 1), dtype=torch.float32),
    )


QUANTIZE_COLUMNWISE_TRANSPOSE = define_op(
    "quantize_columnwise_transpose(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_columnwise_transpose_reference,
    cuda=quantize_columnwise_transpose_triton,
    fake=_fake,
)
