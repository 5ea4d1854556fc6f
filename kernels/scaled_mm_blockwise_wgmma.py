# mypy: allow-untyped-defs
"""`scaled_mm_blockwise` for Hopper (compute capability 9.0), written in Gluon: sums in float32 beside the multiplications.

The sums of a block's products, which are int32, are scaled and added to others in float32. The three roles are those of
`scaled_mm_wgmma`: while one half of the tile adds, the other half has the tensor cores. Two sets of sums leave registers
for 192 columns, which no tensor of Triton's has: a tile is 128 columns, and 64 more on the right; and none for the scales
of the next block, which wait in shared memory.
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

from swcompile.kernels.int8 import BLOCK_ROWS
from swcompile.kernels.launch import Described, Launcher
from swcompile.kernels.scaled_mm_kernels import MatmulConfig
from swcompile.kernels.scaled_mm_wgmma import TensorDescriptor, async_load, described, store, tile_start


def blockwise_wgmma_launcher(
    config: MatmulConfig,
    num_programs: int,
    a_q_MK: torch.Tensor,
    b_q_NK: torch.Tensor,
) -> Callable[..., None]:
    """Launches the kernel on operands like these (a, b, None, scale, None, out).

    They are contiguous, their rows start at multiples of 16 bytes, and there is one tile a program at least.
    """
    (num_rows, num_summed), num_columns = a_q_MK.shape, b_q_NK.shape[0]
    kernel = Launcher(
        blockwise_wgmma_kernel,
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
    height = config.block_m // 2
    describe_out_left, describe_out_right = described(height, left), described(height, right)
    describe_scale_left, describe_scale_right = _described_row(left), _described_row(right)

    def launch(a: torch.Tensor, b: torch.Tensor, _: None, scale: torch.Tensor, __: None, out: torch.Tensor) -> None:
        operands = describe_a(a), describe_left(b), describe_right(b)
        scales = describe_scale_left(scale), describe_scale_right(scale)
        kernel(*operands, *scales, describe_out_left(out), describe_out_right(out))

    return launch


def _described_row(size: int) -> Described:
    """Makes descriptors by which so many adjacent elements of a contiguous tensor, of whatever shape, are moved."""

    def describe(tensor: torch.Tensor) -> TensorDescriptor:
        return TensorDescriptor(tensor, [tensor.numel()], [1], [size], ROW_LAYOUT)

    return Described(describe)


ROW_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


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
        "STEPS": BLOCK_ROWS // config.block_k,
    }


@gluon.jit
def _load(
    operand_descs,
    scale_descs,
    shared,
    sizes,
    BLOCK_M: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    STEPS: gl.constexpr,
):
    a_desc, left_desc, right_desc = operand_descs
    scale_left_desc, scale_right_desc = scale_descs
    operands, scales, _, barriers = shared
    a_ring, left_ring, right_ring = operands
    scale_left_ring, scale_right_ring = scales
    loaded, free, _ = barriers
    num_rows, num_columns, num_summed = sizes
    OPERAND_BYTES: gl.constexpr = (BLOCK_M + LEFT + RIGHT) * BLOCK_K
    SCALE_BYTES: gl.constexpr = (LEFT + RIGHT) * 4
    num_tiles = gl.cdiv(num_rows, BLOCK_M) * gl.cdiv(num_columns, LEFT + RIGHT)
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = tile_start(tile, num_rows, num_columns, BLOCK_M, LEFT + RIGHT, GROUP)
        for k in range(0, num_summed, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(
                free.index(stage), (step // STAGES + 1) & 1
            )  # the first time round it is free at once
            barrier = loaded.index(stage)
            block = k // (STEPS * BLOCK_K)
            if k == block * (STEPS * BLOCK_K):
                mbarrier.expect(barrier, OPERAND_BYTES + SCALE_BYTES)
                # Halves have not scaled at most the block before those in the stages: a place each, and one.
                place = turn % (STAGES + 1)
                first = block * num_columns + column
                async_load(scale_left_desc, [first], barrier, scale_left_ring.index(place))
                async_load(scale_right_desc, [first + LEFT], barrier, scale_right_ring.index(place))
                turn += 1
            else:
                mbarrier.expect(barrier, OPERAND_BYTES)
            async_load(a_desc, [row, k], barrier, a_ring.index(stage))
            async_load(left_desc, [column, k], barrier, left_ring.index(stage))
            async_load(right_desc, [column + LEFT, k], barrier, right_ring.index(stage))
            step += 1


@gluon.jit
def _multiply(
    out_descs,
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
    left_out_desc, right_out_desc = out_descs
    operands, scales, outs, barriers = shared
    a_ring, left_ring, right_ring = operands
    scale_left_ring, scale_right_ring = scales
    left_halves, right_halves = outs
    loaded, free, started = barriers
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
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, column = tile_start(tile, num_rows, num_columns, BLOCK_M, LEFT + RIGHT, GROUP)
        row += HALF * HEIGHT
        left = gl.zeros([HEIGHT, LEFT], gl.float32, left_layout)
        right = gl.zeros([HEIGHT, RIGHT], gl.float32, right_layout)
        for first in range(0, num_steps, STEPS):
            left_part = gl.zeros([HEIGHT, LEFT], gl.int32, left_layout)
            right_part = gl.zeros([HEIGHT, RIGHT], gl.int32, right_layout)
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
            place = turn % (STAGES + 1)
            right += _scaled(right_part, scale_right_ring.index(place))
            left += _scaled(left_part, scale_left_ring.index(place))
            turn += 1
        store(left_out_desc, left_halves.index(HALF), left.to(left_out_desc.dtype), row, column)
        store(right_out_desc, right_halves.index(HALF), right.to(right_out_desc.dtype), row, column + LEFT)
    tma.store_wait(0)


@gluon.jit
def _scaled(part, scale):
    """The sums of one block's products, times the scales of their columns."""
    columns: gl.constexpr = gl.SliceLayout(0, part.type.layout)
    return part.to(gl.float32) * gl.expand_dims(scale.load(columns), 0)


