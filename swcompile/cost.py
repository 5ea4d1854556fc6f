"""Predicts whether a matmul is faster in 8 bit, from its work and the device's measured rates."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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
from swcompile.rates import device_rates
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
