"""Quantised weights that serve several passes: what `gradient_accumulation` keeps."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


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
    ends; of whole weights, where FSDP2 shards them. A weight that changes in the block is quantised again: by an in-place
    operation, `load_state_dict`, an optimizer, or as another tensor becomes its ``data``. Writes that leave no trace must
    not be in the block: to ``weight.data``, by a kernel that autograd does not know of, to the shards of FSDP2 other than
    by an optimizer. What a CUDA graph records is quantised by the graph itself.

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
            "no matmul asked for a quantised weight within gradient_accumulation(): compile the model with "
            "backend='switchback' and options={'micro_batches': n}; swcompile.reports() says which matmuls run in int8",
            stacklevel=3,
        )


def quantized_weight(weight: torch.Tensor, quantizer: torch._ops.OpOverload) -> tuple[torch.Tensor, torch.Tensor]:
    """What a quantiser makes of a weight: within `gradient_accumulation` made once, as long as the weight stays the same.

    Args:
        weight: of any shape and dtype that the quantiser takes.
        quantizer: an op of one tensor with two results. Nobody may write to them.
    """
    if _current is None:
        return quantizer(weight)
    if not _can_be_held(weight):
        _current.quantized += 1
        return quantizer(weight)
    state = _state(weight)
    known = _held.setdefault(weight, {})
    if quantizer in known and known[quantizer].state == state:
        _current.reused += 1
        return known[quantizer].results
    _current.quantized += 1
    known[quantizer] = _Held(state, weight.untyped_storage(), quantizer(weight))
    return known[quantizer].results


class _Held(NamedTuple):
    state: Any
    """Of the weight, when it was quantised."""
    storage: torch.UntypedStorage
    """Of the weight, kept so that no other storage can pass for it."""
    results: tuple[torch.Tensor, torch.Tensor]


_current: Accumulation | None = None
_held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight -> quantiser -> `_Held`. By the tensor itself: a sharded model may give weights the same memory in turns."""


def _state(weight: torch.Tensor) -> Any:
    """What differs once a weight has changed, and for a stream on which the results may not be there yet."""
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    # Not the address: FSDP2 frees a storage's memory and gives it another.
    memory = weight.untyped_storage()._cdata, weight.storage_offset()
    return weight._version, memory, weight.dtype, weight.shape, weight.stride(), stream


def _can_be_held(weight: torch.Tensor) -> bool:
    """Whether changes can be seen, and the results are there when the next pass comes: not if a CUDA graph makes them."""
    return not weight.is_inference() and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
