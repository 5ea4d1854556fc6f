# mypy: allow-untyped-defs
"""Tensor-wise int8 quantisation, as it is, transposed, or both; also by a scale that is known.

Shapes: N rows (out features), K columns (in features); R rows and C columns in the order of storage.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from swcompile.kernels import int8
from swcompile.kernels.int8 import (
    absmax_reference,
    check_quantizer_input,
    has_unit_inner_stride,
    inverse_of,
    inverse_reference,
    magnitude_bits,
    round_reference,
    round_to_int8,
    scale_and_inverse,
    scale_and_inverse_reference,
    store_tile,
)
from swcompile.kernels.launch import Launcher, Plans, device_facts, empty, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.tuning import Tuner, bucket, worth_trying


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


def quantize_by_scale(x_NK: torch.Tensor, scale_11: torch.Tensor, transpose: bool) -> torch.Tensor:
    """The x_q of `quantize_tensorwise` or `quantize_tensorwise_transpose`, bit for bit, by the scale that it gave for x.

    For the backward: it reads the weight once, where finding the scale again would read it twice. A weight that has changed
    in between unnoticed is quantised as it is now, by the old scale: what has grown beyond that becomes 127 or -127.

    Args:
        x_NK: [N, K] bfloat16, float16 or float32, any strides.
        scale_11: [1, 1] float32.
        transpose: give x_q transposed.

    Returns:
        x_q [N, K] int8, contiguous, or [K, N] transposed.

    Raises:
        ValueError: x is of another dtype, or not a matrix; the scale is no single float32.
    """
    return QUANTIZE_BY_SCALE(x_NK, scale_11, transpose)


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


def quantize_by_scale_reference(x_NK: torch.Tensor, scale_11: torch.Tensor, transpose: bool) -> torch.Tensor:
    """`quantize_by_scale` in plain PyTorch, bit for bit."""
    _check_scale(scale_11)
    check_quantizer_input("quantize_by_scale", x_NK)
    x_q_NK = round_reference(x_NK, inverse_reference(scale_11), limited=True)
    return (x_q_NK.t() if transpose else x_q_NK).clone(memory_format=torch.contiguous_format)


def quantize_by_scale_work(num_rows: int, num_columns: int, itemsize: int) -> Work:
    """One multiplication an element; x read once."""
    num_elements = num_rows * num_columns
    return Work(flops=num_elements, bytes=num_elements * (itemsize + 1) + 4)


def quantize_tensorwise_work(num_rows: int, num_columns: int, itemsize: int, *, num_outputs: int = 1) -> Work:
    """One comparison and one multiplication an element; `num_outputs` is 2 for `quantize_tensorwise_both`.

    x counts as read twice: its last element may decide what its first becomes, and it need not fit a cache.
    """
    num_elements = num_rows * num_columns
    return Work(flops=2 * num_elements, bytes=num_elements * (2 * itemsize + num_outputs) + 4)


def quantize_tensorwise_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise` by the Triton kernels: what the op does on CUDA."""
    x_q_NK, _, scale_11 = _quantize(x_NK, same=True, transposed=False)
    assert x_q_NK is not None
    return x_q_NK, scale_11


