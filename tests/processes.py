"""Processes of tests."""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.multiprocessing as mp
import triton.language as tl
from torch._dynamo import guards, symbolic_convert
from torch._functorch._aot_autograd import graph_compile
from torch._inductor import config, cpp_builder
from triton.runtime import interpreter

multiprocessing.set_forkserver_preload(["tests.preloaded"])  # is found where pytest runs in the repository's root
_START_METHOD = "spawn" if torch.cuda.is_available() else "forkserver"  # CUDA does not outlive a fork


def run_in_processes(function: Callable[..., None], arguments: tuple[Any, ...], num_processes: int = 1) -> None:
    """Run ``function(rank, *arguments)`` in new processes and wait for them; an error of theirs is raised here.

    Without a GPU they are forked from a process that has imported `preloaded`, which takes a tenth of the time of doing so in
    each; their environment variables are those of the first start.
    """
    mp.start_processes(function, arguments, num_processes, start_method=_START_METHOD)


def run_program(program: str, *arguments: str, folder: Path, path: Path | None = None, **environment: str) -> str:
    """What a program prints that runs in a process of its own, where nothing of ours is imported.

    Args:
        program: its source.
        arguments: of its command line.
        folder: to work in; what it prints is left there, too.
        path: of modules to find before all others.
        environment: variables beside those that there are.
    """
    with mock.patch.dict(os.environ, environment):  # a process that is not forked has them from the beginning
        run_in_processes(_run_program, (program, arguments, str(folder), path and str(path), environment))
    return (folder / "printed").read_text()


def run_compiled(*arguments: str, **environment: str) -> str:
    """What Python prints in a process without Triton's interpreter, which replaces parts of Triton's language; errors behind it.

    Args:
        arguments: of Python's command line. Modules of the tests and benchmarks are found.
        environment: variables beside those that there are.
    """
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = Path(__file__).parent
    variables["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent / "benchmarks"), *sys.path])
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr * (done.returncode != 0)


def check_document(name: str, folder: Path) -> None:
    """Fail where `make docs` would change a document; on the CPU, as it is written."""
    program = "import make_docs, sys; print(make_docs.main(['--check', sys.argv[1]]))"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    printed = run_program(program, name, folder=folder, path=Path(__file__).parents[1] / "docs", **hidden)
    assert printed.splitlines()[-1:] == ["0"], f"{printed}\n`make docs` brings {name} up to date"


def _run_program(
    rank: int, program: str, arguments: tuple[str, ...], folder: str, path: str | None, environment: dict[str, str]
) -> None:
    os.environ |= environment
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    sys.path[:0] = [path] if path else []
    compile_quickly()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102 (it is ours)
    Path("printed").write_text(printed.getvalue())


def share_headers(source: str, cache: str) -> None:
    """Give one cache folder of Inductor's the precompiled headers of another: they take seconds to compile."""
    headers, own = Path(source, "precompiled_headers"), Path(cache, "precompiled_headers")
    for folder in (headers, own.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if not own.exists():
        own.symlink_to(headers)


def compile_quickly() -> None:
    """Leave out what takes time in compiling, and changes no result.

    Inductor takes the CPU for one without vectors, of which it would try each kind: it writes such code, and the compiler
    reads it, in three quarters of the time. What it writes is compiled once and runs a few times: it is not optimised. It calls
    nothing of PyTorch's libraries, of which the linker would read all symbols.
    For logs that nobody reads, Dynamo does not time its guards with the CPU's caches flushed, 20 to 40 ms a graph, nor read every
    file that it comes through for the names of functions, a tenth of a second a file; graphs are not printed, and their nodes
    get no stack traces. Triton's interpreter puts its own functions in the place of the language's once a launch, and not again
    for each function that a kernel calls.
    """
    config.cpp.vec_isa_ok = False
    config.aot_inductor.link_libtorch = False
    cpp_builder._get_optimization_cflags = _unoptimized(cpp_builder._get_optimization_cflags)
    guards.profile_guard_manager = lambda *arguments: 0.0
    symbolic_convert.get_funcname = lambda filename, lineno: None
    torch.fx.config.do_not_emit_stack_traces = True
    graph_compile._log_joint_graph = lambda *arguments: None
    graph_compile._log_fw_bw_graphs = lambda *arguments: (None, None)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)


def _unoptimized(cflags: Callable[..., tuple[list[str], list[str]]]) -> Callable[..., tuple[list[str], list[str]]]:
    """`cpp_builder._get_optimization_cflags` with -O0 for -O3."""

    def unoptimized(*arguments: Any, **options: Any) -> tuple[list[str], list[str]]:
        found, of_linker = cflags(*arguments, **options)
        return ["O0" if flag == "O3" else flag for flag in found], of_linker

    return unoptimized


def _patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`interpreter._patch_lang` that does nothing for modules that the running launch has patched already."""
    patched: set[Any] = set()

    def patch_once(function: Any) -> Any:
        modules = {module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())}
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        patched.update(modules)
        return scope

    return patch_once


def leave() -> NoReturn:
    """End a process that `run_in_processes` has started, once its results are in a file.

    Without destructors: one of DistributedDataParallel's destroys the process group and holds Python's lock meanwhile, for
    which Gloo's thread may be waiting to free what is left of a collective.
    """
    os._exit(0)
