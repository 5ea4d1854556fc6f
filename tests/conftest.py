"""The interpreter for Triton kernels where there is no GPU, and the `gpu` marker."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the workers share the cores; read when torch is imported
    threads = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from processes import compile_quickly
from torch._inductor.runtime.cache_dir_utils import cache_dir

from swcompile import backend

# Tests that run at once on a GPU measure it while the others use it: what they find is not for the user's own programs.
if Path(cache_dir()).name != "swcompile_tests":  # which the workers find set
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache_dir(), "swcompile_tests"))

compile_quickly()
# pytest puts its handlers on every logger that does not propagate, and PyTorch takes the time to write a trace of all
# compilations where this one has a handler.
logging.getLogger("torch.__trace").propagate = True


LONGEST = (
    "test_prepare_distributed.py",
    "test_train_clip.py",
    "test_compiles_for_gpus",
    "test_snippets_run",
    "test_the_guide_is_what",
    "test_compile_for_hopper",
)
"""They come first, so that none keeps one worker busy when the other has nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_compilations_from_other_tests() -> Iterator[None]:
    """Hugging Face models share code objects, and Dynamo limits the compilations of one; `reports` are a test's own."""
    yield
    torch._dynamo.reset()
    backend._reports.clear()


@pytest.fixture
def much_memory() -> Iterator[None]:
    """For a test that takes a good part of a GPU's memory: one worker at a time has it, and gives it back."""
    with FileLock(Path(tempfile.gettempdir()) / "swcompile_tests_much_memory.lock"):
        yield
        torch.cuda.empty_cache()
