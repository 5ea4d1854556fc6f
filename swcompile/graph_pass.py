"""Where Inductor calls passes: an object for its hooks, with an identity for its caches."""

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from swcompile.ahead import compile_ahead
from swcompile.pipeline import Pass, pass_identity, run_passes, source_fingerprint

try:
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass
except ImportError:  # torch 2.11 hands every pass the graph alone

    class CustomInferenceAwareGraphPass(CustomGraphPass):  # type: ignore[no-redef]
        """No pass is one."""


class GraphPass(CustomGraphPass):
    """Runs passes on each graph that Inductor hands to one of its hooks.

    Args:
        passes: what to run.
        hook: the name of Inductor's option that takes this object.
        identity: what decides on the result besides the passes and their options.
        before: what the user has hooked in at the same place, a pass or several; it runs first. Left out, it is what
            Inductor's config holds.
    """

    def __init__(self, passes: Sequence[Pass], *, hook: str, identity: str = "", before: Any = None):
        self.passes = list(passes)
        self.identity = identity
        before = getattr(inductor_config, hook) if before is None else before
        self.before = [p for p in (before if isinstance(before, (list, tuple)) else [before]) if p is not None]

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        for other in self.before:
            other(graph, *([is_inference] if isinstance(other, CustomInferenceAwareGraphPass) else []))
        self.run(graph)

    def run(self, graph: fx.Graph) -> None:
        """Run the passes on a graph, in place."""
        run_passes(graph, self.passes)

    def uuid(self) -> str | None:
        """What stands for this pass in Inductor's cache key; None (no caching) where a pass has no identity."""
        before = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.before]
        passes = [pass_identity(rewrite) for rewrite in self.passes]
        if None in before or None in passes:
            return None
        key = repr((source_fingerprint(), passes, self.identity, before))
        return hashlib.sha256(key.encode()).hexdigest()


class LateGraphPass(GraphPass, CustomInferenceAwareGraphPass):
    """A `GraphPass` for the hooks behind the partitioner, which tell whether a graph is for inference.

    Afterwards the graph is what will run, and the kernels of its ops start to be compiled.
    """

    def run(self, graph: fx.Graph) -> None:
        """Run the passes on a graph, in place."""
        super().run(graph)
        compile_ahead(graph)
