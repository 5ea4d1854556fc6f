# mypy: allow-untyped-defs
"""Two Triton kernels of `scaled_mm` and `scaled_mm_e4m3`, and which configurations of all kernels there are.

What the ops mean, check and promise stands in `scaled_mm.py` and `scaled_mm_e4m3.py`; the third kernel, which int8 and
e4m3 have each their own of, in `scaled_mm_wgmma.py` and `scaled_mm_e4m3_wgmma.py`.
Shapes: M rows of A, N rows of B, K the summed dimension.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from swcompile.kernels.launch import INTERPRETED, Described, Launcher, device_facts, tl, triton


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
    MatmulConfig("wgmma", 256, 128, 128, 4, 4, num_stores=2, lead=1),
    MatmulConfig("wgmma", 128, 128, 128, 4, 5, num_stores=1, lead=2),
    MatmulConfig("wgmma", 128, 64, 128, 4, 6, num_stores=1, lead=2),
    MatmulConfig("tma", 128, 128, 128, 4, 3, num_stores=2, programs_each=2),
    MatmulConfig("tma", 64, 128, 128, 4, 4, num_stores=1, programs_each=2),
    MatmulConfig("tma", 64, 64, 128, 4, 6, num_stores=1, programs_each=2),
]
"""The fastest for the shapes of benchmarks/kernel_speed.py on an H200, and smaller tiles for few rows.

At the power limit, which holds a training step back, the first one is between 2 % behind the next (4096 -> 14336) and 8 %
ahead of it (1280 -> 5120), whatever a few calls say.
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
HOPPER_E4M3_CANDIDATES = [
    MatmulConfig("wgmma", 128, 192, 128, 4, 4, lead=1),
    MatmulConfig("wgmma", 128, 192, 128, 4, 4, group_m=16, lead=0),
    MatmulConfig("wgmma", 128, 192, 128, 4, 3, lead=1),
    *(config for config in TMA_CANDIDATES if config.block_m * config.block_n <= 128 * 128),
]
"""192 columns, and smaller tiles. For float32 results there is room for three stages."""
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


@cache
def candidates(
    device: torch.device, tma_fits: bool, dtype: torch.dtype, num_rows: int, num_columns: int
) -> list[MatmulConfig]:
    """What to choose among on a device for a result of this size, or of so many rows at least.

    Small tiles are for small results: where each multiprocessor has several of the large ones, they only cost the time to
    compile them.

    Args:
        device: where.
        tma_fits: the answer of `fits_tma` for the operands.
        dtype: of the operands.
        num_rows: M.
        num_columns: N.
    """
    if not tma_fits:
        configs = POINTER_CANDIDATES
    elif not has_wgmma(device):
        configs = TMA_CANDIDATES
    else:
        configs = HOPPER_CANDIDATES if dtype == torch.int8 else HOPPER_E4M3_CANDIDATES
    many = _MANY_TILES * device_facts(device).num_multiprocessors
    is_large = triton.cdiv(num_rows, 128) * triton.cdiv(num_columns, 128) >= many
    return [config for config in configs if config.block_m * config.block_n >= 128 * 128 or not is_large]


_MANY_TILES = 4
"""Of 128 x 128 for a multiprocessor, of which two each are one of the large ones."""


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
        and (num_summed | row_bytes | a_q_MK.data_ptr() | b_q_NK.data_ptr()) % 16 == 0
    )


