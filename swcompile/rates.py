"""The rates of devices on which decisions rest: measured once for each model of device, and kept in a file."""

import dataclasses
import math
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from swcompile.kernels.measurements import MeasurementFile
from swcompile.measuring import DeviceRates, compile_trials, measure
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


def _check_steady(rates: DeviceRates, device: torch.device, dtype: torch.dtype) -> None:
    """Warn of rates, whoever measured them, that may decide for the slower of two formats."""
    if device.type == "cuda" and not rates.is_steady:
        own = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} seems to have been in use by other programs: when its rates were measured, one call "
            f"took {rates.spread:.1f} times as long as another of its kind. So matmuls may be left in {own}, or taken to int8, where "
            f"the other is faster. Delete {_rates_file().path} while the GPU is idle, and the next process measures again",
            stacklevel=2,
        )
