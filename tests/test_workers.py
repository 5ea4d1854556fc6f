"""Kernels that are compiled in Inductor's processes are those that this process launches."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from pickle import PicklingError
from unittest import mock

import pytest
import torch
from processes import run_compiled, run_program
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_compat
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler

from swcompile.kernels import tuning, workers
from swcompile.kernels.launch import Launch, Launcher, Plans, is_recording, recording
from swcompile.kernels.tuning import Tuner, launches_of
from swcompile.kernels.workers import Assembler, compile_elsewhere, submit, wait_for

CUDA = torch.device("cuda", 0)
TARGET = GPUTarget("cuda", 90, 32)


def test_this_process_finds_what_another_compiled() -> None:
    printed = run_compiled("-m", "compile_elsewhere", TORCHINDUCTOR_COMPILE_THREADS="4")
    assert printed.splitlines()[-1:] == ["all found"], printed


def test_threads_wait_for_the_one_that_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    @cache
    def triton_key() -> None:
        begun.append(1)
        time.sleep(0.05)
        done.append(1)

    begun: list[int] = []
    done: list[int] = []
    monkeypatch.setattr(triton_compat, "triton_key", triton_key)
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    monkeypatch.setattr(workers, "triton", mock.MagicMock())
    monkeypatch.setattr(workers, "_assembler", lambda arch: None)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: workers.prepare(CUDA) and len(done), range(4))) == [1] * 4
    assert len(begun) == 1


class Kernel:
    """A stand-in for Triton's, which must not be launched."""

    def fn(self) -> None: ...


def launcher(*numbers: int, **constants: int) -> Launcher:
    return Launcher(Kernel(), (1,), *numbers, **constants)


def test_launches_that_are_compiled_alike_are_one() -> None:
    with recording() as launches:
        for rows in (32, 64, 48):
            launcher(rows, 1, 3, 2**31, WIDTH=8)(torch.zeros(rows), None)
        launcher(33, 1, 3, 2**31, WIDTH=8)(torch.zeros(8), None)
        launcher(32, 1, 3, 2**31, WIDTH=16)(torch.zeros(8), None)
        launcher(32, 1, 3, 2**31, WIDTH=8)(torch.zeros(8).bfloat16(), None)
    assert [launch.arguments for launch in launches.values()] == [
        (torch.float32, None, 16, 1, 17, 2**31),
        (torch.float32, None, 17, 1, 17, 2**31),
        (torch.float32, None, 16, 1, 17, 2**31),
        (torch.bfloat16, None, 16, 1, 17, 2**31),
    ]
    first = next(iter(launches.values()))
    assert first[:2] == (Kernel.__module__, "fn") and first.options == (("WIDTH", 8),)
    assert not is_recording()


class Config(tuple[int]):
    def _asdict(self) -> dict[str, int]:
        return {"width": self[0]}


def test_each_candidates_launches_are_gathered_and_nothing_is_decided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(config: Config) -> None:
        if config[0] == 2:
            raise ValueError("does not fit")
        launcher(WIDTH=config[0])(torch.zeros(8))

    tuner: Tuner[Config] = Tuner("test", [], measure=lambda run, num_calls: pytest.fail("timed"))
    monkeypatch.setattr(tuner, "_path", lambda device: tmp_path / "choices.json")
    plans = Plans(lambda: tuner.choose((16,), lambda: [Config([width]) for width in (1, 2, 3)], run, CUDA))

    def call() -> None:
        launcher(WIDTH=plans.find([])[0])(torch.zeros(8))

    launches = launches_of([call, call, lambda: 1 / 0])
    assert [launch.options for launch in launches] == [(("WIDTH", 1),), (("WIDTH", 3),)]
    assert not tuner._chosen and not plans._known and not (tmp_path / "choices.json").exists()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.MagicMock]:
    """A stand-in for Inductor's, which are about to start."""
    pool, process_pool = mock.MagicMock(), cache(lambda: pool)
    process_pool()
    pool.submit.side_effect = lambda *call: Future()
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: False)
    monkeypatch.setattr(AsyncCompile, "process_pool", process_pool)
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    monkeypatch.setattr(workers, "prepare", lambda device: TARGET)
    monkeypatch.setattr(workers, "_assembler", lambda arch: Assembler("a version", {}))
    monkeypatch.setattr(workers, "_given_up", [])
    monkeypatch.setattr(workers, "_submitted", {})
    yield pool


