"""Launching many small kernels in one go."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Replayed:
    """A function of CUDA tensors that stay where they are: recorded as a CUDA graph by the second call, then replayed.

    A replay costs the host one launch. Its results lie where those of the last one lay. The first call runs the function
    itself, as it has to compile what a recording only launches; so does a call that the caller records.

    Args:
        function: launches kernels, without waiting for any.
        inputs: what to call it with, all on one device.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor]):
        self.function, self.inputs = function, inputs
        self.has_run = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.results: Any = None

    def __call__(self) -> Any:
        """What the function returns for what the inputs hold now, on the current stream."""
        if not self.has_run or torch.cuda.is_current_stream_capturing():
            self.has_run = True
            return self.function(*self.inputs)
        if self.graph is None:
            self.graph = self._record()
        self.graph.replay()
        return self.results

    def _record(self) -> torch.cuda.CUDAGraph:
        # Not `torch.cuda.graph`, which waits for the device and empties the allocator's cache, and whose strict mode
        # fails for what other threads, of a data loader say, allocate meanwhile.
        graph, device = torch.cuda.CUDAGraph(), self.inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.results = self.function(*self.inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph
