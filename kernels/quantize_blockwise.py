# mypy: allow-untyped-defs
"""int8 quantisation with a transpose and a scale for each column and block of rows.

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
    round_reference,
    round_to_int8,
    scale_and_inverse,
    scale_and_inverse_reference,
    store_tile,
    with_unit_inner_stride,
)
from swcompile.kernels.launch import Launcher, Plans, empty, nothing, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.tuning import Tuner, bucket


def quantize_blockwise_transpose(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise blocks of 1024 rows to int8, each column by its absmax in the block, and transpose.

    ``x[n, k] ~= x_q[k, n] * scale[n // 1024, k]``: an operand of an 8-bit grad_weight, which sums over tokens. A token
    that is much larger than the others takes bits from those of its block alone: as an element errs by at most half a
    step, absmax / 254, a column of a block errs by at most sqrt(1024) / 254, an eighth, of its norm. x is read once.

    Args:
        x_NK: [N, K] bfloat16, float16 or float32, any strides.

    Returns:
        x_q [K, P] int8, contiguous, with zeros from N to P, as tensor cores want multiples of 16; and scale
        [B, K] float32. A column of a block with a NaN or Inf gets scale NaN.

    Raises:
        ValueError: x is of another dtype, or not a matrix.
    """
    return QUANTIZE_BLOCKWISE_TRANSPOSE(x_NK)


def quantize_blockwise_transpose_reference(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_blockwise_transpose` in plain PyTorch, bit for bit."""
    check_quantizer_input("quantize_blockwise_transpose", x_NK)
    num_rows, num_columns = x_NK.shape
    rows_left = -num_rows % BLOCK_ROWS
    blocks = F.pad(x_NK, (0, 0, 0, rows_left)).reshape(num_blocks(num_rows), BLOCK_ROWS, num_columns)
    scale, inverse = scale_and_inverse_reference(blocks.abs().amax(1, keepdim=True).float())
    x_q_NK = round_reference(blocks, inverse).view(num_rows + rows_left, num_columns)
    return x_q_NK[: padded(num_rows)].t().contiguous(), scale.squeeze(1)


def padded(num_rows: int) -> int:
    """P: the number of rows, rounded up to a multiple of 16."""
    return (num_rows + 15) // 16 * 16


def quantize_blockwise_transpose_work(num_rows: int, num_columns: int, itemsize: int) -> Work:
    """One comparison and one multiplication an element; x read once, x_q and the scales written once."""
    num_elements = num_rows * num_columns
    num_bytes = num_elements * itemsize + padded(num_rows) * num_columns + 4 * num_blocks(num_rows) * num_columns
    return Work(flops=2 * num_elements, bytes=num_bytes)


def quantize_blockwise_transpose_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_blockwise_transpose` by the Triton kernel: what the op does on CUDA."""
    check_quantizer_input("quantize_blockwise_transpose", x_NK)
    x_NK = with_unit_inner_stride(x_NK)
    launch = PLANS.find([x_NK])
    outputs = _empty_outputs(x_NK)
    launch(x_NK, *outputs)
    return outputs


def _empty_outputs(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_columns = x_NK.shape
    x_q_KP = empty((num_columns, padded(num_rows)), torch.int8, x_NK.device)
    return x_q_KP, empty((num_blocks(num_rows), num_columns), torch.float32, x_NK.device)


def _prepare(x_NK: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (x, x_q, scale)."""
    if x_NK.numel() == 0:
        return nothing
    outputs = _empty_outputs(x_NK)

    def run(config: BlockConfig) -> None:
        launcher(config, x_NK)(x_NK, *outputs)

    key = (bucket(x_NK.shape[0]), x_NK.shape[1], x_NK.dtype)
    return launcher(TUNER.choose(key, lambda: CANDIDATES, run, x_NK.device), x_NK)


PLANS = Plans(_prepare)


class BlockConfig(NamedTuple):
    """Columns of a block that a program holds in its registers."""

    columns: int
    num_warps: int


CANDIDATES = [BlockConfig(16, 8), BlockConfig(32, 8), BlockConfig(32, 16)]


def launcher(config: BlockConfig, x_NK: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (x, x_q, scale) in the given configuration."""
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
    mask = (rows < num_rows)[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
    scale, inverse = scale_and_inverse(tl.max(magnitude_bits(x), axis=0))
    tl.store(scale_ptr + block.to(tl.int64) * num_columns + columns, scale, mask=column_mask)
    stored = (rows < num_padded)[:, None] & column_mask[None, :]
    x_q = round_to_int8(x, inverse[None, :])
    store_tile(x_q, None, x_q_ptr, rows, columns, num_padded, num_columns, stored, False, True)


TUNER: Tuner[BlockConfig] = Tuner("quantize_blockwise_transpose", [__file__, int8.__file__])


def _fake(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantizer_input("quantize_blockwise_transpose", x_NK)
    num_rows, num_columns = x_NK.shape
    return (
        x_NK.new_empty((num_columns, padded(num_rows)), dtype=torch.int8),
        x_NK.new_empty((num_blocks(num_rows), num_columns), dtype=torch.float32),
    )


QUANTIZE_BLOCKWISE_TRANSPOSE = define_op(
    "quantize_blockwise_transpose(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_blockwise_transpose_reference,
    cuda=quantize_blockwise_transpose_triton,
    fake=_fake,
)
