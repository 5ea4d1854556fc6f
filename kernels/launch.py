"""Triton itself, or a stand-in where it is not installed, the facts of a device that a launch depends on, and launching.

A launch costs the host 10 us, and as much again to find out how to launch; in a training step, whose code and tensors
fill the caches, several times that. A small model waits for it. So what was found out is kept for calls that look alike.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch._C._dynamo import guards

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

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which on Triton's `tl.dot` multiplies int8 on tensor cores."""


def settle_key(kernel: Any) -> None:
    """Make the key by which Triton finds a kernel in its cache the same in every process.

    In Triton 3.6 it depends on which of the functions that the kernel calls were hashed before the kernel itself, and so
    on what a process has compiled until then, and on chance where threads compile. They are hashed first.
    """
    if HAS_TRITON and isinstance(kernel, triton.runtime.jit.JITCallable):
        with _settling:
            _hash_callees(kernel, set())


_settling = threading.Lock()


def _hash_callees(function: Any, seen: set[int]) -> None:
    """Of the functions by its names; an attribute's name may be that of a function, too, and even its own."""
    seen.add(id(function))
    for name in function.fn.__code__.co_names:
        callee = function.fn.__globals__.get(name)
        if isinstance(callee, triton.runtime.jit.JITCallable) and callee.hash is None and id(callee) not in seen:
            _hash_callees(callee, seen)
            _ = callee.cache_key  # computed when it is first asked for


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


def load(compiled: Any, device: torch.device) -> None:
    """Load a compiled Triton kernel, which tells its registers, and make what launches it: a C compiler may do that."""
    with torch.cuda.device(device):
        compiled._init_handles()


