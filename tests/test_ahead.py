"""The kernels of a graph's ops are compiled ahead of their first call."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gpus import H100, L40S
from processes import run_program
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from swcompile import ahead
from swcompile.graph_pass import LateGraphPass
from swcompile.kernels import (
    launch,
    quantize_columnwise,
    quantize_rowwise,
    quantize_tensorwise,
    scaled_mm_kernels,
    tuning,
)
from swcompile.kernels.launch import Launch

ops = torch.ops.swcompile
GPUS = {"Hopper": H100, "another": L40S}
MATMULS = {"Hopper": {"wgmma_kernel": 2, "_tma_kernel": 0}, "another": {"_pointer_kernel": 6}}
"""On Hopper wide results have one configuration, and narrow ones a second."""


def linear(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    x_q, scales = ops.quantize_rowwise(x)
    weight_q, scale = ops.quantize_tensorwise(weight)
    return ops.scaled_mm(x_q, weight_q, scales, scale, None, torch.bfloat16)


def every_other_op(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    x_q, scales = ops.quantize_rowwise(x)
    weight_q, weight_q_t, scale = ops.quantize_tensorwise_both(weight)
    a, (b, by_block) = ops.transpose(x_q), ops.quantize_blockwise_transpose(x, scales)
    return [
        ops.dequantize(x_q, scales, torch.bfloat16), ops.scaled_mm_blockwise(a, b, by_block, torch.bfloat16),
        *ops.quantize_columnwise_transpose(x), *ops.quantize_tensorwise_transpose(weight),
        ops.quantize_by_scale(weight, scale, True), weight_q, weight_q_t,
    ]  # fmt: skip


def trace(function: Callable[..., Any], *, device: str = "cuda", symbolic: bool = False) -> fx.Graph:
    """Of a function of bfloat16 that is nowhere: tokens [32768, 4096], weights [4096, 4096], [14336, 4096] and [1024, 4096]."""
    sizes = ShapeEnv()
    rows: Any = 32768
    if symbolic:
        source = ConstantSource("rows")
        rows = sizes.create_symintnode(sizes.create_symbol(rows, source), hint=rows, source=source)
    with FakeTensorMode(shape_env=sizes):
        x = torch.empty(rows, 4096, device=device, dtype=torch.bfloat16)
        weight = torch.empty(4096, 4096, device=device, dtype=torch.bfloat16)
        wide = torch.empty(14336, 4096, device=device, dtype=torch.bfloat16)
        narrow = torch.empty(1024, 4096, device=device, dtype=torch.bfloat16)
        return make_fx(function, tracing_mode="real")(x, weight, wide, narrow).graph


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for module in (launch, quantize_columnwise, quantize_rowwise, quantize_tensorwise, scaled_mm_kernels, tuning):
        monkeypatch.setattr(module, "device_facts", lambda device: GPUS[request.param])
    monkeypatch.setattr(scaled_mm_kernels, "has_wgmma", lambda device: request.param == "Hopper")
    monkeypatch.setattr(tuning.Tuner, "_path", lambda tuner, device: tmp_path / f"{tuner._name}.json")
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    return str(request.param)


@pytest.fixture
def submitted(gpu: str, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    found: list[Launch] = []

    def submit(launches: list[Launch], device: torch.device, *, at_once: bool) -> list[Any]:
        assert device == torch.device("cuda", 0) and not at_once
        found.extend(launches)
        return []

    monkeypatch.setattr(ahead, "compile_elsewhere", submit)
    return found


def test_each_configuration_that_will_be_tried_is_compiled_once(gpu: str, submitted: list[Launch]) -> None:
    def layers(x: torch.Tensor, weight: torch.Tensor, wide: torch.Tensor, narrow: torch.Tensor) -> list[torch.Tensor]:
        x = linear(linear(x, weight), weight)
        return [linear(x, wide), linear(x, narrow)]  # shapes do not make a kernel another one

    LateGraphPass([], hook="post_grad_custom_post_pass").run(trace(layers))
    names = Counter(found.name for found in submitted)
    num_tries = 1 if gpu == "Hopper" else 4
    assert names["_quantize_tiles_kernel"] == num_tries and names["_absmax_kernel"] == 1
    assert (names["_quantize_rowwise_kernel"] == 1) == (gpu == "Hopper")
    assert {name: names[name] for name in MATMULS[gpu]} == MATMULS[gpu]


def test_a_wide_matmuls_tile_is_not_chosen_by_a_few_calls(gpu: str, submitted: list[Launch]) -> None:
    ahead.compile_ahead(trace(lambda x, weight, wide, narrow: linear(linear(x, weight), wide)))
    assert sum(found.name == "wgmma_kernel" for found in submitted) == (1 if gpu == "Hopper" else 0)


def test_all_ops_are_compiled_ahead(submitted: list[Launch]) -> None:
    ahead.compile_ahead(trace(every_other_op))
    names = {found.name.removeprefix("blockwise_") for found in submitted}
    assert names - {"wgmma_kernel", "_tma_kernel", "_pointer_kernel"} == {
        "_quantize_rowwise_kernel", "_absmax_kernel", "_quantize_tiles_kernel", "_transpose_kernel",
        "_quantize_blocks_kernel", "_dequantize_kernel", "_quantize_columns_kernel",
    }  # fmt: skip
    assert len(names) > 7


def test_what_goes_wrong_is_left_to_the_first_call(gpu: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ahead, "compile_elsewhere", mock.Mock(side_effect=RuntimeError("no driver")))
    with caplog.at_level("INFO", logger="swcompile"):
        ahead.compile_ahead(trace(linear))
    assert "no driver" in caplog.text


def test_nothing_is_compiled_for_a_cpu(submitted: list[Launch]) -> None:
    ahead.compile_ahead(trace(linear, device="cpu"))
    assert not submitted


def test_ops_of_unknown_sizes_are_left_to_their_first_call(submitted: list[Launch]) -> None:
    ahead.compile_ahead(trace(linear, symbolic=True))
    assert {found.name for found in submitted} == {"_absmax_kernel", "_quantize_tiles_kernel"}, "the weight's alone"


ON_A_GPU = """
import re, torch, torch._inductor.async_compile as inductor
from unittest import mock
from triton.backends.nvidia.compiler import CUDABackend
from swcompile import ahead
from swcompile.kernels.workers import compile_elsewhere

