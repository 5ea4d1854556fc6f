"""Quantised weights that serve several passes: what `gradient_accumulation` keeps."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from swcompile.kernels.launch import is_capturing


@dataclasses.dataclass(slots=True)
class Accumulation:
    """What became of the weights that matmuls asked for within `gradient_accumulation`."""

    quantized: int = 0
    """How often one was quantised."""
    reused: int = 0
    """How often one was there already."""


@contextlib.contextmanager
def gradient_accumulation() -> Iterator[Accumulation]:
    """Quantise a weight once for all passes in this block. Bit for bit what comes out without the block.

    ::

        compiled = torch.compile(model, backend="switchback", options={"micro_batches": 4})
        with swcompile.gradient_accumulation():
            for batch in micro_batches:
                loss(compiled(batch)).backward()
        optimizer.step()

    Holds 8-bit copies of the weights, one byte a parameter for the forward and one for the backward, until the block
    ends; of whole weights, where FSDP2 shards them. Every other weight is quantised in every pass, as without the block:
    parts of a parameter, and weights that several matmuls of the forward read. In all threads alike.

    A weight that changes in the block is quantised again: by an in-place operation, `load_state_dict`, any
    `torch.optim.Optimizer`, or as another tensor becomes its ``data``. Writes that leave no trace must not be in the
    block: to ``weight.data``, by a kernel that autograd does not know of, to the shards of FSDP2 other than by an
    optimizer. What a CUDA graph records is quantised by the graph itself.

    Yields:
        counts of what was quantised and what was reused.

    Warns:
        UserWarning: no matmul asked for a weight.
    """
    global _current
    if _current is not None:  # the outer block goes on
        yield _current
        return
    _current = counts = Accumulation()
    # Fused optimizers write parameters without counting up their versions.
    hook = register_optimizer_step_post_hook(lambda *_: _held.clear())
    try:
        yield counts
    finally:
        hook.remove()
        _current = None
        _held.clear()
    if not counts.quantized + counts.reused:
        warnings.warn(
            "no matmul asked for a weight to hold within gradient_accumulation(). Is the model compiled with "
            "backend='switchback' and options={'micro_batches': n}? swcompile.reports() says which matmuls run in int8; "
            "parts of parameters, and weights that several matmuls read, are not held",
            stacklevel=3,
        )


def quantized_weight(weight: torch.Tensor, quantizer: torch._ops.OpOverload) -> tuple[torch.Tensor, torch.Tensor]:
    """What a quantiser makes of a weight: within `gradient_accumulation` made once, as long as the weight stays the same.

    Args:
        weight: of any shape and dtype that the quantiser takes.
        quantizer: an op of one tensor with two results. Nobody may write to them.
    """
    counts = _current
    if counts is None or not _can_be_held(weight):
        if counts is not None:
            counts.quantized += 1
        return quantizer(weight)
    # A storage, and not an address: FSDP2 frees a storage's memory and gives it another, perhaps that of another weight.
    storage = weight.untyped_storage()
    key = storage._cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, quantizer
    state = weight._version, torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    known = _held.get(key)
    if known is not None and known.state == state:
        counts.reused += 1
        return known.results
    for gone in [other for other, held in _held.items() if held.storage.expired()]:
        del _held[gone]
    counts.quantized += 1
    with torch.no_grad():
        _held[key] = held = _Held(state, StorageWeakRef(storage), quantizer(weight))
    return held.results


class _Held(NamedTuple):
    state: Any
    """What differs once the weight has changed, and for a stream on which the results may not be there yet."""
    storage: StorageWeakRef
    """Of the weight. As long as this is there, no other storage can pass for it."""
    results: tuple[torch.Tensor, torch.Tensor]


_current: Accumulation | None = None
_held: dict[Any, _Held] = {}


def _can_be_held(weight: torch.Tensor) -> bool:
    """Whether changes can be seen, and the results are there when the next pass comes: not if a CUDA graph makes them."""
    return not weight.is_inference() and not (weight.is_cuda and is_capturing())
