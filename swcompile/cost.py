"""Predicts whether a matmul is faster in 8 bit, from its work and the device's measured rates."""

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import fx
from torch._inductor import config as inductor_config

from swcompile.calls import Call, Flag, Op
from swcompile.graph import Matmul
from swcompile.kernels.int8 import padded
from swcompile.kernels.library import Work
from swcompile.kernels.scaled_mm import scaled_mm_work
from swcompile.measuring import DeviceRates
from swcompile.rates import call_seconds, device_rates
from swcompile.recipe import GemmFormat, Role, Scaling
from swcompile.symbolic import bucketed
from swcompile.values import is_column_major, unrounded

MIN_SPEEDUP = 1.01
"""What 8 bit has to be worth at least, as it rounds. It is worth more than calls say that are timed among their equals: up to 3 %, in
60 layers on an H200."""


class Candidate(NamedTuple):
    """A matmul that may be rewritten. What several need is computed once, and they share its cost."""

    matmul: Matmul
    gemm: GemmFormat
    activation: Hashable = None
    """Equal for those that read the same quantised activation (or gradient); None where nobody else does."""
    is_fused: bool = False
    """The activation is quantised in the kernel that computes it, which then only writes int8 in addition."""
    weight: Hashable = None
    """Equal for those that read the same quantised weight; None where nobody else does."""
    weight_passes: int = 1
    """How many passes the quantised weight serves."""
    scale: Hashable = None
    """Equal for those that read the weight by one scale, which is found for all of them; None where this one finds its own."""
    finds_scale: bool = True
    """It is the one that finds it, as the first of them does, or reads the same quantised weight."""
    gradient: Hashable = None
    """Equal for those that read the transpose of the same int8 gradient; None where nobody else does."""
    spared: Hashable = None
    """Equal for those that read what nobody else reads, so that the kernel that computes and quantises it writes only int8."""
    has_bias: bool = False
    """`scaled_mm` adds it, as the original does."""
    is_plain: bool = True
    """It is one product of two matrices, which is computed as it stands: what can be timed."""
    is_timed: bool = False
    """Its calls have been timed, and count whatever rates predict."""


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
    """What a kernel or two of a matmul in 8 bit take."""

    seconds: float
    """Of the device; below zero where they spare it a part of another kernel."""
    num_launches: int
    call: Call | None = None
    """To time it; not for what is no call of its own, but a part of one."""
    less: float = 0.0
    """Seconds of the call that are another part."""
    share: float = 1.0
    """Of it that this matmul bears."""
    key: Hashable = None
    """Equal for matmuls that need the same and share it; of one matmul, no two parts have the same."""

    @property
    def cost(self) -> float:
        """Seconds, as they count against what the original may take at most; what is spared is a part of that."""
        return self.seconds if self.seconds > 0 else self.seconds / MIN_SPEEDUP


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
        return sum(part.share * part.seconds for part in self.parts if part.seconds > 0)

    @property
    def spared(self) -> float:
        """Seconds of other kernels that the original takes besides its own."""
        return -sum(part.share * part.seconds for part in self.parts if part.seconds < 0)

    @property
    def quantized_host(self) -> float:
        """Seconds that the host takes to launch that and the kernels behind it."""
        return sum(part.share * part.num_launches for part in self.parts) * self.launch + _BETWEEN * self.original.launch

    def on_device(self) -> Prediction:
        """What counts where the device is the bottleneck."""
        return Prediction((self.original.seconds + self.spared) / self.quantized, self.is_measured)

    def with_launches(self) -> Prediction:
        """What counts where the host is: it launches the next kernels while the device runs those between."""
        original, between = self.original, self.original.between
        seconds = max(original.seconds + self.spared, original.host - between)
        speedup = seconds / max(self.quantized, self.quantized_host - between)
        return Prediction(speedup, self.is_measured, launches_decide=speedup < MIN_SPEEDUP <= self.on_device().speedup)

    def calls(self) -> set[Call]:
        """All that can be timed."""
        return {self.original.call} | {part.call for part in self.parts if part.call}

    def measured(self, seconds: Mapping[Call, float], *, is_close: bool) -> "_Times":
        """With times of calls in the place of those that rates predict.

        Where one of them is not known, or it is not close, only what it may share has the price that it has for all.
        """
        is_close = is_close and self.calls() <= seconds.keys()

        def found(call: Call) -> float:
            return seconds[call] + call.num_kernels * self.gap

        def priced(part: _Part) -> _Part:
            if part.call is None or part.call not in seconds or not (is_close or part.key is not None):
                return part
            return part._replace(seconds=max(found(part.call) - part.less, 0.0))

        original = self.original._replace(seconds=found(self.original.call)) if is_close else self.original
        parts = tuple(priced(part) for part in self.parts)
        return self._replace(original=original, parts=parts, is_measured=is_close)


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
    predicted = [_times(candidate, rates) for candidate in candidates]
    times, timed = _share_out(predicted), set[int]()
    while rates is None and (close := _close_ones(times, candidates) - timed):  # shares move, and others come close
        timed |= close
        times = _share_out(_timed(predicted, candidates, timed))
    dtypes = {candidate.matmul.node.meta["val"].dtype for candidate in candidates}  # the device is measured for these
    rest = [_original(matmul, rates) for matmul in others if matmul.node.meta["val"].dtype in dtypes]
    device = sum(t.quantized - t.spared + t.original.between for t in times) + sum(t.seconds + t.between for t in rest)
    host = sum(t.quantized_host for t in times) + sum(t.host for t in rest)
    by_device = [t.on_device() for t in times]
    is_settled = all(prediction.speedup >= MIN_SPEEDUP for prediction in by_device)
    if host <= device or not is_settled or inductor_config.triton.cudagraphs:
        return by_device
    return [t.with_launches() for t in times]


