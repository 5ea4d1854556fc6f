"""Which kernels of scaled_mm can be chosen where; and the Gluon kernel, compiled for Hopper without one."""

import pytest
import torch

pytest.importorskip("triton")

from gpus import H100
from processes import run_compiled

from swcompile.kernels import scaled_mm_kernels
from swcompile.kernels.scaled_mm_kernels import (
    HOPPER_BLOCKWISE_CANDIDATES,
    HOPPER_CANDIDATES,
    POINTER_CANDIDATES,
    TMA_BLOCKWISE_CANDIDATES,
    TMA_CANDIDATES,
    MatmulConfig,
    candidates,
    fits_tma,
    has_wgmma,
)

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def test_candidates():
    assert all(0 < len(configs) <= 8 for configs in (HOPPER_CANDIDATES, TMA_CANDIDATES, POINTER_CANDIDATES))
    small, large = (64, 64, 64, torch.bfloat16), (65536, 4096, 2048, torch.bfloat16)
    assert candidates(DEVICE, False, *small) == POINTER_CANDIDATES
    assert candidates(DEVICE, True, *small) == (HOPPER_CANDIDATES if has_wgmma(DEVICE) else TMA_CANDIDATES)
    for tma_fits in (False, True):
        kept = candidates(DEVICE, tma_fits, *large)
        of_large = [c for c in candidates(DEVICE, tma_fits, *small) if min(c.block_m, c.block_n) >= 128]
        assert 0 < len(kept) < len(candidates(DEVICE, tma_fits, *small))
        assert kept == (of_large[:1] if tma_fits and has_wgmma(DEVICE) else of_large)


@pytest.mark.parametrize("blockwise", [False, True])
def test_candidates_on_hopper(monkeypatch: pytest.MonkeyPatch, blockwise: bool):
    monkeypatch.setattr(scaled_mm_kernels, "device_facts", lambda device: H100)
    monkeypatch.setattr(scaled_mm_kernels, "has_wgmma", lambda device: True)

    def offered(*size: int, dtype: torch.dtype = torch.bfloat16) -> list[MatmulConfig]:
        return candidates(torch.device("cuda"), True, *size, dtype, blockwise=blockwise)

    first, second, *others = HOPPER_BLOCKWISE_CANDIDATES if blockwise else HOPPER_CANDIDATES
    others += TMA_BLOCKWISE_CANDIDATES if blockwise else []
    assert offered(64, 64, 2048) == [first, second, *others]
    assert offered(64, 64, 2048, dtype=torch.float32) == [second, *others], "tiles of float32 take more shared memory"
    assert offered(8192, 1280, 2048) == [first, second], "a few tiles each: which is faster depends on how many the last round has"
    assert offered(8192, 4096, 2048) == [first], "many: the fastest at the power limit, which a few calls do not show"
    assert offered(8192, 4096, 512) == [first]
    assert offered(8192, 4096, 256) == [first, second], "sums so short were not compared"
    assert offered(8192, 4096, 2048, dtype=torch.float32) == [second]


def test_tma_wants_multiples_of_16_bytes():
    has_tma = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    for num_summed, num_columns, fits in ((8, 8, False), (16, 4, False), (16, 8, has_tma)):
        a_q = torch.zeros(4, num_summed, dtype=torch.int8, device=DEVICE)
        out = torch.empty(4, num_columns, dtype=torch.bfloat16, device=DEVICE)
        assert fits_tma(a_q, a_q, out) == fits
    unaligned = torch.zeros(4 * 16 + 1, dtype=torch.int8, device=DEVICE)[1:].view(4, 16)
    assert not fits_tma(unaligned, unaligned, out)


INT8 = """
from swcompile.kernels.scaled_mm_kernels import HOPPER_CANDIDATES
from swcompile.kernels.scaled_mm_wgmma import wgmma_kernel as function

config = HOPPER_CANDIDATES[0]
blocks = {
    "a_desc": ("i8", 1, config.block_m, config.block_k),
    "b_desc": ("i8", 1, config.block_n, config.block_k),
    "out_desc": ("bf16", 2, config.block_m // 2, config.block_n // config.num_stores),
}
constants = dict(
    BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, STAGES=config.num_stages, GROUP=config.group_m,
    NUM_STORES=config.num_stores, LEAD=config.lead, HAS_BIAS=True, PER_COLUMN=True,
)
blockwise, instructions = False, ["m64n128k32.s32.s8.s8"]
rows, ROW_LAYOUT = {}, None
"""
BLOCKWISE = """
from swcompile.kernels.scaled_mm_blockwise_wgmma import ROW_LAYOUT, columns_of, constants_of, blockwise_wgmma_kernel as function
from swcompile.kernels.scaled_mm_kernels import HOPPER_BLOCKWISE_CANDIDATES

config = HOPPER_BLOCKWISE_CANDIDATES[0]
blocks = {"a_desc": ("i8", 1, config.block_m, config.block_k)}
for side, columns in zip(("left", "right"), columns_of(config)):
    blocks[f"{side}_desc"] = "i8", 1, columns, config.block_k
    blocks[f"{side}_out_desc"] = "bf16", 2, config.block_m // 2, columns
rows = dict(zip(("scale_left_desc", "scale_right_desc"), columns_of(config)))
constants = constants_of(config)
blockwise, instructions = True, ["m64n128k32.s32.s8.s8", "m64n64k32.s32.s8.s8"]
"""
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from swcompile.kernels.scaled_mm_kernels import wgmma_bytes
from swcompile.kernels.scaled_mm_wgmma import layout_of

signature = {
    name: f"tensordesc<{dtype}[{rows}, {columns}],{layout_of(rows, columns, size)!r}>"
    for name, (dtype, size, rows, columns) in blocks.items()
}
signature |= {name: f"tensordesc<fp32[{size}],{ROW_LAYOUT!r}>" for name, size in rows.items()}
signature |= dict(scale_a_ptr="*fp32", scale_b_ptr="*fp32", bias_ptr="*bf16")
signature |= dict(num_rows="i32", num_columns="i32", num_summed="i32")
names = function.arg_names
source = GluonASTSource(
    fn=function,
    signature={name: "constexpr" if name in constants else signature[name] for name in names},
    constexprs={(names.index(name),): value for name, value in constants.items()},
)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=False))
assert kernel.metadata.shared <= 232448, kernel.metadata.shared
spare = wgmma_bytes(config, 2, blockwise=blockwise) - kernel.metadata.shared
assert 0 <= spare < 1024, spare
ptx = kernel.asm["ptx"]
assert all(f"wgmma.mma_async.sync.aligned.{instruction}" in ptx for instruction in instructions)
in_flight = len(instructions)
assert f"wgmma.wait_group.sync.aligned {in_flight}" in ptx, "each multiplication waits for the one before"
assert "ld.local" not in ptx and "st.local" not in ptx
print("compiled")
"""


def test_compile_for_hopper_with_overlapping_multiplications():
    printed = run_compiled("-c", INT8 + COMPILE + BLOCKWISE + COMPILE)
    assert printed.splitlines() == ["compiled", "compiled"], printed
