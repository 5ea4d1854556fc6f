# mypy: allow-untyped-defs
"""`scaled_mm` for Hopper (compute capability 9.0), written in Gluon: what Triton's `tl.dot` leaves out for int8.

Triton waits for each int8 multiplication to end before it issues the next (it overlaps float32 accumulators
only), and nothing is multiplied while a finished tile is scaled and stored. Here one program fills each
multiprocessor with three roles that meet at barriers in shared memory only:

    load        1 warp   fetches the next operands into a ring of stages, across tiles
    multiply 0  4 warps  upper half of each tile: one multiplication in flight while the next is issued, then
                         the epilogue
    multiply 1  4 warps  lower half, `LEAD` steps behind: it has the tensor cores to itself while half 0 stores,
                         and the other way round

Each stage has two barriers: `loaded` is completed by the bytes of both operands, `free` by both halves once they
have multiplied with them. Shapes: M rows of A, N rows of B, K the summed dimension.
"""

from collections.abc import Callable
from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from swcompile.kernels.launch import Described, Launcher
from swcompile.kernels.scaled_mm_kernels import MatmulConfig

# Triton 3.9 renamed both.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


def wgmma_launcher(
    config: MatmulConfig,
    num_programs: int,
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
    scale_b: torch.Tensor,
    bias_N: torch.Tensor | None,
) -> Callable[..., None]:
    """Launches the kernel on operands like these (a, b, scale_a, scale_b, bias, out).

    They are contiguous, their rows start at multiples of 16 bytes, and there is one tile a program at least.
    """
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    kernel = Launcher(
        wgmma_kernel,
        (num_programs,),
        num_rows,
        num_columns,
        num_summed,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        GROUP=config.group_m,
        NUM_STORES=config.num_stores,
        LEAD=config.lead,
        HAS_BIAS=bias_N is not None,
        PER_COLUMN=scale_b.numel() > 1,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # acc * scale + bias rounds twice, like the reference
    )
    describe_a, describe_b = described(config.block_m, config.block_k), described(config.block_n, config.block_k)
    describe_out = described(config.block_m // 2, config.block_n // config.num_stores)
    return lambda a, b, scale_a, scale_b, bias, out: kernel(
        describe_a(a), describe_b(b), describe_out(out), scale_a, scale_b, bias
    )


def described(rows: int, columns: int) -> Described:
    """Makes descriptors by which tiles of a contiguous matrix are moved."""

    def describe(tensor: torch.Tensor) -> TensorDescriptor:
        layout = layout_of(rows, columns, tensor.element_size())
        return TensorDescriptor(tensor, tensor.shape, (tensor.shape[1], 1), [rows, columns], layout)

    return Described(describe)


@cache
def layout_of(rows: int, columns: int, itemsize: int) -> gl.NVMMASharedLayout:
    dtype = {1: gl.int8, 2: gl.bfloat16, 4: gl.float32}[itemsize]  # a layout depends on the size alone
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@gluon.jit
def tile_start(
    tile, num_rows, num_columns, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr
):
    """First row and column of a tile. Tiles go down `GROUP` rows of tiles, then one column on."""
    tiles_down, tiles_across = gl.cdiv(num_rows, BLOCK_M), gl.cdiv(num_columns, BLOCK_N)
    group = tile // (GROUP * tiles_across)
    height = min(tiles_down - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_across)
    return (group * GROUP + within % height) * BLOCK_M, (within // height) * BLOCK_N


@gluon.jit
def _load(
    a_desc,
    b_desc,
    shared,
    sizes,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    a_ring, b_ring, _, loaded, free, _ = shared
    num_rows, num_columns, num_summed = sizes
    num_tiles = gl.cdiv(num_rows, BLOCK_M) * gl.cdiv(num_columns, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = tile_start(tile, num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP)
        for k in range(0, num_summed, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(
                free.index(stage), (step // STAGES + 1) & 1
            )  # the first time round it is free at once
            barrier = loaded.index(stage)
            mbarrier.expect(barrier, (BLOCK_M + BLOCK_N) * BLOCK_K)
            async_load(a_desc, [row, k], barrier, a_ring.index(stage))
            async_load(b_desc, [column, k], barrier, b_ring.index(stage))
            step += 1


@gluon.jit
def _multiply(
    out_desc,
    pointers,
    shared,
    sizes,
    HALF: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    NUM_STORES: gl.constexpr,
    LEAD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PER_COLUMN: gl.constexpr,
):
    scale_a_ptr, scale_b_ptr, bias_ptr = pointers
    a_ring, b_ring, out_halves, loaded, free, started = shared
    num_rows, num_columns, num_summed = sizes
    HEIGHT: gl.constexpr = BLOCK_M // 2
    # Triton knows int8 instructions up to 224 columns, of which the largest power of two is 128.
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(128, BLOCK_N), 32]
    )
    num_tiles = gl.cdiv(num_rows, BLOCK_M) * gl.cdiv(num_columns, BLOCK_N)
    num_steps = gl.cdiv(num_summed, BLOCK_K)
    out_tile = out_halves.index(HALF)
    if not PER_COLUMN:
        scale_b = gl.load(scale_b_ptr)
    if HALF == 1 and LEAD > 0:
        mbarrier.wait(started, 0)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = tile_start(tile, num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP)
        row += HALF * HEIGHT
        rows = row + gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
        scale_a = gl.load(scale_a_ptr + rows, mask=rows < num_rows, other=0.0)
        acc = gl.zeros([HEIGHT, BLOCK_N], gl.int32, layout)
        for k in range(num_steps):
            stage = step % STAGES
            mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
            a = a_ring.index(stage).slice(HALF * HEIGHT, HEIGHT)
            acc = warpgroup_mma(a, b_ring.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(
                num_outstanding=1, deps=(acc,)
            )  # all but this one: the last stage is done with
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
            if HALF == 0 and LEAD > 0:  # noqa: SIM102 (the first is known at compile time)
                if step == min(LEAD, num_steps):
                    mbarrier.arrive(started, count=1)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)

        columns = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        if PER_COLUMN:
            scale_b = gl.expand_dims(gl.load(scale_b_ptr + columns, mask=columns < num_columns, other=0.0), 0)
        out = (acc.to(gl.float32) * gl.expand_dims(scale_a, 1)) * scale_b
        if HAS_BIAS:
            bias = gl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
            out += gl.expand_dims(bias.to(gl.float32), 0)
        out = out.to(out_desc.dtype)
        if NUM_STORES == 1:
            store(out_desc, out_tile, out, row, column)
        else:
            left, right = out.reshape((HEIGHT, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
            store(out_desc, out_tile, left, row, column)
            store(out_desc, out_tile, right, row, column + BLOCK_N // 2)
    tma.store_wait(0)


@gluon.jit
def store(out_desc, out_tile, out, row, column):
    tma.store_wait(0)  # until the last store has read its tile
    out_tile.store(out)
    fence_async_shared()
    async_store(out_desc, [row, column], out_tile)


@gluon.jit(do_not_specialize=["num_rows"])
def wgmma_kernel(
    a_desc,
    b_desc,
    out_desc,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    num_rows,
    num_columns,
    num_summed,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    NUM_STORES: gl.constexpr,
    LEAD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PER_COLUMN: gl.constexpr,
):
    gl.static_assert(LEAD < STAGES, "half 0 cannot be further ahead than there are stages")
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    out_halves = gl.allocate_shared_memory(
        out_desc.dtype, [2, BLOCK_M // 2, BLOCK_N // NUM_STORES], out_desc.layout
    )
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(started, count=1)
    fence_async_shared()  # the TMA sees the barriers as they are now
    shared = (a_ring, b_ring, out_halves, loaded, free, started)
    sizes = (num_rows, num_columns, num_summed)
    pointers = (scale_a_ptr, scale_b_ptr, bias_ptr)
    # Written out twice: a tuple that is given a name turns its constants into values of run time.
    gl.warp_specialize(
        [
            (_multiply, (out_desc, pointers, shared, sizes, 0, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP, NUM_STORES,
                         LEAD, HAS_BIAS, PER_COLUMN)),
            (_multiply, (out_desc, pointers, shared, sizes, 1, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP, NUM_STORES,
                         LEAD, HAS_BIAS, PER_COLUMN)),
            (_load, (a_desc, b_desc, shared, sizes, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
