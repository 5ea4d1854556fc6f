"""The optimizer: StableAdamW, its step emitted as a graph."""

from swcompile.optim.param_groups import split_decay_groups
from swcompile.optim.stable_adamw import StableAdamW

__all__ = ["StableAdamW", "split_decay_groups"]
