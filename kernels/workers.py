"""Compiling Triton kernels in the processes in which Inductor compiles its own, into the cache on disk.

A thread needs Python's lock for a good part of the time that Triton takes to compile a kernel, and so does Inductor, which
generates code meanwhile: each holds the other up.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from swcompile.kernels.launch import triton

_ENVIRONMENT = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Variables that may have changed since Inductor's processes started."""


def submit(function: Callable[..., object], *args: Any, target: Any) -> Future[None] | None:
    """Call a function that compiles kernels by their `warmup`, in one of Inductor's processes.

    What it compiles, any process that compiles the same then finds in Triton's cache.

    Args:
        function: one that a module holds by its name, as its arguments are pickled.
        args: its arguments.
        target: Triton's name of a GPU model, which the process does not ask for, as it uses none.

    Returns:
        What is done when the function is; None while Inductor has no such processes, or if it is told to have none.
    """
    from torch._inductor.async_compile import AsyncCompile  # 2 s to import where Inductor is not

    if not AsyncCompile.use_process_pool():
        return None
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return AsyncCompile.process_pool().submit(run_for, target, environment, function, *args)


class _NoDevice(NamedTuple):
    """As much of a Triton driver as compiling takes, for a GPU that need not be there."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run_for(target: Any, environment: dict[str, str], function: Callable[..., object], *args: Any) -> None:
    """Call a function with a GPU model as Triton's current target, whatever GPU is there."""
    os.environ |= environment
    driver = triton.runtime.driver
    before, driver._active = driver._active, _NoDevice(target)
    try:
        function(*args)
    finally:
        driver._active = before
