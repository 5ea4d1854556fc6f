"""Timing what a GPU does, without the time that the host takes to launch it."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

_SLEEPS = 4_000_000, 20_000_000, 100_000_000, 640_000_000
"""Cycles: some 2 ms to 0.3 s."""


def queue_ahead(queue: Callable[[], torch.cuda.Event]) -> None:
    """Launch what is to be timed while the current CUDA device sleeps, and wait for it.

    If the device wakes up before all is launched, as it may where the host has much else to do, it sleeps longer and
    all is launched once more: times would be those of launching otherwise.

    Args:
        queue: launches, on the current stream, and returns the first event that it recorded.
    """
    for cycles in _SLEEPS:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        first = queue()
        if not first.query():
            break
    torch.cuda.synchronize()


def intervals_ms(calls: Sequence[Callable[[], object]], num_intervals: int) -> list[float]:
    """Milliseconds that the current CUDA device spends on each of so many calls, which take turns, launched ahead."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_intervals + 1)]

    def queue() -> torch.cuda.Event:
        for number, event in enumerate(events[:-1]):
            event.record()
            calls[number % len(calls)]()
        events[-1].record()
        return events[0]

    queue_ahead(queue)
    return [start.elapsed_time(end) for start, end in pairwise(events)]