def _share_out(times: Sequence[_Times]) -> list[_Times]:
    """Let matmuls bear what several need so that each is worth it where all together are.

    Each bears of it in proportion to what it gains beyond `MIN_SPEEDUP` after all else that it bears, and what all together spare
    goes to who lacks it. By equal parts one that gains less than its part would be left alone, and the others would bear
    the whole for no less. Where a matmul shares several things, what it bears of one is what it does not have for
    another: they are shared out in turns, until nothing moves.
    """
    costs: dict[Hashable, dict[int, float]] = defaultdict(dict)
    for number, of_one in enumerate(times):
        for part in of_one.parts:
            costs[part.key][number] = part.cost
    shared = {key: of_it for key, of_it in costs.items() if key is not None and len(of_it) > 1}
    shares = {key: dict.fromkeys(of_it, 0.0) for key, of_it in shared.items()}
    gains = [
        of_one.original.seconds / MIN_SPEEDUP - sum(part.share * part.cost for part in of_one.parts if part.key not in shared)
        for of_one in times
    ]
    for _ in range(_TURNS):
        for key, of_it in shared.items():
            for number, seconds in of_it.items():
                gains[number] += shares[key][number] * seconds
            claims = {number: max(gains[number] if seconds > 0 else -gains[number], 0.0) for number, seconds in of_it.items()}
            whole = sum(claims.values())
            shares[key] = {number: claim / whole if whole else 1 / len(claims) for number, claim in claims.items()}
            for number, seconds in of_it.items():
                gains[number] -= shares[key][number] * seconds
    return [
        of_one._replace(
            parts=tuple(part._replace(share=shares[part.key][number]) if part.key in shared else part for part in of_one.parts)
        )
        for number, of_one in enumerate(times)
    ]


_TURNS = 10
"""By then shares stay as they are: of random costs that several share, choices came within a hundredth of the best of all."""


def _close_ones(times: Sequence[_Times], candidates: Sequence[Candidate]) -> set[int]:
    """Those whose predictions are near 1, and whose calls can be timed."""
    return {
        number
        for number, (of_one, candidate) in enumerate(zip(times, candidates, strict=True))
        if (candidate.is_timed or _CLOSE[0] < of_one.on_device().speedup < _CLOSE[1])
        and candidate.is_plain
        and 0 not in _shape(candidate.matmul)
    }


