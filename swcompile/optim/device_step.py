"""An emitted step bound to the tensors of one device: state, addresses, and the compiled graph."""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._C._dynamo.guards import TensorGuards
from torch.distributed.tensor import DTensor, Replicate

from swcompile.kernels.stable_adamw import GRAD
from swcompile.kernels.tensor_table import is_dense, make_table
from swcompile.optim.replay import Replayed, can_replay
from swcompile.optim.step_graph import OPTIONS, Bucket, emit_step, lower_to_tables


class StaleError(Exception):
    """The tensors are no longer those that the step was emitted for."""


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
        return tensor.wait() if isinstance(tensor, torch.distributed._functional_collectives.AsyncCollectiveTensor) else tensor
    return tensor


def plan_steps(
    param_groups: Sequence[dict[str, Any]],
    state: dict[torch.Tensor, dict[str, Any]],
    names: Sequence[str],
    with_ratios: bool,
    master_weights: bool,
) -> list["DeviceStep"]:
    """One step a device, for all parameters that are trained. Missing state is made and registered in `state`.

    Raises:
        ValueError: a parameter is of a kind that is not supported, named.
    """
    members: dict[torch.device, dict[Any, list[_Member]]] = {}
    idle = []
    params = [(number, param) for number, group in enumerate(param_groups) for param in group["params"]]
    for position, ((group, param), name) in enumerate(zip(params, names, strict=True)):
        if param.grad is None and not param.requires_grad and not state.get(param):
            idle.append(param)
            continue
        member = _Member(param, name, position, group)
        member.add_state(state[param], master_weights)
        members.setdefault(member.local.device, {}).setdefault(member.key, []).append(member)
    steps = []
    for device, by_key in members.items():
        buckets: list[_BoundBucket] = []
        for key, alike in by_key.items():
            dtype = str(key[0]).removeprefix("torch.")
            number = sum(bound.bucket.param_dtype == key[0] for bound in buckets)
            buckets.append(_BoundBucket(f"{dtype}_{number + 1}" if number else dtype, alike, device))
        steps.append(DeviceStep(device, buckets, len(param_groups), with_ratios, idle))
    return steps


class _Member:
    """A parameter in a bucket."""

    def __init__(self, param: nn.Parameter, name: str, position: int, group: int):
        self.param, self.name, self.position, self.group = param, name, position, group
        self.local = local_tensor(param.detach())
        self.grad_dtype = param.dtype if param.grad is None else param.grad.dtype
        self.process_groups: tuple[str, ...] = ()
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"parameter {name} is {param.dtype}; StableAdamW takes float32 and bfloat16 parameters. "
                "Keep float32 ones, and run the model under torch.autocast"
            )
        if not is_dense(self.local):
            raise ValueError(f"parameter {name} has gaps between its elements (strides {self.local.stride()}); clone it")
        if isinstance(param, DTensor):
            self.process_groups = _process_groups(param, name)

    def add_state(self, state: dict[str, Any], master_weights: bool) -> None:
        """Make what is not there yet, and lay out what is there as the parameter."""
        param = self.param.detach()
        if not state:
            for name in ("step", "skipped"):
                state[name] = torch.zeros((), device=self.local.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=torch.float32)
            if master_weights and param.dtype == torch.bfloat16:
                state["remainder"] = torch.zeros_like(param, dtype=torch.int16)
        for name in ("exp_avg", "exp_avg_sq", "remainder"):
            value = state.get(name)
            if value is not None and value.shape == param.shape and value.stride() != param.stride():
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
        self.state = state

    @property
    def key(self) -> Any:
        """What tensors that share their launches have in common."""
        is_aligned = self.local.data_ptr() % 16 == 0
        return self.param.dtype, self.grad_dtype, "remainder" in self.state, self.process_groups, is_aligned


def _process_groups(param: DTensor, name: str) -> tuple[str, ...]:
    mesh, groups = param.device_mesh, []
    for dimension, placement in enumerate(param.placements):
        if placement.is_partial():
            raise ValueError(f"parameter {name} is a partial sum over mesh dimension {dimension}; redistribute it")
        if not isinstance(placement, Replicate):
            groups.append(mesh.get_group(dimension).group_name)
    return tuple(groups)


