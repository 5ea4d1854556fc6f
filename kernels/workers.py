"""Compiling Triton kernels beside the thread that needs them: in the processes in which Inductor compiles its own, or in threads.

What a process compiles, this one then finds in the cache on disk. A thread needs Python's lock for a part of the time that
Triton takes to compile a kernel, and so does Inductor, which generates code meanwhile: each holds the other up. But threads are
there at once, where the processes take seconds to start.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from importlib import import_module
from pickle import PicklingError
from typing import Any, NamedTuple

import torch

from swcompile.kernels.launch import Description, Launch, load, settle_key, triton, with_base

_log = logging.getLogger(__name__)
_SETTINGS = ("TRITON_", "TORCHINDUCTOR_CACHE_DIR")
"""How variables start that decide what Triton compiles, and where it keeps that."""
_ASSEMBLER = "TRITON_PTXAS"
"""How those start that name the assembler, of which Inductor sets one in its processes: they have PyTorch's in place of Triton's."""

threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="kernels")
_exiting = threading.Event()


def _leave_off() -> None:
    _exiting.set()
    threads.shutdown(wait=False, cancel_futures=True)


if hasattr(threading, "_register_atexit"):  # a pool's threads else finish all their work before the process ends
    threading._register_atexit(_leave_off)
_preparing = threading.Lock()


def prepare(device: torch.device) -> Any:
    """Have ready what takes a second before Triton can compile its first kernel for a GPU.

    That is its driver, which a C compiler makes, its hash of itself, and its assembler's version. Several threads that compile
    at once would else each do it.

    Returns:
        Triton's name of the GPU model.
    """
    from torch._inductor.runtime.triton_compat import triton_key  # 2 s to import where Inductor is not

    with _preparing, torch.cuda.device(device):
        target = triton.runtime.driver.active.get_current_target()
        triton_key()
        _assembler(target.arch)
    return target


def submit(
    function: Callable[..., list[Any]], *args: Any, target: Any, at_once: bool = True
) -> Future[None] | None:
    """Call a function that compiles kernels by their `warmup` and returns them, in one of Inductor's processes.

    Args:
        function: one that a module holds by its name, as its arguments are pickled.
        args: its arguments.
        target: Triton's name of a GPU model, which the process does not ask for, as it uses none.
        at_once: not if the processes are still to start.

    Returns:
        What is done when the function is; None where nobody has started such processes.
    """
    from torch._inductor.async_compile import AsyncCompile  # 2 s to import where Inductor is not

    if not _are_there(at_once):
        return None
    try:
        return AsyncCompile.process_pool().submit(run_for, target, _settings(), _assembler(target.arch), function, *args)
    except (RuntimeError, OSError, PicklingError) as error:  # the processes have died, or something is not to be pickled
        _log.info("Inductor's processes take no kernels of ours: %r", error)
        return None


_given_up: list[str] = []
"""Why Inductor's processes are left alone from now on."""
_PATIENCE = 60.0
"""Seconds that are waited for all kernels of an op, or of a device's rates. Nobody says so if the processes have died."""


class Assembler(NamedTuple):
    """The program whose version is part of Triton's keys."""

    version: str
    settings: Mapping[str, str]
    """The variables by which Triton found it."""


