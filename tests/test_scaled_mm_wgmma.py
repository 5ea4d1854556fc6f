"""The Gluon kernel, compiled for Hopper without one: that this Triton still has what it needs, and overlaps."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A process of its own: the interpreter, where it is on, replaces parts of Triton's language.
PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from swcompile.kernels.scaled_mm_kernels import WGMMA_CANDIDATES
from swcompile.kernels.scaled_mm_wgmma import _layout, wgmma_kernel

config = WGMMA_CANDIDATES[0]
blocks = {
    "a_desc": ("i8", 1, config.rows, config.summed),
    "b_desc": ("i8", 1, config.columns, config.summed),
    "out_desc": ("bf16", 2, config.rows // 2, config.columns // config.num_stores),
}
signature = {
    name: f"tensordesc<{dtype}[{rows}, {columns}],{_layout(rows, columns, size)!r}>"
    for name, (dtype, size, rows, columns) in blocks.items()
}
signature |= dict(scale_a_ptr="*fp32", scale_b_ptr="*fp32", bias_ptr="*bf16")
signature |= dict(num_rows="i32", num_columns="i32", num_summed="i32")
constants = dict(
    ROWS=config.rows, COLUMNS=config.columns, SUMMED=config.summed, STAGES=config.num_stages, GROUP=config.group_rows,
    NUM_STORES=config.num_stores, LEAD=config.lead, HAS_BIAS=True, PER_COLUMN=True,
)
names = wgmma_kernel.arg_names
source = GluonASTSource(
    fn=wgmma_kernel,
    signature={name: "constexpr" if name in constants else signature[name] for name in names},
    constexprs={(names.index(name),): value for name, value in constants.items()},
)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=False))
assert kernel.metadata.shared <= 232448, kernel.metadata.shared
ptx = kernel.asm["ptx"]
assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in ptx
assert "wgmma.wait_group.sync.aligned 1" in ptx, "each multiplication waits for the one before"
assert "ld.local" not in ptx and "st.local" not in ptx
print("compiled")
"""


def test_compiles_for_hopper_with_overlapping_multiplications():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert "compiled" in done.stdout, done.stderr
