"""Predicts whether a matmul is faster in 8 bit, from its work and the device's measured rates."""

import contextlib
import dataclasses
import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import sympy
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from swcompile.graph import Matmul, hint
from swcompile.kernels.int8 import num_blocks
from swcompile.kernels.launch import Launch
from swcompile.kernels.library import Work
from swcompile.kernels.measurements import MeasurementFile
from swcompile.kernels.quantize_blockwise import (
    QUANTIZE_BLOCKWISE_TRANSPOSE,
    quantize_blockwise_transpose_work,
)
from swcompile.kernels.quantize_columnwise import (
    QUANTIZE_COLUMNWISE_TRANSPOSE,
    quantize_columnwise_transpose_work,
)
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE, quantize_rowwise_work
from swcompile.kernels.quantize_tensorwise import (
    QUANTIZE_BY_SCALE,
    QUANTIZE_TENSORWISE,
    quantize_by_scale_work,
    quantize_tensorwise_work,
)
from swcompile.kernels.scaled_mm import SCALED_MM, scaled_mm_work
from swcompile.kernels.scaled_mm_blockwise import SCALED_MM_BLOCKWISE
from swcompile.kernels.timing import intervals_ms
from swcompile.kernels.transpose import TRANSPOSE, transpose_work
from swcompile.kernels.tuning import bucket, launches_of, run_together
from swcompile.kernels.workers import compile_elsewhere, compile_here, wait_for
from swcompile.pipeline import source_fingerprint
from swcompile.recipe import GemmFormat, Role, Scaling
from swcompile.values import unrounded

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_SPEEDUP = 1.03
"""What 8 bit has to be worth at least: near 1 a prediction may be on the wrong side, and 8 bit rounds."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """What one device gives in one dtype, and in int8 with scales of one kind in its place: measured on it."""

    matmul: float
    """Rate at which a large matmul in the model's own dtype sums, FLOP/s."""
    output: float
    """Seconds that it spends on each element of its result besides, at least: it stores little of it while it sums."""
    quantized_matmul: float
    """Rate at which a large `scaled_mm`, or `scaled_mm_blockwise`, sums, OP/s."""
    quantized_output: float
    """Seconds that it spends on each element of its result besides, at most."""
    quantize: float
    """Rate of a large `quantize_rowwise`, bytes read and written a second."""
    quantize_columns: float
    """Rate of a large `quantize_columnwise_transpose`, or the blockwise one, bytes a second, as its work counts them."""
    transpose: float
    """Rate of a large int8 `transpose`, bytes read and written a second; 0 where scales are not by block, which needs none."""
    kernel: float
    """Seconds that a kernel takes on the device, besides what it reads, writes and computes."""
    matmul_call: float
    """Seconds that the host spends on launching a matmul; 0 on a CPU, where it is part of `kernel`."""
    quantize_call: float
    """Seconds that the host spends on launching one of our kernels; likewise."""
    spread: float = 1.0
    """By what factor timings of one call differed at most: by much where other programs used the device, too."""


class Candidate(NamedTuple):
    """A matmul that may be rewritten."""

    matmul: Matmul
    gemm: GemmFormat
    sharers: int
    """How many candidates read the same quantised activation (or gradient); each bears its share."""
    is_fused: bool = False
    """The activation is quantised in the kernel that computes it, which then only writes int8 in addition."""
    weight_passes: int = 1
    """How many passes the quantised weight serves; each bears its share."""
    scale_sharers: int = 1
    """How many candidates read the weight by the one scale that is found for all of them; each bears its share."""
    transpose_sharers: int = 1
    """How many candidates read the transpose of the same int8 gradient; each bears its share."""
    spares_gradient: bool = False
    """Nobody reads the gradient but candidates, so that the kernel that computes and quantises it writes only int8."""


class Prediction(NamedTuple):
    """What a rewrite of one matmul is worth."""

    speedup: float
    """Time of the original over that in 8 bit with its quantisation."""
    launches_decide: bool = False
    """8 bit is faster on the device, but the host takes longer to launch it."""


