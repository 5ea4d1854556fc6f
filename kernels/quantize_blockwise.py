# mypy: allow-untyped-defs
"""int8 quantisation with a transpose and a scale for each column and block of rows, of rows times a factor each.

Shapes: N rows, which a grad_weight matmul sums over (tokens), in B blocks of `BLOCK_ROWS`; K columns; P is N rounded up
to a multiple of 16.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from swcompile.kernels import int8
from swcompile.kernels.int8 import (
    BLOCK_ROWS,
    check_quantizer_input,
    magnitude_bits,
    num_blocks,
    padded,
    round_reference,
    round_to_int8,
    scale_and_inverse,
    scale_and_inverse_reference,
    store_tile,
    with_unit_inner_stride,
)
from swcompile.kernels.launch import Launcher, Plans, empty, nothing, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.tuning import Tuner, bucket, worth_trying


def quantize_blockwise_transpose(x_NK: torch.Tensor, factor_N1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply rows by factors, quantise blocks of 1024 rows to int8, each column by its absmax in the block, and transpose.

    ``x[n, k] * factor[n] ~= x_q[k, n] * scale[n // 1024, k]``: the activation in an 8-bit grad_weight, which sums over
    tokens. The factors are the scales of the other operand, the gradient by rows, which cannot be taken out of a sum over
    rows. An element errs by at most half a step, absmax / 254, so a token whose product is much larger than those of others
    takes bits from these, in its block alone. x is read once.

    Args:
        x_NK: [N, K] bfloat16, float16, float32 or, of what is in int8 already, int8; any strides.
        factor_N1: [N, 1] float32; for int8 its scales are part of the factors. The product is rounded to float32.

    Returns:
        x_q [K, P] int8, contiguous, with zeros from N to P, as tensor cores want multiples of 16; and scale
        [B, K] float32. A column of a block with a NaN or Inf gets scale NaN, and a factor that is none
        gives it to all columns.

    Raises:
        ValueError: x is of another dtype, or not a matrix; a factor for each row is not what the factors are.
    """
    return QUANTIZE_BLOCKWISE_TRANSPOSE(x_NK, factor_N1)


