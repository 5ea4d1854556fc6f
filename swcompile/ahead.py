"""Compiling the kernels of a graph's ops in Inductor's processes, while Inductor generates code for the rest of the graph."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from swcompile.kernels.dequantize import DEQUANTIZE
from swcompile.kernels.library import LAUNCHERS
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.quantize_tensorwise import (
    QUANTIZE_BY_SCALE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_BOTH,
    QUANTIZE_TENSORWISE_TRANSPOSE,
)
from swcompile.kernels.scaled_mm import SCALED_MM
from swcompile.kernels.scaled_mm_blockwise import SCALED_MM_BLOCKWISE
from swcompile.kernels.transpose import TRANSPOSE
from swcompile.kernels.tuning import launches_of
from swcompile.kernels.workers import compile_elsewhere
from swcompile.pipeline import log

_OPS = (
    QUANTIZE_ROWWISE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_TRANSPOSE,
    QUANTIZE_TENSORWISE_BOTH,
    QUANTIZE_BY_SCALE,
    QUANTIZE_COLUMNWISE_TRANSPOSE,
    QUANTIZE_BLOCKWISE_TRANSPOSE,
    TRANSPOSE,
    DEQUANTIZE,
    SCALED_MM,
    SCALED_MM_BLOCKWISE,
)
"""Not `map_rows`, which chooses by registers and not by time: whoever writes it has it compiled. Not ops with a memory."""


def compile_ahead(graph: fx.Graph) -> None:
    """Start to compile what a graph's ops will launch on a GPU, each configuration that will be tried included.

    Not where sizes are symbolic. An op whose configurations are timed waits for what was started; another one compiles its
    kernel itself if it is called before that is done. What goes wrong here goes wrong there again.

    Args:
        graph: with fake tensors as its nodes' values.
    """
    try:
        for device, calls in _calls(graph).items():
            with torch.cuda.device(device):
                launches = launches_of(calls)
            compile_elsewhere(launches, device, at_once=False)
    except Exception as error:  # noqa: BLE001 (a step that a compilation can do without)
        log.info("no kernel is compiled ahead of its first call: %r", error)


def _calls(graph: fx.Graph) -> dict[torch.device, list[Callable[[], object]]]:
    """By GPU, one call of those that look alike."""
    calls: dict[torch.device, dict[str, Callable[[], object]]] = defaultdict(dict)
    for node in (node for op in _OPS for node in graph.find_nodes(op="call_function", target=op)):
        args = fx.map_arg(node.args, lambda source: source.meta["val"])
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        sizes = [size for tensor in tensors for size in (*tensor.shape, *tensor.stride())]
        if tensors[0].is_cuda and all(isinstance(size, int) for size in sizes):
            looks = [_look(value) for value in args]
            calls[tensors[0].device][str((node.target, looks))] = partial(_call, LAUNCHERS[node.target], args)
    return {device: list(different.values()) for device, different in calls.items()}


def _call(function: Callable[..., object], args: tuple[Any, ...]) -> None:
    """With fake tensors, of which the first argument is one."""
    with args[0].fake_mode:
        function(*args)


def _look(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value
