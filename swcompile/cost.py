"""Predicts whether a matmul is faster in int8, from its work and the device's measured rates."""

import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import unset_fake_temporarily

from swcompile.graph import Matmul, sizes
from swcompile.kernels.library import Work
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE, quantize_rowwise_work
from swcompile.kernels.quantize_tensorwise import quantize_tensorwise_work
from swcompile.kernels.scaled_mm import SCALED_MM, scaled_mm_work
from swcompile.pipeline import source_fingerprint
from swcompile.recipe import GemmFormat, Scaling

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """What one device gives, measured on it."""

    matmul: float
    """Rate of a large matmul in the model's own dtype, FLOP/s."""
    int8_matmul: float
    """Rate of a large `scaled_mm`, OP/s."""
    quantize: float
    """Rate of a large `quantize_rowwise`, bytes read and written a second."""
    kernel: float
    """Seconds that the smallest kernel takes on the device."""
    matmul_call: float
    """Seconds that the host spends on launching a matmul; 0 on a CPU, where it is part of `kernel`."""
    quantize_call: float
    """Seconds that the host spends on launching one of our kernels; likewise."""


class Candidate(NamedTuple):
    """A matmul that may be rewritten."""

    matmul: Matmul
    gemm: GemmFormat
    sharers: int
    """How many candidates read the same quantised activation; each bears its share."""


class _Times(NamedTuple):
    """Seconds that a matmul takes, as it is and in int8 with its quantisation."""

    original: float
    int8: float
    original_host: float
    int8_host: float


def predict_speedups(
    candidates: Sequence[Candidate], others: Sequence[Matmul] = (), *, rates: DeviceRates | None = None
) -> list[float]:
    """Predicted time of each original matmul over that of int8 with its quantisation.

    Device time decides as long as the device is the bottleneck. Where the host would take longer to launch the
    matmuls of this graph than the device to run them (and no CUDA graph launches them), the longer of both counts.

    Args:
        candidates: the matmuls of one graph that may be rewritten.
        others: the rest of its matmuls, which keep the device busy while the host launches.
        rates: of the device; measured where not given.
    """
    times = [_times(candidate, rates) for candidate in candidates]
    rest = [_original(matmul, rates) for matmul in others]
    device = sum(t.int8 for t in times) + sum(seconds for seconds, _ in rest)
    host = sum(t.int8_host for t in times) + sum(seconds for _, seconds in rest)
    if host <= device or inductor_config.triton.cudagraphs:
        return [t.original / t.int8 for t in times]
    return [max(t.original, t.original_host) / max(t.int8, t.int8_host) for t in times]


def _original(matmul: Matmul, rates: DeviceRates | None) -> tuple[float, float]:
    """Seconds that the device and the host spend on a matmul as it is; nothing for a dtype that was not measured."""
    value = matmul.node.meta["val"]
    if value.dtype not in _DTYPES:
        return 0.0, 0.0
    rates = rates or device_rates(value.device, value.dtype)
    m, n, k = matmul.shape
    work = Work(flops=2 * m * n * k, bytes=value.dtype.itemsize * (m * k + n * k + m * n))
    return max(work.flops / rates.matmul, work.bytes / rates.quantize) + rates.kernel, rates.matmul_call


