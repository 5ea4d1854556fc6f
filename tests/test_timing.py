"""Timing on a device that wakes up before the host has launched everything."""

import time

import pytest
import torch

from swcompile.kernels.timing import intervals_ms, queue_ahead


class Event:
    def __init__(self, has_ended: bool) -> None:
        self.has_ended = has_ended

    def query(self) -> bool:
        return self.has_ended


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """What the fake device was told: cycles to sleep, and to wait."""
    calls: list[int | str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", calls.append)
    return calls


@pytest.mark.parametrize("num_late", range(6))
def test_sleeps_longer_until_the_host_is_done_first(calls: list[int | str], num_late: int) -> None:
    events = iter([Event(True)] * num_late + [Event(False)])

    def queue() -> Event:
        calls.append("launch")
        return next(events)

    queue_ahead(queue)
    sleeps = [call for call in calls if isinstance(call, int)]
    num_tries = min(num_late + 1, 4)
    assert len(sleeps) == num_tries == len(set(sleeps)) and sleeps == sorted(sleeps)
    assert calls == [call for sleep in sleeps for call in ("wait", sleep, "launch")] + ["wait"]


def test_calls_take_turns_between_events(calls: list[int | str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded(Event):
        def __init__(self, enable_timing: bool) -> None:
            super().__init__(False)

        def record(self) -> None:
            self.place = len(calls)

        def elapsed_time(self, end: "Recorded") -> float:
            return end.place - self.place

    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    long = lambda: calls.extend(["long"] * 3)
    assert intervals_ms([lambda: calls.append("short"), long], 5) == [1, 3, 1, 3, 1]
    assert calls[2:-1] == ["short", *["long"] * 3, "short", *["long"] * 3, "short"]


@pytest.mark.gpu
def test_a_host_that_is_slow_is_not_timed() -> None:
    x = torch.randn(1 << 20, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def queue() -> torch.cuda.Event:
        start.record()
        x.mul(2)
        time.sleep(0.015)
        end.record()
        return start

    queue_ahead(queue)
    assert start.elapsed_time(end) < 5