@gluon.jit(do_not_specialize=["num_summed"])
def blockwise_wgmma_kernel(
    a_desc,
    left_desc,
    right_desc,
    scale_left_desc,
    scale_right_desc,
    left_out_desc,
    right_out_desc,
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
    HEIGHT: gl.constexpr = BLOCK_M // 2
    PLACES: gl.constexpr = STAGES + 1
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    left_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES, LEFT, BLOCK_K], left_desc.layout)
    right_ring = gl.allocate_shared_memory(right_desc.dtype, [STAGES, RIGHT, BLOCK_K], right_desc.layout)
    scale_left_ring = gl.allocate_shared_memory(gl.float32, [PLACES, LEFT], scale_left_desc.layout)
    scale_right_ring = gl.allocate_shared_memory(gl.float32, [PLACES, RIGHT], scale_right_desc.layout)
    left_halves = gl.allocate_shared_memory(left_out_desc.dtype, [2, HEIGHT, LEFT], left_out_desc.layout)
    right_halves = gl.allocate_shared_memory(right_out_desc.dtype, [2, HEIGHT, RIGHT], right_out_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(started, count=1)
    fence_async_shared()  # the TMA sees the barriers as they are now
    operands = (a_ring, left_ring, right_ring)
    scales = (scale_left_ring, scale_right_ring)
    shared = (operands, scales, (left_halves, right_halves), (loaded, free, started))
    sizes = (num_rows, num_columns, num_summed)
    operand_descs = (a_desc, left_desc, right_desc)
    scale_descs = (scale_left_desc, scale_right_desc)
    out_descs = (left_out_desc, right_out_desc)
    # Written out twice: a tuple that is given a name turns its constants into values of run time.
    gl.warp_specialize(
        [
            (_multiply, (out_descs, shared, sizes, 0, BLOCK_M, LEFT, RIGHT, BLOCK_K, STAGES, GROUP, LEAD, STEPS)),
            (_multiply, (out_descs, shared, sizes, 1, BLOCK_M, LEFT, RIGHT, BLOCK_K, STAGES, GROUP, LEAD, STEPS)),
            (_load, (operand_descs, scale_descs, shared, sizes, BLOCK_M, LEFT, RIGHT, BLOCK_K, STAGES, GROUP, STEPS)),
        ],
        [4, 1],
        [232, 40],
    )
