"""StableAdamW: AdamW with AdaFactor's update clipping (arXiv 2304.13013, Section 3), its step one compiled graph."""

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import fx
from torch.optim import Optimizer

from swcompile.optim.device_step import DeviceStep, StaleError, local_tensor, plan_steps
from swcompile.recipe import closest

_OWN_ATTRIBUTES = ("skip_nonfinite", "master_weights", "_with_ratios", "_step_supports_amp_scaling")
DECAY_BY = ("clipped_lr", "lr", "schedule")


class StableAdamW(Optimizer):
    """AdamW that clips each tensor's update where its second moment lags behind the gradient.

    Algorithm 2 of arXiv 2304.13013, for each tensor θ with gradient g, at its own step t::

        v ← β̂1 v + (1 - β̂1) g           β̂ = β (1 - β^(t-1)) / (1 - β^t), so no bias correction is needed
        u ← β̂2 u + (1 - β̂2) g²
        RMS = sqrt(mean(g² / max(u, eps²)))
        η = lr / max(1, RMS / clip_threshold)
        θ ← θ - η weight_decay θ - η v / (sqrt(u) + eps)

    A tensor whose gradient holds an Inf or NaN is left as it is, moments and step count included; the others are
    updated (Section 3.6). The step is emitted as a graph (`graph`), compiled where the parameters are on a GPU, and
    never waits for the device. Schedulers change numbers in a tensor, so nothing is ever compiled anew.

    bfloat16 parameters keep the lower halves of float32 master weights in the state, two bytes each, so that no update
    is too small to count: the training is bit for bit that of a float32 copy whose rounded values the model uses. Kahan
    summation costs the same memory and is exact to 16 bits only; stochastic rounding costs none, but adds noise.

    With DTensor parameters (FSDP2, tensor parallel) the RMS is that of the whole tensor: the shards' sums go through
    one all-reduce.

    Args:
        params: parameters, named parameters, or groups, as for any `torch.optim.Optimizer`. float32 or bfloat16.
        lr: learning rate; a float, or a tensor of one element that is read when the step runs on the device.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: as in `torch.optim.AdamW`, unless `decay_by` says otherwise.
        clip_threshold: RMS above which the update is scaled down; None never does: AdamW.
        decay_by: what weight decay is multiplied by: "clipped_lr" (η, Algorithm 2), "lr" (the learning rate before
            clipping, as the paper's training code), or "schedule" (``lr / max_lr``: independent weight decay, arXiv
            2309.14322, Section 3.2.2).
        max_lr: the learning rate at the schedule's peak, for ``decay_by="schedule"``; by default `lr`.
        beta2_warmup: λ of ``β̂2 = 1 - t^-λ``, AdaFactor's schedule, in the place of ``betas[1]``; None for none.
        loss_scale: what the loss was multiplied by: gradients are divided by it. A fixed 65536 keeps 16-bit gradients
            in range without ever being changed (Section 3.6).
        skip_nonfinite: leave tensors alone whose gradient is not finite. Without it and without clipping, gradients are
            read once instead of twice.
        maximize: go up instead of down.
        master_weights: keep the lower halves for bfloat16 parameters; without them updates round to nearest, and small
            ones are lost.

    Raises:
        ValueError: an option out of range; in `step`, a parameter or gradient of a kind that is not supported.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        clip_threshold: float | None = 1.0,
        *,
        decay_by: str = "clipped_lr",
        max_lr: float | None = None,
        beta2_warmup: float | None = None,
        loss_scale: float = 1.0,
        skip_nonfinite: bool = True,
        maximize: bool = False,
        master_weights: bool = True,
    ):
        self._steps: list[DeviceStep] | None = None
        self._with_ratios = True
        self._step_supports_amp_scaling = True  # GradScaler leaves scale and verdict to the step
        self.skip_nonfinite = skip_nonfinite
        self.master_weights = master_weights
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "decay_by": decay_by,
            "max_lr": max_lr,
            "beta2_warmup": beta2_warmup,
            "loss_scale": loss_scale,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; raises `ValueError` for an option out of range."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._steps = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; returns what `closure` returned, which is called with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        options = [_numbers(group) for group in self.param_groups]
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for step in self._with_gradients():
            step.run(options, *scaling)
        return loss

    def graph(self, *, lowered: bool = False) -> fx.Graph:
        """The step's graph: emitted for the parameters that are there now, or as it is lowered for a GPU.

        Raises:
            ValueError: the parameters are on several devices, each of which has a graph: see `graphs`.
        """
        graphs = self.graphs(lowered=lowered)
        if len(graphs) != 1:
            raise ValueError(f"one graph a device: see graphs(), for {', '.join(map(str, graphs))}")
        return next(iter(graphs.values()))

    def graphs(self, *, lowered: bool = False) -> dict[torch.device, fx.Graph]:
        """`graph` of each device that has parameters."""
        return {step.device: step.lowered_graph if lowered else step.graph for step in self._planned()}

    def parameter_names(self) -> list[str]:
        """Of all parameters in the order of the groups: what `last_rms` and the like are about.

        Names come from named parameters; without, a parameter is ``<group>.<position>``.
        """
        names: list[str] = []
        for number, group in enumerate(self.param_groups):
            names += group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        return names

    def last_rms(self) -> torch.Tensor:
        """RMS of ``g / sqrt(u)`` of each parameter in the last step: [parameters] float32, on the first one's device.

        Far above 1 where the second moment lags behind: what comes before a loss spike (arXiv 2304.13013, Section 3.3).
        NaN without gradient, and where neither clipping nor `skip_nonfinite` needs it.
        """
        return self._gathered(lambda step: step.last_rms())

    def last_update_norms(self) -> torch.Tensor:
        """L2 norm of what the last step took off each parameter: [parameters] float32, on the first one's device.

        0 where the parameter was skipped. With sharded parameters a collective: call it on every rank.
        """
        return self._gathered(lambda step: step.last_update_norms())

    def skipped_steps(self) -> torch.Tensor:
        """How often each parameter was skipped: [parameters] float32, on the first one's device."""
        return self._gathered(lambda step: step.skipped())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, with every part of the state in its own dtype."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                # torch casts it to the parameter's dtype
                self.state[param][name] = value.detach().clone().to(param.device)
        self._steps = None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        own = {name: self.__dict__[name] for name in _OWN_ATTRIBUTES}
        return state | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steps = None

    def _planned(self) -> list[DeviceStep]:
        """The step of each device, emitted anew after a change."""
        with_ratios = self.skip_nonfinite or any(g["clip_threshold"] is not None for g in self.param_groups)
        if self._steps is None or with_ratios != self._with_ratios:
            names = self.parameter_names()
            self._steps = plan_steps(self.param_groups, self.state, names, with_ratios, self.master_weights)
            self._with_ratios = with_ratios
        return self._steps

    def _with_gradients(self) -> list[DeviceStep]:
        """The step of each device, all gradients found, nothing updated yet."""
        steps = self._planned()
        try:
            for step in steps:
                step.take_gradients()
        except StaleError:
            self._steps = None
            for step in self._planned():
                step.take_gradients()
        return self._planned()

    def _gathered(self, values: Callable[[DeviceStep], Iterable[tuple[torch.Tensor, torch.Tensor]]]) -> torch.Tensor:
        params = [param for group in self.param_groups for param in group["params"]]
        gathered = torch.full((len(params),), torch.nan, device=local_tensor(params[0]).device)
        for step in self._planned():
            for positions, numbers in values(step):
                gathered[positions.to(gathered.device)] = numbers.to(gathered)
        return gathered


