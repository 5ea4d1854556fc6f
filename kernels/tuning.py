"""Choice of a kernel's configuration: timed once on the device, remembered in the process and on disk.

Every configuration of a kernel gives the same bits, so a choice changes time only: ranks of one job may choose apart.
"""

import contextlib
import statistics
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from math import inf, log2
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from swcompile.kernels.launch import (
    HAS_TRITON,
    Launch,
    device_facts,
    is_capturing,
    is_recording,
    recording,
    triton,
)
from swcompile.kernels.measurements import MeasurementFile
from swcompile.kernels.timing import intervals_ms
from swcompile.kernels.workers import compile_elsewhere, prepare, wait_for


class ConfigLike(Hashable, Protocol):
    """A `NamedTuple` of numbers, strings and booleans."""

    def _asdict(self) -> dict[str, Any]: ...


Config = TypeVar("Config", bound=ConfigLike)
Key = tuple[int, *tuple[Hashable, ...]]
"""What a choice depends on. The first element is the size that varies from call to call: `bucket(num_rows)`."""

NUM_FINALISTS = 3
"""So many of the fastest candidates are timed once more, which a chance of the first round then cannot decide."""
_FEW_CALLS, _MORE_CALLS = 5, 11
"""Of each candidate in the first round, and in the second."""

_num_tunings = 0


def num_tunings() -> int:
    """How often this process has timed a set of candidates. Tests assert that it stands still."""
    return _num_tunings


def bucket(size: int) -> int:
    """`size` rounded up to a power of two, so that a new number of tokens seldom means a new tuning."""
    return 1 << (size - 1).bit_length() if size > 1 else 1


def worth_trying(candidates: Sequence[Config], x: torch.Tensor) -> Sequence[Config]:
    """Of a kernel that memory holds back: all, or the first alone where it is known to be nearly the fastest.

    On an H200 it is, up to 4 % for the sizes of benchmarks/results/kernels_h200.md, so it is taken on Hopper for 16-bit and
    8-bit input: to compile and time the others takes longer there than they save.
    """
    is_known = x.itemsize <= 2 and device_facts(x.device).capability == (9, 0)
    return candidates[:1] if is_known else candidates


def measure_ms(run: Callable[[], object], num_calls: int = _MORE_CALLS) -> float:
    """Median time of `run` on the current CUDA stream in milliseconds, of so many calls after a warm-up.

    Each call finds the L2 cache full of something else, as a training step leaves it.
    """
    run()
    others = torch.empty(
        2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
        dtype=torch.uint8,
        device="cuda",
    )
    return statistics.median(intervals_ms([others.zero_, run], 2 * num_calls)[1::2])