def launcher(
    config: MatmulConfig,
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_a_M1: torch.Tensor,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
) -> Callable[..., None]:
    """Launches one of the kernels in the given configuration on contiguous operands like these, given in this order."""
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    num_programs = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_columns, config.block_n)
    if config.kernel != "pointers":
        num_multiprocessors = device_facts(a_q_MK.device).num_multiprocessors
        num_programs = min(num_programs, config.programs_each * num_multiprocessors)
    if config.kernel == "wgmma" and a_q_MK.dtype != torch.int8:
        from swcompile.kernels.scaled_mm_e4m3_wgmma import e4m3_wgmma_launcher

        return e4m3_wgmma_launcher(config, num_programs, a_q_MK, b_q_NK)
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
        E4M3=a_q_MK.dtype != torch.int8,
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
def _scale(
    acc,
    scale_a,
    scale_b_ptr,
    bias_ptr,
    columns,
    num_columns,
    HAS_BIAS: tl.constexpr,
    PER_COLUMN: tl.constexpr,
):
    """The epilogue, in float32: ``(acc * scale_a) * scale_b + bias`` for a tile of these columns."""
    mask = columns < num_columns
    scale_b = (
        tl.load(scale_b_ptr + columns, mask=mask, other=0.0)[None, :] if PER_COLUMN else tl.load(scale_b_ptr)
    )
    out = (acc.to(tl.float32) * scale_a[:, None]) * scale_b
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def _multiply(a, b, acc, E4M3: tl.constexpr):
    """``acc + a @ b``, exact in int32; of e4m3, whose products Hopper adds in 14 bits, each step's sum in float32."""
    if E4M3:
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1], out_dtype=tl.float32)
    else:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


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
    E4M3: tl.constexpr,
    NUM_STORES: tl.constexpr,
):
    num_tiles = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(num_columns, BLOCK_N)
    # Flattened with the loop over K, so that a tile's first operands are fetched while the last one is stored.
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row, column = _tile_start(tile, num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if E4M3 else tl.int32)
        for k in range(0, num_summed, BLOCK_K):
            acc = _multiply(a_desc.load([row, k]), b_desc.load([column, k]).T, acc, E4M3)
        rows = row + tl.arange(0, BLOCK_M)
        scale_a = tl.load(scale_a_ptr + rows, mask=rows < num_rows, other=0.0)
        WIDTH: tl.constexpr = BLOCK_N // NUM_STORES
        columns = column + tl.arange(0, WIDTH)
        if NUM_STORES == 1:
            out = _scale(
                acc, scale_a, scale_b_ptr, bias_ptr, columns, num_columns, HAS_BIAS, SCALE_PER_COLUMN
            )
            out_desc.store([row, column], out.to(out_desc.dtype))
        else:
            left, right = tl.split(acc.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1))
            out = _scale(
                left, scale_a, scale_b_ptr, bias_ptr, columns, num_columns, HAS_BIAS, SCALE_PER_COLUMN
            )
            out_desc.store([row, column], out.to(out_desc.dtype))
            out = _scale(
                right,
                scale_a,
                scale_b_ptr,
                bias_ptr,
                columns + WIDTH,
                num_columns,
                HAS_BIAS,
                SCALE_PER_COLUMN,
            )
            out_desc.store([row, column + WIDTH], out.to(out_desc.dtype))


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
    E4M3: tl.constexpr,
):
    row, column = _tile_start(tl.program_id(0), num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    summed = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the last wrap around: what they compute is not stored.
    a_ptrs = a_ptr + (rows % num_rows).to(tl.int64)[:, None] * num_summed + summed[None, :]
    b_ptrs = b_ptr + (columns % num_columns).to(tl.int64)[None, :] * num_summed + summed[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if E4M3 else tl.int32)
    for k in range(0, num_summed, BLOCK_K):
        mask = summed < num_summed - k
        a = tl.load(a_ptrs, mask=mask[None, :], other=0.0 if E4M3 else 0)
        b = tl.load(b_ptrs, mask=mask[:, None], other=0.0 if E4M3 else 0)
        acc = _multiply(a, b, acc, E4M3)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    scale_a = tl.load(scale_a_ptr + rows, mask=rows < num_rows, other=0.0)
    out = _scale(acc, scale_a, scale_b_ptr, bias_ptr, columns, num_columns, HAS_BIAS, SCALE_PER_COLUMN)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