class _BoundBucket:
    """A bucket's tensors, and their gradients as they come."""

    def __init__(self, name: str, members: Sequence[_Member], device: torch.device):
        param_dtype, self.grad_dtype, has_remainders, process_groups, is_aligned = members[0].key
        self.bucket = Bucket(
            name=name,
            num_tensors=len(members),
            param_dtype=param_dtype,
            grad_dtype=self.grad_dtype,
            is_aligned=is_aligned,
            has_remainders=has_remainders,
            process_groups=process_groups,
        )
        self.positions = torch.tensor([member.position for member in members], device=device)
        self.names = [member.name for member in members]
        self.params = [member.param for member in members]
        self.locals = [member.local for member in members]
        states = [member.state for member in members]
        self.exp_avgs = [local_tensor(state["exp_avg"]) for state in states]
        self.exp_avg_sqs = [local_tensor(state["exp_avg_sq"]) for state in states]
        self.remainders = [local_tensor(state["remainder"]) for state in states] if has_remainders else []
        # One tensor of counts for all; the state has views of it.
        self.steps, self.skipped = (
            torch.stack([state[name] for state in states]).to(device) for name in ("step", "skipped")
        )
        for state, step, skipped in zip(states, self.steps.unbind(), self.skipped.unbind(), strict=True):
            state["step"], state["skipped"] = step, skipped
        self.groups = torch.tensor([member.group for member in members], device=device)
        self.sizes = torch.tensor([max(p.numel(), 1) for p in self.params], dtype=torch.float64, device=device)
        self.present = torch.ones(len(members), dtype=torch.bool, device=device)
        # One for each tensor, as the guards take none twice.
        self.nothing = [torch.empty(0, dtype=self.grad_dtype, device=device) for _ in members]
        columns = [self.locals, [], self.exp_avgs, self.exp_avg_sqs, self.remainders]
        self.table = make_table(self.locals, columns, device)
        self.grad_addresses = self.table.addresses[GRAD]
        self.shapes = [local.shape for local in self.locals]
        self.strides = [local.stride() for local in self.locals]
        self.param_addresses = [local.data_ptr() for local in self.locals]
        self.is_sharded = any(isinstance(param, DTensor) for param in self.params)
        self.gradients: list[torch.Tensor] = []
        self.gradient_addresses: list[int] = []
        self.guards: TensorGuards | None = None
        self.rms: torch.Tensor | None = None
        self.changes: torch.Tensor | None = None

    def take_gradients(self) -> None:
        """Find the gradients, each laid out as its parameter; an empty tensor where there is none.

        Raises:
            StaleError: a parameter lies elsewhere than before, or a gradient has another dtype.
            ValueError: a gradient is sparse.
        """
        # Hundreds of tensors in every step: guards check them several times as fast as Python does.
        gradients = [param.grad for param in self.params]
        found = [nothing if grad is None else grad for grad, nothing in zip(gradients, self.nothing, strict=True)]
        params: Sequence[torch.Tensor] = self.params
        if self.guards is None or not self.guards.check(*params, *found):
            params, found = self._checked(found)
        if [param.data_ptr() for param in params] != self.param_addresses:
            raise StaleError
        addresses = [grad.data_ptr() for grad in found]
        if addresses != self.gradient_addresses and any(address & 15 for address in addresses):
            found = [grad.clone() if grad.data_ptr() & 15 else grad for grad in found]
            addresses = [grad.data_ptr() for grad in found]
        self.gradients, self.gradient_addresses = found, addresses

    def _checked(self, found: list[torch.Tensor]) -> tuple[Sequence[torch.Tensor], list[torch.Tensor]]:
        """This process's parts of the parameters and of their gradients, each gradient laid out as its parameter.

        What needs nothing done to it, guards let pass the next time.
        """
        params: Sequence[torch.Tensor] = self.params
        if self.is_sharded:
            params = [param.to_local() if isinstance(param, DTensor) else param for param in params]
        shapes = [param.shape for param in params]
        if shapes != self.shapes or [p.stride() for p in params] != self.strides or {grad.dtype for grad in found} != {self.grad_dtype}:
            raise StaleError
        for grad, name in zip(found, self.names, strict=True):
            if grad.layout is not torch.strided:
                raise ValueError(f"the gradient of {name} is sparse; StableAdamW takes dense ones")
        fitting = [local_tensor(grad) for grad in found]
        for number, (grad, local) in enumerate(zip(fitting, self.locals, strict=True)):
            if grad is not self.nothing[number] and grad.stride() != local.stride():
                fitting[number] = torch.empty_like(local, dtype=grad.dtype).copy_(grad)
        is_usual = not self.is_sharded and all(map(operator.is_, fitting, found))
        self.guards = _guards([*self.params, *found]) if is_usual else None
        return params, fitting

    def inputs(self) -> dict[str, Any]:
        """The inputs of the emitted and of the lowered graph."""
        values = {
            "groups": self.groups,
            "sizes": self.sizes,
            "present": self.present,
            "steps": self.steps,
            "skipped": self.skipped,
            "params": self.locals,
            "grads": self.gradients,
            "exp_avgs": self.exp_avgs,
            "exp_avg_sqs": self.exp_avg_sqs,
            "remainders": self.remainders,
            **self.table._asdict(),
        }
        return {f"{self.bucket.name}_{name}": value for name, value in values.items()}

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Over the shards."""
        for group in self.bucket.process_groups:
            values = torch.ops._c10d_functional.all_reduce(values, "sum", group)
            values = torch.ops._c10d_functional.wait_tensor(values)
        return values


def _guards(tensors: Sequence[torch.Tensor]) -> TensorGuards:
    """Dynamo's check that other tensors are of the same type, dtype, device, shape and strides as these."""
    shapes: Any = [list(tensor.shape) for tensor in tensors]  # its stub knows symbolic ones only
    strides: Any = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)


