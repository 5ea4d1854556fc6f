"""What devices give, on which decisions rest: measured once for each model of device, and kept in a file."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Collection, Iterable
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from swcompile.calls import Call
from swcompile.kernels.measurements import MeasurementFile
from swcompile.measuring import DeviceRates, compile_trials, is_steady, measure, time_calls
from swcompile.pipeline import source_fingerprint

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
            measured = measure(device, dtype, by_block)
            rates = _rates_from(file.add(key, dataclasses.asdict(measured) | name, instead_of=name)) or measured
        _check_steady(rates.spread, device)
        _known[key] = rates
    return _known[key]


def call_seconds(calls: Collection[Call], device: torch.device) -> dict[Call, float]:
    """Seconds that calls take on a GPU among their equals; none on a CPU, where they vary too much to be worth it.

    Measured once for each model of GPU and kept as its rates are, so ranks decide alike. Without memory for the operands of
    all, those are missing that nobody has measured before.
    """
    if device.type != "cuda":
        return {}
    file = _rates_file()
    stored = file.read()
    keys = {call: f"{_device_name(device)}, {call}, swcompile {source_fingerprint()[:16]}" for call in calls}
    found = {call: _timing_from(_timings.get(key) or stored.get(key)) for call, key in keys.items()}
    missing = [call for call, timing in found.items() if timing is None]
    if missing:
        with contextlib.suppress(torch.OutOfMemoryError):
            seconds, spread = time_calls(missing, device)
            for call in missing:
                mine = {"seconds": seconds[call], "spread": spread}
                found[call] = _timing_from(file.add(keys[call], mine, instead_of=stored.get(keys[call]))) or mine
    known = {call: timing for call, timing in found.items() if timing is not None}
    for call, timing in known.items():
        if keys[call] not in _timings:
            _check_steady(timing["spread"], device)
            _timings[keys[call]] = timing
    return {call: timing["seconds"] for call, timing in known.items()}


_timings: dict[str, dict[str, float]] = {}
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
    """Have the kernels by which GPUs are measured compiled, while a graph is traced, if nobody has asked for their rates yet."""
    known = _rates_file().read()
    unknown: dict[str, tuple[torch.device, torch.dtype, bool]] = {}  # GPUs of one model share a key
    for of in _wanted(devices, dtypes, by_block):
        key = _device_key(*of)
        if of[0].type == "cuda" and key not in _identities and not _has_identity(known.get(key)):
            unknown.setdefault(key, of)
    compile_trials(unknown.values())


def _wanted(
    devices: Iterable[torch.device], dtypes: Iterable[torch.dtype], by_block: bool
) -> list[tuple[torch.device, torch.dtype, bool]]:
    """What has rates, of devices and dtypes of a graph."""
    measured = {device for device in devices if device.type in ("cpu", "cuda")}
    return list(product(measured, set(dtypes).intersection(_DTYPES), {False, by_block}))


def _device_key(device: torch.device, dtype: torch.dtype, by_block: bool = False) -> str:
    numbers = f"{dtype}, int8{' by block' if by_block else ''}"
    return f"{_device_name(device)}, {numbers}, swcompile {source_fingerprint()[:16]}"


def _device_name(device: torch.device) -> str:
    """And what else decides how fast it multiplies."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        precision = torch.get_float32_matmul_precision()
    else:
        name = f"{device.type} {torch.get_num_threads()} threads"
        precision = "highest"
    return f"{name}, torch {torch.__version__}, float32 {precision}"


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


def _timing_from(stored: Any) -> dict[str, float] | None:
    """What the file holds for a call; None for what is no timing."""
    if not isinstance(stored, dict) or stored.keys() != {"seconds", "spread"}:
        return None
    are_times = all(isinstance(value, (int, float)) and 0 < value < math.inf for value in stored.values())
    return stored if are_times else None


def _check_steady(spread: float, device: torch.device) -> None:
    """Warn of what has been measured, by whoever it was, that may decide for the slower of two formats."""
    if device.type == "cuda" and not is_steady(spread):
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} seems to have been in use by other programs: when it was measured, one call took "
            f"{spread:.1f} times as long as another of its kind. So matmuls may be left as they are, or taken to int8, where the "
            f"other is faster. Delete {_rates_file().path} while the GPU is idle, and the next process measures again",
            stacklevel=2,
        )
