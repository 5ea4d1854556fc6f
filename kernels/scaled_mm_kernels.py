# mypy: allow-untyped-defs
"""Two Triton kernels of `scaled_mm` and `scaled_mm_blockwise`, and which configurations of all kernels there are.

What the ops mean, check and promise stands in `scaled_mm.py` and `scaled_mm_blockwise.py`; the third kernel, which they
have each their own of, in `scaled_mm_wgmma.py` and `scaled_mm_blockwise_wgmma.py`.
Shapes: M rows of A, N rows of B, K the summed dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from swcompile.kernels.int8 import BLOCK_ROWS
from swcompile.kernels.launch import INTERPRETED, Described, Launcher, address, device_facts, tl, triton


class MatmulConfig(NamedTuple):
    """Tile and schedule of one of the kernels."""

    kernel: str
    """ "wgmma": Hopper only; "tma": tiles moved by the tensor memory accelerator, Hopper and later; "pointers": any."""
    block_m: int
    block_n: int
    block_k: int
    """Elements of K a step."""
    num_warps: int
    num_stages: int
    """Steps whose operands are in flight or in use."""
    group_m: int = 8
    """Tiles of rows that are worked on together, so that operands meet in the L2 cache."""
    num_stores: int = 1
    """Not of "pointers": 2 stores the tile in two halves, which leaves more shared memory for stages."""
    programs_each: int = 1
    """Not of "pointers": programs a multiprocessor, which loop over the tiles."""
    lead: int = 0
    """ "wgmma" only: steps by which one half of the tile goes ahead of the other."""


HOPPER_CANDIDATES = [
    MatmulConfig("wgmma", 128, 256, 128, 4, 4, num_stores=2, lead=0),
    MatmulConfig("wgmma", 128, 128, 128, 4, 5, num_stores=1, lead=2),
    MatmulConfig("wgmma", 128, 64, 128, 4, 6, num_stores=1, lead=2),
    MatmulConfig("tma", 64, 128, 128, 4, 4, num_stores=1, programs_each=2),
    MatmulConfig("tma", 64, 64, 128, 4, 6, num_stores=1, programs_each=2),
]
"""The fastest for the shapes of benchmarks/kernel_speed.py on an H200, and smaller tiles for few rows or columns.

At the power limit, which holds a training step back, the first one is up to 11 % ahead of the next, whatever a few calls say.
It has no room for the tiles of a float32 result.
Tiles of 256 x 128, and the others by "tma", are never the fastest by more than 0.2 % (benchmarks/results/kernels_h200.md).
"""
MARGIN = 0.03
"""What a candidate has to be faster by, in a few calls, than one listed before it."""
TMA_CANDIDATES = [
    MatmulConfig("tma", 128, 256, 128, 8, 3, num_stores=2),
    MatmulConfig("tma", 128, 256, 128, 8, 4, num_stores=2),
    MatmulConfig("tma", 256, 128, 128, 8, 4, num_stores=2),
    MatmulConfig("tma", 128, 128, 128, 4, 3, num_stores=2, programs_each=2),
    MatmulConfig("tma", 128, 256, 128, 8, 3, group_m=16, num_stores=2),
    MatmulConfig("tma", 128, 128, 128, 8, 4, num_stores=2),
    MatmulConfig("tma", 64, 128, 128, 4, 4, num_stores=1, programs_each=2),
    MatmulConfig("tma", 64, 64, 128, 4, 6, num_stores=1, programs_each=2),
]
POINTER_CANDIDATES = [
    MatmulConfig("pointers", 128, 128, 64, 4, 3),
    MatmulConfig("pointers", 128, 256, 128, 8, 3),
    MatmulConfig("pointers", 256, 128, 128, 8, 3),
    MatmulConfig("pointers", 128, 128, 128, 8, 3),
    MatmulConfig("pointers", 128, 128, 128, 4, 4),
    MatmulConfig("pointers", 128, 256, 64, 8, 4),
    MatmulConfig("pointers", 64, 128, 128, 4, 3),
    MatmulConfig("pointers", 64, 64, 128, 4, 4),
]


def _has_room_for_two_sums(config: MatmulConfig) -> bool:
    """Whether a thread has registers for two sums of each of its elements: that of a block, and that of all blocks."""
    return config.block_m * config.block_n <= 64 * 32 * config.num_warps


HOPPER_BLOCKWISE_CANDIDATES = [
    MatmulConfig("wgmma", 128, 192, 128, 4, 4, lead=1),
    MatmulConfig("wgmma", 128, 192, 128, 4, 3, lead=1),
]
"""Of 192 columns. For float32 results there is room for three stages. On an H200 every large result of
benchmarks/results/kernels_h200.md took the first one.
"""
TMA_BLOCKWISE_CANDIDATES = [config for config in TMA_CANDIDATES if _has_room_for_two_sums(config)]
POINTER_BLOCKWISE_CANDIDATES = [config for config in POINTER_CANDIDATES if _has_room_for_two_sums(config)]


def candidates(
    device: torch.device,
    tma_fits: bool,
    num_rows: int,
    num_columns: int,
    num_summed: int,
    out_dtype: torch.dtype,
    *,
    blockwise: bool = False,
) -> list[MatmulConfig]:
    """What to choose among on a device for a result of this size, or of so many rows at least.

    Small tiles are for small results: where each multiprocessor has several of the large ones, they only cost the time to
    compile them, and so do other kernels than "wgmma" where it runs. Where each has many, so that the last hardly counts,
    of sums that are not very short, the first configuration is the fastest at the power limit. A few calls do not show
    that: it is taken untimed.

    Args:
        device: where.
        tma_fits: the answer of `fits_tma` for the operands.
        num_rows: M.
        num_columns: N.
        num_summed: K.
        out_dtype: of the result.
        blockwise: for `scaled_mm_blockwise`.
    """
    if blockwise:
        configs = TMA_BLOCKWISE_CANDIDATES if tma_fits else POINTER_BLOCKWISE_CANDIDATES
        if tma_fits and has_wgmma(device):
            configs = HOPPER_BLOCKWISE_CANDIDATES + configs
    elif not tma_fits:
        configs = POINTER_CANDIDATES
    else:
        configs = HOPPER_CANDIDATES if has_wgmma(device) else TMA_CANDIDATES
    facts = device_facts(device)
    room = facts.shared_memory - 1024  # CUDA takes 1 KiB a program
    configs = [
        config
        for config in configs
        if config.kernel != "wgmma" or wgmma_bytes(config, out_dtype.itemsize, blockwise=blockwise) <= room
    ]

    def tiles_each(block_m: int, block_n: int) -> float:
        return triton.cdiv(num_rows, block_m) * triton.cdiv(num_columns, block_n) / facts.num_multiprocessors

    if tiles_each(128, 128) < _SEVERAL_TILES:
        return configs
    large = [config for config in configs if config.block_m * config.block_n >= 128 * 128]
    by_wgmma = [config for config in large if config.kernel == "wgmma"]
    if by_wgmma and num_summed >= _SHORTEST_SUM and tiles_each(by_wgmma[0].block_m, by_wgmma[0].block_n) >= _MANY_TILES:
        return by_wgmma[:1]
    return by_wgmma or large


_SEVERAL_TILES = 4
"""Of 128 x 128 for a multiprocessor, of which two each are one of the large ones."""
_MANY_TILES = 7
"""Of the first configuration's for a multiprocessor."""
_SHORTEST_SUM = 512
"""The shortest whose configurations benchmarks/results/kernels_h200.md compares at the power limit."""


def wgmma_bytes(config: MatmulConfig, out_itemsize: int, *, blockwise: bool) -> int:
    """Shared memory that a program of the kernel "wgmma" takes at most, with 1 KiB for its barriers."""
    operands = config.num_stages * (config.block_m + config.block_n) * config.block_k
    scales = 4 * (config.num_stages + 1) * config.block_n if blockwise else 0
    return operands + scales + config.block_m * config.block_n // config.num_stores * out_itemsize + 1024