class _Original(NamedTuple):
    """What a matmul takes as it is."""

    seconds: float
    """Of the device."""
    between: float
    """Seconds that the device spends on the kernels between this matmul and the next, by `_BETWEEN`."""
    call: float
    """Seconds that the host takes to launch a kernel of PyTorch's or Inductor's."""

    @property
    def host(self) -> float:
        """Seconds that the host takes to launch the matmul and the kernels behind it."""
        return (1 + _BETWEEN) * self.call


class _Times(NamedTuple):
    """Seconds that a matmul takes, as it is and in 8 bit with its quantisation."""

    original: _Original
    quantized: float
    quantized_host: float
    """Likewise with the kernels behind it."""

    def with_launches(self) -> Prediction:
        """What counts where the host is the bottleneck: it launches the next kernels while the device runs those between."""
        seconds, between, _ = self.original
        speedup = max(seconds, self.original.host - between) / max(self.quantized, self.quantized_host - between)
        return Prediction(speedup, launches_decide=speedup < MIN_SPEEDUP <= seconds / self.quantized)


def predict_speedups(
    candidates: Sequence[Candidate], others: Sequence[Matmul] = (), *, rates: DeviceRates | None = None
) -> list[Prediction]:
    """How much faster each matmul would be in 8 bit.

    Device time decides as long as the device is the bottleneck. Where the host would take longer to launch this graph
    than the device to run it (and no CUDA graph launches it), the longer of both counts. That is asked about a graph all
    of whose candidates are worth it by device time: as long as one is not, device time decides.

    Args:
        candidates: the matmuls of one graph that may be rewritten.
        others: the rest of its matmuls, which keep the device busy while the host launches; of those in other dtypes,
            for which the device would have to be measured, nothing is counted.
        rates: of the device; measured where not given.
    """
    times = [_times(candidate, rates) for candidate in candidates]
    dtypes = {candidate.matmul.node.meta["val"].dtype for candidate in candidates}  # the device is measured for these
    rest = [_original(matmul, rates) for matmul in others if matmul.node.meta["val"].dtype in dtypes]
    device = sum(t.quantized + t.original.between for t in times) + sum(t.seconds + t.between for t in rest)
    host = sum(t.quantized_host for t in times) + sum(t.host for t in rest)
    by_device = [Prediction(t.original.seconds / t.quantized) for t in times]
    is_settled = all(prediction.speedup >= MIN_SPEEDUP for prediction in by_device)
    if host <= device or not is_settled or inductor_config.triton.cudagraphs:
        return by_device
    return [t.with_launches() for t in times]


def _original(matmul: Matmul, rates: DeviceRates | None) -> _Original:
    value = matmul.node.meta["val"]
    rates = rates or device_rates(value.device, value.dtype)
    m, n, k = _shape(matmul)
    itemsize = value.dtype.itemsize
    num_read = _num_elements(matmul.lhs) + _num_elements(matmul.rhs)
    work = Work(flops=2 * m * n * k, bytes=itemsize * (num_read + m * n))
    seconds = max(work.flops / rates.matmul + m * n * rates.output, work.bytes / rates.quantize)
    # Those of a weight's gradient are read and written around other matmuls, and its result by the optimizer alone.
    touched = 0 if matmul.role is Role.GRAD_WEIGHT else itemsize * (_num_elements(matmul.other_operand) + m * n)
    return _Original(seconds + rates.kernel, _BETWEEN * (2 * touched / rates.quantize + rates.kernel), rates.matmul_call)


_BETWEEN = 2.0
"""Kernels between two matmuls, of norms, attention and activations: an estimate, whatever the graph has. A step of an encoder took the
host as long as two and a half for each matmul; one that quantises takes the place of some of them, and is counted as well. On the
device each reads as much as the activation and the result hold, of a matmul that is none for a weight's gradient, and writes as much:
that is what they took in this encoder (8 ms) and in 8 layers of a ViT-H (25 ms)."""


def _num_elements(node: fx.Node) -> int:
    return math.prod(bucketed(size) for size in node.meta["val"].shape)