seen, here = [], []

def noted(stage):
    def run(*args):
        here.extend(re.findall(r"tt.func public @(\\w+)", " ".join(map(str, args))))
        return stage(*args)
    return run

def and_wait(launches, device, at_once):
    futures = compile_elsewhere(launches, device, at_once=at_once)
    assert len(futures) == len(launches)
    seen.extend(launch.name for launch in launches)
    assert all(future.exception() is None for future in futures)
    return futures

inductor.maybe_warm_pool()
inductor.AsyncCompile.wait_pool_ready(timeout=600)
device = torch.device("cuda", 0)
model = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096)).to(device, torch.bfloat16)
x = torch.randn(16384, 4096, device=device, dtype=torch.bfloat16, requires_grad=True)
to_ttir, from_gluon = staticmethod(noted(CUDABackend.make_ttir)), noted(CUDABackend.gluon_to_ttgir)
with (
    mock.patch.object(ahead, "compile_elsewhere", and_wait),
    mock.patch.object(CUDABackend, "make_ttir", to_ttir), mock.patch.object(CUDABackend, "gluon_to_ttgir", from_gluon),
):
    torch.compile(model, backend="switchback", options={"include": "*", "skip_slower": False})(x).square().mean().backward()
torch.cuda.synchronize()
assert {"wgmma_kernel", "_quantize_tiles_kernel"} <= set(seen), seen
assert not [name for name in here if not name.startswith("triton_")], here  # Inductor compiles some of its own here
print("all found")
"""


@pytest.mark.gpu
def test_a_first_step_compiles_no_kernel_in_its_own_process(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("names a kernel for Hopper")
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = run_program(ON_A_GPU, folder=tmp_path, TORCHINDUCTOR_COMPILE_THREADS="4", **caches)
    assert done.splitlines()[-1:] == ["all found"]
