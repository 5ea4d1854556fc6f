"""Which parameters decay."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn

from swcompile.recipe import patterns, unmatched

NO_DECAY = ("*bias", "*logit_scale", "*gamma", "*layer_scale*")
"""Names of parameters that do not decay whatever their shape: open_clip's rule, and every model's layer-scale."""


def split_decay_groups(
    model: nn.Module, weight_decay: float, *, no_decay: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups in which matrices decay, and vectors, scalars and named exceptions do not.

    As in the training runs of arXiv 2304.13013: no decay for biases, norms, layer-scales and the logit scale. What
    `swcompile.prepare` inserts is among them.

    Args:
        model: all of its trainable parameters are in one of the groups, with their names.
        weight_decay: of those that decay.
        no_decay: globs on names of further parameters that do not decay, whatever their shape; None for `NO_DECAY`.

    Returns:
        At most two groups for `swcompile.StableAdamW` or any `torch.optim.Optimizer`, without one that would be empty.

    Raises:
        ValueError: a pattern matches no parameter, or the model has none to train.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    globs = NO_DECAY if no_decay is None else patterns("no_decay", no_decay)
    if no_decay is not None:
        for pattern, nearest in unmatched(globs, [name for name, _ in named]).items():
            raise ValueError(f"no_decay: {pattern!r} matches no parameter; the closest is {nearest!r}")
    groups: dict[float, list[Any]] = {weight_decay: [], 0.0: []}
    for name, param in named:
        decays = param.ndim >= 2 and not any(fnmatch.fnmatchcase(name, glob) for glob in globs)
        groups[weight_decay if decays else 0.0].append((name, param))
    return [{"params": members, "weight_decay": decay} for decay, members in groups.items() if members]
