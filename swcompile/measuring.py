"""Measures on a device what predicting a matmul's time takes: how fast it multiplies, quantises and launches."""

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import torch

from swcompile.calls import Call, Flag, Op
from swcompile.kernels.launch import Launch
from swcompile.kernels.timing import intervals_ms
from swcompile.kernels.tuning import launches_of
from swcompile.kernels.workers import compile_elsewhere, compile_here, wait_for


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """What one device gives in one dtype, and in int8 with scales of one kind in its place: measured on it."""

    matmul: float
    """Rate at which a large matmul in the model's own dtype sums, FLOP/s."""
    output: float
    """Seconds that it spends on each element of its result besides, at least: it stores little of it while it sums."""
    quantized_matmul: float
    """Rate at which a large `scaled_mm`, or `scaled_mm_blockwise`, sums, OP/s."""
    quantized_output: float
    """Seconds that it spends on each element of its result besides, at most."""
    quantize: float
    """Rate of a large `quantize_rowwise`, bytes read and written a second."""
    quantize_columns: float
    """Rate of a large `quantize_columnwise_transpose`, or the blockwise one, bytes a second, as its work counts them."""
    transpose: float
    """Rate of a large int8 `transpose`, bytes read and written a second; 0 where scales are not by block, which needs none."""
    kernel: float
    """Seconds that a kernel takes on the device, besides what it reads, writes and computes."""
    matmul_call: float
    """Seconds that the host spends on launching a matmul; 0 on a CPU, where it is part of `kernel`."""
    quantize_call: float
    """Seconds that the host spends on launching one of our kernels; likewise."""
    spread: float = 1.0
    """By what factor timings of one call differed at most."""

    @property
    def gap(self) -> float:
        """Seconds of `kernel` that go by only between kernels of different kinds."""
        return self.kernel * (1 - 1 / _AMONG_OTHERS)


class Timing(NamedTuple):
    """What a call takes among its equals: on a GPU the device, on a CPU all in all."""

    seconds: float
    """Median of three."""
    spread: float
    """By what factor they differed at most."""


