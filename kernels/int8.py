# mypy: allow-untyped-defs
"""The int8 rounding rule, once in PyTorch and once in Triton, operation for operation, so that both give the same bits.

    absmax  = max |x|
    scale   = max(absmax, 2^-100) / 127        float32, correctly rounded; NaN if absmax is NaN or Inf
    inverse = 1 / scale                        float32, correctly rounded; 0 if scale is NaN
    x_q     = round_half_to_even(x * inverse)  both the product and the rounding in float32; 0 if scale is NaN

It is rint(127 * x / absmax) of arXiv 2304.13013, section 2.2, with the reciprocal taken once a row. Three roundings err by
half an ulp each, so |x * inverse| < 127.5 and -128 never occurs. x_q depends on x and the scale alone: who has the scale
needs no absmax. Where x may have changed since its scale was found, x * inverse is limited to [-127, 127].

The floor 2^-100 replaces a case for zero: an all-zero row has a tiny, finite, normal scale. Below the floor nothing
depends on subnormals, which some devices flush: an x below 2^-108 gives 0 either way.
"""

import torch

from swcompile.kernels.formats import INT8
from swcompile.kernels.launch import tl, triton

SMALLEST_ABSMAX = 2.0**-100
BLOCK_ROWS = 1024
"""Rows of a matrix that share a column's scale, where a matmul sums over rows: the largest power of two of which any sum of
so many products of two int8 is an integer that float32 holds."""
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_quantizer_input(op: str, x: torch.Tensor, *, takes_int8: bool = False) -> None:
    """Raise `ValueError` unless `x` is a matrix of a dtype that the quantisers take. Looks at no size."""
    if x.dtype not in INPUT_DTYPES and not (takes_int8 and x.dtype == torch.int8):
        wanted = "bfloat16, float16, float32 or int8" if takes_int8 else "bfloat16, float16 or float32"
        raise ValueError(f"{op}: x is {x.dtype}, but must be {wanted}; cast it first (float64 would lose bits silently)")
    if x.dim() != 2:
        raise ValueError(f"{op}: x has {x.dim()} dimensions, but must have 2; flatten the leading ones first")


