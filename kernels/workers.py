"""Compiling Triton kernels in the processes in which Inductor compiles its own, into the cache on disk.

A thread needs Python's lock for a part of the time that Triton takes to compile a kernel, and so does Inductor, which
generates code meanwhile: each holds the other up.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import cache
from importlib import import_module
from pickle import PicklingError
from typing import Any, NamedTuple

import torch

from swcompile.kernels.launch import Description, Launch, triton, with_base

_log = logging.getLogger(__name__)
_SETTINGS = ("TRITON_", "TORCHINDUCTOR_CACHE_DIR")
"""How variables start that decide what Triton compiles, and where it keeps that. Inductor sets one in its processes: they have
PyTorch's assembler in place of Triton's, and its version is part of Triton's keys.
"""
_ASSEMBLER = "TRITON_PTXAS"


def submit(
    function: Callable[..., list[Any]], *args: Any, target: Any, at_once: bool = True
) -> Future[None] | None:
    """Call a function that compiles kernels by their `warmup` and returns them, in one of Inductor's processes.

    What it compiles, any process that compiles the same then finds in Triton's cache.

    Args:
        function: one that a module holds by its name, as its arguments are pickled.
        args: its arguments.
        target: Triton's name of a GPU model, which the process does not ask for, as it uses none.
        at_once: not if the processes are still to start.

    Returns:
        What is done when the function is; None where nobody has started such processes.
    """
    from torch._inductor.async_compile import AsyncCompile  # 2 s to import where Inductor is not

    if _given_up or not _have_started() or (at_once and not AsyncCompile.use_process_pool()):
        return None
    try:
        return AsyncCompile.process_pool().submit(run_for, target, _settings_of(target.arch), function, *args)
    except (RuntimeError, OSError, PicklingError) as error:  # the processes have died, or something is not to be pickled
        _log.info("Inductor's processes take no kernels of ours: %r", error)
        return None


_given_up: list[str] = []
"""Why Inductor's processes are left alone from now on."""
_PATIENCE = 60.0
"""Seconds that are waited for all kernels of an op. Nobody says so if the processes have died."""


@cache
def _assembler(arch: int) -> dict[str, str]:
    """Where Triton found the assembler whose version is part of its keys: asked once, while Inductor may set another later."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    get_ptxas_version(arch)
    return {name: value for name, value in os.environ.items() if name.startswith(_ASSEMBLER)}


def _have_started() -> bool:
    """Whether a backend has started the processes. For an op that is called by itself a dozen of them would be too many."""
    from torch._inductor.async_compile import AsyncCompile

    started: int = AsyncCompile.process_pool.cache_info().currsize
    return started > 0


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}


def _settings_of(arch: int) -> dict[str, str]:
    """What a process needs to compile what this one then finds."""
    settings = {name: value for name, value in _settings().items() if not name.startswith(_ASSEMBLER)}
    return settings | _assembler(arch)


def compile_elsewhere(launches: Iterable[Launch], device: torch.device, *, at_once: bool = True) -> list[Future[None]]:
    """Compile the kernels of some launches in Inductor's processes.

    Args:
        launches: gathered by `recording`, on tensors that are aligned, as most are.
        device: that they are for.
        at_once: as for `submit`.

    Returns:
        What is done when a kernel is compiled, if it is compiled there; what goes wrong there goes wrong here again.
    """
    with torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
    found = [submit(compile_launch, launch, target=target, at_once=at_once) for launch in launches]
    return [future for future in found if future is not None]


def wait_for(futures: Iterable[Future[None]]) -> None:
    """Wait for what was submitted, but not for ever: what is not compiled there will be compiled here."""
    done, pending = wait(list(futures), _PATIENCE)
    for error in filter(None, (future.exception() for future in done)):
        _log.info("a kernel is compiled in this process, as another one could not: %r", error)
    if pending:
        _given_up.append(f"{len(pending)} kernels took more than {_PATIENCE:g} s")
        _log.warning("Inductor's processes compile no kernels of ours any more: %s", _given_up[-1])


def compile_launch(launch: Launch) -> list[Any]:
    """Compile a launch's kernel for Triton's current target."""
    kernel = getattr(import_module(launch.module), launch.name)
    arguments = [
        with_base(argument, triton.runtime.jit.MockTensor(argument.dtype)) if isinstance(argument, Description) else argument
        for argument in launch.arguments
    ]
    return [kernel.warmup(*arguments, grid=(1,), **dict(launch.options))]


class _NoDevice(NamedTuple):
    """As much of a Triton driver as compiling takes, for a GPU that need not be there."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run_for(target: Any, settings: Mapping[str, str], function: Callable[..., list[Any]], *args: Any) -> None:
    """Call a function that compiles kernels with a GPU model as Triton's current target, whatever GPU is there, and another
    process's settings.
    """
    driver = triton.runtime.driver
    before, driver._active = driver._active, _NoDevice(target)
    try:
        with _set(settings):
            for compiled in function(*args):
                _make_launcher(compiled)
                compiled.src.fn.device_caches.clear()  # they know one target and one folder
    finally:
        driver._active = before


def _make_launcher(compiled: Any) -> None:
    """Have Triton 3.6 make what launches a kernel, which takes a C compiler longer than many a kernel takes to compile."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(AssertionError):  # no GPU's driver to link with
            driver.CudaLauncher(compiled.src, compiled.metadata)


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
