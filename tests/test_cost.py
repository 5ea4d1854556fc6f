"""The cost rule's rates: measured once for each model of device, on that device, and kept in a file that may break."""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

import swcompile
from swcompile import Role, cost, make_recipe
from swcompile.backend import _dtypes
from swcompile.cost import Candidate, DeviceRates, device_rates, rates_identity
from swcompile.graph import Matmul, matmuls
from swcompile.joint import parameter_names
from swcompile.kernels import measurements

CPU = torch.device("cpu")
RATES = DeviceRates(
    matmul=1e12, output=0.0, quantized_matmul=2e12, quantized_output=0.0, quantize=1e12, quantize_columns=5e11, transpose=8e11, kernel=1e-6,
    matmul_call=1e-6, quantize_call=2e-6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the rates are kept; nothing is known yet."""
    monkeypatch.setattr(cost, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(cost, "_known", {})
    monkeypatch.setattr(cost, "_identities", {})
    return tmp_path / "swcompile" / "device_rates.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that are measured, each 1 FLOP/s faster than the one before. All GPUs are of one model."""
    devices: list[torch.device] = []

    def measure(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
        devices.append(device)
        return dataclasses.replace(RATES, matmul=len(devices))

    monkeypatch.setattr(cost, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    return devices


def forget() -> None:
    """As a new process has it."""
    cost._known.clear()
    cost._identities.clear()


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
    seen: list[bool] = []

    class Trials(cost._Trials):
        def __init__(self, *of: Any) -> None:
            seen.append(torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher))
            super().__init__(*of)
            seen.append(isinstance(self.x, FakeTensor))
            seen.append(torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            seen.append(len(inspect.stack(context=0)) > 20)

    monkeypatch.setattr(cost, "_Trials", Trials)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(8, 32)
    with torch.set_grad_enabled(graph == "training"), torch.autocast("cpu"):
        torch.compile(model, backend="switchback", options={"include": "*"})(x)
    assert seen == [False] * 4


def test_only_the_first_to_ask_for_rates_prepares_them(
    file: Path, measured: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, started = torch.device("cuda", 0), []

    @contextlib.contextmanager
    def trials(*of: Any) -> Iterator[Any]:
        assert threading.current_thread() is not threading.main_thread(), "there modes are on"
        yield mock.MagicMock(all=list)

    monkeypatch.setattr(cost, "_trials", trials)
    monkeypatch.setattr(cost, "compile_elsewhere", lambda launches, device: [])  # Inductor's processes are still to start
    monkeypatch.setattr(cost, "compile_here", lambda launches, device: started.append(device) or [])
    for _ in range(2):
        forget()
        cost.start_measuring([gpu, CPU], [torch.bfloat16, torch.int64])
        cost.rates_identity([gpu, CPU], [torch.bfloat16, torch.int64])
    device_rates(gpu, torch.bfloat16)
    forget()
    cost.start_measuring([gpu], [torch.bfloat16])
    assert started == [gpu] and measured == [gpu]


def test_the_gpu_that_is_measured_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current, timed, made = [0], [], cost._Trials

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    def trials(device: torch.device, dtype: torch.dtype, by_block: bool) -> cost._Trials:
        assert current[-1] == device.index
        return made(CPU, dtype, by_block)

    def seconds(run: Callable[[], object]) -> float:
        timed.append(current[-1])
        return 1e-3

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(cost, "_Trials", trials)
    for timer in ("_gpu_seconds", "_host_seconds"):
        monkeypatch.setattr(cost, timer, seconds)
    monkeypatch.setattr(cost, "run_together", lambda runs, device: None)
    assert cost._measure(torch.device("cuda", 2), torch.float32, False).kernel > 1e-3
    assert current == [0] and timed == [2] * (3 * 9 + 2)


class Cast(nn.Module):
    """A weight that reaches its matmul in another dtype, after other steps, in a checkpoint, or beside a matmul of its own dtype."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.weight = how, nn.LayerNorm(8), nn.Parameter(torch.randn(8, 8))
        self.words = nn.Embedding(8, 8)
        self.register_buffer("frequencies", torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "embedding":
            return nn.functional.linear(self.words(x.argmax(-1)).bfloat16(), self.weight.bfloat16())
        if self.how == "rotary":
            angles = self.frequencies @ torch.arange(8.0)[:, None]
            return nn.functional.linear(x, self.weight.bfloat16()) * angles[:, 0].cos().bfloat16()
        x = self.norm(x.float()).bfloat16()
        if self.how == "checkpoint":
            return checkpoint(lambda y: y @ self.weight.bfloat16(), x, use_reentrant=False)
        weight = {"scaled": self.weight * 2, "turned": self.weight.t()}.get(self.how, self.weight)
        return nn.functional.linear(x, weight.bfloat16())


@pytest.mark.parametrize("how", ["cast", "scaled", "turned", "checkpoint", "bfloat16", "rotary", "embedding"])
def test_rates_are_for_the_dtypes_of_matmuls(how: str) -> None:
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        found.append(_dtypes(gm, [CPU], parameter_names(gm, inputs)))
        return gm

    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).bfloat16() if how == "bfloat16" else Cast(how)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(4, 8, dtype=torch.bfloat16))
    assert torch.bfloat16 in found[0]
    assert how not in ("bfloat16", "embedding") or found[0] == {torch.bfloat16}
    assert how != "rotary" or model.frequencies.dtype not in found[0]
    assert _dtypes(torch.fx.symbolic_trace(model), [CPU], []) == set(), "a graph that Dynamo has not made"


def test_of_two_ranks_that_measure_at_once_both_take_the_first_ones_rates(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
        ((key, entry),) = json.loads(file.read_text()).items()
        file.write_text(json.dumps({key: entry | dataclasses.asdict(RATES)}))  # the other rank is done while this one measures
        return dataclasses.replace(RATES, matmul=7.0)

    monkeypatch.setattr(cost, "_measure", measure)
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
    file.write_text(json.dumps({cost._device_key(CPU, torch.float32): entry, "other": 1}))
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


@pytest.mark.parametrize(
    ("device", "spreads", "taken"),
    [("cuda", [1.3], 0), ("cuda", [2.0, 1.1], 1), ("cuda", [3.0, 1.6, 23.0], 1), ("cpu", [3.0], 0)],
    ids=["idle", "in use for a while", "in use", "CPU"],
)
def test_a_gpu_that_others_use_is_measured_again(
    device: str, spreads: list[float], taken: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = [dataclasses.replace(RATES, matmul=number + 1, spread=spread) for number, spread in enumerate(spreads)]
    left = iter(attempts)
    monkeypatch.setattr(cost, "_measure_once", lambda *of: next(left))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    for _ in range(2):  # and another process, which reads what the first has measured
        forget()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                assert device_rates(torch.device(device), torch.bfloat16) == attempts[taken]
        assert not list(left), "all that were expected"
        told = [str(w.message) for w in seen]
        assert len(told) == (len(spreads) == 3)
        assert all("Fake GPU" in text and "1.6 times" in text and f"Delete {file}" in text for text in told)


@pytest.mark.parametrize("by_block", [False, True])
def test_every_timing_of_the_device_counts_for_its_spread(by_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(slow: int) -> tuple[float, int]:
        """Where the timing of that number takes twice as long as the others, and how many there are."""
        number = itertools.count()
        monkeypatch.setattr(cost, "_cpu_seconds", lambda run: 2e-3 if next(number) == slow else 1e-3)
        return cost._measure_once(CPU, torch.float32, by_block).spread, next(number)

    assert spread(-1) == (1.0, num_timings := 3 * (9 + by_block))
    assert {spread(slow)[0] for slow in range(num_timings)} == {2.0}


def test_a_default_dtype_is_nothing_to_the_scales() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        for by_block in (False, True):
            assert cost._measure_once(CPU, torch.float32, by_block).matmul > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_go_on_as_if_nothing_had_been_measured() -> None:
    state = torch.get_rng_state()
    cost._measure(CPU, torch.float32, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_timings_of_several_calls_take_turns() -> None:
    times, order = iter([1.0, 9.0, 3.0, 8.0, 2.0, 7.0]), []
    clock = cost._Clock(lambda run: order.append(run()) or next(times))
    assert clock(lambda: "a", lambda: "b") == [2.0, 8.0] and order == ["a", "b"] * 3
    assert clock.spread == 3.0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_measured_where_the_first_is_current() -> None:
    for by_block in (False, True):
        rates = cost._measure(torch.device("cuda", 1), torch.bfloat16, by_block)
        assert rates.kernel < 1e-3 and rates.quantized_matmul > rates.matmul > 1e13
    assert torch.cuda.current_device() == 0


def test_a_host_that_is_busy_for_a_while_is_measured_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = itertools.count()
    assert cost._host_seconds(lambda: time.sleep(2e-3 if next(calls) < 40 else 0)) < 2e-3


def test_an_activation_that_its_own_kernel_quantises_costs_the_bytes_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "device_rates", lambda *of: RATES)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    x = torch.randn(1024, 256)
    speedups = {}
    for fuse in (True, False):
        report = swcompile.explain(model, x, include="*", fuse=fuse)
        speedups[fuse] = {(d.parameter, d.role.value): d.speedup for d in report.decisions if d.speedup is not None}
    same = [("0.weight", "output"), ("2.weight", "grad_input")]  # an input, and a gradient that comes in
    assert all(speedups[True][key] == speedups[False][key] for key in same)
    assert speedups[True]["2.weight", "output"] > speedups[False]["2.weight", "output"]
    seconds = 2 * 1024 * 512 * 256 / RATES.matmul + RATES.kernel
    multiply = max(seconds - RATES.kernel, 0) / 2 + RATES.kernel
    # Rounding the weight, and half of finding its scale, which the backward reads too.
    weight = (256 * 512 * (4 + 1) + 4 + 256 * 512 * 4 / 2) / RATES.quantize + 1.5 * RATES.kernel
    expected = seconds / (multiply + 1024 * (512 + 4) / RATES.quantize + weight)
    assert speedups[True]["2.weight", "output"] == pytest.approx(expected, rel=1e-6)


def test_a_scale_that_is_not_shared_is_found_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "device_rates", lambda *of: RATES)
    times = {}
    for micro_batches in (1, 2):  # passes of their own look for a weight with its own scale
        x = torch.randn(64, 256, requires_grad=True)
        report = swcompile.explain(nn.Linear(256, 512), x, include="*", recipe="switchback", micro_batches=micro_batches)
        original = 2 * 64 * 512 * 256 / RATES.matmul + RATES.kernel
        times[micro_batches] = [original / d.speedup for d in report.decisions if d.speedup]
    rounding = (256 * 512 * (4 + 1) + 4) / RATES.quantize + RATES.kernel  # two matmuls share the scale, two passes this, too
    for of_both, of_both_passes in zip(times[1], times[2], strict=True):
        assert of_both - of_both_passes == pytest.approx(rounding / 2, rel=1e-3)


def test_a_matmul_in_a_dtype_of_its_own_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cost, "device_rates", lambda device, dtype, *of: asked.append(dtype) or RATES)
    model = Cast("rotary")
    swcompile.explain(model, torch.randn(4, 8, dtype=torch.bfloat16), include="*")
    assert set(asked) == {torch.bfloat16}


@pytest.mark.parametrize("field", ["output", "quantized_output"])
def test_short_sums_wait_for_their_results(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.replace(RATES, **{field: 1e-11})
    shapes, times = [(1024, 512, 256), (1024, 256, 512)], {}
    for known in (RATES, rates):
        monkeypatch.setattr(cost, "device_rates", lambda *of, known=known: known)
        report = swcompile.explain(nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True), include="*")
        for decision, (m, n, k) in zip([d for d in report.decisions if d.speedup], shapes, strict=True):
            assert decision.shape == (m, n, k) and decision.speedup is not None
            original = 2 * m * n * k / rates.matmul + rates.kernel
            times.setdefault(decision.shape, []).append((original, decision.speedup))
    for (m, n, _), ((original, without), (_, speedup)) in times.items():
        results = m * n * 1e-11
        changed = (original + results) / (original / without) if field == "output" else original / (original / without + results)
        assert speedup == pytest.approx(changed, rel=1e-4)


@pytest.mark.parametrize(
    ("whole", "part", "share", "expected"),
    [(1.0, 0.5, 2, 0.0), (1.0, 0.6, 2, 0.2), (8.7, 1.7, 8, 0.7), (1.0, 0.1, 8, 0.0), (1.0, 1.5, 8, 0.5), (1.0, -0.1, 8, 0.0)],
    ids=["all of it sums", "a part", "a part of an eighth", "less than nothing", "half of it at most", "noise"],
)
def test_what_of_a_matmul_does_not_grow_with_its_sums(whole: float, part: float, share: int, expected: float) -> None:
    assert cost._rest(whole, part, share) == pytest.approx(expected)


def test_the_rates_of_a_matmul_are_found_by_sums_of_several_lengths() -> None:
    a, b = torch.zeros(64, 512), torch.zeros(32, 512)
    for pick, slow in ((min, 1e-9), (max, 3e-9)):  # kernels for sums of 64 and 32: one takes longer for its results
        results = {512: 1e-9, 64: 1e-9, 32: 3e-9}

        def seconds(run: Callable[[], object], results: dict[int, float] = results) -> float:
            length = run.args[0].shape[1]
            return 2 * 64 * 32 * length / 1e9 + 64 * 32 * results[length] + 1e-6

        rate, output = cost._matmul_rates(torch.mm, (a, b), cost._Clock(seconds), 1e-6, pick)
        assert output == pytest.approx(slow, rel=0.1) and rate == pytest.approx(1e9, rel=0.01)


def test_a_sum_over_tokens_has_its_own_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    block_rates = dataclasses.replace(RATES, quantized_matmul=1.5e12)
    monkeypatch.setattr(cost, "device_rates", lambda *of: block_rates if True in of else RATES)
    layer, x = nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True)
    seconds = 2 * 1024 * 512 * 256 / RATES.matmul + RATES.kernel
    twice_read = (1024 * (256 + 512) * (2 * 4 + 1) + 4 * (256 + 512)) / RATES.quantize_columns + 4 * RATES.kernel
    # The activation times the scales of tokens, once read; int8 of the gradient, which grad_input reads as well, turned.
    turned = (1024 * (256 * (4 + 1) + 4) + 4 * 256) / RATES.quantize_columns + 1024 * 512 * 2 / RATES.transpose + 2 * RATES.kernel
    once_read = turned + ((1024 * (512 * (4 + 1) + 4)) / RATES.quantize + RATES.kernel) / 2
    for recipe, rate, quantize in (("switchback_full", 1.5e12, once_read), ("llm_int8", RATES.quantized_matmul, twice_read)):
        (decision,) = (
            d for d in swcompile.explain(layer, x, include="*", recipe=recipe).decisions if d.role is Role.GRAD_WEIGHT
        )
        expected = seconds / (2 * 1024 * 512 * 256 / rate + RATES.kernel + quantize)
        assert decision.speedup == pytest.approx(expected, rel=1e-6)
    # What computes the gradient writes int8 for grad_input as well, and no float32 for anybody.
    written = 1024 * (512 + 4) / RATES.quantize / 2 - 1024 * 512 * 4 / RATES.quantize
    report = swcompile.explain(nn.Sequential(layer, nn.GELU()), x, include="*", recipe="switchback_full", fuse=True)
    (decision,) = (d for d in report.decisions if d.role is Role.GRAD_WEIGHT)
    expected = seconds / (2 * 1024 * 512 * 256 / 1.5e12 + RATES.kernel + turned + written)
    assert decision.speedup == pytest.approx(expected, rel=1e-6)


def test_a_kernel_that_also_computes_what_it_quantises_takes_the_host_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.replace(RATES, quantize_call=1e-3)  # all else is less than that
    monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    speedups = {}
    for fuse in (True, False):
        report = swcompile.explain(model, torch.ones(64, 256), include="*", fuse=fuse)
        (decision,) = (d for d in report.decisions if (d.parameter, d.role) == ("2.weight", Role.OUTPUT))
        speedups[fuse] = decision.speedup
    between = 2 * (2 * 4 * 64 * (512 + 256) / 1e12 + 1e-6)
    assert speedups[True] == speedups[False] == pytest.approx((2 * 64 * 512 * 256 / 1e12 + 1e-6) / (3.502e-3 - between), rel=1e-6)


def test_a_refusal_by_device_time_comes_before_the_host_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """In int8 the small layers would keep the host busy, and they are left alone: it is no bottleneck for the others."""
    monkeypatch.setattr(cost, "device_rates", lambda *of: dataclasses.replace(RATES, quantize_call=150e-6))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.medium, self.small = (
                nn.Sequential(*[nn.Linear(size, size) for _ in range(number)]) for size, number in ((1024, 4), (256, 4), (16, 40))
            )

        def forward(self, large: torch.Tensor, medium: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
            return self.large(large).sum() + self.medium(medium).sum() + self.small(small).sum()

    inputs = [torch.ones(4096, size) for size in (1024, 256, 16)]
    report = swcompile.explain(Mixed().requires_grad_(False), *inputs, include="*")
    assert [d.rewritten for d in report.decisions] == [d.shape[2] > 16 for d in report.decisions]
    assert not any("time to launch" in d.reason for d in report.decisions)


def traced(model: nn.Module, *inputs: torch.Tensor) -> dict[Role, Matmul]:
    """The matmuls of a model that has one of each role."""
    return {matmul.role: matmul for matmul in matmuls(swcompile.capture(model, *inputs).graph)}


class Folded(nn.Module):
    """A matmul whose weight is the left operand, of each matrix of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.weight.expand(x.shape[0], -1, -1), x)


def test_what_is_read_and_written_between_matmuls() -> None:
    found = traced(nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True))
    between = {role: cost._original(matmul, RATES).between for role, matmul in found.items()}
    moved = 2 * 4 * (1024 * 256 + 1024 * 512)
    expected = 2 * (moved / RATES.quantize + RATES.kernel)
    assert between[Role.OUTPUT] == between[Role.GRAD_INPUT] == pytest.approx(expected)
    assert between[Role.GRAD_WEIGHT] == pytest.approx(2 * RATES.kernel), "its operands were counted, its result is for the optimizer"

    on_left = traced(Folded(), torch.randn(16, 256, 1024))[Role.OUTPUT]
    assert on_left.weight_on_left
    moved = 2 * 4 * 16 * (256 * 1024 + 512 * 1024)
    assert cost._original(on_left, RATES).between == pytest.approx(2 * (moved / RATES.quantize + RATES.kernel))
    gemm = make_recipe({}).format_of(Role.OUTPUT)
    assert gemm is not None
    times = [cost._times(Candidate(on_left, gemm, sharers), RATES).quantized for sharers in (1, 10**9)]
    rows = 16 * 1024 * (256 * (4 + 1) + 4) / RATES.quantize
    assert times[0] - times[1] == pytest.approx(rows + RATES.kernel, rel=1e-3), "each row of x, of each matrix"


def test_other_matmuls_keep_the_device_busy_and_the_host_too() -> None:
    found = traced(nn.Linear(256, 512), torch.randn(1024, 256, requires_grad=True))
    gemm = make_recipe({}).format_of(Role.OUTPUT)
    assert gemm is not None
    candidate, others = Candidate(found[Role.OUTPUT], gemm, 1), [found[Role.GRAD_INPUT]]
    rates = dataclasses.replace(RATES, matmul_call=5e-5, quantize_call=1e-3)
    times, other = cost._times(candidate, rates), cost._original(*others, rates)
    ahead = other.seconds + other.between - 3 * 5e-5  # the host is, of the device, with the matmul and two kernels behind it
    assert 0 < other.between < ahead
    number = (times.quantized_host - times.quantized - times.original.between) / ahead
    for enough in (False, True):
        (prediction,) = cost.predict_speedups([candidate], others * (math.floor(number) + enough), rates=rates)
        assert (prediction.speedup == times.original.seconds / times.quantized) == enough


def test_kernels_between_matmuls_keep_the_device_busy_while_the_host_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).requires_grad_(False), torch.ones(512, 256)

    def speedups(quantize_call: float) -> list[float | None]:
        rates = dataclasses.replace(RATES, matmul_call=0.0, quantize_call=quantize_call)
        monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
        return [d.speedup for d in swcompile.explain(model, x, include="*").decisions]

    alone = speedups(0.0)
    assert len({*alone}) == 1 and alone[0] is not None
    matmul = (2 * 512 * 256 * 256 / RATES.matmul + RATES.kernel) / alone[0]  # in int8, with its quantisation
    between = 2 * (2 * 4 * 512 * (256 + 256) / RATES.quantize + RATES.kernel)
    calls = 4  # of the matmul, of its activation's quantisation and of its weight's two
    assert speedups((matmul + 0.9 * between) / calls) == alone
    assert speedups((matmul + 1.1 * between) / calls) != alone


def test_where_the_host_would_be_the_bottleneck_launches_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dataclasses.replace(RATES, quantize=1e14, quantize_columns=1e14, kernel=1e-9)
    monkeypatch.setattr(cost, "device_rates", lambda *of: rates)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    # In int8 a matmul of 66 tokens takes the device 4 us, and the host 7 to launch it and 2 for what comes between.
    for tokens, in_int8 in ((66, 0), (4096, 8)):
        report = swcompile.explain(model, torch.ones(tokens, 256), include="*")
        assert report.num_rewritten(Role.OUTPUT) == in_int8
        reasons = [d.reason for d in report.decisions if d.role is Role.OUTPUT and not d.rewritten]
        assert all("time to launch" in reason for reason in reasons)