def _times(candidate: Candidate, rates: DeviceRates | None) -> _Times:
    matmul, gemm, sharers = candidate
    value = matmul.node.meta["val"]
    rates = rates or device_rates(value.device, value.dtype)
    m, n, k = matmul.shape
    itemsize = value.dtype.itemsize
    weight = matmul.lhs if matmul.weight_on_left else matmul.rhs
    weight_rows = math.prod(sizes(weight)[-2:]) // k
    other_rows = m + n - weight_rows

    original, original_host = _original(matmul, rates)
    multiply = scaled_mm_work(m, n, k, itemsize)
    quantize_other = quantize_rowwise_work(other_rows, k, itemsize).bytes / rates.quantize + rates.kernel
    # An operand with one scale is read twice, and its absmax is a kernel of its own.
    weight_kernels = 2 if gemm.weight is Scaling.TENSOR else 1
    quantize = quantize_tensorwise_work if gemm.weight is Scaling.TENSOR else quantize_rowwise_work
    quantize_weight = quantize(weight_rows, k, itemsize).bytes / rates.quantize + weight_kernels * rates.kernel
    return _Times(
        original=original,
        int8=max(multiply.flops / rates.int8_matmul, multiply.bytes / rates.quantize)
        + rates.kernel
        + quantize_other / sharers
        + quantize_weight,
        original_host=original_host,
        int8_host=(1 + 1 / sharers + weight_kernels) * rates.quantize_call,
    )


def device_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Rates of a device for a dtype. Measured once (under a second, and kernel tuning), then read from a file in
    Inductor's cache folder."""
    return _rates(_device_key(device, dtype), torch.device(device.type, device.index or 0), dtype)


def rates_fingerprint(devices: Iterable[torch.device], dtypes: Iterable[torch.dtype]) -> str:
    """What a cache key needs of the rates on which decisions rest."""
    kinds = sorted({device.type for device in devices} & {"cpu", "cuda"})
    measured = [dtype for dtype in _DTYPES if dtype in set(dtypes)]
    return repr([(kind, dtype, device_rates(torch.device(kind), dtype)) for kind in kinds for dtype in measured])


def _device_key(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        precision = torch.get_float32_matmul_precision()
    else:
        name = f"{device.type} {torch.get_num_threads()} threads"
        precision = "highest"
    return f"{name}, torch {torch.__version__}, {dtype}, float32 {precision}, swcompile {source_fingerprint()[:16]}"


@functools.cache
def _rates(key: str, device: torch.device, dtype: torch.dtype) -> DeviceRates:
    file = Path(cache_dir()) / "swcompile" / "device_rates.json"
    known = _read(file)
    if key not in known:
        rates = _measure(device, dtype)
        known = _read(file) | {key: dataclasses.asdict(rates)}
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
            json.dump(known, scratch, indent=1)
        os.replace(scratch.name, file)
    return DeviceRates(**known[key])


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # absent, or cut short by a crash: measure again
        return {}


def _measure(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    on_gpu = device.type == "cuda"
    size = 4096 if on_gpu else 512
    rows = 8 * size if on_gpu else 2 * size
    seconds = _gpu_seconds if on_gpu else _cpu_seconds
    autocast = torch.autocast(device.type, enabled=False)
    with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng([device] if on_gpu else []), autocast:
        x = torch.randn(rows, size, device=device, dtype=dtype)
        weight = torch.randn(size, size, device=device, dtype=dtype)
        q, scale = QUANTIZE_ROWWISE(x)
        weight_q, weight_scale = QUANTIZE_ROWWISE(weight)
        small, small_weight = x[:16, :16].contiguous(), weight[:16, :16].contiguous()
        flops = 2 * rows * size * size
        return DeviceRates(
            matmul=flops / seconds(lambda: x @ weight),
            int8_matmul=flops / seconds(lambda: SCALED_MM(q, weight_q, scale, weight_scale, None, dtype)),
            quantize=quantize_rowwise_work(rows, size, dtype.itemsize).bytes / seconds(lambda: QUANTIZE_ROWWISE(x)),
            kernel=seconds(lambda: QUANTIZE_ROWWISE(small)),
            matmul_call=_host_seconds(lambda: small @ small_weight) if on_gpu else 0.0,
            quantize_call=_host_seconds(lambda: QUANTIZE_ROWWISE(small)) if on_gpu else 0.0,
        )


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
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _host_seconds(run: Callable[[], object], repeats: int = 50) -> float:
    """Host time of a call; the device is done sooner."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repeats
