"""Predicts whether a matmul is faster in int8, from its work and the device's measured rates."""

import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import unset_fake_temporarily

from swcompile.graph import Matmul, sizes
from swcompile.kernels.library import Work
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE, quantize_rowwise_work
from swcompile.kernels.quantize_tensorwise import quantize_tensorwise_work
from swcompile.kernels.scaled_mm import SCALED_MM, scaled_mm_work
from swcompile.recipe import GemmFormat, Scaling


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """What one device gives, measured on it."""

    matmul: float
    """Rate of a large matmul in the model's own dtype, FLOP/s."""
    int8_matmul: float
    """Rate of a large `scaled_mm`, OP/s."""
    quantize: float
    """Rate of a large `quantize_rowwise`, bytes read and written a second."""
    call: float
    """Time of the smallest op call, seconds: what each further kernel costs at least."""

    def time_of(self, work: Work, *, int8: bool = False) -> float:
        """Seconds for an op: its arithmetic or its bytes, whichever takes longer, and the call."""
        rate = self.int8_matmul if int8 else self.matmul
        return max(work.flops / rate, work.bytes / self.quantize) + self.call


def predict_speedup(
    matmul: Matmul, gemm: GemmFormat, *, sharers: int = 1, rates: DeviceRates | None = None
) -> float:
    """Predicted time of the original matmul over that of int8 with its quantisation.

    Args:
        matmul: the matmul.
        gemm: how it would run in int8.
        sharers: how many matmuls read the same quantised activation; each bears its share.
        rates: of the device; measured where not given.
    """
    value = matmul.node.meta["val"]
    rates = rates or device_rates(value.device, value.dtype)
    m, n, k = matmul.shape
    itemsize = value.dtype.itemsize
    original = Work(flops=2 * m * n * k, bytes=itemsize * (m * k + n * k + m * n))
    left, right = gemm.other, gemm.weight
    weight = matmul.lhs if matmul.weight_on_left else matmul.rhs
    weight_elements = math.prod(sizes(weight)[-2:])
    activation_elements = m * k + n * k - weight_elements
    quantize_activation = _quantize_time(left, activation_elements // k, k, itemsize, rates) / sharers
    quantize_weight = _quantize_time(right, weight_elements // k, k, itemsize, rates)
    int8 = rates.time_of(scaled_mm_work(m, n, k, itemsize), int8=True)
    return rates.time_of(original) / (int8 + quantize_activation + quantize_weight)


def _quantize_time(scaling: Scaling, rows: int, columns: int, itemsize: int, rates: DeviceRates) -> float:
    if scaling is Scaling.TENSOR:
        work = quantize_tensorwise_work(rows, columns, itemsize)
        return work.bytes / rates.quantize + 2 * rates.call  # the absmax is a launch of its own
    return quantize_rowwise_work(rows, columns, itemsize).bytes / rates.quantize + rates.call


def device_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Rates of a device for a dtype. Measured once (under a second, and kernel tuning), then read from a file in
    Inductor's cache folder."""
    return _rates(_device_key(device, dtype), torch.device(device.type, device.index or 0), dtype)


def rates_fingerprint(devices: Iterable[torch.device]) -> str:
    """What a cache key needs of the rates on which decisions rest: those of every dtype on these devices."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    unique = sorted({device.type for device in devices})
    return repr([device_rates(torch.device(kind), dtype) for kind in unique for dtype in dtypes])


def _device_key(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        precision = torch.get_float32_matmul_precision()
    else:
        name = f"{device.type} {torch.get_num_threads()} threads"
        precision = "highest"
    return f"{name}, torch {torch.__version__}, {dtype}, float32 {precision}"


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
    size = 4096 if device.type == "cuda" else 512
    rows = 8 * size
    autocast = torch.autocast(device.type, enabled=False)
    with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(_cuda_only(device)), autocast:
        x = torch.randn(rows, size, device=device, dtype=dtype)
        weight = torch.randn(size, size, device=device, dtype=dtype)
        q, scale = QUANTIZE_ROWWISE(x)
        weight_q, weight_scale = QUANTIZE_ROWWISE(weight)
        matmul = _seconds(device, lambda: x @ weight)
        int8 = _seconds(device, lambda: SCALED_MM(q, weight_q, scale, weight_scale, None, dtype))
        quantize = _seconds(device, lambda: QUANTIZE_ROWWISE(x))
        call = _seconds(device, lambda: QUANTIZE_ROWWISE(x[:1, :16]))
    flops = 2 * rows * size * size
    return DeviceRates(
        matmul=flops / matmul,
        int8_matmul=flops / int8,
        quantize=quantize_rowwise_work(rows, size, dtype.itemsize).bytes / quantize,
        call=call,
    )


def _cuda_only(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    """The shortest of a few timings, host included: a matmul too small to hide its launch is slow for that reason."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    times = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
