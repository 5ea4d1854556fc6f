"""How devices are measured: what is timed, where, and what follows from it."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from swcompile import measuring
from swcompile.calls import Call, Op

CPU = torch.device("cpu")


def test_the_gpu_that_is_measured_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current, timed, prepared, compiled = [0], [], [], []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    def prepare(call: Call, device: torch.device) -> Callable[[], object]:
        prepared.append(call)
        assert current[-1] == device.index
        return lambda: None

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(Call, "prepare", prepare)
    monkeypatch.setattr(measuring, "_gpu_seconds", lambda run: timed.append(current[-1]) or 1e-3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: timed.append(current[-1]))
    monkeypatch.setattr(measuring, "_from_memory", prepare)
    monkeypatch.setattr(measuring, "_compile", lambda calls, device: compiled.extend(calls))
    assert measuring.measure(torch.device("cuda", 2), torch.float32, False).kernel > 1e-3
    assert current == [0] and {*timed} == {2} and len(timed) == 3 * 9 + 2 * 11
    assert len(compiled) == 9 and len(prepared) == 3 * 9 + 2 and [call.op for call in prepared[-2:]] == [Op.MATMUL, Op.QUANTIZE_ROWWISE], "those of the host"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_measured_where_the_first_is_current() -> None:
    for by_block in (False, True):
        rates = measuring.measure(torch.device("cuda", 1), torch.bfloat16, by_block)
        assert rates.kernel < 1e-3 and rates.quantized_matmul > rates.matmul > 1e13
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("by_block", [False, True])
def test_every_timing_of_the_device_counts_for_its_spread(by_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(slow: int) -> tuple[float, int]:
        """Where the timing of that number takes twice as long as the others, and how many there are."""
        number = itertools.count()
        monkeypatch.setattr(measuring, "_cpu_seconds", lambda run: 2e-3 if next(number) == slow else 1e-3)
        return measuring.measure(CPU, torch.float32, by_block).spread, next(number)

    assert spread(-1) == (1.0, num_timings := 3 * (9 + by_block))
    assert {spread(slow)[0] for slow in range(num_timings)} == {2.0}


def test_timings_of_several_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [Call(Op.QUANTIZE_ROWWISE, (size, 8), torch.float32) for size in (1, 2)]
    times, order = iter([1.0, 9.0, 3.0, 8.0, 2.0, 7.0]), []
    monkeypatch.setattr(Call, "prepare", lambda call, device: call)
    monkeypatch.setattr(measuring, "_cpu_seconds", lambda run: order.append(run) or next(times))
    assert measuring.time_calls(calls, CPU) == {calls[0]: (2.0, 3.0), calls[1]: (8.0, 9 / 7)}
    assert order == calls * 3


def test_only_unsteady_calls_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, once, never = (Call(Op.QUANTIZE_ROWWISE, (size, 8), torch.float32) for size in (1, 2, 3))
    spreads = {steady: iter([1.3]), once: iter([2.0, 1.1]), never: iter([3.0, 1.6, 23.0])}
    monkeypatch.setattr(measuring, "_compile", lambda calls, device: None)
    monkeypatch.setattr(
        measuring, "_time_once", lambda calls, device: {call: measuring.Timing(1.0, next(spreads[call])) for call in calls}
    )
    timings = measuring.time_calls([steady, once, never], torch.device("cuda", 0))
    assert [timing.spread for timing in timings.values()] == [1.3, 1.1, 1.6]
    assert not any(list(left) for left in spreads.values())


def test_a_default_dtype_is_nothing_to_the_scales() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        for by_block in (False, True):
            assert measuring.measure(CPU, torch.float32, by_block).matmul > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_go_on_as_if_nothing_had_been_measured() -> None:
    state = torch.get_rng_state()
    measuring.measure(CPU, torch.float32, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_host_that_is_busy_for_a_while_is_measured_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Call, "prepare", lambda call, device: lambda: time.sleep(2e-3 if next(calls) < 40 else 0))
    assert measuring._host_seconds(Call(Op.MATMUL, (16, 16, 16), torch.float32), CPU) < 2e-3


@pytest.mark.parametrize(
    ("whole", "part", "share", "expected"),
    [(1.0, 0.5, 2, 0.0), (1.0, 0.6, 2, 0.2), (8.7, 1.7, 8, 0.7), (1.0, 0.1, 8, 0.0), (1.0, 1.5, 8, 0.5), (1.0, -0.1, 8, 0.0)],
    ids=["all of it sums", "a part", "a part of an eighth", "less than nothing", "half of it at most", "noise"],
)
def test_what_of_a_matmul_does_not_grow_with_its_sums(whole: float, part: float, share: int, expected: float) -> None:
    assert measuring._rest(whole, part, share) == pytest.approx(expected)


def test_the_rates_of_a_matmul_are_found_by_sums_of_several_lengths() -> None:
    calls = [Call(Op.MATMUL, (64, 32, length), torch.float32) for length in (512, 64, 32)]
    results = [1e-9, 1e-9, 3e-9]  # seconds for each, by the kernels for sums of 512, 64 and 32
    seconds = {
        call: 2 * 64 * 32 * call.sizes[2] / 1e9 + 64 * 32 * result + 1e-6 for call, result in zip(calls, results, strict=True)
    }
    for pick, expected in ((min, 1e-9), (max, 3e-9)):
        rate, output = measuring._matmul_rates(calls, seconds, 1e-6, pick)
        assert output == pytest.approx(expected, rel=0.1) and rate == pytest.approx(1e9, rel=0.01)


def test_kernels_that_a_model_needs_next_are_compiled_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Call] = []
    monkeypatch.setattr(Call, "prepare", lambda call, device: prepared.append(call) or (lambda: None))
    for by_block in (False, True):
        trials = measuring._Trials.of(CPU, torch.bfloat16, by_block)
        measuring._launches([*trials.all(), *trials.next()], CPU)
    ops = {call.op for call in prepared}
    of_training = set(Op) - {Op.MATMUL, Op.QUANTIZE_TENSORWISE_TRANSPOSE, Op.QUANTIZE_BY_SCALE}
    assert ops == of_training, "all of our kernels that a linear layer has"
    weight = {call.sizes for call in prepared if call.op in (Op.QUANTIZE_TENSORWISE, Op.QUANTIZE_BY_SCALE_TRANSPOSE)}
    assert weight == {(512, 512)}


@pytest.mark.gpu
def test_operands_come_from_memory() -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(gpu).L2_cache_size
    for rows, expected in ((1, measuring._MOST_COPIES + 1), (4096, 2 * cache // (4096 * 4096 * 2) + 1), (131072, 1)):
        before = torch.cuda.memory_allocated()
        run = measuring._from_memory(Call(Op.QUANTIZE_ROWWISE, (rows, 4096), torch.bfloat16), gpu)
        held = torch.cuda.memory_allocated() - before
        assert round(held / (rows * 4096 * 2)) == expected
        del run


@pytest.mark.gpu
def test_timing_leaves_no_memory_behind() -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    calls = [Call(Op.MATMUL, (256 * number, 512, 512), torch.bfloat16) for number in range(1, 17)]
    measuring.time_calls(calls[:1], gpu)
    before = torch.cuda.memory_allocated()
    measuring.time_calls(calls, gpu)
    assert torch.cuda.memory_allocated() - before < 80 * 2**20, "at most the workspaces of two threads"