def _times(candidate: Candidate, rates: DeviceRates | None) -> _Times:
    matmul, gemm, sharers, is_fused, weight_passes, scale_sharers, transpose_sharers, spares_gradient = candidate
    value = matmul.node.meta["val"]
    original = _original(matmul, rates)
    rates = rates or device_rates(value.device, value.dtype, gemm.is_by_block)
    m, n, k = _shape(matmul)
    itemsize = value.dtype.itemsize
    weight = matmul.weight_operand
    weight_rows = bucketed(weight.meta["val"].shape[-2 if matmul.weight_on_left else -1])
    weight_itemsize = unrounded(weight)[0].meta["val"].dtype.itemsize  # under autocast, of the parameter itself
    sizes = [bucketed(size) for size in matmul.other_operand.meta["val"].shape]
    del sizes[-2 if matmul.weight_on_left else -1]  # what is summed
    other_rows = math.prod(sizes)

    multiply = scaled_mm_work(m, n, k, itemsize)
    # An operand with one scale is read twice, and takes two kernels: one for its absmax, unless another matmul has found
    # its scale, and one that rounds.
    activation_kernels, weight_kernels = 1.0, 1.0
    written = other_rows * (k + 4)  # int8 and scales, where what computes the activation only writes these in addition
    if gemm.is_by_block:  # of an activation that takes over the scales of a gradient's tokens, and this one's transpose
        quantize_other = quantize_rowwise_work(k, other_rows, itemsize).bytes / rates.quantize
        written = k * (other_rows + 4)
        quantize_weight = quantize_blockwise_transpose_work(k, weight_rows, itemsize).bytes / rates.quantize_columns
        of_gradient = transpose_work(k, other_rows).bytes / rates.transpose
        if spares_gradient:
            of_gradient -= itemsize * k * other_rows / rates.quantize
        quantize_weight += of_gradient / transpose_sharers
        weight_kernels += 1 / transpose_sharers
    elif matmul.role is Role.GRAD_WEIGHT:
        activation_kernels = weight_kernels = 2.0  # one sets zeros
        work_other, work_weight = (
            quantize_columnwise_transpose_work(k, rows, itemsize).bytes for rows in (other_rows, weight_rows)
        )
        quantize_other, quantize_weight = work_other / rates.quantize_columns, work_weight / rates.quantize_columns
    else:
        quantize_other = quantize_rowwise_work(other_rows, k, itemsize).bytes / rates.quantize
        if gemm.weight is Scaling.TENSOR:
            once, whole = (work(weight_rows, k, weight_itemsize).bytes for work in (quantize_by_scale_work, quantize_tensorwise_work))
            weight_bytes = once + (whole - once) / scale_sharers
            weight_kernels += 1 / scale_sharers
        else:
            weight_bytes = quantize_rowwise_work(weight_rows, k, weight_itemsize).bytes
        quantize_weight = weight_bytes / rates.quantize
    activation_launches = activation_kernels
    if is_fused:  # which takes the host as long as a kernel of its own
        quantize_other, activation_kernels = written / rates.quantize, 0.0
    quantize_other += activation_kernels * rates.kernel
    quantize_weight += weight_kernels * rates.kernel
    return _Times(
        original=original,
        quantized=max(
            multiply.flops / rates.quantized_matmul + m * n * rates.quantized_output, multiply.bytes / rates.quantize
        )
        + rates.kernel
        + quantize_other / sharers
        + quantize_weight / weight_passes,
        quantized_host=(1 + activation_launches / sharers + weight_kernels / weight_passes) * rates.quantize_call
        + _BETWEEN * original.call,
    )


def _shape(matmul: Matmul) -> tuple[int, int, int]:
    """(M, N, K) with the batch folded into M, symbolic sizes in buckets."""
    *rows, k = (bucketed(size) for size in matmul.lhs.meta["val"].shape)
    n = matmul.node.meta["val"].shape[-1] if matmul.node.meta["val"].dim() > 1 else 1
    return math.prod(rows), bucketed(n), k


