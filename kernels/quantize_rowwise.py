# mypy: allow-untyped-defs
"""Row-wise int8 quantisation. Shapes: M rows (tokens), K features a row."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from swcompile.kernels import int8
from swcompile.kernels.int8 import (
    absmax_reference,
    check_quantizer_input,
    has_unit_inner_stride,
    magnitude_bits,
    round_reference,
    round_to_int8,
    scale_and_inverse,
    scale_and_inverse_reference,
)
from swcompile.kernels.launch import Launcher, Plans, device_facts, empty, nothing, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.tuning import Tuner, bucket, worth_trying


def quantize_rowwise(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row to int8 by its own absmax: ``x ~= x_q * scale``.

    Row-wise quantisation of activations and output gradients in SwitchBack (arXiv 2304.13013, section 2.2).

    Args:
        x_MK: [M, K] bfloat16, float16 or float32, any strides.

    Returns:
        x_q [M, K] int8, contiguous, and scale [M, 1] float32. A row with a NaN or Inf gets scale NaN.

    Raises:
        ValueError: x is of another dtype, or not a matrix.
    """
    return QUANTIZE_ROWWISE(x_MK)


def quantize_rowwise_reference(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rowwise` in plain PyTorch, bit for bit."""
    check_quantizer_input("quantize_rowwise", x_MK)
    scale_M1, inverse_M1 = scale_and_inverse_reference(absmax_reference(x_MK, (1,)))
    return round_reference(x_MK, inverse_M1).contiguous(), scale_M1


def quantize_rowwise_work(num_rows: int, num_columns: int, itemsize: int) -> Work:
    """One comparison and one multiplication an element; x read once, x_q and the scales written once."""
    num_elements = num_rows * num_columns
    return Work(flops=2 * num_elements, bytes=num_elements * (itemsize + 1) + 4 * num_rows)


LANE_ELEMENTS = 8
"""Adjacent elements that a thread takes of each piece of a row: one 16-byte load of 16-bit elements."""
PIECE_PER_WARP = 32 * LANE_ELEMENTS
MAX_PIECES = 8
"""A thread holds at most so many pieces in registers, between finding the absmax and rounding."""
MAX_RESIDENT_COLUMNS = 16 * PIECE_PER_WARP * MAX_PIECES
"""Longer rows are read twice, the second time from the L2 cache."""


class RowwiseConfig(NamedTuple):
    """How rows are shared out among warps."""

    warps_per_row: int
    """1 finds the absmax without a barrier."""
    num_warps: int
    """Warps a program, a multiple of `warps_per_row`."""
    num_stages: int = 1
    """1: one tile a program. More: a few programs a multiprocessor loop over the tiles, loads so many tiles ahead."""


def quantize_rowwise_triton(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rowwise` by the Triton kernel: what the op does on CUDA."""
    launch = PLANS.find([x_MK])
    if launch is None:
        return quantize_rowwise_triton(x_MK.contiguous())
    x_q_MK, scale_M1 = _empty_outputs(x_MK)
    launch(x_MK, x_q_MK, scale_M1)
    return x_q_MK, scale_M1


def _empty_outputs(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_q_MK = empty(x_MK.shape, torch.int8, x_MK.device)
    return x_q_MK, empty((x_MK.shape[0], 1), torch.float32, x_MK.device)


def _prepare(x_MK: torch.Tensor) -> Callable[..., object] | None:
    """Launches the kernel on (x, x_q, scale); None where x must be laid out anew."""
    check_quantizer_input("quantize_rowwise", x_MK)
    if not has_unit_inner_stride(x_MK):
        return None
    num_rows, num_columns = x_MK.shape
    if not num_rows:
        return nothing
    key = (bucket(num_rows), num_columns, x_MK.dtype)
    outputs = _empty_outputs(x_MK)

    def run(config: RowwiseConfig) -> None:
        launcher(config, x_MK)(x_MK, *outputs)

    return launcher(TUNER.choose(key, lambda: worth_trying(candidates(num_columns), x_MK), run, x_MK.device), x_MK)


PLANS = Plans(_prepare)


def launcher(config: RowwiseConfig, x_MK: torch.Tensor) -> Launcher:
    """Launches the kernel on (x, x_q, scale) in the given configuration."""
    num_rows, num_columns = x_MK.shape
    numbers = num_rows, num_columns, x_MK.stride(0)
    if num_columns > MAX_RESIDENT_COLUMNS:
        options = {"BLOCK": 8192, "num_warps": config.num_warps, "enable_fp_fusion": False}
        return Launcher(_quantize_long_rows_kernel, (num_rows,), *numbers, **options)
    rows = config.num_warps // config.warps_per_row
    width = PIECE_PER_WARP * config.warps_per_row
    num_programs = triton.cdiv(num_rows, rows)
    if config.num_stages > 1:
        programs_each = max(32 // config.num_warps, 1)
        num_programs = min(num_programs, programs_each * device_facts(x_MK.device).num_multiprocessors)
    return Launcher(
        _quantize_rowwise_kernel,
        (num_programs,),
        *numbers,
        BLOCK_M=rows,
        WIDTH=width,
        NUM_PIECES=triton.cdiv(num_columns, width),
        EVEN=num_columns % width == 0,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


def candidates(num_columns: int) -> list[RowwiseConfig]:
    """At most 8 configurations, the likeliest first: few warps a row, few pieces a thread, little padding."""
    if num_columns > MAX_RESIDENT_COLUMNS:
        return [RowwiseConfig(16, 16), RowwiseConfig(8, 8), RowwiseConfig(32, 32)]
    configs = []
    for warps_per_row in (1, 2, 4, 8, 16, 32):
        num_pieces = triton.cdiv(num_columns, PIECE_PER_WARP * warps_per_row)
        smallest = warps_per_row == 1 or num_pieces > 1
        if num_pieces <= MAX_PIECES and smallest:
            padding = num_pieces * PIECE_PER_WARP * warps_per_row - num_columns
            for num_warps in {max(warps_per_row, 4), max(warps_per_row, 8)}:
                badness = abs(num_pieces - 5) + 16 * padding / max(num_columns, 1) + num_warps / 16
                configs.append((badness, RowwiseConfig(warps_per_row, num_warps)))
    return [config for _, config in sorted(configs)[:8]]


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rowwise_kernel(
    x_ptr,
    x_q_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    x_stride,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        # Rows beyond the last repeat it: the same bits are written twice, and no mask is needed.
        rows = tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64), num_rows - 1)
        x_rows = x_ptr + (rows * x_stride)[:, None]
        x_q_rows = x_q_ptr + (rows * num_columns)[:, None]
        columns = tl.arange(0, WIDTH)[None, :]
        # Pieces of one shape have one layout: nothing moves between threads but the maxima.
        pieces = ()
        bits = tl.zeros([BLOCK_M, WIDTH], tl.int32)
        for i in tl.static_range(NUM_PIECES):
            mask = None if EVEN or i < NUM_PIECES - 1 else i * WIDTH + columns < num_columns
            x = tl.load(x_rows + i * WIDTH + columns, mask=mask)
            if mask is not None:
                x = tl.where(mask, x, 0.0)
            pieces = pieces + (x,)  # type: ignore[assignment]
            bits = tl.maximum(bits, magnitude_bits(x))
        scale, inverse = scale_and_inverse(tl.max(bits, axis=1))
        for i in tl.static_range(NUM_PIECES):
            mask = None if EVEN or i < NUM_PIECES - 1 else i * WIDTH + columns < num_columns
            tl.store(x_q_rows + i * WIDTH + columns, round_to_int8(pieces[i], inverse[:, None]), mask=mask)
        tl.store(scale_ptr + rows, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_long_rows_kernel(
    x_ptr, x_q_ptr, scale_ptr, num_rows, num_columns, x_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    x_q_row = x_q_ptr + row * num_columns
    bits = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + columns, mask=columns < num_columns, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    scale, inverse = scale_and_inverse(tl.max(bits, axis=0))
    for start in range(0, num_columns, BLOCK):  # the row comes from the L2 cache this time
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        x = tl.load(x_row + columns, mask=mask, other=0.0)
        tl.store(x_q_row + columns, round_to_int8(x, inverse), mask=mask)
    tl.store(scale_ptr + row, scale)


TUNER: Tuner[RowwiseConfig] = Tuner("quantize_rowwise", [__file__, int8.__file__])


def _fake(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantizer_input("quantize_rowwise", x_MK)
    num_rows, num_columns = x_MK.shape
    return (
        x_MK.new_empty((num_rows, num_columns), dtype=torch.int8),
        x_MK.new_empty((num_rows, 1), dtype=torch.float32),
    )


QUANTIZE_ROWWISE = define_op(
    "quantize_rowwise(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_rowwise_reference,
    cuda=quantize_rowwise_triton,
    fake=_fake,
)
"""The op as it stands in a graph: ``torch.ops.swcompile.quantize_rowwise.default``."""