class _Uploads:
    """Copies numbers to the device when they have changed, without waiting for it."""

    NUM_SPARE = 4

    def __init__(self) -> None:
        self.latest: dict[int, list[Any]] = {}
        self.spare: dict[int, list[torch.Tensor]] = {}
        self.captured: list[torch.Tensor] = []
        """Host memory that CUDA graphs copy from when they are replayed."""

    def __call__(self, target: torch.Tensor, values: list[Any]) -> None:
        """Make `target` hold `values`."""
        key = id(target)
        if self.latest.get(key) == values:
            return
        self.latest[key] = values
        host = torch.tensor(values, dtype=target.dtype)
        if target.is_cuda:
            if torch.cuda.is_current_stream_capturing():  # nothing can be allocated
                host = self.spare[key].pop().copy_(host)
                self.captured.append(host)
            else:
                host = host.pin_memory()
                if key not in self.spare:
                    self.spare[key] = [torch.empty_like(host, pin_memory=True) for _ in range(self.NUM_SPARE)]
        target.copy_(host, non_blocking=True)


class DeviceStep:
    """The step of all parameters on one device.

    Args:
        device: the device.
        buckets: the tensors.
        num_groups: parameter groups.
        with_ratios: see `emit_step`.
        idle: parameters that are not trained, but might be one day.
    """

    def __init__(
        self,
        device: torch.device,
        buckets: Sequence[_BoundBucket],
        num_groups: int,
        with_ratios: bool,
        idle: Sequence[nn.Parameter],
    ):
        self.device, self.buckets, self.idle = device, buckets, idle
        self.graph = emit_step([bound.bucket for bound in buckets], num_groups=num_groups, with_ratios=with_ratios)
        self.lowered_graph = lower_to_tables(self.graph)
        self.is_lowered = runs_on_tables(device)
        self.options = torch.empty(num_groups, len(OPTIONS), dtype=torch.float64, device=device)
        self.scaling = {name: torch.empty(1, device=device) for name in ("grad_scale", "found_inf")}
        self.upload = _Uploads()
        self.launch = self._launch() if self.is_lowered else None
        self.emitted: Any = None if self.is_lowered else fx.GraphModule(nn.Module(), self.graph)

    def _launch(self) -> Callable[[], Any]:
        """The lowered graph, compiled, of inputs none of which ever moves."""
        function = torch.compile(fx.GraphModule(nn.Module(), self.lowered_graph), fullgraph=True, dynamic=False)
        inputs = self._inputs(self.lowered_graph)
        is_alone = not any(bound.bucket.process_groups for bound in self.buckets)
        if self.device.type == "cuda" and is_alone and can_replay():
            return Replayed(function, inputs)
        return partial(function, *inputs)

    def _inputs(self, graph: fx.Graph) -> list[Any]:
        values = {"options": self.options, **self.scaling}
        for bound in self.buckets:
            values |= bound.inputs()
        return [values[node.name] for node in graph.find_nodes(op="placeholder")]

    def take_gradients(self) -> None:
        """Find the gradients; changes nothing else.

        Raises:
            StaleError: the tensors are no longer those that the step was emitted for.
            ValueError: a gradient is sparse.
        """
        if any(param.grad is not None for param in self.idle):
            raise StaleError
        with torch._C.DisableTorchFunctionSubclass():  # looked up in every access to a parameter otherwise
            for bound in self.buckets:
                bound.take_gradients()

    def run(self, options: list[list[Any]], grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        """Update the parameters by the gradients taken.

        Args:
            options: a row of `step_graph.OPTIONS` a parameter group; numbers, or tensors of one element.
            grad_scale: what gradients are to be divided by.
            found_inf: not 0 if the step is to be skipped.
        """
        for bound in self.buckets:
            self.upload(bound.present, [grad is not nothing for grad, nothing in zip(bound.gradients, bound.nothing, strict=True)])
            if self.is_lowered:
                self.upload(bound.grad_addresses, bound.gradient_addresses)
        self._set_options(options)
        for name, given, default in (("grad_scale", grad_scale, 1.0), ("found_inf", found_inf, 0.0)):
            if given is None:
                self.upload(self.scaling[name], [default])
            else:
                self.scaling[name].copy_(given.reshape(1), non_blocking=True)
                self.upload.latest.pop(id(self.scaling[name]), None)
        outputs = self.launch() if self.launch else self.emitted(*self._inputs(self.graph))
        if self.is_lowered:  # autograd sees no write through an address; whoever saved a parameter is to be told
            torch.autograd.graph.increment_version([local for bound in self.buckets for local in bound.locals])
        for bound, (rms, changes) in zip(self.buckets, outputs, strict=True):
            bound.rms, bound.changes = rms, changes
            bound.gradients = []  # nobody else may need them any more

    def _set_options(self, options: list[list[Any]]) -> None:
        numbers = [[self._number(value) for value in row] for row in options]
        self.upload(self.options, numbers)
        for row, values in enumerate(options):
            for column, value in enumerate(values):
                if isinstance(value, torch.Tensor) and value.device == self.device != torch.device("cpu"):
                    self.options[row, column].copy_(value.reshape(()))

    def _number(self, value: Any) -> float:
        """A number that the host knows; 0 for one that is read on the device."""
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return 0.0
        return float(value)

    def last_rms(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """(positions, RMS) of each bucket after a step."""
        for bound in self.buckets:
            if bound.rms is not None:
                yield bound.positions, bound.rms.where(bound.present, torch.nan)

    def last_update_norms(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """(positions, norms) of each bucket after a step."""
        for bound in self.buckets:
            if bound.changes is not None:
                yield bound.positions, bound.summed(bound.changes).sqrt()

    def skipped(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """(positions, counts) of each bucket."""
        for bound in self.buckets:
            yield bound.positions, bound.skipped


def runs_on_tables(device: torch.device) -> bool:
    """Whether the step of a device is lowered to tables of addresses, and compiled."""
    return device.type == "cuda"
