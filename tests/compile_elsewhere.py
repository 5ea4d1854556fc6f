"""Compiles kernels in Inductor's processes, for a GPU that need not be there, and finds them in this one."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from gpus import H100
from row_programs import PROGRAMS
from torch._inductor.async_compile import AsyncCompile, maybe_warm_pool
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas_version

from swcompile.kernels import quantize_tensorwise, scaled_mm_kernels
from swcompile.kernels.launch import Launch, recording
from swcompile.kernels.row_program import parse
from swcompile.kernels.row_program_triton import _warm_up, candidates
from swcompile.kernels.scaled_mm_kernels import MatmulConfig
from swcompile.kernels.workers import _assembler, _settings, compile_launch, run_for, submit

TARGET = GPUTarget("cuda", 90, 32)
MATMULS = [
    MatmulConfig("wgmma", 128, 256, 128, 4, 4, num_stores=2, lead=1),
    MatmulConfig("tma", 128, 256, 128, 8, 3, num_stores=2),
    MatmulConfig("pointers", 128, 128, 64, 4, 3),
]


def start_processes(folder: str) -> str:
    """Inductor's, with another assembler, of which they are to make no use; its path."""
    assert _assembler(90).version == get_ptxas_version(90)
    other = Path(folder, "ptxas")
    other.write_text("#!/bin/sh\necho Cuda compilation tools, release 1.0, V1.0.0\n")
    other.chmod(0o755)
    with mock.patch.dict(os.environ, TRITON_PTXAS_PATH=str(other), TRITON_PTXAS_BLACKWELL_PATH=str(other)):
        maybe_warm_pool()
        get_ptxas_version.cache_clear()
        assert "1.0.0" in get_ptxas_version(90), "what Inductor finds"
    get_ptxas_version.cache_clear()
    return str(other)


def launches() -> list[Launch]:
    """Of a quantiser in two configurations, which share a kernel, and of a matmul by each of its kernels."""
    x, x_q, x_q_t = torch.randn(256, 256).bfloat16(), torch.empty(256, 256).char(), torch.empty(256, 256).char()
    scale, scales = torch.ones(1, 1), torch.ones(256, 1)
    with (
        mock.patch.object(quantize_tensorwise, "device_facts", lambda device: H100),
        mock.patch.object(scaled_mm_kernels, "device_facts", lambda device: H100),
        recording() as found,
    ):
        for tile in quantize_tensorwise.CANDIDATES[:2]:
            quantize_tensorwise.launcher(tile, x, same=False, transposed=True)(x, None, x_q_t, scale)
        for config in MATMULS:
            operands = x_q, x_q, scales, scale, None, x
            scaled_mm_kernels.launcher(config, *operands)(*operands)
    names = [launch.name for launch in found.values()]
    assert names == ["_absmax_kernel", *["_quantize_tiles_kernel"] * 2, "wgmma_kernel", "_tma_kernel", "_pointer_kernel"]
    return list(found.values())


def refuse(*args: object) -> NoReturn:
    raise AssertionError("it is compiled here")


def main() -> None:
    """The last line that it prints says that all is well."""
    their_folder = tempfile.TemporaryDirectory()
    their_assembler = start_processes(their_folder.name)
    program, width = parse(PROGRAMS["rms_norm_backward"]), 1280
    warm_up = _warm_up, program, candidates(program, width)[0], width
    calls: list[tuple[Callable[..., list[Any]], object]] = [(compile_launch, launch) for launch in launches()]
    AsyncCompile.wait_pool_ready(timeout=600)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        futures = [submit(*call, target=TARGET) for call in (*calls, (*warm_up, True, H100))]
        for future in futures:
            assert future is not None, "there are no such processes"
            future.result()
        with mock.patch.object(CUDABackend, "make_ttir", refuse):
            for call in (*calls, (*warm_up, True, H100)):
                run_for(TARGET, _settings(), _assembler(90), *call)
        with tempfile.TemporaryDirectory() as another:
            run_for(TARGET, _settings() | {"TRITON_CACHE_DIR": another}, _assembler(90), *calls[0])
            assert any(Path(another).rglob("*.cubin")), "what was found in one folder is compiled for another"
        with mock.patch.object(CUDABackend, "make_ttir", refuse):
            try:
                run_for(TARGET, _settings(), _assembler(90), *warm_up, False, H100)
            except AssertionError as error:
                assert str(error) == "it is compiled here"
            else:
                raise AssertionError("nothing else was compiled there")
    theirs = {"TRITON_PTXAS_PATH": their_assembler, "TRITON_CACHE_DIR": os.getenv("TRITON_CACHE_DIR")}
    for name, value in theirs.items():
        assert AsyncCompile.process_pool().submit(os.getenv, name).result() == value, "their settings are theirs again"
    print("all found")


if __name__ == "__main__":
    main()
