# mypy: allow-untyped-defs
"""Column-wise quantisation with a transpose, to int8 and to e4m3. Shapes: N rows, K columns, one scale a column.

Rows are what a grad_weight matmul sums over; P is their number rounded up to a multiple of 16.
"""

from typing import NamedTuple

import torch

from swcompile.kernels import e4m3, int8
from swcompile.kernels.e4m3 import round_to_e4m3
from swcompile.kernels.formats import E4M3, INT8
from swcompile.kernels.int8 import (
    absmax_reference,
    check_quantizer_input,
    magnitude_bits,
    round_to_int8,
    scale_and_inverse,
    scale_and_inverse_reference,
    store_tile,
    with_unit_inner_stride,
)
from swcompile.kernels.launch import device_facts, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.quantize_rowwise import quantize_rowwise_reference, quantize_rowwise_triton
from swcompile.kernels.tuning import Tuner, bucket


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


def quantize_columnwise_transpose_e4m3(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columnwise_transpose` to float8_e4m3fn, whose range leaves small values of a column some bits.

    An operand of an 8-bit grad_weight: a token that is much larger than the others costs them nothing in this format,
    where in int8 it takes their bits away.

    Args:
        x_NK: [N, K] bfloat16, float16 or float32, any strides.

    Returns:
        x_q [K, P] float8_e4m3fn, contiguous, with zeros from N to P, as tensor cores want multiples of 16; and scale
        [K, 1] float32. A column with a NaN or Inf gets scale NaN.

    Raises:
        ValueError: x is of another dtype, or not a matrix.
        RuntimeError: on a GPU older than compute capability 8.9.
    """
    return QUANTIZE_COLUMNWISE_TRANSPOSE_E4M3(x_NK)


def quantize_columnwise_transpose_e4m3_reference(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columnwise_transpose_e4m3` in plain PyTorch, bit for bit."""
    check_quantizer_input("quantize_columnwise_transpose_e4m3", x_NK)
    scale_1K, inverse_1K = scale_and_inverse_reference(absmax_reference(x_NK, (0,)), E4M3)
    x_q_KN = e4m3.round_reference(x_NK, inverse_1K).t()
    x_q_KP = x_q_KN.new_zeros((x_q_KN.shape[0], padded(x_NK.shape[0])))
    x_q_KP[:, : x_NK.shape[0]] = x_q_KN
    return x_q_KP, scale_1K.t().contiguous()


def padded(num_rows: int) -> int:
    """P: the number of rows, rounded up to a multiple of 16."""
    return (num_rows + 15) // 16 * 16


def quantize_columnwise_transpose_reference(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columnwise_transpose` in plain PyTorch, bit for bit."""
    return quantize_rowwise_reference(x_NK.t())


def quantize_columnwise_transpose_work(num_rows: int, num_columns: int, itemsize: int) -> Work:
    """One comparison and one multiplication an element; x read twice, as its last row may hold the absmax."""
    num_elements = num_rows * num_columns
    return Work(flops=2 * num_elements, bytes=num_elements * (2 * itemsize + 1) + 4 * num_columns)


def quantize_columnwise_transpose_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columnwise_transpose` by the Triton kernels: what the op does on CUDA."""
    check_quantizer_input("quantize_columnwise_transpose", x_NK)
    num_rows, num_columns = x_NK.shape
    if (x_NK.stride(0) == 1 and x_NK.stride(1) != 1) or num_rows == 0:  # stored as its transpose
        return quantize_rowwise_triton(x_NK.t())
    x_NK = with_unit_inner_stride(x_NK)
    x_q_KN = torch.empty((num_columns, num_rows), dtype=torch.int8, device=x_NK.device)
    return x_q_KN, _quantize(x_NK, x_q_KN)


def quantize_columnwise_transpose_e4m3_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columnwise_transpose_e4m3` by the Triton kernels: what the op does on CUDA."""
    check_quantizer_input("quantize_columnwise_transpose_e4m3", x_NK)
    num_rows, num_columns = x_NK.shape
    x_q_KP = torch.empty((num_columns, padded(num_rows)), dtype=E4M3.dtype, device=x_NK.device)
    if num_rows == 0:
        return x_q_KP, scale_and_inverse_reference(x_NK.new_zeros((num_columns, 1), dtype=torch.float32), E4M3)[0]
    return x_q_KP, _quantize(with_unit_inner_stride(x_NK), x_q_KP)


def _quantize(x_NK: torch.Tensor, x_q: torch.Tensor) -> torch.Tensor:
    """Write the transposed quantised form of x and return its scale [K, 1]."""
    num_rows, num_columns = x_NK.shape
    scale_K1 = torch.empty((num_columns, 1), dtype=torch.float32, device=x_NK.device)
    if num_columns:
        partial_SK = torch.empty((MAX_PARTIALS, num_columns), dtype=torch.int32, device=x_NK.device)

        def run(config: ColumnConfig) -> None:
            launch(config, x_NK, partial_SK, x_q, scale_K1)

        key = (bucket(num_rows), num_columns, x_NK.dtype, x_q.dtype)
        run(TUNER.choose(key, lambda: CANDIDATES, run, x_NK.device))
    return scale_K1


class ColumnConfig(NamedTuple):
    """The tile that a program loads, rounds and stores transposed."""

    rows: int
    columns: int
    num_warps: int


MAX_PARTIALS = 64
"""Spans of rows at most that the first kernel finds column maxima of, for the second one to join."""
CANDIDATES = [
    ColumnConfig(64, 128, 4),
    ColumnConfig(128, 128, 8),
    ColumnConfig(128, 64, 4),
    ColumnConfig(64, 64, 4),
    ColumnConfig(128, 128, 4),
]


def launch(
    config: ColumnConfig,
    x_NK: torch.Tensor,
    partial_SK: torch.Tensor,
    x_q: torch.Tensor,
    scale_K1: torch.Tensor,
) -> None:
    """Run both kernels in the given configuration; x_q is int8 [K, N] or float8_e4m3fn [K, P]."""
    num_rows, num_columns = x_NK.shape
    num_multiprocessors = device_facts(x_NK.device).num_multiprocessors
    blocks = triton.cdiv(num_columns, _ABSMAX_BLOCK_K)
    rows_each = _span(num_rows, _ABSMAX_BLOCK_N, min(MAX_PARTIALS, triton.cdiv(8 * num_multiprocessors, blocks)))
    num_partials = triton.cdiv(num_rows, rows_each)
    _column_absmax_kernel[(blocks, num_partials)](
        x_NK,
        partial_SK,
        num_rows,
        num_columns,
        x_NK.stride(0),
        rows_each,
        BLOCK_N=_ABSMAX_BLOCK_N,
        BLOCK_K=_ABSMAX_BLOCK_K,
        num_warps=4,
    )
    blocks = triton.cdiv(num_columns, config.columns)
    rows_each = _span(x_q.shape[1], config.rows, triton.cdiv(16 * num_multiprocessors, blocks))
    _quantize_columns_kernel[(blocks, triton.cdiv(x_q.shape[1], rows_each))](
        x_NK,
        partial_SK,
        x_q,
        scale_K1,
        num_partials,
        num_rows,
        x_q.shape[1],
        num_columns,
        x_NK.stride(0),
        rows_each,
        BLOCK_N=config.rows,
        BLOCK_K=config.columns,
        MAX_PARTIALS=partial_SK.shape[0],
        E4M3=x_q.dtype != torch.int8,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


def _span(num_rows: int, tile_rows: int, num_spans: int) -> int:
    """Rows a program, a multiple of its tile's, so that about `num_spans` programs share all rows."""
    return triton.cdiv(triton.cdiv(num_rows, tile_rows), num_spans) * tile_rows


_ABSMAX_BLOCK_N, _ABSMAX_BLOCK_K = 32, 128
_INT8_MAX_VALUE = tl.constexpr(INT8.max_value)


@triton.jit
def _column_absmax_kernel(
    x_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    x_stride,
    rows_each,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (c, p): largest `magnitude_bits` of each column of block c over span p of the rows."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = columns < num_columns
    first = tl.program_id(1) * rows_each
    bits = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for start in range(first, tl.minimum(first + rows_each, num_rows), BLOCK_N):
        rows = tl.minimum(start + tl.arange(0, BLOCK_N).to(tl.int64), num_rows - 1)
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask[None, :], other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * num_columns + columns
    tl.store(partial, tl.max(bits, axis=0), mask=mask)


@triton.jit
def _quantize_columns_kernel(
    x_ptr,
    partial_ptr,
    x_q_ptr,
    scale_ptr,
    num_partials,
    num_rows,
    num_padded,
    num_columns,
    x_stride,
    rows_each,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX_PARTIALS: tl.constexpr,
    E4M3: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    column_mask = columns < num_columns
    index = tl.arange(0, MAX_PARTIALS)[:, None]
    partial = tl.load(
        partial_ptr + index * num_columns + columns[None, :],
        mask=(index < num_partials) & column_mask[None, :],
        other=0,
    )
    scale, inverse = scale_and_inverse(tl.max(partial, axis=0), e4m3.MAX_VALUE if E4M3 else _INT8_MAX_VALUE)
    tl.store(scale_ptr + columns, scale, mask=column_mask)  # every span writes the same bits
    first = tl.program_id(1) * rows_each
    for start in range(first, tl.minimum(first + rows_each, num_padded), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (rows < num_rows)[:, None] & column_mask[None, :]
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
        x_q = round_to_e4m3(x, inverse[None, :]) if E4M3 else round_to_int8(x, inverse[None, :])
        stored = (rows < num_padded)[:, None] & column_mask[None, :]
        store_tile(x_q, None, x_q_ptr, rows, columns, num_padded, num_columns, stored, False, True)


TUNER: Tuner[ColumnConfig] = Tuner("quantize_columnwise_transpose", [__file__, int8.__file__, e4m3.__file__])


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


def _fake_e4m3(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantizer_input("quantize_columnwise_transpose_e4m3", x_NK)
    num_rows, num_columns = x_NK.shape
    return (
        x_NK.new_empty((num_columns, padded(num_rows)), dtype=E4M3.dtype),
        x_NK.new_empty((num_columns, 1), dtype=torch.float32),
    )


QUANTIZE_COLUMNWISE_TRANSPOSE_E4M3 = define_op(
    "quantize_columnwise_transpose_e4m3(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_columnwise_transpose_e4m3_reference,
    cuda=quantize_columnwise_transpose_e4m3_triton,
    fake=_fake_e4m3,
    number_format=E4M3,
)