def _check_group(group: dict[str, Any]) -> None:
    """Raise `ValueError` for an option out of range; fill in the default of `max_lr`."""
    if group["max_lr"] is None and group["decay_by"] == "schedule":
        group["max_lr"] = float(group["lr"])
    ranges: dict[str, Callable[[Any], bool]] = {
        "lr": lambda x: x >= 0,
        "eps": lambda x: x > 0,
        "weight_decay": lambda x: x >= 0,
        "clip_threshold": lambda x: x is None or x > 0,
        "max_lr": lambda x: x is None or x > 0,
        "beta2_warmup": lambda x: x is None or x > 0,
        "loss_scale": lambda x: x > 0 and math.isfinite(x),
        "betas": lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x),
    }
    for name, is_legal in ranges.items():
        if not is_legal(group[name]):
            raise ValueError(f"{name} is {group[name]!r}; it takes {_LEGAL[name]}")
    if group["decay_by"] not in DECAY_BY:
        raise ValueError(f"decay_by is {group['decay_by']!r}; did you mean {closest(str(group['decay_by']), DECAY_BY)!r}?")


_LEGAL = {
    "lr": "a number of at least 0",
    "eps": "a number above 0",
    "weight_decay": "a number of at least 0",
    "clip_threshold": "a number above 0, or None",
    "max_lr": "a number above 0, or None",
    "beta2_warmup": "a number above 0, or None",
    "loss_scale": "a finite number above 0",
    "betas": "two numbers of at least 0 and below 1",
}


def _numbers(group: dict[str, Any]) -> list[Any]:
    """A group's row of `step_graph.OPTIONS`."""
    decay, by = group["weight_decay"], group["decay_by"]
    free = 0.0 if by == "clipped_lr" else decay if by == "lr" else decay / group["max_lr"]
    threshold = group["clip_threshold"]
    return [
        group["lr"],
        *group["betas"],
        group["eps"],
        decay if by == "clipped_lr" else 0.0,
        free,
        math.inf if threshold is None else threshold,
        group["beta2_warmup"] or 0.0,
        (-1.0 if group["maximize"] else 1.0) / group["loss_scale"],
    ]