LAUNCH = Launch("module", "kernel", (torch.float32,), ())


def test_processes_that_are_about_to_start_get_work_only_ahead_of_time(processes: mock.MagicMock) -> None:
    assert compile_elsewhere([LAUNCH], CUDA) == [] and not processes.submit.mock_calls
    assert len(compile_elsewhere([LAUNCH], CUDA, at_once=False)) == 1
    (call,) = processes.submit.mock_calls
    assert call.args[3:] == (Assembler("a version", {}), workers.compile_launch, LAUNCH)


def test_a_kernel_is_submitted_once(processes: mock.MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_elsewhere([LAUNCH, LAUNCH], CUDA, at_once=False)
    assert compile_elsewhere([LAUNCH], CUDA, at_once=False) == first and len(processes.submit.mock_calls) == 1
    monkeypatch.setenv("TRITON_CACHE_DIR", "another")
    assert compile_elsewhere([LAUNCH], CUDA, at_once=False) != first and len(processes.submit.mock_calls) == 2


def test_without_processes_nothing_is_submitted(processes: mock.MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: pytest.fail("would start them"))
    AsyncCompile.process_pool.cache_clear()
    assert all(submit(workers.compile_launch, LAUNCH, target=TARGET, at_once=at_once) is None for at_once in (True, False))
    assert not processes.submit.mock_calls


@pytest.mark.parametrize("error", [RuntimeError("closed"), BrokenProcessPool(), PicklingError(), OSError()], ids=repr)
def test_processes_that_take_nothing_are_done_without(processes: mock.MagicMock, error: Exception) -> None:
    processes.submit.side_effect = error
    assert compile_elsewhere([LAUNCH], CUDA, at_once=False) == []


def test_what_fails_there_is_compiled_here(processes: mock.MagicMock, caplog: pytest.LogCaptureFixture) -> None:
    (future,) = compile_elsewhere([LAUNCH], CUDA, at_once=False)
    future.set_exception(ValueError("in vain"))
    with caplog.at_level("INFO", logger="swcompile"):
        wait_for([future])
    assert "in vain" in caplog.text and not workers._given_up


def test_a_process_that_ends_waits_for_nothing(processes: mock.MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    exiting = threading.Event()
    monkeypatch.setattr(workers, "_exiting", exiting)
    threading.Timer(0.1, exiting.set).start()
    wait_for(compile_elsewhere([LAUNCH], CUDA, at_once=False))
    assert not workers._given_up


def test_a_kernel_that_is_no_longer_compiled_is_not_waited_for(processes: mock.MagicMock) -> None:
    (future,) = compile_elsewhere([LAUNCH], CUDA, at_once=False)
    future.cancel()
    wait_for([future])


def test_processes_that_never_answer_are_given_up(
    processes: mock.MagicMock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "_PATIENCE", 0.01)
    (future,) = compile_elsewhere([LAUNCH], CUDA, at_once=False)
    wait_for([future])
    assert "any more" in caplog.text
    assert compile_elsewhere([LAUNCH], CUDA, at_once=False) == []


def test_they_use_the_assembler_that_this_process_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_assembler", cache(workers._assembler.__wrapped__))
    monkeypatch.setenv("TRITON_PTXAS_PATH", "mine")
    monkeypatch.setattr(compiler, "get_ptxas_version", lambda arch: "a version")
    first = workers._assembler(90)
    assert first.version == "a version" and first.settings["TRITON_PTXAS_PATH"] == "mine"
    monkeypatch.setenv("TRITON_PTXAS_PATH", "inductor's")
    monkeypatch.setenv("TRITON_CACHE_DIR", "another")
    assert workers._assembler(90) == first
    assert workers._settings()["TRITON_CACHE_DIR"] == "another" and "TRITON_PTXAS_PATH" not in workers._settings()


def test_what_is_compiled_elsewhere_comes_before_what_is_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(tuning, "compile_elsewhere", lambda launches, device: seen.append(launches) or ["futures"])
    monkeypatch.setattr(tuning, "wait_for", seen.append)
    monkeypatch.setattr(tuning, "run_together", lambda runs, device: seen.append(len(runs)))
    tuning.compile_together([lambda: launcher(WIDTH=1)(torch.zeros(8))], CUDA)
    assert [launch.name for launch in seen[0]] == ["fn"] and seen[1:] == [["futures"], 1]


KEYS = """
from itertools import permutations
from triton.runtime.jit import JITFunction
from swcompile.kernels import int8, quantize_columnwise, quantize_rowwise, quantize_tensorwise
from swcompile.kernels.launch import settle_key

modules = int8, quantize_columnwise, quantize_rowwise, quantize_tensorwise
functions = {name: f for module in modules for name, f in vars(module).items() if isinstance(f, JITFunction)}
kernels = [
    quantize_rowwise._quantize_rowwise_kernel, quantize_tensorwise._quantize_tiles_kernel,
    quantize_tensorwise._absmax_kernel, quantize_columnwise._quantize_columns_kernel,
]
callees = [f for f in functions.values() if f not in kernels]  # a set of them would hash them
assert len(callees) == len(functions) - len(kernels)
found = set()
for order in permutations(kernels):
    for function in functions.values():
        function.hash, function.used_global_vals = None, {}
    for kernel in order:
        settle_key(kernel)
        assert kernel.hash is None and all(f.hash for f in callees if f.__name__ in kernel.fn.__code__.co_names)
        _ = kernel.cache_key
    found.add(tuple(kernel.cache_key for kernel in kernels))
print(len(found))
"""


def test_a_kernels_key_does_not_depend_on_what_was_compiled_before() -> None:
    """In Triton 3.6 it does: of these four, which share functions, 7 different sets of keys come out of 24 orders."""
    assert run_compiled("-c", KEYS) == "1\n"


ON_A_GPU = """
import time, torch, torch._inductor.async_compile as inductor
from unittest import mock
from concurrent.futures import wait
from triton.backends.nvidia.compiler import CUDABackend
import swcompile
from swcompile.kernels.tuning import launches_of
from swcompile.kernels.workers import compile_elsewhere

inductor.maybe_warm_pool()
ops, device = torch.ops.swcompile, torch.device("cuda", 0)
x = torch.randn(2048, 1024, device=device, dtype=torch.bfloat16)
weight = torch.randn(512, 1024, device=device, dtype=torch.bfloat16)
x_q, scales = torch.empty_like(x, dtype=torch.int8), torch.ones(2048, 1, device=device)
weight_q, scale = torch.empty_like(weight, dtype=torch.int8), torch.ones(1, 1, device=device)
calls = [
    lambda: ops.quantize_rowwise(x), lambda: ops.quantize_tensorwise(weight), lambda: ops.quantize_tensorwise_transpose(weight),
    lambda: ops.quantize_columnwise_transpose(x), lambda: ops.scaled_mm(x_q, weight_q, scales, scale, None, torch.bfloat16),
]
launches = launches_of(calls)
inductor.AsyncCompile.wait_pool_ready(timeout=600)
futures = compile_elsewhere(launches, device)
assert len(futures) == len(launches) >= 8
errors = [error for future in futures if (error := future.exception()) is not None]
assert not errors, errors

def refuse(*args):
    raise AssertionError("it is compiled here")

with mock.patch.object(CUDABackend, "make_ttir", refuse):
    for call in calls:
        call()
torch.cuda.synchronize()
print("all found")
"""


@pytest.mark.gpu
def test_a_gpus_tuned_kernels_are_those_that_were_compiled_elsewhere(tmp_path: Path) -> None:
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    assert run_program(ON_A_GPU, folder=tmp_path, TORCHINDUCTOR_COMPILE_THREADS="4", **caches).splitlines()[-1:] == ["all found"]