def run_together(runs: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Call each in a thread of its own, whatever comes of it: kernels are compiled next to each other that way.

    Most of a compilation leaves Python's lock to others. What the calls compute is overwritten later.
    """
    prepare(device)
    stream = torch.cuda.current_stream(device)  # a thread's own, else, where operands may not be there yet

    def attempt(run: Callable[[], object]) -> None:
        with torch.cuda.device(device), torch.cuda.stream(stream), contextlib.suppress(Exception):  # whoever calls it again sees its error
            run()

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(attempt, runs))


def launches_of(runs: Iterable[Callable[[], object]]) -> list[Launch]:
    """What calls would launch, each configuration of it that would be tried included."""
    with recording() as launches:
        for run in runs:
            with contextlib.suppress(Exception):  # whoever calls it sees its error
                run()
    return list(launches.values())


def compile_together(runs: Sequence[Callable[[], object]], device: torch.device) -> None:
    """`run_together`, once Inductor's processes, if there are any, have compiled the kernels."""
    wait_for(compile_elsewhere(launches_of(runs), device))
    run_together(runs, device)


class _Turns:
    """Kernels of several ops may be compiled (and tried) at once; meanwhile none is timed, and those that are take turns."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_compiling = 0

    @contextlib.contextmanager
    def to_compile(self) -> Iterator[None]:
        """Waits for who times."""
        with self._condition:
            self._num_compiling += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_compiling -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def to_time(self) -> Iterator[None]:
        """Waits until nobody compiles, nor times."""
        with self._condition:
            self._condition.wait_for(lambda: self._num_compiling == 0)
            yield


_turns = _Turns()


class Tuner(Generic[Config]):
    """Remembers the fastest configuration of one kernel for each key.

    Args:
        name: of the kernel, for the file on disk.
        sources: files whose change makes old choices worthless.
        margin: by what part the fastest has to be faster than one that `candidates` lists before it. The few calls that are
            timed do not heat a GPU up to its power limit; where that limit decides, the order knows more than they do.
        measure: time of a call, in any unit, from so many of them; replaced in tests.
        compile_all: prepares the calls that are to be timed; replaced in tests.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[str],
        margin: float = 0.0,
        measure: Callable[[Callable[[], object], int], float] = measure_ms,
        compile_all: Callable[[Sequence[Callable[[], object]], torch.device], object] = compile_together,
    ) -> None:
        self._name = name
        self._sources = sources
        self._margin = margin
        self._measure = measure
        self._compile_all = compile_all
        self._chosen: dict[tuple[torch.device, Key], Config] = {}
        self.latest: Config | None = None
        """What `choose` returned last, for reports."""

    def choose(
        self,
        key: Key,
        candidates: Callable[[], Sequence[Config]],
        run: Callable[[Config], object],
        device: torch.device,
    ) -> Config:
        """The configuration to launch for `key`, timing `run` on each of `candidates()` if it is not known yet.

        While a CUDA graph is being captured nothing may be timed: the choice of the nearest size, else the first
        candidate, serves that launch and is not remembered. While launches are gathered, each candidate's are. The
        interpreter takes the first candidate.
        """
        chosen = self._chosen.get((device, key))
        if chosen is None:
            chosen = self._choose_unknown(key, candidates(), run, device)
        self.latest = chosen
        return chosen

    def _choose_unknown(
        self, key: Key, candidates: Sequence[Config], run: Callable[[Config], object], device: torch.device
    ) -> Config:
        if device.type == "cpu" or len(candidates) == 1:
            return candidates[0]
        file = MeasurementFile(self._path(device))
        stored = file.read().get(str(key))
        for config in candidates:
            if config._asdict() == stored:
                self._chosen[device, key] = config
                return config
        if is_recording():
            for config in candidates:
                with contextlib.suppress(Exception):  # whoever tries it sees its error
                    run(config)
            return candidates[0]
        if is_capturing():
            return self._nearest(key, device) or candidates[0]
        config = self._time(candidates, run, device)
        self._chosen[device, key] = config
        file.add(str(key), config._asdict(), instead_of=stored)
        return config

    def _time(
        self, candidates: Sequence[Config], run: Callable[[Config], object], device: torch.device
    ) -> Config:
        global _num_tunings
        _num_tunings += 1
        with _turns.to_compile():
            self._compile_all([partial(run, config) for config in candidates], device)
        with _turns.to_time():
            times: dict[Config, float] = {}
            unfit: Exception | None = None
            for config in candidates:
                try:
                    times[config] = self._measure(partial(run, config), _FEW_CALLS)
                except _resource_errors() as error:  # needs more shared memory or registers than this GPU has
                    unfit = error
            if not times:
                raise RuntimeError(f"no configuration of {self._name} fits this GPU") from unfit
            finalists = sorted(times, key=times.__getitem__)[:NUM_FINALISTS]
            final = {config: self._measure(partial(run, config), _MORE_CALLS) for config in finalists}
            bound = min(final.values()) * (1 + self._margin)
            return next(config for config in candidates if final.get(config, inf) <= bound)

    def _nearest(self, key: Key, device: torch.device) -> Config | None:
        """What is remembered for the nearest first element of `key`, all else being equal."""
        alike = [
            (abs(log2(known[0] / key[0])), config)
            for (at, known), config in self._chosen.items()
            if at == device and known[1:] == key[1:]
        ]
        return min(alike, key=lambda pair: pair[0])[1] if alike else None

    def _path(self, device: torch.device) -> Path:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # 2 s to import where Inductor is not

        facts = [device_facts(device).name, triton.__version__ if HAS_TRITON else ""]
        digest = sha256("\n".join([*facts, *(Path(source).read_text() for source in self._sources)]).encode())
        return Path(cache_dir()) / "swcompile" / f"{self._name}-{digest.hexdigest()[:16]}.json"


def _resource_errors() -> tuple[type[Exception], ...]:
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError
