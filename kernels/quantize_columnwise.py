# mypy: allow-untyped-defs
"""Column-wise int8 quantisation with a transpose. Shapes: N rows, K columns, one scale a column."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from swcompile.kernels import int8
from swcompile.kernels.int8 import (
    check_quantizer_input,
    magnitude_bits,
    round_to_int8,
    scale_and_inverse,
    store_tile,
    with_unit_inner_stride,
)
from swcompile.kernels.launch import Launcher, Plans, device_facts, empty, nothing, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.quantize_rowwise import quantize_rowwise_reference, quantize_rowwise_triton
from swcompile.kernels.tuning import Tuner, bucket, worth_trying


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
    """One comparison and one multiplication an element; x read twice, as its last row may hold the absmax.

    Much of the second reading is from the L2 cache, if that holds two blocks of columns.
    """
    num_elements = num_rows * num_columns
    return Work(flops=2 * num_elements, bytes=num_elements * (2 * itemsize + 1) + 4 * num_columns)


def quantize_columnwise_transpose_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_columnwise_transpose` by the Triton kernel: what the op does on CUDA."""
    check_quantizer_input("quantize_columnwise_transpose", x_NK)
    if (x_NK.stride(0) == 1 and x_NK.stride(1) != 1) or x_NK.shape[0] == 0:  # stored as its transpose
        return quantize_rowwise_triton(x_NK.t())
    x_NK = with_unit_inner_stride(x_NK)
    launch = PLANS.find([x_NK])
    outputs = _empty_outputs(x_NK)
    launch(x_NK, *outputs)
    return outputs


def _empty_outputs(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_columns = x_NK.shape
    x_q = empty((num_columns, num_rows), torch.int8, x_NK.device)
    return x_q, empty((num_columns, 1), torch.float32, x_NK.device)


def _prepare(x_NK: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (x, x_q, scale)."""
    num_rows, num_columns = x_NK.shape
    if not num_columns:
        return nothing
    outputs = _empty_outputs(x_NK)

    def run(config: ColumnConfig) -> None:
        launcher(config, x_NK)(x_NK, *outputs)

    key = (bucket(num_rows), num_columns, x_NK.dtype)
    return launcher(TUNER.choose(key, lambda: worth_trying(CANDIDATES, x_NK), run, x_NK.device), x_NK)


PLANS = Plans(_prepare)


class ColumnConfig(NamedTuple):
    """The item of x that a program works on: tiles above each other, one after the other in its registers."""

    rows: int
    """Of a tile."""
    columns: int
    num_warps: int
    tiles: int


CANDIDATES = [
    ColumnConfig(128, 64, 8, 2),
    ColumnConfig(128, 64, 4, 2),
    ColumnConfig(128, 64, 4, 1),
]
_LEAD = 2
"""How many items the first pass is ahead, for each multiprocessor: enough that few programs wait, few enough for the L2 cache."""


def launcher(config: ColumnConfig, x_NK: torch.Tensor) -> Callable[..., None]:
    """Launches the kernel on (x, x_q, scale) in the given configuration."""
    num_rows, num_columns = x_NK.shape
    spans = triton.cdiv(num_rows, config.rows * config.tiles)
    blocks = triton.cdiv(num_columns, config.columns)
    lead = min(spans + _LEAD * device_facts(x_NK.device).num_multiprocessors, spans * blocks)
    kernel = Launcher(
        _quantize_columns_kernel,
        (2 * spans * blocks,),
        num_rows,
        num_columns,
        x_NK.stride(0),
        lead,
        BLOCK_N=config.rows,
        BLOCK_K=config.columns,
        TILES=config.tiles,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )

    def launch(x_NK: torch.Tensor, x_q: torch.Tensor, scale_K1: torch.Tensor) -> None:
        meeting = torch.zeros(1 + blocks + num_columns, dtype=torch.int32, device=x_NK.device)
        kernel(x_NK, meeting, x_q, scale_K1)

    return launch


@triton.jit(do_not_specialize=["lead"])
def _quantize_columns_kernel(
    x_ptr,
    meeting_ptr,
    x_q_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    x_stride,
    lead,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program finds the column maxima of an item, or rounds it: a second pass that finds x in the L2 cache.

    The first pass is `lead` items ahead. Items go down a block of columns, then down the next one. Programs take the
    items in the order in which they start, so that none waits for another that has yet to start. All begin at zero in
    `meeting`: how many programs have started, how many items of each block have their maxima, and the maxima, as
    `magnitude_bits`.
    """
    spans = tl.cdiv(num_rows, BLOCK_N * TILES)
    blocks = tl.cdiv(num_columns, BLOCK_K)
    num_items = spans * blocks
    ticket = tl.atomic_add(meeting_ptr, 1, sem="relaxed")
    turn = ticket - lead  # from here on passes take turns, until the first one has ended
    is_first = (turn < 0) | ((turn % 2 == 0) & (ticket < 2 * num_items - lead))
    first_item = tl.where(turn < 0, ticket, lead + turn // 2)
    item = tl.where(is_first, first_item, tl.maximum(turn // 2, ticket - num_items))
    block, start = item // spans, (item % spans) * (BLOCK_N * TILES)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    column_mask = columns < num_columns
    finished = meeting_ptr + 1 + block
    magnitudes = meeting_ptr + 1 + blocks + columns
    if is_first:
        largest = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        for tile in range(TILES):
            rows = start + tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            rows = tl.minimum(rows, num_rows - 1)  # a row seen twice changes no maximum
            x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=column_mask[None, :], other=0.0)
            largest = tl.maximum(largest, magnitude_bits(x))
        tl.atomic_max(magnitudes, tl.max(largest, axis=0), mask=column_mask, sem="relaxed")
        tl.debug_barrier()  # all maxima of the item are there before it counts
        tl.atomic_add(finished, 1, sem="release")
    else:
        while tl.atomic_add(finished, 0, sem="acquire") < spans:
            pass
        bits = tl.load(magnitudes, mask=column_mask, other=0)
        scale, inverse = scale_and_inverse(bits)
        if start == 0:
            tl.store(scale_ptr + columns, scale, mask=column_mask)
        for tile in range(TILES):
            rows = start + tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            mask = (rows < num_rows)[:, None] & column_mask[None, :]
            x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
            x_q = round_to_int8(x, inverse[None, :])
            store_tile(x_q, None, x_q_ptr, rows, columns, num_rows, num_columns, mask, False, True)


TUNER: Tuner[ColumnConfig] = Tuner("quantize_columnwise_transpose", [__file__, int8.__file__])


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
