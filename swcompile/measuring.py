"""Measures on a device what predicting a matmul's time takes: how fast it multiplies, quantises and launches."""

import contextlib
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch

from swcompile.kernels.int8 import num_blocks
from swcompile.kernels.launch import Launch
from swcompile.kernels.quantize_blockwise import (
    QUANTIZE_BLOCKWISE_TRANSPOSE,
    quantize_blockwise_transpose_work,
)
from swcompile.kernels.quantize_columnwise import (
    QUANTIZE_COLUMNWISE_TRANSPOSE,
    quantize_columnwise_transpose_work,
)
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE, quantize_rowwise_work
from swcompile.kernels.quantize_tensorwise import QUANTIZE_BY_SCALE, QUANTIZE_TENSORWISE
from swcompile.kernels.scaled_mm import SCALED_MM
from swcompile.kernels.scaled_mm_blockwise import SCALED_MM_BLOCKWISE
from swcompile.kernels.timing import intervals_ms
from swcompile.kernels.transpose import TRANSPOSE, transpose_work
from swcompile.kernels.tuning import launches_of, run_together
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
    def is_steady(self) -> bool:
        """Whether nothing else seems to have used a GPU meanwhile."""
        return self.spread <= _STEADY


def measure(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
    """Rates of a device for a dtype, and for int8 with scales by block or without.

    A GPU is measured again where timings differ, as they do while other programs use it, and the steadiest rates count. On
    a CPU other programs are the rule, and each timing is the shortest of a few.
    """
    measured: list[DeviceRates] = []
    for _ in range(_ATTEMPTS):
        measured.append(_in_a_thread(_measure_once, device, dtype, by_block))
        if measured[-1].is_steady or device.type == "cpu":
            break
    return min(measured, key=lambda rates: rates.spread)


_ATTEMPTS = 3
_STEADY = 1.4
"""By what factor timings of a call may differ. On an H200 that was idle up to 1.2; where tests shared it and a rate was a tenth
or more off, 1.5 to 23."""


def compile_trials(wanted: Iterable[tuple[torch.device, torch.dtype, bool]]) -> None:
    """Have the kernels compiled by which devices will be measured, each for a dtype and for scales by block or not.

    Where Inductor's processes are still to start, threads are done sooner.
    """
    launches: dict[torch.device, dict[str, Launch]] = defaultdict(dict)
    for of in wanted:
        with contextlib.suppress(torch.OutOfMemoryError):
            launches[of[0]].update((str(launch), launch) for launch in _in_a_thread(_launches, *of))
    for device, different in launches.items():
        elsewhere = compile_elsewhere(different.values(), device)
        _compiling.extend(elsewhere)
        if not elsewhere:
            _compiling_here.extend(compile_here(different.values(), device))


def _launches(device: torch.device, dtype: torch.dtype, by_block: bool) -> list[Launch]:
    """What measuring a device launches."""
    with _trials(device, dtype, by_block) as trials:
        return launches_of(trials.all())


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


class _Trials:
    """What is timed to measure a device, on normal data."""

    def __init__(self, device: torch.device, dtype: torch.dtype, by_block: bool) -> None:
        size = 4096 if device.type == "cuda" else 512
        rows = 8 * size if device.type == "cuda" else 2 * size
        self._by_block = by_block
        self.x = torch.randn(rows, size, device=device, dtype=dtype)
        self.weight = torch.randn(size, size, device=device, dtype=dtype)
        self.small, self.small_weight = self.x[:16, :16].contiguous(), self.weight[:16, :16].contiguous()
        self._ones = torch.ones(rows, 1, device=device, dtype=torch.float32)
        self._rounded = _rounded(self.x)
        if by_block:  # sums over the rows, as a weight's gradient does; as many operations
            self._scales = torch.ones(num_blocks(rows), size, device=device, dtype=torch.float32)
            self.quantized = [self._rounded.t().contiguous()] * 2
        else:
            self.quantized = [self._rounded, _rounded(self.weight)]

    def quantize(self) -> object:
        return QUANTIZE_ROWWISE(self.x)

    def quantize_small(self) -> object:
        return QUANTIZE_ROWWISE(self.small)

    def quantize_columns(self) -> object:
        if self._by_block:
            return QUANTIZE_BLOCKWISE_TRANSPOSE(self.x, self._ones)
        return QUANTIZE_COLUMNWISE_TRANSPOSE(self.x)

    def transpose(self) -> object:
        return TRANSPOSE(self._rounded)

    def quantized_matmul(self, a: torch.Tensor, b: torch.Tensor) -> object:
        if self._by_block:
            return SCALED_MM_BLOCKWISE(a, b, self._scales[: num_blocks(a.shape[1])], self.x.dtype)
        return SCALED_MM(a, b, self._ones, self._ones[:1], None, self.x.dtype)

    def all(self) -> list[Callable[[], object]]:
        """All that have kernels of ours, and those that a model will need next, to compile them at once."""
        matmul = partial(self.quantized_matmul, *self.quantized)
        calls: list[Callable[[], object]] = [self.quantize, self.quantize_small, self.quantize_columns, matmul]
        if self._by_block:
            return [*calls, self.transpose]
        return [
            *calls,
            lambda: QUANTIZE_TENSORWISE(self.weight),
            lambda: QUANTIZE_BY_SCALE(self.weight, self._ones[:1], True),
        ]


@contextlib.contextmanager
def _trials(device: torch.device, dtype: torch.dtype, by_block: bool) -> Iterator[_Trials]:
    """Makes the tensors, on the device, which is the current one meanwhile."""
    rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with _on(device), torch.no_grad(), rng:
        yield _Trials(device, dtype, by_block)


def _measure_once(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
    on_gpu = device.type == "cuda"
    clock = _Clock(_gpu_seconds if on_gpu else _cpu_seconds)
    with _trials(device, dtype, by_block) as trials:
        if on_gpu:
            wait_for(_compiling)  # those of other rates, too: they keep the host busy
            wait(_compiling_here)
            _compiling.clear()
            _compiling_here.clear()
            run_together(trials.all(), device)
        rows, size = trials.x.shape
        (quantize,) = clock(trials.quantize)
        (small,) = clock(trials.quantize_small)
        kernel = small * (_AMONG_OTHERS if on_gpu else 1.0)

        # What speaks against 8 bit counts.
        matmul, output = _matmul_rates(lambda a, b: a @ b.t(), (trials.x, trials.weight), clock, kernel, min)
        quantized, quantized_output = _matmul_rates(trials.quantized_matmul, trials.quantized, clock, kernel, max)
        (columns,) = clock(trials.quantize_columns)
        columns_work = quantize_blockwise_transpose_work if by_block else quantize_columnwise_transpose_work
        transpose = transpose_work(rows, size).bytes / clock(trials.transpose)[0] if by_block else 0.0
        return DeviceRates(
            matmul=matmul,
            output=output,
            quantized_matmul=quantized,
            quantized_output=quantized_output,
            quantize=quantize_rowwise_work(rows, size, dtype.itemsize).bytes / quantize,
            quantize_columns=columns_work(rows, size, dtype.itemsize).bytes / columns,
            transpose=transpose,
            kernel=kernel,
            matmul_call=_host_seconds(lambda: trials.small @ trials.small_weight) if on_gpu else 0.0,
            quantize_call=_host_seconds(trials.quantize_small) if on_gpu else 0.0,
            spread=clock.spread,
        )


class _Clock:
    """Times calls.

    Args:
        seconds: times one.
    """

    def __init__(self, seconds: Callable[[Callable[[], object]], float]) -> None:
        self._seconds = seconds
        self.spread = 1.0
        """By what factor the timings of one call have differed, at most."""

    def __call__(self, *runs: Callable[[], object]) -> list[float]:
        """Median seconds of each of several calls, which take turns."""
        turns = [[self._seconds(run) for run in runs] for _ in range(3)]
        times = list(zip(*turns, strict=True))
        self.spread = max(self.spread, *(max(of_one) / min(of_one) for of_one in times))
        return [statistics.median(of_one) for of_one in times]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Normal data in int8, as a quantiser leaves it: what is multiplied decides on a GPU's clock."""
    return (x * 31.0).clamp(-127, 127).round().to(torch.int8)


def _matmul_rates(
    matmul: Callable[..., object],
    operands: Sequence[torch.Tensor],
    clock: Callable[..., Sequence[float]],
    kernel: float,
    pick: Callable[[Iterable[float]], float],
) -> tuple[float, float]:
    """Operations a second at which a matmul sums, and seconds that it spends on an element of its result besides.

    Args:
        matmul: of two operands that are summed along their rows.
        operands: large ones.
        clock: times calls, as `_Clock` does.
        kernel: seconds that any kernel takes.
        pick: of what is found by sums an eighth as long and by sums a sixteenth as long, as kernels are chosen by length.
    """
    (num_rows, length), num_columns = operands[0].shape, operands[1].shape[0]
    shares = (1, 8, 16)
    cut = [[operand[:, : length // share].contiguous() for operand in operands] for share in shares]
    times = clock(*(partial(matmul, *pair) for pair in cut))
    whole, *parts = (seconds - min(kernel, seconds / 2) for seconds in times)
    rest = pick([_rest(whole, part, share) for part, share in zip(parts, shares[1:], strict=True)])
    return 2 * num_rows * num_columns * length / (whole - rest), rest / (num_rows * num_columns)


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


def _host_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Host time of a call in a training step: the shortest of a few timings, as other programs keep the host busy, and more.

    The device is done sooner.
    """
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
