# mypy: allow-untyped-defs
"""`scaled_mm_e4m3` for Hopper (compute capability 9.0), written in Gluon: sums in float32 beside the multiplications.

Hopper adds e4m3 products in 14 bits, so the sums of every `PRODUCTS` products are added to others in float32. The three
roles are those of `scaled_mm_wgmma`: while one half of the tile adds, the other half has the tensor cores. Two sets of
sums leave registers for 192 columns, which no tensor of Triton's has: a tile is 128 columns, and 64 more on the right.
Shapes: M rows of A, N rows of B, K the summed dimension.
"""

from collections.abc import Callable

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

from swcompile.kernels.launch import Launcher
from swcompile.kernels.scaled_mm_kernels import MatmulConfig
from swcompile.kernels.scaled_mm_wgmma import async_load, described, store, tile_start

PRODUCTS = 512
"""Added in 14 bits: 16 roundings down by at most 2^-13, where e4m3 itself rounds by up to 2^-4."""


def e4m3_wgmma_launcher(
    config: MatmulConfig,
    num_programs: int,
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
) -> Callable[..., None]:
    """Launches the kernel on operands like these (a, b, scale_a, scale_b, None, out).

    They are contiguous, their rows start at multiples of 16 bytes, and there is one tile a program at least.
    """
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    kernel = Launcher(
        e4m3_wgmma_kernel,
        (num_programs,),
        num_rows,
        num_columns,
        num_summed,
        **constants_of(config),
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # rounds as the reference does
    )
    left, right = columns_of(config)
    describe_a = described(config.block_m, config.block_k)
    describe_left, describe_right = described(left, config.block_k), described(right, config.block_k)
    describe_out_left, describe_out_right = described(config.block_m // 2, left), described(config.block_m // 2, right)

    def launch(
        a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, _: None, out: torch.Tensor
    ) -> None:
        outs = describe_out_left(out), describe_out_right(out)
        kernel(describe_a(a), describe_left(b), describe_right(b), *outs, scale_a, scale_b)

    return launch


def columns_of(config: MatmulConfig) -> tuple[int, int]:
    """Columns of a tile's left and right part: the powers of two that its columns are the sum of."""
    left = 1 << (config.block_n.bit_length() - 1)
    assert config.block_n > left, "a tile of a power of two has no right part"
    return left, config.block_n - left


def constants_of(config: MatmulConfig) -> dict[str, int]:
    """The kernel's arguments that are known when it is compiled."""
    left, right = columns_of(config)
    return {
        "BLOCK_M": config.block_m,
        "LEFT": left,
        "RIGHT": right,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "GROUP": config.group_m,
        "LEAD": config.lead,
        "STEPS": PRODUCTS // config.block_k,
    }


@gluon.jit
def _load(
    a_desc,
    left_desc,
    right_desc,
    shared,
    sizes,
    BLOCK_M: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    a_ring, left_ring, right_ring, _, _, loaded, free, _ = shared
    num_rows, num_columns, num_summed = sizes
    num_tiles = gl.cdiv(num_rows, BLOCK_M) * gl.cdiv(num_columns, LEFT + RIGHT)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = tile_start(tile, num_rows, num_columns, BLOCK_M, LEFT + RIGHT, GROUP)
        for k in range(0, num_summed, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(
                free.index(stage), (step // STAGES + 1) & 1
            )  # the first time round it is free at once
            barrier = loaded.index(stage)
            mbarrier.expect(barrier, (BLOCK_M + LEFT + RIGHT) * BLOCK_K)
            async_load(a_desc, [row, k], barrier, a_ring.index(stage))
            async_load(left_desc, [column, k], barrier, left_ring.index(stage))
            async_load(right_desc, [column + LEFT, k], barrier, right_ring.index(stage))
            step += 1


@gluon.jit
def _multiply(
    left_out_desc,
    right_out_desc,
    pointers,
    shared,
    sizes,
    HALF: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LEAD: gl.constexpr,
    STEPS: gl.constexpr,
):
    scale_a_ptr, scale_b_ptr = pointers
    a_ring, left_ring, right_ring, left_halves, right_halves, loaded, free, started = shared
    num_rows, num_columns, num_summed = sizes
    HEIGHT: gl.constexpr = BLOCK_M // 2
    left_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, LEFT, 32]
    )
    right_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, RIGHT, 32]
    )
    num_tiles = gl.cdiv(num_rows, BLOCK_M) * gl.cdiv(num_columns, LEFT + RIGHT)
    num_steps = gl.cdiv(num_summed, BLOCK_K)
    if HALF == 1 and LEAD > 0:
        mbarrier.wait(started, 0)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = tile_start(tile, num_rows, num_columns, BLOCK_M, LEFT + RIGHT, GROUP)
        row += HALF * HEIGHT
        left = gl.zeros([HEIGHT, LEFT], gl.float32, left_layout)
        right = gl.zeros([HEIGHT, RIGHT], gl.float32, right_layout)
        for first in range(0, num_steps, STEPS):
            left_part = gl.zeros([HEIGHT, LEFT], gl.float32, left_layout)
            right_part = gl.zeros([HEIGHT, RIGHT], gl.float32, right_layout)
            for k in range(first, min(first + STEPS, num_steps)):
                stage = step % STAGES
                mbarrier.wait(loaded.index(stage), (step // STAGES) & 1)
                a = a_ring.index(stage).slice(HALF * HEIGHT, HEIGHT)
                left_part = warpgroup_mma(a, left_ring.index(stage).permute((1, 0)), left_part, is_async=True)
                right_part = warpgroup_mma(a, right_ring.index(stage).permute((1, 0)), right_part, is_async=True)
                left_part, right_part = warpgroup_mma_wait(
                    num_outstanding=2, deps=(left_part, right_part)
                )  # all but these two: the last stage is done with
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=k > first)
                step += 1
                if HALF == 0 and LEAD > 0:  # noqa: SIM102 (the first is known at compile time)
                    if step == min(LEAD, num_steps):
                        mbarrier.arrive(started, count=1)
            left_part, right_part = warpgroup_mma_wait(num_outstanding=0, deps=(left_part, right_part))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
            left += left_part
            right += right_part
        _scale_and_store(
            left, scale_a_ptr, scale_b_ptr, left_out_desc, left_halves.index(HALF), row, column, num_rows, num_columns,
            HEIGHT, LEFT, left_layout,
        )  # fmt: skip
        _scale_and_store(
            right, scale_a_ptr, scale_b_ptr, right_out_desc, right_halves.index(HALF), row, column + LEFT, num_rows,
            num_columns, HEIGHT, RIGHT, right_layout,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _scale_and_store(
    acc,
    scale_a_ptr,
    scale_b_ptr,
    out_desc,
    out_tile,
    row,
    column,
    num_rows,
    num_columns,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
):
    rows = row + gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    scale_a = gl.load(scale_a_ptr + rows, mask=rows < num_rows, other=0.0)
    scale_b = gl.load(scale_b_ptr + columns, mask=columns < num_columns, other=0.0)
    out = (acc * gl.expand_dims(scale_a, 1)) * gl.expand_dims(scale_b, 0)
    store(out_desc, out_tile, out.to(out_desc.dtype), row, column)


@gluon.jit(do_not_specialize=["num_summed"])
def e4m3_wgmma_kernel(
    a_desc,
    left_desc,
    right_desc,
    left_out_desc,
    right_out_desc,
    scale_a_ptr,
    scale_b_ptr,
    num_rows,
    num_columns,
    num_summed,
    BLOCK_M: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LEAD: gl.constexpr,
    STEPS: gl.constexpr,
):
    gl.static_assert(LEAD < STAGES, "half 0 cannot be further ahead than there are stages")
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    left_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES, LEFT, BLOCK_K], left_desc.layout)
    right_ring = gl.allocate_shared_memory(right_desc.dtype, [STAGES, RIGHT, BLOCK_K], right_desc.layout)
    left_halves = gl.allocate_shared_memory(left_out_desc.dtype, [2, BLOCK_M // 2, LEFT], left_out_desc.layout)
    right_halves = gl.allocate_shared_memory(right_out_desc.dtype, [2, BLOCK_M // 2, RIGHT], right_out_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(started, count=1)
    fence_async_shared()  # the TMA sees the barriers as they are now
    shared = (a_ring, left_ring, right_ring, left_halves, right_halves, loaded, free, started)
    sizes = (num_rows, num_columns, num_summed)
    pointers = (scale_a_ptr, scale_b_ptr)
    # Written out twice: a tuple that is given a name turns its constants into values of run time.
    gl.warp_specialize(
        [
            (_multiply, (left_out_desc, right_out_desc, pointers, shared, sizes, 0, BLOCK_M, LEFT, RIGHT, BLOCK_K, STAGES,
                         GROUP, LEAD, STEPS)),
            (_multiply, (left_out_desc, right_out_desc, pointers, shared, sizes, 1, BLOCK_M, LEFT, RIGHT, BLOCK_K, STAGES,
                         GROUP, LEAD, STEPS)),
            (_load, (a_desc, left_desc, right_desc, shared, sizes, BLOCK_M, LEFT, RIGHT, BLOCK_K, STAGES, GROUP)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