def bucketed(size: int | torch.SymInt) -> int:
    """The size itself, or of a symbolic one its value where each symbol is its hint rounded up to a power of two.

    Decisions rest on these values, and a cache key holds them (`size_buckets`): a graph that is compiled once for
    any number of tokens then gets the same decisions from every number in the bucket.
    """
    if not isinstance(size, torch.SymInt):
        return size
    node = size.node
    hints = {symbol: bucket(_symbol_hint(symbol, node.shape_env)) for symbol in node.expr.free_symbols}
    return int(node.expr.subs(hints))


def symbolic_sizes(values: Iterable[Any]) -> list[torch.SymInt]:
    """The symbolic ones among numbers and the sizes of tensors."""
    shapes = (value.shape if isinstance(value, torch.Tensor) else (value,) for value in values)
    return [size for shape in shapes for size in shape if isinstance(size, torch.SymInt)]


def size_buckets(values: Iterable[Any]) -> dict[str, int]:
    """Name -> bucketed hint of each symbol in numbers and the sizes of tensors."""
    nodes = [size.node for size in symbolic_sizes(values)]
    symbols = {symbol: node.shape_env for node in nodes for symbol in node.expr.free_symbols}
    return dict(sorted((str(symbol), bucket(_symbol_hint(symbol, env))) for symbol, env in symbols.items()))


def _symbol_hint(symbol: sympy.Symbol, shape_env: ShapeEnv) -> int:
    return hint(torch.SymInt(SymNode(symbol, shape_env, int, None)))


def device_rates(device: torch.device, dtype: torch.dtype, by_block: bool = False) -> DeviceRates:
    """Rates of a device for a dtype, and for int8 with scales by block or without.

    Measured once (a second or two, up to three times that on a GPU that others use, and kernel tuning), then read from a
    file in Inductor's cache folder, where the first process to write decides for all that share it.

    The rates are those of the device's model: GPUs of one name get the same, so ranks decide alike.
    """
    key = _device_key(device, dtype, by_block)
    if key not in _known:
        file = _rates_file()
        stored = file.read().get(key)
        rates = _rates_from(stored)
        if rates is None:
            name = {_IDENTITY: _identity(key)}
            measured = _measure(device, dtype, by_block)
            rates = _rates_from(file.add(key, dataclasses.asdict(measured) | name, instead_of=name)) or measured
        _check_steady(rates, device, dtype)
        _known[key] = rates
    return _known[key]


_known: dict[str, DeviceRates] = {}
_identities: dict[str, str] = {}
_IDENTITY = "identity"
"""Names a device's rates in cache keys, also while they are still to be measured: a graph is looked for before it is traced."""


def _rates_file() -> MeasurementFile:
    return MeasurementFile(Path(cache_dir()) / "swcompile" / "device_rates.json")


def rates_identity(devices: Iterable[torch.device], dtypes: Iterable[torch.dtype], by_block: bool = False) -> str:
    """What a cache key needs of the rates on which decisions rest, those by block included or not. Nothing is measured."""
    keys = {_device_key(*of) for of in _wanted(devices, dtypes, by_block)}
    return repr(sorted((key, _identity(key)) for key in keys))


def _identity(key: str) -> str:
    """The name that the file has for a device's rates; a new one if it has none, or values that are none."""
    if key not in _identities:
        file = _rates_file()
        stored = file.read().get(key)
        if not _has_identity(stored):
            new = {_IDENTITY: uuid4().hex}
            stored = file.add(key, new, instead_of=stored)
            stored = stored if _has_identity(stored) else new
        _identities[key] = stored[_IDENTITY]
    return _identities[key]


def _has_identity(stored: Any) -> bool:
    """Whether an entry is a device's rates, or their name alone."""
    if not isinstance(stored, dict) or not isinstance(stored.get(_IDENTITY), str):
        return False
    return len(stored) == 1 or _rates_from(stored) is not None