def quantize_tensorwise_transpose_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise_transpose` by the Triton kernels: what the op does on CUDA."""
    _, x_q_KN, scale_11 = _quantize(x_NK, same=False, transposed=True)
    assert x_q_KN is not None
    return x_q_KN, scale_11


def quantize_tensorwise_both_triton(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_tensorwise_both` by the Triton kernels: what the op does on CUDA."""
    x_q_NK, x_q_KN, scale_11 = _quantize(x_NK, same=True, transposed=True)
    assert x_q_NK is not None and x_q_KN is not None
    return x_q_NK, x_q_KN, scale_11


def quantize_by_scale_triton(x_NK: torch.Tensor, scale_11: torch.Tensor, transpose: bool) -> torch.Tensor:
    """`quantize_by_scale` by the Triton kernel: what the op does on CUDA."""
    x_q_NK, x_q_KN, _ = _quantize(x_NK, scale_11, same=not transpose, transposed=transpose)
    x_q = x_q_KN if transpose else x_q_NK
    assert x_q is not None
    return x_q


class TileConfig(NamedTuple):
    """The tile that a program loads, rounds and stores."""

    rows: int
    columns: int
    num_warps: int
    loads_early: bool = False
    """The first tile is loaded before the scale is known: worth its registers where a program has one tile."""


MAX_PARTIALS = 256
"""Programs of the first kernel at most: each program of the second one takes the maximum of all their results."""
CANDIDATES = [
    TileConfig(64, 128, 4, loads_early=True),
    TileConfig(128, 64, 4),
    TileConfig(128, 128, 8),
    TileConfig(128, 128, 4),
]


def _quantize(
    x_NK: torch.Tensor, known_scale: torch.Tensor | None = None, *, same: bool, transposed: bool
) -> "Outputs":
    """(x_q, x_q transposed, scale); of the first two, one not asked for is None."""
    launch = PLANS.find([x_NK, known_scale], same, transposed)
    if launch is None:
        if x_NK.stride(0) == 1:  # stored as its transpose: swap the two outputs instead
            x_q_KN, x_q_NK, scale_11 = _quantize(x_NK.t(), known_scale, same=transposed, transposed=same)
            return x_q_NK, x_q_KN, scale_11
        return _quantize(x_NK.contiguous(), known_scale, same=same, transposed=transposed)
    outputs = _outputs(x_NK, known_scale, same, transposed)
    launch(x_NK, *outputs)
    return outputs


Outputs = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]


def _outputs(x_RC: torch.Tensor, known_scale: torch.Tensor | None, same: bool, transposed: bool) -> Outputs:
    num_rows, num_columns = x_RC.shape
    x_q_RC = empty((num_rows, num_columns), torch.int8, x_RC.device) if same else None
    x_q_CR = empty((num_columns, num_rows), torch.int8, x_RC.device) if transposed else None
    return x_q_RC, x_q_CR, empty((1, 1), torch.float32, x_RC.device) if known_scale is None else known_scale


def _prepare(
    x_NK: torch.Tensor, known_scale: torch.Tensor | None, same: bool, transposed: bool
) -> Callable[..., None] | None:
    """Launches the kernels on (x, x_q, x_q transposed, scale); None where x does not have its rows contiguous."""
    check_quantizer_input("quantize_tensorwise" if known_scale is None else "quantize_by_scale", x_NK)
    if known_scale is not None:
        _check_scale(known_scale)
    if not has_unit_inner_stride(x_NK):
        return None
    num_rows, num_columns = x_NK.shape
    outputs, knows_scale = _outputs(x_NK, known_scale, same, transposed), known_scale is not None

    def prepared(config: TileConfig) -> Callable[..., None]:
        return launcher(config, x_NK, same=same, transposed=transposed, knows_scale=knows_scale)

    def run(config: TileConfig) -> None:
        prepared(config)(x_NK, *outputs)

    key = (bucket(num_rows), num_columns, x_NK.dtype, same, transposed, knows_scale)
    return prepared(TUNER.choose(key, lambda: worth_trying(CANDIDATES, x_NK), run, x_NK.device))


PLANS = Plans(_prepare)


def launcher(
    config: TileConfig, x_RC: torch.Tensor, *, same: bool, transposed: bool, knows_scale: bool = False
) -> Callable[..., None]:
    """Launches the kernels on (x, x_q, x_q transposed, scale) in the given configuration.

    An output that is not asked for is None. The scale is written by them, or read if they need not find it.
    """
    num_rows, num_columns = x_RC.shape
    num_tiles = triton.cdiv(num_rows, config.rows) * triton.cdiv(num_columns, config.columns)
    facts = device_facts(x_RC.device)
    # The second kernel is launched while the first one runs, and waits inside (programmatic dependent launch).
    overlaps = x_RC.is_cuda and facts.capability >= (9, 0) and not knows_scale
    overlap = {"launch_pdl": True} if overlaps else {}
    num_absmax_tiles = triton.cdiv(num_rows, _ABSMAX_BLOCK_R) * triton.cdiv(num_columns, _ABSMAX_BLOCK_C)
    num_partials = 0
    if num_absmax_tiles and not knows_scale:
        num_partials = triton.cdiv(num_absmax_tiles, triton.cdiv(num_absmax_tiles, MAX_PARTIALS))  # as many tiles each
    find_absmax = Launcher(
        _absmax_kernel,
        (num_partials,),
        num_rows,
        num_columns,
        x_RC.stride(0),
        BLOCK_R=_ABSMAX_BLOCK_R,
        BLOCK_C=_ABSMAX_BLOCK_C,
        OVERLAP=overlaps,
        num_warps=_ABSMAX_WARPS,
    )
    quantize = Launcher(
        _quantize_tiles_kernel,
        (max(min(num_tiles, 16 * facts.num_multiprocessors), 1),),
        num_partials,
        num_rows,
        num_columns,
        x_RC.stride(0),
        BLOCK_R=config.rows,
        BLOCK_C=config.columns,
        MAX_PARTIALS=MAX_PARTIALS,
        SAME=same,
        TRANSPOSED=transposed,
        LOADS_EARLY=config.loads_early,
        KNOWS_SCALE=knows_scale,
        OVERLAP=overlaps,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **overlap,
    )

    def launch(
        x_RC: torch.Tensor,
        same_RC: torch.Tensor | None,
        transposed_CR: torch.Tensor | None,
        scale_11: torch.Tensor,
    ) -> None:
        partial_P = None if knows_scale else empty((MAX_PARTIALS,), torch.int32, x_RC.device)
        if num_partials:
            find_absmax(x_RC, partial_P)
        quantize(x_RC, partial_P, same_RC, transposed_CR, scale_11)

    return launch


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
    KNOWS_SCALE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program p: int8 of tiles p, p + P, p + 2 P, ... of P programs, counted from the end: what was read last is cached."""
    tiles_per_row = tl.maximum(tl.cdiv(num_columns, BLOCK_C), 1)
    num_tiles = tl.maximum(tl.cdiv(num_rows, BLOCK_R) * tl.cdiv(num_columns, BLOCK_C), 1)
    first = tl.program_id(0)
    rows, columns, mask = _tile(num_tiles - 1 - first, tiles_per_row, num_rows, num_columns, BLOCK_R, BLOCK_C)
    if LOADS_EARLY:
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # `_absmax_kernel` has ended; nothing was written before
    if KNOWS_SCALE:
        inverse = inverse_of(tl.load(scale_ptr))
    else:
        index = tl.arange(0, MAX_PARTIALS)
        partial = tl.load(partial_ptr + index, mask=index < num_partials, other=0)
        scale, inverse = scale_and_inverse(tl.max(partial, axis=0))
        tl.store(scale_ptr, scale)  # every program writes the same bits
    if not LOADS_EARLY:
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask)
    x_q = round_to_int8(x, inverse, KNOWS_SCALE)
    store_tile(x_q, same_ptr, transposed_ptr, rows, columns, num_rows, num_columns, mask, SAME, TRANSPOSED)
    for before in tl.range(first + tl.num_programs(0), num_tiles, tl.num_programs(0)):
        rows, columns, mask = _tile(num_tiles - 1 - before, tiles_per_row, num_rows, num_columns, BLOCK_R, BLOCK_C)
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + columns[None, :], mask=mask)
        x_q = round_to_int8(x, inverse, KNOWS_SCALE)
        store_tile(x_q, same_ptr, transposed_ptr, rows, columns, num_rows, num_columns, mask, SAME, TRANSPOSED)


