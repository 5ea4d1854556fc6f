"""The optimizer: StableAdamW, its step emitted as a graph."""

from swcompile.optim.stable_adamw import StableAdamW

__all__ = ["StableAdamW"]
