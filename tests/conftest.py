"""The interpreter for Triton kernels where there is no GPU, and the `gpu` marker."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_compilations_from_other_tests() -> Iterator[None]:
    """Hugging Face models share code objects, and Dynamo limits the compilations of one."""
    yield
    torch._dynamo.reset()
