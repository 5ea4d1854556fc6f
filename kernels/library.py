"""The one ``torch.library.Library`` of swcompile, and how an op enters it.

`define`/`impl` is used instead of `torch.library.custom_op` because it costs 2 us a call instead of 7.
The library is opened with "DEF": if this file is ever imported under a second module name, PyTorch raises
instead of silently making a second op of the same name.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch

from swcompile.kernels.launch import require_supported_gpu

LIBRARY = torch.library.Library("swcompile", "DEF")
LAUNCHERS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""What each op does on CUDA, its device being the current one."""


class Work(NamedTuple):
    """The least that an op has to do, whatever the kernel: what a roofline is drawn from."""

    flops: int
    """Arithmetic operations; a multiply-add counts two."""
    bytes: int
    """Bytes of device memory read and written, each operand once unless the docstring says otherwise."""


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define `swcompile::<schema>` and return its overload, which is both callable and a graph node's target.

    `reference` is the CPU implementation, `cuda` launches the Triton kernel, `fake` infers shapes only (sizes
    may be symbolic). The first argument of all three is a tensor on the device where the op runs, or a list of such.
    A GPU without int8 tensor cores is an error.
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIBRARY.impl(name, _without_autocast(reference), "CPU")
    LIBRARY.impl(name, _on_device_of_first_argument(cuda), "CUDA")
    torch.library.register_fake(f"swcompile::{name}", fake, lib=LIBRARY)
    op: torch._ops.OpOverload = getattr(torch.ops.swcompile, name).default
    LAUNCHERS[op] = cuda
    return op


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference's float32 matmuls are exact in float32 alone."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return run


def _on_device_of_first_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make that the tensor's, and check that its GPU can run the kernel."""

    supported: set[int] = set()

    @wraps(function)
    def run(first: Any, *rest: Any) -> Any:
        index = (first if isinstance(first, torch.Tensor) else first[0]).get_device()
        if index not in supported:
            require_supported_gpu(index)
            supported.add(index)
        if index == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(index):
            return function(first, *rest)

    return run
