"""Timing on a device that wakes up before the host has launched everything."""

import time

import pytest
import torch

from swcompile.kernels.timing import queue_ahead


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