def num_blocks(num_rows: int) -> int:
    """Blocks of `BLOCK_ROWS` rows, the last of which may be shorter."""
    return (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS


def padded(num_rows: int) -> int:
    """The number of rows, rounded up to a multiple of 16."""
    return (num_rows + 15) // 16 * 16


def with_unit_inner_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its rows are contiguous, whatever their distance; else a contiguous copy."""
    return x if has_unit_inner_stride(x) else x.contiguous()


def has_unit_inner_stride(x: torch.Tensor) -> bool:
    """Whether the rows of a matrix are contiguous, whatever their distance: those of an empty one are."""
    return x.stride(1) == 1 or x.shape[1] == 1 or x.numel() == 0


def absmax_reference(x: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """Largest magnitude over `dim` in float32, kept as size-1 dimensions; NaN wins, nothing at all gives 0."""
    if x.numel() == 0:
        shape = [1 if d in dim else size for d, size in enumerate(x.shape)]
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    return x.abs().amax(dim, keepdim=True).float()


def scale_and_inverse_reference(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, inverse) of float32 `absmax`, any shape."""
    finite = absmax.isfinite()
    absmax = absmax.clamp(min=SMALLEST_ABSMAX)
    # A tensor, not a number: CUDA divides by a number by multiplying with its rounded reciprocal.
    max_value = torch.full_like(absmax, INT8.max_value)
    scale = torch.where(finite, absmax / max_value, torch.nan)
    return scale, inverse_reference(scale)


def inverse_reference(scale: torch.Tensor) -> torch.Tensor:
    """What `round_reference` multiplies with; 0 for a scale that is not above 0, or NaN."""
    return torch.where(scale > 0, torch.ones_like(scale) / scale, 0.0)


def round_reference(x: torch.Tensor, inverse: torch.Tensor, *, limited: bool = False) -> torch.Tensor:
    """int8 of `x` by an `inverse` that broadcasts against it; where `inverse` is 0, NaN and Inf give 0.

    Args:
        x: any shape and floating dtype.
        inverse: float32.
        limited: x may have grown since its scale was found.
    """
    scaled = x.float() * inverse
    if limited:  # as the instructions for it do: NaN becomes the lower limit
        largest = torch.full_like(scaled, INT8.max_value)
        scaled = scaled.fmax(-largest).fmin(largest).mul_(inverse != 0)
    return scaled.round_().nan_to_num_(nan=0.0).to(torch.int8)


# 1.5 * 2^23: adding it to a float32 of magnitude below 2^22 rounds that half to even into the low mantissa bits.
_ROUNDER = tl.constexpr(12582912.0)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
_NAN_BITS = tl.constexpr(0x7FC00000)
_MAX_VALUE = tl.constexpr(INT8.max_value)
_SMALLEST_ABSMAX = tl.constexpr(SMALLEST_ABSMAX)


@triton.jit
def magnitude_bits(x):
    """Bits of |x| in float32 as int32. Their integer order is that of the magnitudes, with Inf above and NaN on top.

    So maxima need no NaN-propagating float instruction (slower, and miscompiled next to transposed 1-byte stores,
    triton#11111), and come out the same in any order.
    """
    return x.to(tl.float32).to(tl.int32, bitcast=True) & _MAGNITUDE_MASK


@triton.jit
def scale_and_inverse(absmax_bits):
    """(scale, inverse) of the maximum of `magnitude_bits`; an inverse of 0 marks a maximum that is not finite."""
    finite = absmax_bits < _INFINITY_BITS
    absmax = tl.where(finite, absmax_bits, 0).to(tl.float32, bitcast=True)
    absmax = tl.maximum(absmax, _SMALLEST_ABSMAX)
    max_value = tl.full(absmax.shape, _MAX_VALUE, tl.float32)
    nan = tl.full(absmax.shape, _NAN_BITS, tl.int32).to(tl.float32, bitcast=True)
    scale = tl.where(finite, tl.div_rn(absmax, max_value), nan)
    return scale, inverse_of(scale)


@triton.jit
def inverse_of(scale):
    """What `round_to_int8` multiplies with; 0 for a scale that is not above 0, or NaN."""
    return tl.where(scale > 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), 0.0)


@triton.jit
def round_to_int8(x, inverse, LIMITED: tl.constexpr = False):
    """int8 of `x`, with `inverse` broadcast against it by the caller. Launch with `enable_fp_fusion=False`.

    `LIMITED`: x may have grown since its scale was found.

    With the rounder added the integer is the low byte of the float: no conversion instruction, of which a
    multiprocessor issues few. A fused multiply-add would skip the rounding of the product and move some ties.
    """
    scaled = x.to(tl.float32) * inverse
    if LIMITED:
        scaled = tl.minimum(tl.maximum(scaled, -_MAX_VALUE), _MAX_VALUE)
    rounded = (scaled + _ROUNDER).to(tl.int32, bitcast=True)
    return tl.where(inverse != 0.0, rounded, 0).to(tl.int8)


@triton.jit
def store_tile(
    x_q, same_ptr, transposed_ptr, rows, columns, num_rows, num_columns, mask, SAME, TRANSPOSED
):
    """Store tile `x_q` of a [num_rows, num_columns] matrix into a contiguous copy, a transposed one, or both."""
    if SAME:
        tl.store(same_ptr + (rows * num_columns)[:, None] + columns[None, :], x_q, mask=mask)
    if TRANSPOSED:
        tl.store(
            transposed_ptr + (columns * num_rows)[:, None] + rows[None, :], tl.trans(x_q), mask=tl.trans(mask)
        )
