"""How ops are registered, and what a machine that cannot run the kernels is told."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from swcompile.kernels import launch, library
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE


def test_a_second_import_under_another_name_fails_loudly():
    spec = importlib.util.spec_from_file_location("another_name", library.__file__)
    with pytest.raises(RuntimeError, match="Only a single TORCH_LIBRARY"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert torch.ops.swcompile.quantize_rowwise.default is QUANTIZE_ROWWISE


def test_old_gpu(monkeypatch):
    turing = launch.DeviceFacts("Tesla T4", (7, 5), 40, 65536)
    monkeypatch.setattr(launch, "device_facts", lambda device: turing)
    monkeypatch.setattr(launch, "HAS_TRITON", True)
    launch.require_supported_gpu.cache_clear()
    with pytest.raises(RuntimeError, match=r"8.0 \(Ampere\) or later; Tesla T4 \(cuda:3\) has 7.5. Run on"):
        launch.require_supported_gpu(3)
    monkeypatch.setattr(launch, "device_facts", lambda device: turing._replace(capability=(8, 0)))
    launch.require_supported_gpu(3)
    launch.require_supported_gpu.cache_clear()


def test_without_triton_the_cpu_still_works():
    program = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from swcompile.kernels import launch, quantize_tensorwise, quantize_columnwise, dequantize, scaled_mm
from swcompile.kernels.quantize_rowwise import quantize_rowwise
x_q, scale = quantize_rowwise(torch.tensor([[127.0, 1.5]]))
assert x_q.tolist() == [[127, 2]] and scale.item() == 1.0
try:
    launch.require_supported_gpu(0)
except RuntimeError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