def start_measuring(devices: Iterable[torch.device], dtypes: Iterable[torch.dtype], by_block: bool = False) -> None:
    """Have the kernels by which GPUs are measured compiled, while a graph is traced, if nobody has asked for their rates yet.

    Where Inductor's processes are still to start, threads are done sooner.
    """
    known = _rates_file().read()
    launches: dict[torch.device, dict[str, Launch]] = defaultdict(dict)
    seen: set[str] = set()  # GPUs of one model share a key
    for of in _wanted(devices, dtypes, by_block):
        key = _device_key(*of)
        if of[0].type == "cuda" and key not in _identities.keys() | seen and not _has_identity(known.get(key)):
            seen.add(key)
            with contextlib.suppress(torch.OutOfMemoryError):
                launches[of[0]].update((str(launch), launch) for launch in _in_a_thread(_launches, *of))
    for device, different in launches.items():
        elsewhere = compile_elsewhere(different.values(), device)
        _compiling.extend(elsewhere)
        if not elsewhere:
            _compiling_here.extend(compile_here(different.values(), device))


def _launches(device: torch.device, dtype: torch.dtype, by_block: bool) -> list[Launch]:
    """What measuring a device launches."""
    with _trials(device, dtype, by_block) as trials:
        return launches_of(trials.all())


_compiling: list[Future[None]] = []
_compiling_here: list[Future[None]] = []


def _wanted(
    devices: Iterable[torch.device], dtypes: Iterable[torch.dtype], by_block: bool
) -> list[tuple[torch.device, torch.dtype, bool]]:
    """What has rates, of devices and dtypes of a graph."""
    measured = {device for device in devices if device.type in ("cpu", "cuda")}
    return list(product(measured, set(dtypes).intersection(_DTYPES), {False, by_block}))


def _device_key(device: torch.device, dtype: torch.dtype, by_block: bool = False) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        precision = torch.get_float32_matmul_precision()
    else:
        name = f"{device.type} {torch.get_num_threads()} threads"
        precision = "highest"
    numbers = f"{dtype}, int8{' by block' if by_block else ''}, float32 {precision}"
    return f"{name}, torch {torch.__version__}, {numbers}, swcompile {source_fingerprint()[:16]}"


def _rates_from(stored: Any) -> DeviceRates | None:
    """What the file holds for a device; None for what is no set of rates."""
    fields = {field.name for field in dataclasses.fields(DeviceRates)}
    if not isinstance(stored, dict) or stored.keys() != fields | {_IDENTITY}:
        return None
    values = {field: stored[field] for field in fields}
    are_numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values.values())
    if not are_numbers or min(values[field] for field in _NOT_ZERO) <= 0:
        return None
    return DeviceRates(**values)


_NOT_ZERO = ("matmul", "quantized_matmul", "quantize", "quantize_columns", "kernel")


def _measure(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
    """Measures more than once where timings differ, as on a GPU that other programs use: the steadiest ones count.

    On a CPU other programs are the rule, and each timing is the shortest of a few.
    """
    measured: list[DeviceRates] = []
    for _ in range(_ATTEMPTS):
        measured.append(_in_a_thread(_measure_once, device, dtype, by_block))
        if measured[-1].spread <= _STEADY or device.type == "cpu":
            break
    return min(measured, key=lambda rates: rates.spread)


def _check_steady(rates: DeviceRates, device: torch.device, dtype: torch.dtype) -> None:
    """Warn of rates, whoever measured them, that may decide for the slower of two formats."""
    if device.type == "cuda" and rates.spread > _STEADY:
        own = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} seems to have been in use by other programs: when its rates were measured, one call "
            f"took {rates.spread:.1f} times as long as another of its kind. So matmuls may be left in {own}, or taken to int8, where "
            f"the other is faster. Delete {_rates_file().path} while the GPU is idle, and the next process measures again",
            stacklevel=2,
        )


_ATTEMPTS = 3
_STEADY = 1.4
"""By what factor timings of a call may differ. On an H200 that was idle up to 1.2; where tests shared it and a rate was a tenth
or more off, 1.5 to 23."""


_Result = TypeVar("_Result")


def _in_a_thread(run: Callable[..., _Result], *arguments: Any) -> _Result:
    """What a function returns that runs in a thread of its own, where calls are as fast as in a training step.

    Who compiles has modes on (fake tensors, the dispatcher in Python, autocast) and Inductor's options patched, which are a
    thread's own, and a deep stack. Python keeps its frames in chunks: where the stack ends with one, each call allocates the
    next and frees it. An op, which makes several, was seen to take two to three times as long.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run, *arguments).result()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one: events, sleep and synchronize are the current device's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Trials:
    """What is timed to measure a device, on normal data."""

    def __init__(self, device: torch.device, dtype: torch.dtype, by_block: bool) -> None:
        size = 4096 if device.type == "cuda" else 512
        rows = 8 * size if device.type == "cuda" else 2 * size
        self._by_block = by_block
        self.x = torch.randn(rows, size, device=device, dtype=dtype)
        self.weight = torch.randn(size, size, device=device, dtype=dtype)
        self.small, self.small_weight = self.x[:16, :16].contiguous(), self.weight[:16, :16].contiguous()
        self._ones = torch.ones(rows, 1, device=device, dtype=torch.float32)
        self._rounded = _rounded(self.x)
        if by_block:  # sums over the rows, as a weight's gradient does; as many operations
            self._scales = torch.ones(num_blocks(rows), size, device=device, dtype=torch.float32)
            self.quantized = [self._rounded.t().contiguous()] * 2
        else:
            self.quantized = [self._rounded, _rounded(self.weight)]

    def quantize(self) -> object:
        return QUANTIZE_ROWWISE(self.x)

    def quantize_small(self) -> object:
        return QUANTIZE_ROWWISE(self.small)

    def quantize_columns(self) -> object:
        if self._by_block:
            return QUANTIZE_BLOCKWISE_TRANSPOSE(self.x, self._ones)
        return QUANTIZE_COLUMNWISE_TRANSPOSE(self.x)

    def transpose(self) -> object:
        return TRANSPOSE(self._rounded)

    def quantized_matmul(self, a: torch.Tensor, b: torch.Tensor) -> object:
        if self._by_block:
            return SCALED_MM_BLOCKWISE(a, b, self._scales[: num_blocks(a.shape[1])], self.x.dtype)
        return SCALED_MM(a, b, self._ones, self._ones[:1], None, self.x.dtype)

    def all(self) -> list[Callable[[], object]]:
        """All that have kernels of ours, and those that a model will need next, to compile them at once."""
        matmul = partial(self.quantized_matmul, *self.quantized)
        calls: list[Callable[[], object]] = [self.quantize, self.quantize_small, self.quantize_columns, matmul]
        if self._by_block:
            return [*calls, self.transpose]
        return [
            *calls,
            lambda: QUANTIZE_TENSORWISE(self.weight),
            lambda: QUANTIZE_BY_SCALE(self.weight, self._ones[:1], True),
        ]


@contextlib.contextmanager
def _trials(device: torch.device, dtype: torch.dtype, by_block: bool) -> Iterator[_Trials]:
    """Makes the tensors, on the device, which is the current one meanwhile."""
    rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with _on(device), torch.no_grad(), rng:
        yield _Trials(device, dtype, by_block)


def _measure_once(device: torch.device, dtype: torch.dtype, by_block: bool) -> DeviceRates:
    on_gpu = device.type == "cuda"
    clock = _Clock(_gpu_seconds if on_gpu else _cpu_seconds)
    with _trials(device, dtype, by_block) as trials:
        if on_gpu:
            wait_for(_compiling)  # those of other rates, too: they keep the host busy
            wait(_compiling_here)
            _compiling.clear()
            _compiling_here.clear()
            run_together(trials.all(), device)
        rows, size = trials.x.shape
        (quantize,) = clock(trials.quantize)
        (small,) = clock(trials.quantize_small)
        kernel = small * (_AMONG_OTHERS if on_gpu else 1.0)

        # What speaks against 8 bit counts.
        matmul, output = _matmul_rates(lambda a, b: a @ b.t(), (trials.x, trials.weight), clock, kernel, min)
        quantized, quantized_output = _matmul_rates(trials.quantized_matmul, trials.quantized, clock, kernel, max)
        (columns,) = clock(trials.quantize_columns)
        columns_work = quantize_blockwise_transpose_work if by_block else quantize_columnwise_transpose_work
        transpose = transpose_work(rows, size).bytes / clock(trials.transpose)[0] if by_block else 0.0
        return DeviceRates(
            matmul=matmul,
            output=output,
            quantized_matmul=quantized,
            quantized_output=quantized_output,
            quantize=quantize_rowwise_work(rows, size, dtype.itemsize).bytes / quantize,
            quantize_columns=columns_work(rows, size, dtype.itemsize).bytes / columns,
            transpose=transpose,
            kernel=kernel,
            matmul_call=_host_seconds(lambda: trials.small @ trials.small_weight) if on_gpu else 0.0,
            quantize_call=_host_seconds(trials.quantize_small) if on_gpu else 0.0,
            spread=clock.spread,
        )


class _Clock:
    """Times calls.

    Args:
        seconds: times one.
    """

    def __init__(self, seconds: Callable[[Callable[[], object]], float]) -> None:
        self._seconds = seconds
        self.spread = 1.0
        """By what factor the timings of one call have differed, at most."""

    def __call__(self, *runs: Callable[[], object]) -> list[float]:
        """Median seconds of each of several calls, which take turns."""
        turns = [[self._seconds(run) for run in runs] for _ in range(3)]
        times = list(zip(*turns, strict=True))
        self.spread = max(self.spread, *(max(of_one) / min(of_one) for of_one in times))
        return [statistics.median(of_one) for of_one in times]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Normal data in int8, as a quantiser leaves it: what is multiplied decides on a GPU's clock."""
    return (x * 31.0).clamp(-127, 127).round().to(torch.int8)


