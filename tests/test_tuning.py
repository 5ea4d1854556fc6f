"""Choice of configurations, with a fake device and a fake clock."""

import contextlib
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch._inductor.runtime import cache_dir_utils

from swcompile.kernels import launch, tuning
from swcompile.kernels.measurements import MeasurementFile
from swcompile.kernels.tuning import Tuner, bucket, num_tunings

GPU = torch.device("cuda", 0)
KEY = (bucket(1000), 1280, torch.bfloat16, True)


class Config(NamedTuple):
    tile: int
    kernel: str = "a"


CANDIDATES = [Config(64), Config(128), Config(128, "b")]
TIMES = {Config(64): 3.0, Config(128): 1.0, Config(128, "b"): 2.0}


class Clock:
    """`run` and `measure` of a tuner: says how long a config takes, and counts."""

    def __init__(self, times: dict[Config, float | Exception]) -> None:
        self.times, self.num_runs = times, 0

    def run(self, config: Config) -> float:
        self.num_runs += 1
        milliseconds = self.times[config]
        if isinstance(milliseconds, Exception):
            raise milliseconds
        return milliseconds

    @staticmethod
    def measure(run: partial[float], num_calls: int) -> float:
        return run()


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch, tmp_path):
    facts = launch.DeviceFacts("Fake GPU", (9, 0), 132, 233472)
    monkeypatch.setattr(tuning, "device_facts", lambda device: facts)
    monkeypatch.setattr(tuning, "is_capturing", lambda: False)
    monkeypatch.setattr(cache_dir_utils, "cache_dir", lambda: str(tmp_path))


compiled: list[int] = []
"""How many calls were prepared, a tuning."""


def new_tuner(source: str = __file__, margin: float = 0.0) -> Tuner[Config]:
    """As in a new process: nothing remembered but what is on disk."""
    return Tuner("test", [source], margin, measure=Clock.measure, compile_all=lambda runs, device: compiled.append(len(runs)))


def choose(tuner: Tuner[Config], clock: Clock, key=KEY, candidates=CANDIDATES, device=GPU) -> Config:
    return tuner.choose(key, lambda: candidates, clock.run, device)


def cache_files(tmp_path):
    return list((tmp_path / "swcompile").glob("test-*.json"))


def test_bucket():
    assert [bucket(size) for size in (0, 1, 2, 3, 4, 5, 1000, 1024, 1025)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        1024,
        1024,
        2048,
    ]


def test_times_once_and_remembers():
    tuner, clock, before = new_tuner(), Clock(TIMES), num_tunings()
    assert choose(tuner, clock) == Config(128)
    assert num_tunings() == before + 1
    num_runs = clock.num_runs
    assert choose(tuner, clock) == Config(128)
    assert (clock.num_runs, num_tunings()) == (num_runs, before + 1)
    assert choose(tuner, clock, key=(2048, *KEY[1:])) == Config(128)
    assert num_tunings() == before + 2


def test_a_chance_of_the_first_round_is_corrected():
    class Erratic(Clock):
        def run(self, config: Config) -> float:
            first = self.num_runs < len(CANDIDATES)
            return super().run(config) * (0.1 if first and config == Config(64) else 1)

    assert choose(new_tuner(), Erratic(TIMES)) == Config(128)


@pytest.mark.parametrize(("margin", "tile"), [(0.0, 128), (0.01, 128), (0.03, 64)])
def test_the_fastest_has_to_be_faster_than_those_before_it_by_a_margin(margin: float, tile: int):
    assert choose(new_tuner(margin=margin), Clock(TIMES | {Config(64): 1.02})) == Config(tile)


def test_remembered_on_disk(tmp_path):
    choose(new_tuner(), Clock(TIMES))
    before, clock = num_tunings(), Clock({})
    assert choose(new_tuner(), clock) == Config(128)
    assert (clock.num_runs, num_tunings()) == (0, before)
    assert len(cache_files(tmp_path)) == 1


def test_two_processes_keep_each_others_choices():
    one, two = new_tuner(), new_tuner()
    choose(one, Clock(TIMES), key=(1, 0))
    choose(two, Clock(TIMES), key=(2, 0))
    before = num_tunings()
    choose(new_tuner(), Clock(TIMES), key=(1, 0))
    choose(new_tuner(), Clock(TIMES), key=(2, 0))
    assert num_tunings() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1', "\x00\xff"])
def test_damaged_file(tmp_path, content):
    choose(new_tuner(), Clock(TIMES))
    (file,) = cache_files(tmp_path)
    file.write_text(content)
    before = num_tunings()
    assert choose(new_tuner(), Clock(TIMES)) == Config(128)
    assert choose(new_tuner(), Clock({})) == Config(128)  # repaired by the one before
    assert num_tunings() == before + 1


def test_unwritable_directory_warns_once(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache_dir_utils, "cache_dir", lambda: str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert choose(new_tuner(), Clock(TIMES)) == Config(128)
    assert len(seen) == 1 and "cannot be written, so every process measures again" in str(seen[0].message)


def test_of_two_processes_the_first_to_write_wins(tmp_path):
    file = MeasurementFile(tmp_path / "folder" / "file.json")
    assert file.add("a", 1) == 1 and file.add("a", 2) == 1
    assert file.add("b", 3) == 3 and file.read() == {"a": 1, "b": 3}
    assert file.add("a", 4, instead_of=1) == 4 and file.add("a", 5, instead_of=1) == 4


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    file = MeasurementFile(tmp_path / "file.json")

    def add(index):
        file.add(str(index), index)
        return file.add("same", index)

    with ThreadPoolExecutor(8) as pool:
        winners = set(pool.map(add, range(40)))
    assert file.read() == {str(index): index for index in range(40)} | {"same": winners.pop()} and not winners


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path):
    file = MeasurementFile(tmp_path / "file.json")
    with pytest.raises(TypeError, match="not JSON serializable"):
        file.add("a", object())
    file.path.mkdir()
    with pytest.warns(UserWarning, match="cannot be written"):
        assert file.add("a", 1) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "file.json.lock"]


