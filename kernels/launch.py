"""Triton itself, or a stand-in where it is not installed, and the facts of a device that a launch depends on."""

from functools import cache
from typing import Any, NamedTuple

import torch

from swcompile.kernels.formats import INT8, NumberFormat

MISSING_TRITON = (
    "swcompile's CUDA kernels need Triton 3.6 or later, and `import triton` failed. "
    "Install it with `pip install triton`, or run the model on the CPU."
)


class _MissingTriton:
    """Lets a module that holds kernels be imported without Triton, as the CPU runs the references only."""

    def jit(self, function: Any = None, **options: Any) -> Any:
        return self.jit if function is None else self

    def constexpr(self, value: Any) -> Any:
        return value

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(MISSING_TRITON)


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = _MissingTriton()
    HAS_TRITON = False

INTERPRETED = bool(HAS_TRITON and triton.knobs.runtime.interpret)
"""True when TRITON_INTERPRET=1 was set before import: kernels then run on CPU tensors, slowly, for tests."""

_ARCHITECTURES = {(8, 0): "Ampere", (8, 9): "Ada"}


class DeviceFacts(NamedTuple):
    """What a launch needs to know of a device."""

    name: str
    capability: tuple[int, int]
    num_multiprocessors: int
    shared_memory: int
    """Bytes of a multiprocessor."""
    max_threads: int = 2048
    """Of a multiprocessor."""


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of `device`. A CPU device stands for the interpreter, where few programs keep the tests quick."""
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "a Triton kernel was given a CPU tensor outside the interpreter; call the op or its reference "
                "instead, or set TRITON_INTERPRET=1 before the first import"
            )
        return DeviceFacts("interpreter", (9, 0), 3, 0)
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        properties.max_threads_per_multi_processor,
    )


def resident_programs(compiled: Any, num_warps: int, device: torch.device) -> int:
    """How many programs of a compiled Triton kernel a CUDA device holds at once, by its registers and shared memory."""
    facts = device_facts(device)
    with torch.cuda.device(device):
        compiled._init_handles()  # loads it, and so finds its registers
    registers = -(-max(compiled.n_regs, 1) // 8) * 8
    threads = 32 * num_warps
    each = min(65536 // (registers * threads), facts.max_threads // threads)
    if compiled.metadata.shared:
        each = min(each, facts.shared_memory // (compiled.metadata.shared + 1024))
    return max(each, 1) * facts.num_multiprocessors


@cache
def require_supported_gpu(index: int, number_format: NumberFormat = INT8) -> None:
    """Raise `RuntimeError` naming the GPU and the way out if the kernels of a number format cannot run on it.

    Args:
        index: of the CUDA device.
        number_format: what its tensor cores are to multiply.
    """
    if not HAS_TRITON:
        raise RuntimeError(MISSING_TRITON)
    facts = device_facts(torch.device("cuda", index))
    oldest = number_format.oldest_capability
    if facts.capability < oldest:
        wanted, found = (".".join(map(str, capability)) for capability in (oldest, facts.capability))
        if number_format == INT8:
            way_out = "compile the model with the default backend"
        else:
            way_out = "use a recipe in int8, such as switchback"
        raise RuntimeError(
            f"swcompile's {number_format.name} kernels need compute capability {wanted} ({_ARCHITECTURES[oldest]}) or later; "
            f"{facts.name} (cuda:{index}) has {found}. Run on a newer GPU, or {way_out}."
        )