def _matmul_rates(
    matmul: Callable[..., object],
    operands: Sequence[torch.Tensor],
    clock: Callable[..., Sequence[float]],
    kernel: float,
    pick: Callable[[Iterable[float]], float],
) -> tuple[float, float]:
    """Operations a second at which a matmul sums, and seconds that it spends on an element of its result besides.

    Args:
        matmul: of two operands that are summed along their rows.
        operands: large ones.
        clock: times calls, as `_Clock` does.
        kernel: seconds that any kernel takes.
        pick: of what is found by sums an eighth as long and by sums a sixteenth as long, as kernels are chosen by length.
    """
    (num_rows, length), num_columns = operands[0].shape, operands[1].shape[0]
    shares = (1, 8, 16)
    cut = [[operand[:, : length // share].contiguous() for operand in operands] for share in shares]
    times = clock(*(partial(matmul, *pair) for pair in cut))
    whole, *parts = (seconds - min(kernel, seconds / 2) for seconds in times)
    rest = pick([_rest(whole, part, share) for part, share in zip(parts, shares[1:], strict=True)])
    return 2 * num_rows * num_columns * length / (whole - rest), rest / (num_rows * num_columns)


def _rest(whole: float, part: float, share: int) -> float:
    """What does not grow with the length of the sums, of a matmul's time and that with sums so many times shorter."""
    return max(min((share * part - whole) / (share - 1), part, whole / 2), 0.0)  # clocks are higher in the shorter one


def _cpu_seconds(run: Callable[[], object]) -> float:
    """The shortest of a few timings."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _gpu_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Device time of a call among equals, all of them queued before the first one starts."""
    run()

    def run_repeatedly() -> None:
        for _ in range(repeats):
            run()

    (milliseconds,) = intervals_ms([run_repeatedly], 1)
    return milliseconds / 1e3 / repeats


def _host_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Host time of a call in a training step: the shortest of a few timings, as other programs keep the host busy, and more.

    The device is done sooner.
    """
    run()
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return _IN_A_STEP * min(times) / repeats


_IN_A_STEP = 2.0
"""Times as long as among equals: in a step, other code and data fill the host's caches. Seen in one of 12 layers: 1.8."""
_AMONG_OTHERS = 1.3
"""Times as long a kernel takes between kernels of other kinds as among equals: seen in six layers, 1.2 to 1.5."""