def resident_programs(compiled: Any, num_warps: int, device: torch.device) -> int:
    """How many programs of a compiled Triton kernel a CUDA device holds at once, by its registers and shared memory."""
    facts = device_facts(device)
    load(compiled, device)
    registers = -(-max(compiled.n_regs, 1) // 8) * 8
    threads = 32 * num_warps
    each = min(65536 // (registers * threads), facts.max_threads // threads)
    if compiled.metadata.shared:
        each = min(each, facts.shared_memory // (compiled.metadata.shared + 1024))
    return max(each, 1) * facts.num_multiprocessors


@cache
def require_supported_gpu(index: int) -> None:
    """Raise `RuntimeError` naming the GPU and the way out if the kernels cannot run on CUDA device `index`."""
    if not HAS_TRITON:
        raise RuntimeError(MISSING_TRITON)
    facts = device_facts(torch.device("cuda", index))
    if facts.capability < OLDEST_CAPABILITY:
        wanted, found = (".".join(map(str, capability)) for capability in (OLDEST_CAPABILITY, facts.capability))
        raise RuntimeError(
            f"swcompile's int8 kernels need compute capability {wanted} (Ampere) or later; "
            f"{facts.name} (cuda:{index}) has {found}. Run on a newer GPU, or compile the model with the default backend."
        )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty(shape, dtype=dtype, device=device)`` in a quarter of the host's time, as Inductor's own code does it.

    A CUDA device has to be the current one.
    """
    make = _FACTORIES.get(device.type)
    if make is None or is_recording():  # then fake operands have fake results
        return torch.empty(shape, dtype=dtype, device=device)
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * max(shape[i], 1)
    return make(tuple(shape), tuple(strides), dtype)  # a torch.Size is none for them


_FACTORIES = {"cpu": guards._empty_strided_cpu, "cuda": guards._empty_strided_cuda}  # type: ignore[attr-defined]


Plan = TypeVar("Plan")
_UNKNOWN = object()
MAX_PLANS = 4096
"""Of one op. More than a model has kinds of calls; with more different sizes than that, some are prepared again."""


class Plans(Generic[Plan]):
    """How to run an op, kept for calls whose tensors differ in their addresses alone.

    Args:
        prepare: takes what a call takes, checks it and says how to run it. It may launch kernels, to time them.
    """

    def __init__(self, prepare: Callable[..., Plan]) -> None:
        self._prepare = prepare
        self._known: dict[Hashable, Any] = {}

    def find(self, tensors: Sequence[torch.Tensor | None], *options: Hashable) -> Plan:
        """The plan for a call with these tensors, and whatever else it takes."""
        if is_recording():  # fake tensors, perhaps, and tuners that do without timing
            return self._prepare(*tensors, *options)
        key = options, *[
            t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16) for t in tensors
        ]
        plan = self._known.get(key, _UNKNOWN)
        if plan is _UNKNOWN:
            plan = self._prepare(*tensors, *options)
            if len(self._known) >= MAX_PLANS:
                self._known.clear()
            if not is_capturing():  # what is prepared then may have had to do without timing
                self._known[key] = plan
        return plan


def is_capturing() -> bool:
    """Whether a CUDA graph is being recorded on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def address(tensor: torch.Tensor) -> int:
    """Of a tensor's memory; while launches are gathered, that of one that is aligned, as most are: it may be fake."""
    return 0 if is_recording() else tensor.data_ptr()


def nothing(*tensors: Any) -> None:
    """What launches the kernel of an op whose result has no elements."""


class Launch(NamedTuple):
    """As much of a launch as it takes to compile its kernel, in another process too."""

    module: str
    name: str
    """Of the kernel in its module."""
    arguments: tuple[Any, ...]
    """A tensor's dtype, `Description` of a descriptor, or a number for each that is not constant."""
    options: tuple[tuple[str, Any], ...]
    """Constants, and options of compilation and launch."""


class Description(NamedTuple):
    """A tensor descriptor without its tensor."""

    kind: Any
    dtype: torch.dtype
    fields: tuple[tuple[str, Any], ...]

    def of_a_block(self) -> "Description":
        """That of a matrix of one block alone: a kernel is compiled for blocks, whatever the matrix."""
        fields = dict(self.fields)
        block = tuple(fields["block_shape"])
        return self._replace(fields=tuple((fields | {"shape": block, "strides": (*block[1:], 1)}).items()))


class _Recorder(threading.local):
    launches: dict[str, Launch] | None = None
    """Of the class while a thread gathers none: a missing attribute takes ten times as long to find out, in each call of an op."""


_recorder = _Recorder()


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Launch]]:
    """Gather what this thread launches for the first time, of each kernel that would be compiled once, and launch nothing."""
    assert not is_recording()
    launches: dict[str, Launch] = {}
    _recorder.launches = launches
    try:
        yield launches
    finally:
        _recorder.launches = None


def is_recording() -> bool:
    """Whether launches are gathered, and nothing is computed."""
    return _recorder.launches is not None


_first_calls: dict[Hashable, threading.Lock] = {}


class Launcher:
    """Launches a kernel of Triton's, time and again, with tensors that differ in their addresses alone.

    Triton finds out at each launch which of the forms that it has compiled fits the arguments; here it does so once. The
    kernel takes tensors (or what `Described` makes of them) first, then numbers, then constants.

    Args:
        kernel: a function under ``triton.jit`` or ``gluon.jit``.
        grid: how many programs, in up to three dimensions.
        numbers: the kernel's arguments after the tensors.
        options: constants of the kernel, and options of its compilation and launch.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: int, **options: Any) -> None:
        self._kernel, self._grid, self._numbers, self._options = kernel, grid, numbers, options
        self._run: Callable[..., object] | None = None
        self._rest: tuple[object, ...] = ()

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current stream of the current device; tensors as in every other call, but for their addresses."""
        if self._run is not None:
            self._run(*tensors, *self._rest)
            return
        if _recorder.launches is not None:
            launch = self._described(tensors)
            _recorder.launches[str(launch)] = launch
            return
        # Candidates that are tried in threads share kernels: one compiles, the others wait for it.
        settle_key(self._kernel)
        with _first_calls.setdefault((id(self._kernel), str(self._options)), threading.Lock()):
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._rest = *self._numbers, *[self._options[name] for name in names]
            self._run = compiled[(*self._grid, 1, 1)[:3]]

    def _described(self, tensors: Sequence[Any]) -> Launch:
        arguments = [t if t is None else t.dtype if isinstance(t, torch.Tensor) else describe(t).of_a_block() for t in tensors]
        numbers = [number if number == 1 or number >> 31 else 17 - (number % 16 == 0) for number in self._numbers]
        function = self._kernel.fn
        options = tuple(sorted(self._options.items()))
        return Launch(function.__module__, function.__name__, (*arguments, *numbers), options)


def describe(descriptor: Any) -> Description:
    """A tensor descriptor without its tensor, of which it takes the dtype alone to compile a kernel."""
    fields = tuple((name, value) for name, value in vars(descriptor).items() if name != "base")
    return Description(type(descriptor), descriptor.base.dtype, fields)


def with_base(description: Description, base: Any) -> Any:
    """The tensor descriptor that was described, of `base`."""
    descriptor = object.__new__(description.kind)
    vars(descriptor).update(description.fields, base=base)
    return descriptor


class _Aligned:
    """A tensor that may be fake, for descriptors, which look at its address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def data_ptr(self) -> int:
        return address(self._tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


class Described:
    """Makes a tensor descriptor for the tensor memory accelerator of each tensor that looks like the first one.

    Args:
        make: makes and checks a descriptor of a tensor.
    """

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        self._make = make
        self._description: Description | None = None

    def __call__(self, tensor: torch.Tensor) -> Any:
        """The descriptor. A tensor is kept by its own descriptor alone."""
        if is_recording():
            return self._make(cast(torch.Tensor, _Aligned(tensor)))
        if self._description is None:
            descriptor = self._make(tensor)
            self._description = describe(descriptor)
            return descriptor
        return with_base(self._description, tensor)
