"""The rates of devices: measured once for each model of device, on that device, and kept in a file that may break."""

import contextlib
import dataclasses
import inspect
import json
import threading
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cost import RATES
from torch import nn
from torch._subclasses import FakeTensor

import swcompile
from swcompile import measuring, rates
from swcompile.calls import Call, Op
from swcompile.kernels import measurements
from swcompile.measuring import DeviceRates, Timing
from swcompile.rates import device_rates, rates_identity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the rates are kept; nothing is known yet."""
    monkeypatch.setattr(rates, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(rates, "_known", {})
    monkeypatch.setattr(rates, "_identities", {})
    monkeypatch.setattr(rates, "_timings", {})
    return tmp_path / "swcompile" / "device_rates.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that are measured, each 1 FLOP/s faster than the one before. All GPUs are of one model."""
    devices: list[torch.device] = []

    def measure(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
        devices.append(device)
        return dataclasses.replace(RATES, matmul=len(devices))

    monkeypatch.setattr(rates, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    return devices


def forget() -> None:
    """As a new process has it."""
    rates._known.clear()
    rates._timings.clear()
    rates._identities.clear()


def in_a_new_process() -> DeviceRates:
    forget()
    return device_rates(CPU, torch.float32)


def test_measured_once_and_then_read(file: Path, measured: list[torch.device]) -> None:
    assert device_rates(CPU, torch.float32) == in_a_new_process() == dataclasses.replace(RATES, matmul=1)
    assert device_rates(CPU, torch.bfloat16).matmul == 2
    assert device_rates(CPU, torch.bfloat16, True).matmul == 3, "for who asks for them alone"
    assert measured == [CPU] * 3 and len(json.loads(file.read_text())) == 3


def test_a_gpu_is_measured_itself_and_others_of_its_model_get_its_rates(measured: list[torch.device]) -> None:
    gpus = [torch.device("cuda", index) for index in (3, 1)]
    assert device_rates(gpus[0], torch.bfloat16) is device_rates(gpus[1], torch.bfloat16)
    assert measured == gpus[:1]
    assert len({rates_identity(some, [torch.bfloat16]) for some in (gpus[:1], gpus[1:], gpus)}) == 1
    assert rates_identity([torch.device("meta")], [torch.float32]) == "[]"


def test_rates_have_a_name_for_cache_keys_before_they_are_measured(file: Path, measured: list[torch.device]) -> None:
    def identity() -> str:
        forget()
        return rates_identity([CPU], [torch.float32])

    first = identity()
    assert identity() == first and not measured, "another process, which is faster"
    device_rates(CPU, torch.float32)
    assert identity() == first and len(measured) == 1
    assert in_a_new_process() == dataclasses.replace(RATES, matmul=1) and len(measured) == 1
    by_block = rates_identity([CPU], [torch.float32], by_block=True)
    assert first[1:-1] in by_block and by_block != first, "names of both"
    file.unlink()
    assert identity() != first, "what is measured now may decide otherwise"


@pytest.mark.parametrize("graph", ["training", "inference"])
def test_calls_are_timed_as_they_are_outside_a_compilation(graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd keeps the dispatcher in Python while a joint graph's passes run, and the stack is deep: calls take longer."""
    seen: list[set[bool]] = [set() for _ in range(4)]
    prepare = Call.prepare

    def noted(call: Call, device: torch.device) -> Callable[[], object]:
        seen[0].add(torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher))
        run = prepare(call, device)
        seen[1].add(isinstance(run.args[0], FakeTensor))
        seen[2].add(torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        seen[3].add(len(inspect.stack(context=0)) > 20)
        return run

    monkeypatch.setattr(Call, "prepare", noted)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(8, 32)
    with torch.set_grad_enabled(graph == "training"), torch.autocast("cpu"):
        torch.compile(model, backend="switchback", options={"include": "*"})(x)
    assert seen == [{False}] * 4


def test_only_the_first_to_ask_for_rates_prepares_them(
    file: Path, measured: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, started = torch.device("cuda", 0), []

    def prepare(call: Call, device: torch.device) -> Callable[[], object]:
        assert threading.current_thread() is not threading.main_thread(), "there modes are on"
        return lambda: None

    monkeypatch.setattr(Call, "prepare", prepare)
    monkeypatch.setattr(measuring, "_quietly", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(measuring, "compile_elsewhere", lambda launches, device: [])  # Inductor's processes are still to start
    monkeypatch.setattr(measuring, "compile_here", lambda launches, device: started.append(device) or [])
    for _ in range(2):
        forget()
        rates.start_measuring([gpu, CPU], [torch.bfloat16, torch.int64])
        rates.rates_identity([gpu, CPU], [torch.bfloat16, torch.int64])
    device_rates(gpu, torch.bfloat16)
    forget()
    rates.start_measuring([gpu], [torch.bfloat16])
    assert started == [gpu] and measured == [gpu]


def test_of_two_ranks_that_measure_at_once_both_take_the_first_ones_rates(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
        ((key, entry),) = json.loads(file.read_text()).items()
        file.write_text(json.dumps({key: entry | dataclasses.asdict(RATES)}))  # the other rank is done while this one measures
        return dataclasses.replace(RATES, matmul=7.0)

    monkeypatch.setattr(rates, "measure", measure)
    assert device_rates(CPU, torch.float32) == in_a_new_process() == RATES


VALUES = dataclasses.asdict(RATES) | {"identity": "a name"}
BROKEN: list[Any] = [
    None, 5, [], {}, {"matmul": 1.0}, dataclasses.asdict(RATES), VALUES | {"more": 1.0}, VALUES | {"matmul": "fast"}, VALUES | {"matmul": 0.0},
    VALUES | {"kernel": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("entry", BROKEN, ids=str)
def test_an_entry_that_is_no_set_of_rates_is_measured_again(
    file: Path, measured: list[torch.device], entry: Any
) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({rates._device_key(CPU, torch.float32): entry, "other": 1}))
    assert device_rates(CPU, torch.float32) == in_a_new_process() == dataclasses.replace(RATES, matmul=1)
    assert len(measured) == 1 and json.loads(file.read_text())["other"] == 1


@pytest.mark.parametrize("content", ["", "[]", "{", "5", "\x00\xff"])
def test_a_damaged_file_is_repaired(file: Path, measured: list[torch.device], content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert device_rates(CPU, torch.float32) == in_a_new_process()
    assert len(measured) == 1


def test_a_folder_that_cannot_be_used_fails_no_compilation(
    file: Path, measured: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.write_text("not a folder")
    monkeypatch.setattr(measurements, "_warned", set())
    x = torch.randn(8, 32)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            report = swcompile.explain(nn.Linear(32, 8), x, include="*")
            forget()
    assert report.decisions[0].speedup is not None and len(measured) == 2
    assert len([w for w in seen if "device_rates.json cannot be written" in str(w.message)]) == 1


def timings(calls: Iterable[Call], seconds: float, spread: float = 1.0) -> dict[Call, Timing]:
    """That all calls take as long."""
    return dict.fromkeys(calls, Timing(seconds, spread))


@pytest.mark.parametrize(
    ("device", "spreads", "taken"),
    [("cuda", [1.3], 0), ("cuda", [2.0, 1.1], 1), ("cuda", [3.0, 1.6, 23.0], 1), ("cpu", [3.0], 0)],
    ids=["idle", "in use for a while", "in use", "CPU"],
)
@pytest.mark.parametrize("asked", ["rates", "calls"])
def test_a_gpu_that_others_use_is_measured_again(
    asked: str, device: str, spreads: list[float], taken: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(enumerate(spreads, 1))
    monkeypatch.setattr(measuring, "_time_once", lambda calls, device: timings(calls, *next(left)))
    monkeypatch.setattr(measuring, "_host_seconds", lambda call, device: 1e-5)
    monkeypatch.setattr(measuring, "_compile", lambda calls, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    if (asked, device) == ("calls", "cpu"):
        assert rates.call_seconds([CALL], CPU) == {} and len(list(left)) == 1 and not file.exists()
        return
    for _ in range(2):  # and another process, which reads what the first has measured
        forget()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                if asked == "rates":
                    found = device_rates(torch.device(device), torch.bfloat16)
                    rounded = 32768 * (4096 * (2 + 1) + 4) if device == "cuda" else 1024 * (512 * (2 + 1) + 4)
                    assert found.spread == spreads[taken] and found.quantize == rounded / (taken + 1)
                else:
                    assert rates.call_seconds([CALL], torch.device(device)) == {CALL: taken + 1}
        assert not list(left), "all that were expected"
        told = [str(w.message) for w in seen]
        assert len(told) == (len(spreads) == 3)
        assert all("Fake GPU" in text and "1.6 times" in text and f"Delete {file}" in text for text in told)


CALL = Call(Op.MATMUL, (4096, 1024, 4096), torch.bfloat16)
OTHER = Call(Op.QUANTIZE_ROWWISE, (4096, 4096), torch.bfloat16)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[Call]]:
    """The calls that are timed at once, each time a second slower. All GPUs are of one model."""
    found: list[list[Call]] = []

    def time_calls(calls: Collection[Call], device: torch.device) -> dict[Call, Timing]:
        found.append(list(calls))
        return timings(calls, float(len(found)))

    monkeypatch.setattr(rates, "time_calls", time_calls)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    return found


def test_a_call_is_timed_once_and_then_read(file: Path, timed: list[list[Call]]) -> None:
    gpus = [torch.device("cuda", index) for index in (3, 1)]
    for gpu in gpus:
        assert rates.call_seconds([CALL], gpu) == {CALL: 1.0}
    forget()
    assert rates.call_seconds([CALL, OTHER], gpus[0]) == {CALL: 1.0, OTHER: 2.0}
    for _ in range(2):
        forget()
        assert rates.call_seconds([OTHER, CALL], gpus[1]) == {CALL: 1.0, OTHER: 2.0}
    assert timed == [[CALL], [OTHER]] and len(json.loads(file.read_text())) == 2
    torch.set_float32_matmul_precision("high")
    try:
        assert rates.call_seconds([CALL], gpus[0]) == {CALL: 3.0}, "in float32 this changes its time"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_of_two_ranks_that_time_a_call_both_take_the_first_ones_seconds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")

    def time_calls(calls: Collection[Call], device: torch.device) -> dict[Call, Timing]:
        monkeypatch.setattr(rates, "time_calls", lambda calls, device: timings(calls, 1.0))
        assert rates.call_seconds(calls, device) == {CALL: 1.0}, "the other rank, which is done while this one measures"
        forget()
        return timings(calls, 2.0)

    monkeypatch.setattr(rates, "time_calls", time_calls)
    for _ in range(2):
        assert rates.call_seconds([CALL], gpu) == {CALL: 1.0}
        forget()


@pytest.mark.parametrize(
    "entry",
    [None, 5, {}, {"seconds": 1.0}, {"seconds": 0.0, "spread": 1.0}, {"seconds": "1", "spread": 1.0}, {"seconds": 1.0, "spread": 0.0}],
    ids=str,
)
def test_an_entry_that_is_no_timing_is_measured_again(file: Path, timed: list[list[Call]], entry: Any) -> None:
    gpu = torch.device("cuda", 0)
    rates.call_seconds([CALL], gpu)
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: entry, "other": 1}))
    for _ in range(2):
        forget()
        assert rates.call_seconds([CALL], gpu) == {CALL: 2.0}
    assert timed == [[CALL]] * 2 and json.loads(file.read_text())["other"] == 1


def test_what_cannot_be_timed_is_missing_for_all(
    file: Path, timed: list[list[Call]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank without memory, say; another one, which would have it, decides alike."""
    gpu, time_calls = torch.device("cuda", 0), rates.time_calls
    rates.call_seconds([CALL], gpu)

    def fail(calls: Collection[Call], device: torch.device) -> dict[Call, Timing]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(rates, "time_calls", fail)
    assert rates.call_seconds([CALL, OTHER], gpu) == {CALL: 1.0} and "no memory" in caplog.text
    monkeypatch.setattr(rates, "time_calls", time_calls)
    for _ in range(2):
        assert rates.call_seconds([CALL, OTHER], gpu) == {CALL: 1.0}
        forget()
    assert timed == [[CALL]]


@pytest.mark.gpu
def test_calls_are_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    calls = [Call(op, (1024, 2048, 512) if "mm" in op or "mul" in op else (1024, 2048), torch.bfloat16) for op in Op]
    seconds = rates.call_seconds(calls, gpu)
    assert seconds.keys() == {*calls} and all(1e-7 < found < 1e-3 for found in seconds.values())
    monkeypatch.delattr(rates, "time_calls")
    forget()
    assert rates.call_seconds(calls, gpu) == seconds
