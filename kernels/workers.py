"""Compiling Triton kernels in the processes in which Inductor compiles its own, into the cache on disk.

A thread needs Python's lock for a part of the time that Triton takes to compile a kernel, and so does Inductor, which
generates code meanwhile: each holds the other up.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from swcompile.kernels.launch import triton

_SETTINGS = ("TRITON_", "TORCHINDUCTOR_CACHE_DIR")
"""How variables start that decide what Triton compiles, and where it keeps that. Inductor sets one in its processes: they have
PyTorch's assembler in place of Triton's, and its version is part of Triton's keys.
"""


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
    return AsyncCompile.process_pool().submit(run_for, target, _settings(), function, *args)


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}


class _NoDevice(NamedTuple):
    """As much of a Triton driver as compiling takes, for a GPU that need not be there."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run_for(target: Any, settings: Mapping[str, str], function: Callable[..., object], *args: Any) -> None:
    """Call a function with a GPU model as Triton's current target, whatever GPU is there, and another process's settings."""
    driver = triton.runtime.driver
    before, driver._active = driver._active, _NoDevice(target)
    try:
        with _set(settings):
            function(*args)
    finally:
        driver._active = before


@contextlib.contextmanager
def _set(settings: Mapping[str, str]) -> Iterator[None]:
    """These, and no others."""
    from triton.backends.nvidia.compiler import get_ptxas_version  # asks the assembler once

    before = _settings()
    try:
        _replace(settings)
        get_ptxas_version.cache_clear()
        yield
    finally:
        _replace(before)
        get_ptxas_version.cache_clear()


def _replace(settings: Mapping[str, str]) -> None:
    for name in _settings().keys() - settings.keys():
        del os.environ[name]
    os.environ.update(settings)