@triton.jit
def _tile(tile, tiles_per_row, num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows, columns and mask of a tile; the only tile of a matrix without elements is masked out."""
    rows = (tile // tiles_per_row) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    columns = (tile % tiles_per_row) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    return rows, columns, (rows < num_rows)[:, None] & (columns < num_columns)[None, :]


TUNER: Tuner[TileConfig] = Tuner("quantize_tensorwise", [__file__, int8.__file__])


def _check_scale(scale: torch.Tensor) -> None:
    if scale.dtype != torch.float32 or scale.shape != (1, 1):
        raise ValueError(f"quantize_by_scale: scale is {scale.dtype} {tuple(scale.shape)}, but must be float32 (1, 1)")


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


def _fake_by_scale(x_NK: torch.Tensor, scale_11: torch.Tensor, transpose: bool) -> torch.Tensor:
    check_quantizer_input("quantize_by_scale", x_NK)
    _check_scale(scale_11)
    return _fake(x_NK.t() if transpose else x_NK)[0]


QUANTIZE_BY_SCALE = define_op(
    "quantize_by_scale(Tensor x, Tensor scale, bool transpose) -> Tensor",
    reference=quantize_by_scale_reference,
    cuda=quantize_by_scale_triton,
    fake=_fake_by_scale,
)
