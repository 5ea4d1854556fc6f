"""Predicts whether a matmul is faster in 8 bit, from its work and the device's measured rates."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from swcompile.calls import Call, Op
from swcompile.graph import Matmul, hint
from swcompile.kernels.library import Work
from swcompile.kernels.quantize_blockwise import quantize_blockwise_transpose_work
from swcompile.kernels.quantize_columnwise import quantize_columnwise_transpose_work
from swcompile.kernels.quantize_rowwise import quantize_rowwise_work
from swcompile.kernels.quantize_tensorwise import quantize_by_scale_work, quantize_tensorwise_work
from swcompile.kernels.scaled_mm import scaled_mm_work
from swcompile.kernels.transpose import transpose_work
from swcompile.kernels.tuning import bucket
from swcompile.measuring import DeviceRates
from swcompile.rates import call_seconds, device_rates
from swcompile.recipe import GemmFormat, Role, Scaling
from swcompile.values import unrounded

MIN_SPEEDUP = 1.03
"""What 8 bit has to be worth at least: near 1 a prediction may be on the wrong side, and 8 bit rounds."""


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
    is_measured: bool = False
    """By timing the calls of both, not by rates."""
    launches_decide: bool = False
    """8 bit is faster on the device, but the host takes longer to launch it."""


class _Original(NamedTuple):
    """What a matmul takes as it is."""

    seconds: float
    """Of the device."""
    between: float
    """Seconds that the device spends on the kernels between this matmul and the next, by `_BETWEEN`."""
    launch: float
    """Seconds that the host takes to launch a kernel of PyTorch's or Inductor's."""
    call: Call

    @property
    def host(self) -> float:
        """Seconds that the host takes to launch the matmul and the kernels behind it."""
        return (1 + _BETWEEN) * self.launch


class _Part(NamedTuple):
    """A share of what a kernel or two of a matmul in 8 bit take."""

    seconds: float
    """Of the device, for the whole."""
    num_launches: int
    share: float = 1.0
    """Others, which read the same result, bear the rest."""
    call: Call | None = None
    """To time it; not for what a kernel does in addition that computes something else."""


class _Times(NamedTuple):
    """What a matmul takes, as it is and in 8 bit with its quantisation."""

    original: _Original
    parts: tuple[_Part, ...]
    launch: float
    """Seconds that the host takes to launch one of our kernels."""
    gap: float
    """Seconds that a kernel takes longer between kernels of other kinds than among its equals, where calls are timed."""
    is_measured: bool = False

    @property
    def quantized(self) -> float:
        """Seconds of the device, in 8 bit."""
        return sum(part.share * part.seconds for part in self.parts)

    @property
    def quantized_host(self) -> float:
        """Seconds that the host takes to launch that and the kernels behind it."""
        return sum(part.share * part.num_launches for part in self.parts) * self.launch + _BETWEEN * self.original.launch

    def on_device(self) -> Prediction:
        """What counts where the device is the bottleneck."""
        return Prediction(self.original.seconds / self.quantized, self.is_measured)

    def with_launches(self) -> Prediction:
        """What counts where the host is: it launches the next kernels while the device runs those between."""
        original, between = self.original, self.original.between
        speedup = max(original.seconds, original.host - between) / max(self.quantized, self.quantized_host - between)
        by_device = self.on_device()
        return by_device._replace(speedup=speedup, launches_decide=speedup < MIN_SPEEDUP <= by_device.speedup)

    def calls(self) -> set[Call]:
        """All that can be timed."""
        return {self.original.call} | {part.call for part in self.parts if part.call}

    def measured(self, seconds: Mapping[Call, float]) -> "_Times":
        """With times of calls in the place of those that rates predict; as it is where one of them is not known."""
        if not self.calls() <= seconds.keys():
            return self

        def found(call: Call) -> float:
            return seconds[call] + call.num_kernels * self.gap

        parts = tuple(part._replace(seconds=found(part.call)) if part.call else part for part in self.parts)
        original = self.original._replace(seconds=found(self.original.call))
        return self._replace(original=original, parts=parts, is_measured=True)


def predict_speedups(
    candidates: Sequence[Candidate], others: Sequence[Matmul] = (), *, rates: DeviceRates | None = None
) -> list[Prediction]:
    """How much faster each matmul would be in 8 bit.

    Rates predict what a call takes to a tenth or two. Where that leaves open which format is faster, the calls are timed on
    operands of their sizes.

    Device time decides as long as the device is the bottleneck. Where the host would take longer to launch this graph
    than the device to run it (and no CUDA graph launches it), the longer of both counts. That is asked about a graph all
    of whose candidates are worth it by device time: as long as one is not, device time decides.

    Args:
        candidates: the matmuls of one graph that may be rewritten.
        others: the rest of its matmuls, which keep the device busy while the host launches; of those in other dtypes,
            for which the device would have to be measured, nothing is counted.
        rates: of the device, and nothing is timed; measured where not given.
    """
    times = [_times(candidate, rates) for candidate in candidates]
    if rates is None:
        times = _time_close_ones(times, [candidate.matmul for candidate in candidates])
    dtypes = {candidate.matmul.node.meta["val"].dtype for candidate in candidates}  # the device is measured for these
    rest = [_original(matmul, rates) for matmul in others if matmul.node.meta["val"].dtype in dtypes]
    device = sum(t.quantized + t.original.between for t in times) + sum(t.seconds + t.between for t in rest)
    host = sum(t.quantized_host for t in times) + sum(t.host for t in rest)
    by_device = [t.on_device() for t in times]
    is_settled = all(prediction.speedup >= MIN_SPEEDUP for prediction in by_device)
    if host <= device or not is_settled or inductor_config.triton.cudagraphs:
        return by_device
    return [t.with_launches() for t in times]


def _time_close_ones(times: Sequence[_Times], matmuls: Sequence[Matmul]) -> list[_Times]:
    """Times of calls in the place of predictions that are near 1."""
    wanted: dict[torch.device, set[Call]] = defaultdict(set)
    close: dict[int, torch.device] = {}
    for number, (of_one, matmul) in enumerate(zip(times, matmuls, strict=True)):
        if _CLOSE[0] < of_one.on_device().speedup < _CLOSE[1] and _is_plain(matmul):
            close[number] = matmul.node.meta["val"].device
            wanted[close[number]] |= of_one.calls()
    seconds = {device: call_seconds(sorted(calls, key=str), device) for device, calls in wanted.items()}
    return [
        of_one.measured(seconds[close[number]]) if number in close else of_one for number, of_one in enumerate(times)
    ]


_CLOSE = 0.9, 1.25
"""Between these a prediction may be on the wrong side. In a sweep over 24 layers on an H200 those of 0.9 to 1.25 were 2 to 27 % too
high; where int8 was a quarter faster or more by prediction, it was faster."""


def _is_plain(matmul: Matmul) -> bool:
    """Whether it is one product of two matrices with something in them, as is timed."""
    return matmul.node.meta["val"].dim() == 2 and 0 not in _shape(matmul)


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
    between = _BETWEEN * (2 * touched / rates.quantize + rates.kernel)
    return _Original(seconds + rates.kernel, between, rates.matmul_call, Call(Op.MATMUL, (m, n, k), value.dtype))


_BETWEEN = 2.0
"""Kernels between two matmuls, of norms, attention and activations: an estimate, whatever the graph has. A step of an encoder took the
host as long as two and a half for each matmul; one that quantises takes the place of some of them, and is counted as well. On the
device each reads as much as the activation and the result hold, of a matmul that is none for a weight's gradient, and writes as much:
that is what they took in this encoder (8 ms) and in 8 layers of a ViT-H (25 ms)."""


def _num_elements(node: fx.Node) -> int:
    return math.prod(bucketed(size) for size in node.meta["val"].shape)


def _times(candidate: Candidate, rates: DeviceRates | None) -> _Times:
    matmul, gemm = candidate.matmul, candidate.gemm
    value = matmul.node.meta["val"]
    original = _original(matmul, rates)
    rates = rates or device_rates(value.device, value.dtype, gemm.is_by_block)
    multiply = _multiply(_shape(matmul), value.dtype, gemm, rates)
    operands = _quantize_by_block(candidate, rates) if gemm.is_by_block else _quantize(candidate, rates)
    parts = tuple(part for part in (multiply, *operands) if part.share)
    return _Times(original, parts, rates.quantize_call, rates.gap)


def _multiply(shape: tuple[int, int, int], dtype: torch.dtype, gemm: GemmFormat, rates: DeviceRates) -> _Part:
    m, n, k = shape
    work = scaled_mm_work(m, n, k, dtype.itemsize)
    seconds = max(work.flops / rates.quantized_matmul + m * n * rates.quantized_output, work.bytes / rates.quantize)
    op = Op.SCALED_MM_BLOCKWISE if gemm.is_by_block else Op.SCALED_MM
    return _Part(seconds + rates.kernel, 1, call=Call(op, shape, dtype))


def _quantize(candidate: Candidate, rates: DeviceRates) -> list[_Part]:
    """What quantises the operands of a matmul by one scale, or by scales of what it does not sum over."""
    matmul, gemm, share = candidate.matmul, candidate.gemm, 1 / candidate.weight_passes
    dtype = matmul.node.meta["val"].dtype
    *_, k = _shape(matmul)
    weight_rows, other_rows = _rows(matmul)
    if matmul.role is Role.GRAD_WEIGHT:
        columns = partial(_part, Op.QUANTIZE_COLUMNWISE_TRANSPOSE, quantize_columnwise_transpose_work, rates.quantize_columns, rates)
        return [columns((k, other_rows), dtype, 1 / candidate.sharers), columns((k, weight_rows), dtype, share)]
    rows = partial(_part, Op.QUANTIZE_ROWWISE, quantize_rowwise_work, rates.quantize, rates)
    if candidate.is_fused:
        other = _written((other_rows, k), candidate, rates)
    else:
        other = rows((other_rows, k), dtype, 1 / candidate.sharers)
    weight_dtype = unrounded(matmul.weight_operand)[0].meta["val"].dtype  # under autocast, of the parameter itself
    if gemm.weight is not Scaling.TENSOR:
        return [other, rows((weight_rows, k), weight_dtype, share)]
    weight = partial(_part, rate=rates.quantize, rates=rates, sizes=(weight_rows, k), dtype=weight_dtype)
    finds = 1 / candidate.scale_sharers  # and the others round by the scale that the first has found
    return [
        other,
        weight(Op.QUANTIZE_TENSORWISE, quantize_tensorwise_work, share=share * finds),
        weight(Op.QUANTIZE_BY_SCALE, quantize_by_scale_work, share=share * (1 - finds)),
    ]


def _quantize_by_block(candidate: Candidate, rates: DeviceRates) -> list[_Part]:
    """What quantises an activation that takes over the scales of a gradient's tokens, and the gradient, which it turns."""
    matmul, share = candidate.matmul, 1 / candidate.transpose_sharers
    dtype = matmul.node.meta["val"].dtype
    *_, k = _shape(matmul)
    weight_rows, other_rows = _rows(matmul)
    columns = _part(
        Op.QUANTIZE_BLOCKWISE_TRANSPOSE, quantize_blockwise_transpose_work, rates.quantize_columns, rates, (k, weight_rows), dtype, 1.0
    )
    turned = _Part(transpose_work(k, other_rows).bytes / rates.transpose + rates.kernel, 1, share, Call(Op.TRANSPOSE, (k, other_rows), dtype))
    if not candidate.is_fused:
        gradient = _part(Op.QUANTIZE_ROWWISE, quantize_rowwise_work, rates.quantize, rates, (k, other_rows), dtype, 1 / candidate.sharers)
        return [gradient, columns, turned]
    parts = [_written((k, other_rows), candidate, rates), columns, turned]
    if candidate.spares_gradient:
        parts.append(_Part(-dtype.itemsize * k * other_rows / rates.quantize, 0, share))
    return parts


def _part(
    op: Op, work: Callable[..., Work], rate: float, rates: DeviceRates, sizes: tuple[int, int], dtype: torch.dtype, share: float
) -> _Part:
    """A quantiser by its rate, bytes/s."""
    call = Call(op, sizes, dtype)
    return _Part(work(*sizes, dtype.itemsize).bytes / rate + call.num_kernels * rates.kernel, call.num_kernels, share, call)


def _written(sizes: tuple[int, int], candidate: Candidate, rates: DeviceRates) -> _Part:
    """int8 and scales, of rows, which is all that the kernel that computes them adds; it takes the host as long as one of its own."""
    num_rows, num_columns = sizes
    return _Part(num_rows * (num_columns + 4) / rates.quantize, 1, 1 / candidate.sharers)


def _rows(matmul: Matmul) -> tuple[int, int]:
    """Rows of the weight and of the other operand, along which they are summed, with the batch folded in."""
    weight = matmul.weight_operand.meta["val"].shape[-2 if matmul.weight_on_left else -1]
    sizes = [bucketed(size) for size in matmul.other_operand.meta["val"].shape]
    del sizes[-2 if matmul.weight_on_left else -1]  # what is summed
    return bucketed(weight), math.prod(sizes)


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
