# mypy: allow-untyped-defs
"""Tensor-wise int8 quantisation, as it is, transposed, or both.

Shapes: N rows (out features), K columns (in features); R rows and C columns in the order of storage.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from swcompile.kernels import int8
from swcompile.kernels.int8 import (
    absmax_reference,
    check_quantizer_input,
    magnitude_bits,
    round_reference,
    round_to_int8,
    scale_and_inverse,
    scale_and_inverse_reference,
    store_tile,
    with_unit_inner_stride,
)
from swcompile.kernels.launch import INTERPRETED, device_facts, resident_programs, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.tuning import Tuner, bucket


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
    """`quantize_tensorwise` by the Triton kernels: what the op does on CUDA."""
    x_q_NK, _, scale_11 = _quantize(x_NK, same=True, transposed=False)
    return x_q_NK, scale_11


def quantize_tensorwise_transpose_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise_transpose` by the Triton kernels: what the op does on CUDA."""
    _, x_q_KN, scale_11 = _quantize(x_NK, same=False, transposed=True)
    return x_q_KN, scale_11


def quantize_tensorwise_both_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise_both` by the Triton kernels: what the op does on CUDA."""
    return _quantize(x_NK, same=True, transposed=True)


class TileConfig(NamedTuple):
    """The tile that a program loads, rounds and stores."""

    rows: int
    columns: int
    num_warps: int
    loads_early: bool = False
    """The first tile is loaded before the scale is known: worth its registers where a program has one tile."""
    at_once: bool = False
    """One launch: programs wait for each other once they know the absmax, and find a small matrix again in their caches."""


MAX_PARTIALS = 256
"""Programs of the first kernel at most: each program of the second one takes the maximum of all their results."""
CANDIDATES = [
    TileConfig(64, 128, 4, loads_early=True),
    TileConfig(64, 128, 4),
    TileConfig(128, 64, 4),
    TileConfig(64, 64, 4),
    TileConfig(128, 128, 8),
    TileConfig(128, 128, 4),
    TileConfig(128, 128, 8, at_once=True),
    TileConfig(64, 128, 4, at_once=True),
]


def _quantize(
    x_NK: torch.Tensor, *, same: bool, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_q, x_q transposed, scale); of the first two, one not asked for is empty."""
    check_quantizer_input("quantize_tensorwise", x_NK)
    if x_NK.stride(0) == 1 and x_NK.stride(1) != 1:  # stored as its transpose: swap the two outputs instead
        x_q_KN, x_q_NK, scale_11 = _quantize(x_NK.t(), same=transposed, transposed=same)
        return x_q_NK, x_q_KN, scale_11
    x_NK = with_unit_inner_stride(x_NK)
    num_rows, num_columns = x_NK.shape
    x_q_NK = torch.empty((num_rows, num_columns) if same else (0,), dtype=torch.int8, device=x_NK.device)
    x_q_KN = torch.empty(
        (num_columns, num_rows) if transposed else (0,), dtype=torch.int8, device=x_NK.device
    )
    scale_11 = torch.empty((1, 1), dtype=torch.float32, device=x_NK.device)
    partial = torch.empty(MAX_PARTIALS, dtype=torch.int32, device=x_NK.device)

    def run(config: TileConfig) -> None:
        launch(config, x_NK, partial, x_q_NK if same else None, x_q_KN if transposed else None, scale_11)

    key = (bucket(num_rows), num_columns, x_NK.dtype, same, transposed)
    run(TUNER.choose(key, lambda: CANDIDATES, run, x_NK.device))
    return x_q_NK, x_q_KN, scale_11


def launch(
    config: TileConfig,
    x_RC: torch.Tensor,
    partial_P: torch.Tensor,
    same_RC: torch.Tensor | None,
    transposed_CR: torch.Tensor | None,
    scale_11: torch.Tensor,
) -> None:
    """Run the kernels in the given configuration; an output that is None is not written."""
    outputs = same_RC, transposed_CR, scale_11
    num_tiles = triton.cdiv(x_RC.shape[0], config.rows) * triton.cdiv(x_RC.shape[1], config.columns)
    if not config.at_once or not _may_run_at_once(x_RC):
        _launch_twice(config, num_tiles, x_RC, partial_P, *outputs)
        return
    resident = _resident_programs(config, x_RC.dtype, same_RC is None, transposed_CR is None, x_RC.device)
    options = _at_once_options(config, *outputs[:2])
    meeting = torch.zeros(2, dtype=torch.int32, device=x_RC.device)
    grid = (triton.cdiv(num_tiles, triton.cdiv(num_tiles, resident)),)  # as many tiles each
    _at_once_kernel[grid](x_RC, meeting, *outputs, *x_RC.shape, x_RC.stride(0), **options)


def _may_run_at_once(x_RC: torch.Tensor) -> bool:
    """Whether programs may wait for each other: for sizes that `_resident_programs` holds for, on a GPU that is not shared.

    A collective on another stream may keep a part of the GPU, for as long as other processes take.
    """
    is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    sizes = (*x_RC.shape, x_RC.stride(0), x_RC.data_ptr())
    return not INTERPRETED and not is_shared and x_RC.numel() > 0 and all(size % 16 == 0 for size in sizes)


def _launch_twice(
    config: TileConfig,
    num_tiles: int,
    x_RC: torch.Tensor,
    partial_P: torch.Tensor,
    same_RC: torch.Tensor | None,
    transposed_CR: torch.Tensor | None,
    scale_11: torch.Tensor,
) -> None:
    """A kernel for the absmax, and one that rounds."""
    num_rows, num_columns = x_RC.shape
    facts = device_facts(x_RC.device)
    # The second kernel is launched while the first one runs, and waits inside (programmatic dependent launch).
    overlap = {"launch_pdl": True} if x_RC.is_cuda and facts.capability >= (9, 0) else {}
    num_absmax_tiles = triton.cdiv(num_rows, _ABSMAX_BLOCK_R) * triton.cdiv(num_columns, _ABSMAX_BLOCK_C)
    num_partials = 0
    if num_absmax_tiles:
        num_partials = triton.cdiv(num_absmax_tiles, triton.cdiv(num_absmax_tiles, MAX_PARTIALS))  # as many tiles each
        _absmax_kernel[(num_partials,)](
            x_RC,
            partial_P,
            num_rows,
            num_columns,
            x_RC.stride(0),
            _ABSMAX_BLOCK_R,
            _ABSMAX_BLOCK_C,
            OVERLAP=bool(overlap),
            num_warps=_ABSMAX_WARPS,
        )
    _quantize_tiles_kernel[(max(min(num_tiles, 16 * facts.num_multiprocessors), 1),)](
        x_RC,
        partial_P,
        same_RC,
        transposed_CR,
        scale_11,
        num_partials,
        num_rows,
        num_columns,
        x_RC.stride(0),
        BLOCK_R=config.rows,
        BLOCK_C=config.columns,
        MAX_PARTIALS=partial_P.shape[0],
        SAME=same_RC is not None,
        TRANSPOSED=transposed_CR is not None,
        LOADS_EARLY=config.loads_early,
        OVERLAP=bool(overlap),
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **overlap,
    )


def _at_once_options(config: TileConfig, same: Any, transposed: Any) -> dict[str, Any]:
    return {
        "BLOCK_R": config.rows,
        "BLOCK_C": config.columns,
        "SAME": same is not None,
        "TRANSPOSED": transposed is not None,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,
        "launch_cooperative_grid": True,
    }


@cache
def _resident_programs(
    config: TileConfig, dtype: torch.dtype, no_same: bool, no_transposed: bool, device: torch.device
) -> int:
    """How many programs of `_at_once_kernel` a GPU holds at once, for sizes that are multiples of 16."""
    outputs = None if no_same else torch.int8, None if no_transposed else torch.int8
    arguments = dtype, torch.int32, *outputs, torch.float32, 1024, 1024, 1024
    with torch.cuda.device(device):
        compiled = _at_once_kernel.warmup(*arguments, **_at_once_options(config, *outputs), grid=(1,))
    return resident_programs(compiled, config.num_warps, device)


_ABSMAX_BLOCK_R, _ABSMAX_BLOCK_C, _ABSMAX_WARPS = 64, 256, 8


@triton.jit
def _absmax_kernel(
    x_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    x_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program p: largest `magnitude_bits` of tiles p, p + P, p + 2 P, ... of P programs."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    tiles_per_row = tl.cdiv(num_columns, BLOCK_C)
    num_tiles = tl.cdiv(num_rows, BLOCK_R) * tiles_per_row
    bits = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows = (tile // tiles_per_row) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        rows = tl.minimum(rows, num_rows - 1)  # a row seen twice changes no maximum
        columns = (tile % tiles_per_row) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns, mask=columns < num_columns, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x))
    tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit
def _quantize_tiles_kernel(
    x_ptr,
    partial_ptr,
    same_ptr,
    transposed_ptr,
    scale_ptr,
    num_partials,
    num_rows,
    num_columns,
    x_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAX_PARTIALS: tl.constexpr,
    SAME: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LOADS_EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program p: int8 of tiles p, p + P, p + 2 P, ... of P programs."""
    tiles_per_row = tl.cdiv(num_columns, BLOCK_C)
    first = tl.program_id(0)
    rows, columns, mask = _tile(first, tiles_per_row, num_rows, num_columns, BLOCK_R, BLOCK_C)
    if LOADS_EARLY:
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # `_absmax_kernel` has ended; nothing was written before
    index = tl.arange(0, MAX_PARTIALS)
    partial = tl.load(partial_ptr + index, mask=index < num_partials, other=0)
    scale, inverse = scale_and_inverse(tl.max(partial, axis=0))
    tl.store(scale_ptr, scale)  # every program writes the same bits
    if not LOADS_EARLY:
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask)
    x_q = round_to_int8(x, inverse)
    store_tile(x_q, same_ptr, transposed_ptr, rows, columns, num_rows, num_columns, mask, SAME, TRANSPOSED)
    num_tiles = tl.cdiv(num_rows, BLOCK_R) * tiles_per_row
    for tile in tl.range(first + tl.num_programs(0), num_tiles, tl.num_programs(0)):
        rows, columns, mask = _tile(tile, tiles_per_row, num_rows, num_columns, BLOCK_R, BLOCK_C)
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask)
        x_q = round_to_int8(x, inverse)
        store_tile(
            x_q, same_ptr, transposed_ptr, rows, columns, num_rows, num_columns, mask, SAME, TRANSPOSED
        )


@triton.jit
def _at_once_kernel(
    x_ptr,
    meeting_ptr,
    same_ptr,
    transposed_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    x_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SAME: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Program p: tiles p, p + P, p + 2 P, ... of P programs, which are all on the GPU at once.

    They meet at two integers: the maximum, and how many programs have added to it.
    """
    tiles_per_row = tl.cdiv(num_columns, BLOCK_C)
    num_tiles = tl.cdiv(num_rows, BLOCK_R) * tiles_per_row
    bits = 0
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows, columns, mask = _tile(tile, tiles_per_row, num_rows, num_columns, BLOCK_R, BLOCK_C)
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
        bits = tl.maximum(bits, tl.max(tl.max(magnitude_bits(x), axis=1), axis=0))
    tl.atomic_max(meeting_ptr, bits, sem="relaxed")
    tl.atomic_add(meeting_ptr + 1, 1, sem="release")
    while tl.load(meeting_ptr + 1, volatile=True) < tl.num_programs(0):  # cheaper than to acquire each time
        pass
    while tl.atomic_add(meeting_ptr + 1, 0, sem="acquire") < tl.num_programs(0):
        pass
    scale, inverse = scale_and_inverse(tl.atomic_max(meeting_ptr, 0, sem="acquire"))
    tl.store(scale_ptr, scale)  # every program writes the same bits
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows, columns, mask = _tile(tile, tiles_per_row, num_rows, num_columns, BLOCK_R, BLOCK_C)
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask)
        x_q = round_to_int8(x, inverse)
        store_tile(x_q, same_ptr, transposed_ptr, rows, columns, num_rows, num_columns, mask, SAME, TRANSPOSED)


@triton.jit
def _tile(tile, tiles_per_row, num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows, columns and mask of a tile; the only tile of a matrix without elements is masked out."""
    tiles_per_row = tl.maximum(tiles_per_row, 1)
    rows = (tile // tiles_per_row) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    columns = (tile % tiles_per_row) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    return rows, columns, (rows < num_rows)[:, None] & (columns < num_columns)[None, :]


TUNER: Tuner[TileConfig] = Tuner("quantize_tensorwise", [__file__, int8.__file__])


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