def _timed(times: Sequence[_Times], candidates: Sequence[Candidate], numbers: Collection[int]) -> list[_Times]:
    """Times of calls in the place of predictions: for some matmuls, and for what others share with them."""
    devices = [candidate.matmul.node.meta["val"].device for candidate in candidates]
    wanted: dict[torch.device, set[Call]] = defaultdict(set)
    for number in numbers:
        wanted[devices[number]] |= times[number].calls()
    seconds = {device: call_seconds(sorted(calls, key=str), device) for device, calls in wanted.items()}
    return [
        of_one.measured(seconds.get(device, {}), is_close=number in numbers)
        for number, (of_one, device) in enumerate(zip(times, devices, strict=True))
    ]


_CLOSE = 0.9, 1.25
"""Between these a prediction may be on the wrong side. In a sweep over 24 layers on an H200 those of 0.9 to 1.25 were 2 to 27 % too
high; where int8 was a quarter faster or more by prediction, it was faster."""


def _original(matmul: Matmul, rates: DeviceRates | None, *, has_bias: bool = False) -> _Original:
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
    flags = {
        Flag.BIAS: has_bias,
        Flag.LHS_TRANSPOSED: is_column_major(matmul.lhs.meta["val"]),
        Flag.RHS_TRANSPOSED: is_column_major(matmul.rhs.meta["val"]),
    }
    call = Call(Op.MATMUL, (m, n, k), value.dtype, Flag.those_of(flags))
    return _Original(seconds + rates.kernel, between, rates.matmul_call, call)


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
    original = _original(matmul, rates, has_bias=candidate.has_bias)
    rates = rates or device_rates(value.device, value.dtype, gemm.is_by_block)
    multiply = _multiply(candidate, rates)
    operands = _quantize_by_block(candidate, rates) if gemm.is_by_block else _quantize(candidate, rates)
    return _Times(original, (multiply, *operands), rates.quantize_call, rates.gap)


def _multiply(candidate: Candidate, rates: DeviceRates) -> _Part:
    matmul, gemm = candidate.matmul, candidate.gemm
    dtype = matmul.node.meta["val"].dtype
    m, n, k = _shape(matmul)
    work = scaled_mm_work(m, n, k, dtype.itemsize)
    seconds = max(work.flops / rates.quantized_matmul + m * n * rates.quantized_output, work.bytes / rates.quantize)
    if gemm.is_by_block:
        k = padded(k)  # by what quantises and turns the operands
    flags = {Flag.BIAS: candidate.has_bias, Flag.COLUMN_SCALES: gemm.weight is Scaling.VECTOR}
    op = Op.SCALED_MM_BLOCKWISE if gemm.is_by_block else Op.SCALED_MM
    return _Part(seconds + rates.kernel, 1, Call(op, (m, n, k), dtype, Flag.those_of(flags)))


def _quantize(candidate: Candidate, rates: DeviceRates) -> list[_Part]:
    """What quantises the operands of a matmul by one scale, or by scales of what it does not sum over."""
    matmul, share = candidate.matmul, 1 / candidate.weight_passes
    *_, k = _shape(matmul)
    weight_rows, other_rows = _rows(matmul)
    if candidate.is_fused:
        other = _written(other_rows, k, rates)
    else:
        other = _quantizer(*_laid_out(_OPS[Scaling.VECTOR], matmul, other_rows, is_weight=False), rates)
    parts = [other._replace(key=_key("rows", candidate.activation)), *_spared(candidate, other_rows, rates)]
    both = _quantizer(*_laid_out(_OPS[candidate.gemm.weight], matmul, weight_rows, is_weight=True), rates)
    key = _key(str(both.call), candidate.weight)
    if candidate.scale is None:
        return [*parts, both._replace(share=share, key=key)]
    # The first one reads it twice, in two kernels: one for the absmax, which is shared, and one that rounds, as each has it.
    rounds = _quantizer(*_laid_out(_BY_SCALE, matmul, weight_rows, is_weight=True), rates)
    finds = _Part(both.seconds - rounds.seconds, both.num_launches - rounds.num_launches, key=_key("scale", candidate.scale))
    if candidate.finds_scale:
        rounds = rounds._replace(call=both.call, less=finds.seconds)
    return [*parts, rounds._replace(key=key), finds]


