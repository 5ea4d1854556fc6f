"""Inductor as far as its partitioner: forwards and backwards that run node by node, and no code is generated."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from swcompile.joint import JointPass, parameter_names
from swcompile.pipeline import Pass


def run_partitioned(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    passes: Sequence[Pass],
    make_call: Callable[[fx.GraphModule], Callable[..., Any]] = lambda part: part.forward,
) -> Any:
    """Take a Dynamo graph through passes on its joint graph and through the partitioner.

    Args:
        gm: the graph.
        inputs: what it takes.
        passes: what to run on the joint graph.
        make_call: what calls the forward, then the backward.
    """

    def call_part(part: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        return make_boxed_func(make_call(part))

    hook = JointPass(passes, names=parameter_names(gm, inputs))
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=call_part, config_patches={"joint_custom_pre_pass": hook})