@cache
def _assembler(arch: int) -> Assembler:
    """Asked once, before Inductor sets another: Triton itself does so."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    version = get_ptxas_version(arch)
    return Assembler(version, {name: value for name, value in os.environ.items() if name.startswith(_ASSEMBLER)})


def _are_there(at_once: bool) -> bool:
    """Whether a backend has started the processes: for an op that is called by itself a dozen of them would be too many."""
    from torch._inductor.async_compile import AsyncCompile

    if _given_up or not AsyncCompile.process_pool.cache_info().currsize:
        return False
    ready: bool = not at_once or AsyncCompile.use_process_pool()
    return ready


def _settings() -> dict[str, str]:
    """What decides what Triton compiles, but for its assembler."""
    return {name: value for name, value in _variables().items() if not name.startswith(_ASSEMBLER)}


def compile_elsewhere(launches: Iterable[Launch], device: torch.device, *, at_once: bool = True) -> list[Future[None]]:
    """Compile the kernels of some launches in Inductor's processes, each once.

    Args:
        launches: gathered by `recording`, on tensors that are aligned, as most are.
        device: that they are for.
        at_once: as for `submit`.

    Returns:
        What is done when a kernel is compiled, if it is compiled there; what goes wrong there goes wrong here again.
    """
    if not _are_there(at_once):
        return []
    target, settings = prepare(device), _settings()
    keys = {str((launch, target, settings)): launch for launch in launches}
    for key, launch in keys.items():
        if key not in _submitted:
            future = submit(compile_launch, launch, target=target, at_once=at_once)
            if future is not None:
                _submitted[key] = future
    return [_submitted[key] for key in keys if key in _submitted]


_submitted: dict[str, Future[None]] = {}


def compile_here(launches: Iterable[Launch], device: torch.device) -> list[Future[None]]:
    """Compile the kernels of some launches in threads, and load them.

    Args:
        launches: as for `compile_elsewhere`.
        device: that they are for.

    Returns:
        What is done when a kernel is.
    """

    def work(launch: Launch) -> None:
        prepare(device)
        with torch.cuda.device(device):
            for compiled in compile_launch(launch):
                load(compiled, device)

    return [threads.submit(work, launch) for launch in launches]


def wait_for(futures: Iterable[Future[None]]) -> None:
    """Wait for what Inductor's processes compile, but not for ever, nor when this process is about to end.

    What is not compiled then will be compiled where it is launched.
    """
    futures = list(futures)
    end = time.monotonic() + _PATIENCE
    pending = set(futures)
    while pending and time.monotonic() < end and not _exiting.is_set():
        pending = wait(pending, min(1.0, _PATIENCE)).not_done
    for error in filter(None, (future.exception() for future in futures if future.done() and not future.cancelled())):
        _log.info("a kernel is compiled where it is launched, as it could not be before: %r", error)
    if pending and not _exiting.is_set():
        _given_up.append(f"{len(pending)} kernels took more than {_PATIENCE:g} s")
        _log.warning("Inductor's processes compile no kernels of ours any more: %s", _given_up[-1])


def compile_launch(launch: Launch) -> list[Any]:
    """Compile a launch's kernel for Triton's current target."""
    kernel = getattr(import_module(launch.module), launch.name)
    settle_key(kernel)
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


def run_for(
    target: Any, settings: Mapping[str, str], assembler: Assembler, function: Callable[..., list[Any]], *args: Any
) -> None:
    """Call a function that compiles kernels with a GPU model as Triton's current target, whatever GPU is there, and another
    process's settings and assembler.
    """
    driver = triton.runtime.driver
    before, driver._active = driver._active, _NoDevice(target)
    try:
        with _set(settings, assembler):
            for compiled in function(*args):
                compiled.src.fn.device_caches.clear()  # they know one target and one folder
                _make_launcher(compiled)
    finally:
        driver._active = before


def _make_launcher(compiled: Any) -> None:
    """Have Triton 3.6 make what launches a kernel, which takes a C compiler longer than many a kernel takes to compile."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(Exception):  # no GPU's driver to link with, or no C compiler: whoever launches it sees that
            driver.CudaLauncher(compiled.src, compiled.metadata)


@contextlib.contextmanager
def _set(settings: Mapping[str, str], assembler: Assembler) -> Iterator[None]:
    """These settings, and no others, and what the assembler said of its version, which takes half a second to ask."""
    from triton.backends.nvidia import compiler

    before, ask = _variables(), compiler.get_ptxas_version
    try:
        _replace({**settings, **assembler.settings})
        compiler.get_ptxas_version = lambda arch=80: assembler.version
        yield
    finally:
        compiler.get_ptxas_version = ask
        _replace(before)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}


def _replace(variables: Mapping[str, str]) -> None:
    for name in _variables().keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