_OPS = {
    Scaling.VECTOR: (Op.QUANTIZE_ROWWISE, Op.QUANTIZE_COLUMNWISE_TRANSPOSE),
    Scaling.TENSOR: (Op.QUANTIZE_TENSORWISE, Op.QUANTIZE_TENSORWISE_TRANSPOSE),
}
"""Of an operand that lies in memory as [outer, contracted], and of one that lies as [contracted, outer]."""
_BY_SCALE = Op.QUANTIZE_BY_SCALE, Op.QUANTIZE_BY_SCALE_TRANSPOSE


def _laid_out(
    ops: tuple[Op, Op], matmul: Matmul, num_rows: int, *, is_weight: bool
) -> tuple[Op, tuple[int, int], torch.dtype]:
    """The op that quantises an operand of so many outer elements as it lies in memory, and what it reads."""
    operand = matmul.weight_operand if is_weight else matmul.other_operand
    is_left = is_weight == matmul.weight_on_left
    *_, k = _shape(matmul)
    # Under autocast a weight's own dtype is that of the parameter itself.
    is_unrounded = is_weight and matmul.role is not Role.GRAD_WEIGHT
    value = operand.meta["val"]
    dtype = (unrounded(operand)[0] if is_unrounded else operand).meta["val"].dtype
    is_folded = value.dim() == 3 and not is_weight  # into rows that are laid out anew
    if is_left == is_column_major(value) and not is_folded:
        return ops[1], (k, num_rows), dtype
    return ops[0], (num_rows, k), dtype


def _quantize_by_block(candidate: Candidate, rates: DeviceRates) -> list[_Part]:
    """What quantises an activation that takes over the scales of a gradient's tokens, and the gradient, which it turns."""
    matmul = candidate.matmul
    dtype = matmul.node.meta["val"].dtype
    *_, k = _shape(matmul)
    weight_rows, other_rows = _rows(matmul)
    gradient = _written(k, other_rows, rates) if candidate.is_fused else _quantizer(Op.QUANTIZE_ROWWISE, (k, other_rows), dtype, rates)
    return [
        _quantizer(Op.QUANTIZE_BLOCKWISE_TRANSPOSE, (k, weight_rows), dtype, rates),
        gradient._replace(key=_key("rows", candidate.activation)),
        *_spared(candidate, other_rows, rates),
        _quantizer(Op.TRANSPOSE, (k, other_rows), torch.int8, rates)._replace(key=_key("turned", candidate.gradient)),
    ]


def _spared(candidate: Candidate, other_rows: int, rates: DeviceRates) -> list[_Part]:
    """What need not be written in 16 bit."""
    if candidate.spared is None:
        return []
    *_, k = _shape(candidate.matmul)
    itemsize = candidate.matmul.other_operand.meta["val"].dtype.itemsize
    return [_Part(-itemsize * k * other_rows / rates.quantize, 0, key=_key("spared", candidate.spared))]


def _key(what: str, which: Hashable) -> Hashable:
    return None if which is None else (what, which)


def _quantizer(op: Op, sizes: tuple[int, int], dtype: torch.dtype, rates: DeviceRates) -> _Part:
    """What a call takes by its rate."""
    call = Call(op, sizes, dtype)
    by_columns = op in (Op.QUANTIZE_COLUMNWISE_TRANSPOSE, Op.QUANTIZE_BLOCKWISE_TRANSPOSE)
    rate = rates.transpose if op is Op.TRANSPOSE else rates.quantize_columns if by_columns else rates.quantize
    return _Part(call.num_bytes / rate + call.num_kernels * rates.kernel, call.num_kernels, call)


def _written(num_rows: int, num_columns: int, rates: DeviceRates) -> _Part:
    """int8 and scales, of rows, which is all that the kernel that computes them adds; it takes the host as long as one of its own."""
    return _Part(num_rows * (num_columns + 4) / rates.quantize, 1)


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
