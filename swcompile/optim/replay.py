"""Launching many small kernels in one go."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)


def can_replay() -> bool:
    """Whether the allocator keeps memory for a CUDA graph alone, as PyTorch's own does."""
    return torch.cuda.get_allocator_backend() == "native" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ


class Replayed:
    """A function of CUDA tensors that stay where they are: recorded as a CUDA graph by the second call, then replayed.

    A replay costs the host one launch. Its results lie where those of the last one lay. The first call runs the function
    itself, as it has to compile what a recording only launches; so does a call that the caller records, and every call
    once a recording has failed (the function was to be compiled anew, or no memory was left).

    Args:
        function: launches kernels, without waiting for any.
        inputs: what to call it with, all on one device.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor]):
        self.function, self.inputs = function, inputs
        self.has_run = self.has_failed = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: Any = None

    def __call__(self) -> Any:
        """What the function returns for what the inputs hold now, on the current stream."""
        if not self.has_run or self.has_failed or torch.cuda.is_current_stream_capturing():
            results = self.function(*self.inputs)
            self.has_run = True
            return results
        if self.graph is None:
            try:
                self.graph, self.results = self._recorded()
            except Exception:  # nothing of it has run
                self.has_failed = True
                log.warning("the optimizer's step cannot be recorded as a CUDA graph and is launched instead", exc_info=True)
                return self.function(*self.inputs)
        self.graph.replay()
        return self.results

    def _recorded(self) -> tuple[torch.cuda.CUDAGraph, Any]:
        # Not `torch.cuda.graph`, which waits for the device and empties the allocator's cache, and whose strict mode
        # fails for what other threads, of a data loader say, allocate meanwhile.
        graph, device = torch.cuda.CUDAGraph(), self.inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                results = self.function(*self.inputs)
            except BaseException:
                with contextlib.suppress(Exception):  # about a recording that was cut off
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph, results
