"""What Inductor computes once, and not again for each reader: a tensor as it is, written to memory, and sines."""

import torch

from swcompile.kernels.library import define_op


def materialize(x: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor of any shape and dtype."""
    return MATERIALIZE(x)


def materialize_reference(x: torch.Tensor) -> torch.Tensor:
    """`materialize` in plain PyTorch."""
    return x.clone()


MATERIALIZE = define_op(
    "materialize(Tensor x) -> Tensor",
    reference=materialize_reference,
    cuda=materialize_reference,
    fake=materialize_reference,
)
SIN, COS = (
    define_op(f"{function.__name__}(Tensor x) -> Tensor", reference=function, cuda=function, fake=function)
    for function in (torch.sin, torch.cos)
)
"""By PyTorch's own kernels, which are there: Triton takes seconds to compile sines for each tile that Inductor tries."""
