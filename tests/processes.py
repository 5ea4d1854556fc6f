"""Processes of tests."""

import os
from typing import NoReturn


def leave() -> NoReturn:
    """End a process that ``mp.spawn`` has started, once its results are in a file.

    Without destructors: one of DistributedDataParallel's destroys the process group and holds Python's lock meanwhile, for
    which Gloo's thread may be waiting to free what is left of a collective.
    """
    os._exit(0)