def test_a_config_that_is_no_candidate_any_more():
    choose(new_tuner(), Clock(TIMES))
    assert choose(new_tuner(), Clock(TIMES), candidates=[Config(64), Config(128, "b")]) == Config(128, "b")


def test_other_source_or_gpu_or_triton_tunes_again(monkeypatch, tmp_path):
    choose(new_tuner(), Clock(TIMES))
    source = tmp_path / "kernel.py"
    source.write_text("changed")
    choose(new_tuner(str(source)), Clock(TIMES))
    monkeypatch.setattr(tuning, "device_facts", lambda device: launch.DeviceFacts("Other GPU", (9, 0), 132, 233472))
    choose(new_tuner(), Clock(TIMES))
    monkeypatch.setattr(tuning.triton, "__version__", "99.0")
    choose(new_tuner(), Clock(TIMES))
    assert len(cache_files(tmp_path)) == 4


def test_never_tunes_during_capture(monkeypatch):
    tuner, before = new_tuner(), num_tunings()
    monkeypatch.setattr(tuning, "is_capturing", lambda: True)
    assert choose(tuner, Clock({})) == CANDIDATES[0]
    monkeypatch.setattr(tuning, "is_capturing", lambda: False)
    for size, best in ((64, Config(128, "b")), (4096, Config(128))):
        choose(tuner, Clock(TIMES | {best: 0.5}), key=(size, *KEY[1:]))
    assert num_tunings() == before + 2
    monkeypatch.setattr(tuning, "is_capturing", lambda: True)
    assert choose(tuner, Clock({}), key=(128, *KEY[1:])) == Config(128, "b")  # nearest: 64
    assert choose(tuner, Clock({}), key=(2048, *KEY[1:])) == Config(128)  # nearest: 4096
    assert choose(tuner, Clock({}), key=(128, 999)) == CANDIDATES[0]  # nothing like it
    assert num_tunings() == before + 2
    monkeypatch.setattr(tuning, "is_capturing", lambda: False)
    assert choose(tuner, Clock(TIMES), key=(128, *KEY[1:])) == Config(128)  # the stopgap was not remembered


def test_configs_that_do_not_fit_the_gpu():
    from triton.runtime.errors import OutOfResources

    unfit = OutOfResources(300_000, 232_448, "shared memory")
    assert choose(new_tuner(), Clock(TIMES | {Config(128): unfit})) == Config(128, "b")
    with pytest.raises(RuntimeError, match="no configuration of test fits this GPU"):
        choose(new_tuner(), Clock(dict.fromkeys(CANDIDATES, unfit)), key=(1,))


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        choose(new_tuner(), Clock(TIMES | {Config(64): ZeroDivisionError()}))


def test_candidates_are_compiled_together_and_once():
    compiled.clear()
    tuner = new_tuner()
    for _ in range(2):
        choose(tuner, Clock(TIMES))
    assert compiled == [len(CANDIDATES)]


def test_calls_run_in_threads_and_errors_are_left_to_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(seen.append(stream)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tuning, "prepare", lambda device: seen.append("prepared"))
    seen: list[str] = []
    both, done = threading.Barrier(2, timeout=30), []

    def call(number: int) -> None:
        both.wait()  # breaks unless both run at once
        done.append(number)
        raise ValueError

    tuning.run_together([partial(call, 1), partial(call, 2)], GPU)
    assert sorted(done) == [1, 2] and seen == ["prepared"] + [f"the stream of {GPU}"] * 2


def test_kernels_are_compiled_at_once_and_timed_one_by_one():
    first_two, now, seen = threading.Barrier(2, timeout=30), Counter(), []

    def during(what: str, seconds: float) -> None:
        now[what] += 1
        seen.append((what, dict(now)))
        time.sleep(seconds)
        seen.append((what, dict(now)))
        now[what] -= 1

    def measure(run: partial[float], num_calls: int) -> float:
        during("time", 0.005)
        return run()

    def work(number: int) -> None:
        def compile_all(runs: object, device: torch.device) -> None:
            if number < 2:
                first_two.wait()  # breaks unless both do
            during("compile", (0.01, 0.1, 0.05)[number])

        time.sleep(0.13 if number == 2 else 0)  # comes while another is timed
        tuner: Tuner[Config] = Tuner(f"test-{number}", [__file__], measure=measure, compile_all=compile_all)
        assert choose(tuner, Clock(TIMES), key=(number,)) == Config(128)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    timed = [others for what, others in seen if what == "time"]
    assert len(timed) == 2 * 3 * 6 and all(others == {"compile": 0, "time": 1} for others in timed)
    assert all(not others.get("time") for what, others in seen if what == "compile")


def test_interpreter_takes_the_first():
    before = num_tunings()
    assert choose(new_tuner(), Clock({}), device=torch.device("cpu")) == CANDIDATES[0]
    assert num_tunings() == before


@pytest.mark.gpu
def test_measure_tells_long_from_short():
    short, long = torch.randn(1 << 20, device="cuda"), torch.randn(1 << 26, device="cuda")
    assert 3 < tuning.measure_ms(lambda: long.mul(2)) / tuning.measure_ms(lambda: short.mul(2))