def has_wgmma(device: torch.device) -> bool:
    """True for Hopper, with a Triton whose Gluon has what the kernel needs."""
    if INTERPRETED or device_facts(device).capability != (9, 0):
        return False
    try:
        import swcompile.kernels.scaled_mm_wgmma  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def fits_tma(a_q_MK: torch.Tensor, b_q_NK: torch.Tensor, out_MN: torch.Tensor) -> bool:
    """True where there is a TMA (compute capability 9) and every row starts at a multiple of 16 bytes."""
    num_summed, row_bytes = a_q_MK.shape[1], out_MN.shape[1] * out_MN.element_size()
    return (
        device_facts(a_q_MK.device).capability >= (9, 0)
        and num_summed > 0
        and (num_summed | row_bytes | address(a_q_MK) | address(b_q_NK)) % 16 == 0
    )


def launcher(
    config: MatmulConfig,
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a: torch.Tensor | None,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    *,
    blockwise: bool = False,
) -> Callable[..., None]:
    """Launches one of the kernels in the given configuration on contiguous operands like these, given in this order.

    With `blockwise` there is no scale of A, and no bias.
    """
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    num_programs = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_columns, config.block_n)
    if config.kernel != "pointers":
        num_multiprocessors = device_facts(a_q_MK.device).num_multiprocessors
        num_programs = min(num_programs, config.programs_each * num_multiprocessors)
    if config.kernel == "wgmma" and blockwise:
        from swcompile.kernels.scaled_mm_blockwise_wgmma import blockwise_wgmma_launcher

        return blockwise_wgmma_launcher(config, num_programs, a_q_MK, b_q_NK)
    if config.kernel == "wgmma":
        from swcompile.kernels.scaled_mm_wgmma import wgmma_launcher

        return wgmma_launcher(config, num_programs, a_q_MK, b_q_NK, scale_b, bias_N)
    is_tma = config.kernel == "tma"
    kernel = Launcher(
        _tma_kernel if is_tma else _pointer_kernel,
        (num_programs,),
        num_rows,
        num_columns,
        num_summed,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        HAS_BIAS=bias_N is not None,
        SCALE_PER_COLUMN=scale_b.numel() > 1,
        BLOCKWISE=blockwise,
        **({"NUM_STORES": config.num_stores} if is_tma else {}),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,  # acc * scale + bias rounds twice, like the reference
    )
    if not is_tma:
        return lambda a, b, scale_a, scale_b, bias, out: kernel(a, b, out, scale_a, scale_b, bias)
    describe_a, describe_b = _described(config.block_m, config.block_k), _described(config.block_n, config.block_k)
    describe_out = _described(config.block_m, config.block_n // config.num_stores)
    return lambda a, b, scale_a, scale_b, bias, out: kernel(
        describe_a(a), describe_b(b), describe_out(out), scale_a, scale_b, bias
    )


def _described(rows: int, columns: int) -> Described:
    """Makes descriptors by which tiles of a contiguous matrix are moved."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return Described(lambda tensor: TensorDescriptor(tensor, tensor.shape, (tensor.shape[1], 1), [rows, columns]))


@triton.jit
def _tile_start(
    tile, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """First row and column of a tile. Tiles go down `GROUP` rows of tiles, then one column on."""
    tiles_down, tiles_across = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    group = tile // (GROUP * tiles_across)
    height = tl.minimum(tiles_down - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_across)
    return (group * GROUP + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def _scaled(
    acc,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    rows,
    columns,
    num_rows,
    num_columns,
    HAS_BIAS: tl.constexpr,
    PER_COLUMN: tl.constexpr,
):
    """In float32: ``(acc * scale_a) * scale_b + bias`` for a tile."""
    mask = columns < num_columns
    scale_a = tl.load(scale_a_ptr + rows, mask=rows < num_rows, other=0.0)
    scale_b = tl.load(scale_b_ptr + columns, mask=mask, other=0.0)[None, :] if PER_COLUMN else tl.load(scale_b_ptr)
    out = (acc.to(tl.float32) * scale_a[:, None]) * scale_b
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def _scaled_block(part, scale_ptr, block, columns, num_columns):
    """In float32: the sums of a block's products times the scales of their columns."""
    scale = tl.load(scale_ptr + block * num_columns + columns, mask=columns < num_columns, other=0.0)
    return part.to(tl.float32) * scale[None, :]


_BLOCK_ROWS = tl.constexpr(BLOCK_ROWS)


@triton.jit(do_not_specialize=["num_rows"])
def _tma_kernel(
    a_desc,
    b_desc,
    out_desc,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    num_rows,
    num_columns,
    num_summed,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_PER_COLUMN: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    NUM_STORES: tl.constexpr,
):
    num_tiles = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(num_columns, BLOCK_N)
    # Flattened with the loop over K, so that a tile's first operands are fetched while the last one is stored.
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=not BLOCKWISE):
        row, column = _tile_start(tile, num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        if BLOCKWISE:
            columns = column + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, num_summed, _BLOCK_ROWS):
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
                for k in range(start, min(start + _BLOCK_ROWS, num_summed), BLOCK_K):
                    part = tl.dot(a_desc.load([row, k]), b_desc.load([column, k]).T, part, out_dtype=tl.int32)
                acc += _scaled_block(part, scale_b_ptr, start // _BLOCK_ROWS, columns, num_columns)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            for k in range(0, num_summed, BLOCK_K):
                acc = tl.dot(a_desc.load([row, k]), b_desc.load([column, k]).T, acc, out_dtype=tl.int32)
        WIDTH: tl.constexpr = BLOCK_N // NUM_STORES
        if NUM_STORES == 1:
            parts = (acc,)
        else:
            parts = tl.split(acc.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1))
        for index in tl.static_range(NUM_STORES):
            out = parts[index]
            if not BLOCKWISE:
                columns = column + index * WIDTH + tl.arange(0, WIDTH)
                out = _scaled(
                    out, scale_a_ptr, scale_b_ptr, bias_ptr, rows, columns, num_rows, num_columns, HAS_BIAS,
                    SCALE_PER_COLUMN,
                )  # fmt: skip
            out_desc.store([row, column + index * WIDTH], out.to(out_desc.dtype))