def quantize_blockwise_transpose_reference(
    x_NK: torch.Tensor, factor_N1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_blockwise_transpose` in plain PyTorch, bit for bit."""
    _check_input(x_NK, factor_N1)
    _check_sizes(x_NK, factor_N1)
    num_rows, num_columns = x_NK.shape
    rows_left = -num_rows % BLOCK_ROWS
    scaled_NK = F.pad(x_NK.float() * factor_N1, (0, 0, 0, rows_left))
    blocks = scaled_NK.reshape(num_blocks(num_rows), BLOCK_ROWS, num_columns)
    scale, inverse = scale_and_inverse_reference(blocks.abs().amax(1, keepdim=True))
    x_q_NK = round_reference(blocks, inverse).view(num_rows + rows_left, num_columns)
    return x_q_NK[: padded(num_rows)].t().contiguous(), scale.squeeze(1)


def quantize_blockwise_transpose_work(num_rows: int, num_columns: int, itemsize: int) -> Work:
    """One comparison and two multiplications an element; x and the factors read once, x_q and the scales written once."""
    num_elements, num_scales = num_rows * num_columns, num_rows + num_blocks(num_rows) * num_columns
    return Work(flops=3 * num_elements, bytes=num_elements * itemsize + padded(num_rows) * num_columns + 4 * num_scales)


def quantize_blockwise_transpose_triton(
    x_NK: torch.Tensor, factor_N1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_blockwise_transpose` by the Triton kernel: what the op does on CUDA."""
    _check_input(x_NK, factor_N1)
    x_NK, factor_N1 = with_unit_inner_stride(x_NK), factor_N1.contiguous()
    launch = PLANS.find([x_NK, factor_N1])
    outputs = _empty_outputs(x_NK)
    launch(x_NK, factor_N1, *outputs)
    return outputs


def _empty_outputs(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_columns = x_NK.shape
    x_q_KP = empty((num_columns, padded(num_rows)), torch.int8, x_NK.device)
    return x_q_KP, empty((num_blocks(num_rows), num_columns), torch.float32, x_NK.device)


def _prepare(x_NK: torch.Tensor, factor_N1: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (x, factor, x_q, scale)."""
    _check_sizes(x_NK, factor_N1)
    if x_NK.numel() == 0:
        return nothing
    outputs = _empty_outputs(x_NK)

    def run(config: BlockConfig) -> None:
        launcher(config, x_NK)(x_NK, factor_N1, *outputs)

    key = (bucket(x_NK.shape[0]), x_NK.shape[1], x_NK.dtype)
    return launcher(TUNER.choose(key, lambda: worth_trying(CANDIDATES, x_NK), run, x_NK.device), x_NK)


PLANS = Plans(_prepare)


class BlockConfig(NamedTuple):
    """Columns of a block that a program holds in its registers."""

    columns: int
    num_warps: int


CANDIDATES = [BlockConfig(16, 8), BlockConfig(32, 8), BlockConfig(32, 16)]


def launcher(config: BlockConfig, x_NK: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (x, factor, x_q, scale) in the given configuration."""
    num_rows, num_columns = x_NK.shape
    return Launcher(
        _quantize_blocks_kernel,
        (num_blocks(num_rows) * triton.cdiv(num_columns, config.columns),),
        num_rows,
        padded(num_rows),
        num_columns,
        x_NK.stride(0),
        BLOCK_N=BLOCK_ROWS,
        BLOCK_K=config.columns,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


@triton.jit
def _quantize_blocks_kernel(
    x_ptr,
    factor_ptr,
    x_q_ptr,
    scale_ptr,
    num_rows,
    num_padded,
    num_columns,
    x_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Programs go along the columns of a block, then to the next one: neighbours read the same rows at the same time."""
    programs_across = tl.cdiv(num_columns, BLOCK_K)
    block = tl.program_id(0) // programs_across
    columns = (tl.program_id(0) % programs_across) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    column_mask = columns < num_columns
    row_mask = rows < num_rows
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
    factor = tl.load(factor_ptr + rows, mask=row_mask, other=0.0)
    x = x.to(tl.float32) * factor[:, None]
    scale, inverse = scale_and_inverse(tl.max(magnitude_bits(x), axis=0))
    tl.store(scale_ptr + block.to(tl.int64) * num_columns + columns, scale, mask=column_mask)
    stored = (rows < num_padded)[:, None] & column_mask[None, :]
    x_q = round_to_int8(x, inverse[None, :])
    store_tile(x_q, None, x_q_ptr, rows, columns, num_padded, num_columns, stored, False, True)


TUNER: Tuner[BlockConfig] = Tuner("quantize_blockwise_transpose", [__file__, int8.__file__])


def _check_input(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Raise `ValueError` on a wrong dtype or rank. Looks at no size: sizes may be symbolic."""
    check_quantizer_input("quantize_blockwise_transpose", x, takes_int8=True)
    if factor.dtype != torch.float32 or factor.dim() != 2:
        raise ValueError(
            f"quantize_blockwise_transpose: factor is {factor.dtype} with {factor.dim()} dimensions, but must be float32 [N, 1]"
        )


def _check_sizes(x: torch.Tensor, factor: torch.Tensor) -> None:
    if factor.shape != (x.shape[0], 1):
        raise ValueError(
            f"quantize_blockwise_transpose: factor is {tuple(factor.shape)}, but must be {(x.shape[0], 1)}: one for each row of x"
        )


def _fake(x_NK: torch.Tensor, factor_N1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_input(x_NK, factor_N1)
    num_rows, num_columns = x_NK.shape
    return (
        x_NK.new_empty((num_columns, padded(num_rows)), dtype=torch.int8),
        x_NK.new_empty((num_blocks(num_rows), num_columns), dtype=torch.float32),
    )


QUANTIZE_BLOCKWISE_TRANSPOSE = define_op(
    "quantize_blockwise_transpose(Tensor x, Tensor factor) -> (Tensor, Tensor)",
    reference=quantize_blockwise_transpose_reference,
    cuda=quantize_blockwise_transpose_triton,
    fake=_fake,
)
