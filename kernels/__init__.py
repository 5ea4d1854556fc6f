"""Triton kernels of swcompile, one op a module, imported as ``swcompile.kernels`` and never as ``kernels``."""

# transformers probes a top-level module named `kernels` and parses its version; without one its import crashes.
__version__ = "0.0.0"
