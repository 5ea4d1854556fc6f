"""What devices give, on which decisions rest: measured once for each model of device, and kept in a file."""

import dataclasses
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from swcompile.calls import Call
from swcompile.kernels.measurements import MeasurementFile
from swcompile.measuring import DeviceRates, Timing, compile_trials, is_steady, measure, time_calls
from swcompile.pipeline import log, source_fingerprint

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

    Measured once for each model of GPU and kept as its rates are, so ranks decide alike. What could not be timed, as for want
    of memory, is missing, there as well.
    """
    if device.type != "cuda":
        return {}
    keys = {call: f"{_device_name(device)}, {call}, swcompile {source_fingerprint()[:16]}" for call in calls}
    unknown = [call for call, key in keys.items() if key not in _timings]
    if unknown:
        _timings.update(_timings_of({call: keys[call] for call in unknown}, device))
        _check_steady(max(_timings[keys[call]].spread for call in unknown), device)
    found = {call: _timings[key].seconds for call, key in keys.items()}
    return {call: seconds for call, seconds in found.items() if seconds != _NEVER}


def _timings_of(keys: Mapping[Call, str], device: torch.device) -> dict[str, Timing]:
    """What the file has for calls by their keys, once they are timed."""
    file = _rates_file()
    stored = file.read()
    found = {key: _timing_from(stored.get(key)) for key in keys.values()}
    missing = [call for call, key in keys.items() if found[key] is None]
    try:
        timings = time_calls(missing, device) if missing else {}
    except Exception as error:  # noqa: BLE001 (the prediction by rates is left)
        log.warning("calls near the limit between 8 and 16 bit are not timed, and predictions decide: %r", error)
        timings = dict.fromkeys(missing, Timing(_NEVER, 1.0))
    for call, timing in timings.items():
        entry = file.add(keys[call], timing._asdict(), instead_of=stored.get(keys[call]))
        found[keys[call]] = _timing_from(entry) or timing
    return {key: timing for key, timing in found.items() if timing is not None}


_NEVER = -1.0
"""Seconds of what could not be timed."""
_timings: dict[str, Timing] = {}
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


def _timing_from(stored: Any) -> Timing | None:
    """What the file holds for a call; None for what is no timing."""
    if not isinstance(stored, dict) or stored.keys() != {*Timing._fields}:
        return None
    timing = Timing(**stored)
    are_numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in timing)
    is_one = are_numbers and (timing.seconds > 0 or timing.seconds == _NEVER) and timing.spread >= 1
    return timing if is_one else None


def _check_steady(spread: float, device: torch.device) -> None:
    """Warn of what has been measured, by whoever it was, that may decide for the slower of two formats."""
    if device.type == "cuda" and not is_steady(spread):
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} seems to have been in use by other programs: when it was measured, one call took "
            f"{spread:.1f} times as long as another of its kind. So matmuls may be left as they are, or taken to int8, where the "
            f"other is faster. Delete {_rates_file().path} while the GPU is idle, and the next process measures again",
            stacklevel=2,
        )
