"""Processes of tests."""

import os
from typing import NoReturn

from torch._inductor import config


def write_scalar_code() -> None:
    """Let Inductor do without vectors on a CPU: it writes such code, and the compiler reads it, in three quarters of the time.

    What tests start as a program of its own keeps them.
    """
    config.cpp.simdlen = 1


def leave() -> NoReturn:
    """End a process that ``mp.spawn`` has started, once its results are in a file.

    Without destructors: one of DistributedDataParallel's destroys the process group and holds Python's lock meanwhile, for
    which Gloo's thread may be waiting to free what is left of a collective.
    """
    os._exit(0)