@triton.jit(do_not_specialize=["num_rows"])
def _pointer_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    num_rows,
    num_columns,
    num_summed,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_PER_COLUMN: tl.constexpr,
    BLOCKWISE: tl.constexpr,
):
    row, column = _tile_start(tl.program_id(0), num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the last wrap around: what they compute is not stored.
    a_rows = a_ptr + (rows % num_rows).to(tl.int64)[:, None] * num_summed
    b_columns = b_ptr + (columns % num_columns).to(tl.int64)[None, :] * num_summed
    if BLOCKWISE:
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, num_summed, _BLOCK_ROWS):
            part = _sum(a_rows, b_columns, start, min(start + _BLOCK_ROWS, num_summed), BLOCK_M, BLOCK_N, BLOCK_K)
            out += _scaled_block(part, scale_b_ptr, start // _BLOCK_ROWS, columns, num_columns)
    else:
        acc = _sum(a_rows, b_columns, 0, num_summed, BLOCK_M, BLOCK_N, BLOCK_K)
        out = _scaled(
            acc, scale_a_ptr, scale_b_ptr, bias_ptr, rows, columns, num_rows, num_columns, HAS_BIAS, SCALE_PER_COLUMN
        )
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum(a_rows, b_columns, start, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The products of elements `start` to `end` of the rows and columns at these pointers, added in int32."""
    summed = start + tl.arange(0, BLOCK_K)
    a_ptrs, b_ptrs = a_rows + summed[None, :], b_columns + summed[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(start, end, BLOCK_K):
        mask = tl.arange(0, BLOCK_K) < end - k
        a = tl.load(a_ptrs, mask=mask[None, :], other=0)
        b = tl.load(b_ptrs, mask=mask[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return acc