def measure(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
    """Rates of a device for a dtype, and for int8 with scales by block or without."""
    trials = _Trials.of(device, dtype, by_block)
    timings = time_calls(trials.all(), device)
    seconds = {call: timing.seconds for call, timing in timings.items()}
    matmul_call, quantize_call = 0.0, 0.0
    kernel = seconds[trials.small]
    if device.type == "cuda":
        kernel *= _AMONG_OTHERS
        small = Call(Op.MATMUL, (16, 16, 16), dtype)
        matmul_call, quantize_call = (_in_a_thread(_host_seconds, call, device) for call in (small, trials.small))

    def bytes_a_second(call: Call | None) -> float:
        return call.num_bytes / seconds[call] if call else 0.0

    # What speaks against 8 bit counts.
    matmul, output = _matmul_rates(trials.matmuls, seconds, kernel, min)
    quantized, quantized_output = _matmul_rates(trials.quantized_matmuls, seconds, kernel, max)
    return DeviceRates(
        matmul=matmul,
        output=output,
        quantized_matmul=quantized,
        quantized_output=quantized_output,
        quantize=bytes_a_second(trials.quantize),
        quantize_columns=bytes_a_second(trials.quantize_columns),
        transpose=bytes_a_second(trials.transpose),
        kernel=kernel,
        matmul_call=matmul_call,
        quantize_call=quantize_call,
        spread=max(timing.spread for timing in timings.values()),
    )


def time_calls(calls: Collection[Call], device: torch.device) -> dict[Call, Timing]:
    """What each of several calls takes, which take turns; the operands of one are in memory at a time.

    On a GPU those are timed again whose timings differ, as they do while other programs use it, and the steadiest count. On
    a CPU other programs are the rule, and each timing is the shortest of a few.

    Raises:
        Exception: what a call raises, as an operand that does not fit in memory does.
    """
    if device.type == "cuda":
        _in_a_thread(_compile, calls, device)
    timings: dict[Call, Timing] = {}
    left = list(calls)
    for _ in range(_ATTEMPTS if device.type == "cuda" else 1):
        for call, timing in _in_a_thread(_time_once, left, device).items():
            timings[call] = min(timing, timings.get(call, timing), key=lambda timing: timing.spread)
        left = [call for call, timing in timings.items() if not is_steady(timing.spread)]
        if not left:
            break
    return timings


def is_steady(spread: float) -> bool:
    """Whether a GPU seems to have done nothing else, by what factor timings of one call differed."""
    return spread <= _STEADY


_ATTEMPTS = 3
_STEADY = 1.4
"""By what factor timings of a call may differ. On an H200 that was idle up to 1.2; where tests shared it and a rate was a tenth
or more off, 1.5 to 23."""


def compile_trials(wanted: Iterable[tuple[torch.device, torch.dtype, bool]]) -> None:
    """Have the kernels compiled by which devices will be measured, each for a dtype and for scales by block or not.

    Those that a model will need next are compiled with them.
    """
    calls: dict[torch.device, set[Call]] = defaultdict(set)
    for device, dtype, by_block in wanted:
        trials = _Trials.of(device, dtype, by_block)
        calls[device] |= {*trials.all(), *trials.next()}
    for device, different in calls.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            _start_compiling(_in_a_thread(_launches, different, device), device)


def _compile(calls: Iterable[Call], device: torch.device) -> None:
    """Have the kernels of calls compiled next to each other, and wait for them and for those of others: they keep the host busy."""
    _start_compiling(_launches(calls, device), device)
    wait_for(_compiling)
    wait(_compiling_here)
    _compiling.clear()
    _compiling_here.clear()


def _start_compiling(launches: Iterable[Launch], device: torch.device) -> None:
    """Where Inductor's processes are still to start, threads are done sooner."""
    different = {str(launch): launch for launch in launches}.values()
    elsewhere = compile_elsewhere(different, device)
    _compiling.extend(elsewhere)
    if not elsewhere:
        _compiling_here.extend(compile_here(different, device))


def _launches(calls: Iterable[Call], device: torch.device) -> list[Launch]:
    """What calls of ours launch."""
    with _quietly(device):
        return [launch for call in calls if call.op is not Op.MATMUL for launch in launches_of([call.prepare(device)])]


_compiling: list[Future[None]] = []
_compiling_here: list[Future[None]] = []

_Result = TypeVar("_Result")


def _in_a_thread(run: Callable[..., _Result], *arguments: Any) -> _Result:
    """What a function returns that runs in a thread of its own, where calls are as fast as in a training step.

    Who compiles has modes on (fake tensors, the dispatcher in Python, autocast) and Inductor's options patched, which are a
    thread's own, and a deep stack. Python keeps its frames in chunks: where the stack ends with one, each call allocates the
    next and frees it. An op, which makes several, was seen to take two to three times as long.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, *arguments).result()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one: events, sleep and synchronize are the current device's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Trials(NamedTuple):
    """By what a device is measured. What multiplies sums over a whole length, an eighth and a sixteenth of it."""

    matmuls: list[Call]
    quantized_matmuls: list[Call]
    quantize: Call
    quantize_columns: Call
    transpose: Call | None
    small: Call

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, by_block: bool) -> "_Trials":
        size = 4096 if device.type == "cuda" else 512
        rows = 8 * size if device.type == "cuda" else 2 * size
        linear = (Flag.RHS_TRANSPOSED,)
        matmuls = [(rows, size, size // share) for share in _SHARES]
        in_blocks = [(size, size, rows // share) for share in _SHARES]  # sums over the rows, as a weight's gradient does
        by_columns = Op.QUANTIZE_BLOCKWISE_TRANSPOSE if by_block else Op.QUANTIZE_COLUMNWISE_TRANSPOSE
        return cls(
            matmuls=[Call(Op.MATMUL, sizes, dtype, linear) for sizes in matmuls],
            quantized_matmuls=[Call(Op.SCALED_MM_BLOCKWISE, sizes, dtype) for sizes in in_blocks]
            if by_block
            else [Call(Op.SCALED_MM, sizes, dtype) for sizes in matmuls],
            quantize=Call(Op.QUANTIZE_ROWWISE, (rows, size), dtype),
            quantize_columns=Call(by_columns, (rows, size), dtype),
            transpose=Call(Op.TRANSPOSE, (rows, size), torch.int8) if by_block else None,
            small=Call(Op.QUANTIZE_ROWWISE, (16, 16), dtype),
        )

    def all(self) -> list[Call]:
        """What is timed."""
        transpose = [self.transpose] if self.transpose else []
        return [*self.matmuls, *self.quantized_matmuls, self.quantize, self.quantize_columns, *transpose, self.small]

    def next(self) -> list[Call]:
        """What else a model calls, as most do."""
        if self.transpose:
            return []
        _, *weight = self.matmuls[0].sizes
        return [Call(op, tuple(weight), self.small.dtype) for op in (Op.QUANTIZE_TENSORWISE, Op.QUANTIZE_BY_SCALE_TRANSPOSE)]


_SHARES = 1, 8, 16


@contextlib.contextmanager
def _quietly(device: torch.device) -> Iterator[None]:
    """Makes a device the current one, leaves its random numbers as they are, and records nothing for a backward."""
    rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with _on(device), torch.no_grad(), rng:
        yield


def _time_once(calls: Collection[Call], device: torch.device) -> dict[Call, Timing]:
    """Three times in turns of all of them, so that what happens meanwhile happens to all."""
    times: dict[Call, list[float]] = defaultdict(list)
    with _quietly(device):
        for _ in range(3):
            for call in calls:
                seconds = _gpu_seconds(_from_memory(call, device)) if device.type == "cuda" else _cpu_seconds(call.prepare(device))
                times[call].append(seconds)
    return {call: Timing(statistics.median(of_one), max(of_one) / min(of_one)) for call, of_one in times.items()}


def _from_memory(call: Call, device: torch.device) -> Callable[[], object]:
    """A call that seldom finds an operand in a GPU's cache, as in a training step: it goes through copies of them."""
    runs = [call.prepare(device)]
    num_bytes = sum(tensor.nbytes for tensor in runs[0].args if isinstance(tensor, torch.Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    runs += [call.prepare(device) for _ in range(min(2 * cache // num_bytes, _MOST_COPIES))]
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


_MOST_COPIES = 15
"""Of operands, the first left aside. Where they are so small that more would fit in the cache, a kernel's own time decides."""


def _matmul_rates(
    calls: Sequence[Call], seconds: dict[Call, float], kernel: float, pick: Callable[[Iterable[float]], float]
) -> tuple[float, float]:
    """Operations a second at which a matmul sums, and seconds that it spends on an element of its result besides.

    Args:
        calls: that differ in how long they sum, by `_SHARES`.
        seconds: of each.
        kernel: seconds that any kernel takes.
        pick: of what is found by sums an eighth as long and by sums a sixteenth as long, as kernels are chosen by length.
    """
    m, n, k = calls[0].sizes
    whole, *parts = (seconds[call] - min(kernel, seconds[call] / 2) for call in calls)
    rest = pick([_rest(whole, part, share) for part, share in zip(parts, _SHARES[1:], strict=True)])
    return 2 * m * n * k / (whole - rest), rest / (m * n)


def _rest(whole: float, part: float, share: int) -> float:
    """What does not grow with the length of the sums, of a matmul's time and that with sums so many times shorter."""
    return max(min((share * part - whole) / (share - 1), part, whole / 2), 0.0)  # clocks are higher in the shorter one


def _cpu_seconds(run: Callable[[], object]) -> float:
    """The shortest of a few timings."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _gpu_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Device time of a call among equals, all of them queued before the first one starts."""
    run()

    def run_repeatedly() -> None:
        for _ in range(repeats):
            run()

    (milliseconds,) = intervals_ms([run_repeatedly], 1)
    return milliseconds / 1e3 / repeats


def _host_seconds(call: Call, device: torch.device, repeats: int = 10) -> float:
    """Host time of a call in a training step: the shortest of a few timings, as other programs keep the host busy, and more.

    The device is done sooner.
    """
    with _quietly(device):
        run = call.prepare(device)
        run()
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return _IN_A_STEP * min(times) / repeats


_IN_A_STEP = 2.0
"""Times as long as among equals: in a step, other code and data fill the host's caches. Seen in one of 12 layers: 1.8."""
_AMONG_OTHERS = 1.3
"""Times as long a kernel takes between kernels of other kinds as among equals: seen in six layers, 1.2 to 1.5."""
