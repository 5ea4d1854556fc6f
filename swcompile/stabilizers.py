"""The layers that stabilise low-precision training, and the options by which users ask for them."""

import dataclasses
import enum
import fnmatch
import math
from typing import Any

import torch
from torch import nn

from swcompile.recipe import closest, patterns


class Over(enum.Enum):
    """What a qk-layernorm takes mean and variance over."""

    HEAD = "head"
    """The channels of one head; one scale for all heads, no bias (arXiv 2309.14322, Section 3.1.1)."""
    MODEL = "model"
    """All heads together, with scale and bias (arXiv 2304.13013, Section 2.3)."""


class Norm(enum.Enum):
    """How queries and keys are normalised."""

    LAYER = "layer"
    RMS = "rms"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerScaleOptions:
    """Which residual branches get a layer-scale (arXiv 2103.17239), and how it starts."""

    init: float = 0.0
    """Start of every gamma; 0 makes each pre-norm block the identity (arXiv 2304.13013, Section 2.3)."""
    include: tuple[str, ...] | None = None
    """Globs on the name of the module that ends the branch; None includes all."""
    exclude: tuple[str, ...] = ()
    """Globs that take precedence over `include`."""

    def __post_init__(self) -> None:
        _check_patterns(self)
        if not _is_number(self.init) or not math.isfinite(self.init):
            raise ValueError(f"layer_scale: init is {self.init!r}; it takes a finite number")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QKLayernormOptions:
    """Which attentions get a norm on queries and keys, and which norm."""

    over: Over = Over.HEAD
    norm: Norm = Norm.LAYER
    eps: float = 1e-6
    """Added to the variance."""
    include: tuple[str, ...] | None = None
    """Globs on the name of the module that attends; None includes all."""
    exclude: tuple[str, ...] = ()
    """Globs that take precedence over `include`."""

    def __post_init__(self) -> None:
        _check_patterns(self)
        object.__setattr__(self, "over", _member("qk_layernorm: over", Over, self.over))
        object.__setattr__(self, "norm", _member("qk_layernorm: norm", Norm, self.norm))
        if not _is_number(self.eps) or not self.eps > 0:
            raise ValueError(f"qk_layernorm: eps is {self.eps!r}; it takes a number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_patterns(options: LayerScaleOptions | QKLayernormOptions) -> None:
    """Make tuples of what was given as globs; one glob may be a string."""
    for option in ("include", "exclude"):
        given = getattr(options, option)
        if given is not None or option == "exclude":
            object.__setattr__(options, option, patterns(option, () if given is None else given))


def read_options(name: str, kind: type, given: Any) -> Any:
    """Options from what a user passed: True (the default), False or None (none), a mapping, or the options.

    Raises:
        ValueError: an unknown option or value, naming the closest legal one.
    """
    if given is None or given is False:
        return None
    if given is True:
        return kind()
    if isinstance(given, kind):
        return given
    fields = {field.name: field for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    try:
        items = dict(given).items()
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {given!r}; it takes True, or a dict of its options") from None
    for option, value in items:
        if option not in fields:
            raise ValueError(f"{name}: unknown option {option!r}; did you mean {closest(str(option), fields)!r}?")
        options[option] = value
    return kind(**options)


def left_out(options: LayerScaleOptions | QKLayernormOptions, module: str) -> str | None:
    """Why the patterns leave the site of a module out, or None where they do not."""
    for pattern in options.exclude:
        if fnmatch.fnmatchcase(module, pattern):
            return f"exclude pattern {pattern!r} matches"
    if options.include is not None and not any(fnmatch.fnmatchcase(module, p) for p in options.include):
        return "no include pattern matches"
    return None


def _member(name: str, kind: type[enum.Enum], value: Any) -> enum.Enum:
    known = [member.value for member in kind]
    if not isinstance(value, kind) and value not in known:
        raise ValueError(f"{name} is {value!r}; did you mean {closest(str(value), known)!r}?")
    return kind(value)


class LayerScale(nn.Module):
    """``y * gamma``: one factor a feature on the end of a residual branch (arXiv 2103.17239, Equation 4).

    The product is taken in float32 where gamma or `y` is, and has the dtype of `y`. `gamma` has one dimension, so
    the usual grouping leaves it without weight decay.

    Args:
        num_features: size of the last dimension of `y`.
        init: start of every gamma.
        device: of gamma.
        dtype: of gamma.
    """

    def __init__(
        self,
        num_features: int,
        *,
        init: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gamma as at the start; also what gives it values after ``to_empty``."""
        nn.init.constant_(self.gamma, self.init)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return (y * self.gamma).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, init={self.init}"


class QKNorm(nn.Module):
    """Layer norm or RMS norm of queries or keys.

    Args:
        num_heads: heads (of the keys, their own).
        num_channels: channels of a head.
        over: mean and variance over the channels of a head, or over all heads together.
        norm: layer norm or RMS norm.
        eps: added to the variance.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        num_channels: int,
        *,
        over: Over = Over.HEAD,
        norm: Norm = Norm.LAYER,
        eps: float = 1e-6,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.over, self.norm, self.eps = over, norm, eps
        self.num_features = num_channels if over is Over.HEAD else num_heads * num_channels
        self.weight = nn.Parameter(torch.empty(self.num_features, device=device, dtype=dtype))
        has_bias = over is Over.MODEL and norm is Norm.LAYER
        self.bias: nn.Parameter | None = None
        if has_bias:
            self.bias = nn.Parameter(torch.empty_like(self.weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1 and bias 0; also what gives them values after ``to_empty``."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension, which has the channels of one head or the features of all; keeps the dtype."""
        shape = (self.num_features,)
        if self.norm is Norm.RMS:
            normalised = nn.functional.rms_norm(x, shape, self.weight, self.eps)
        else:
            normalised = nn.functional.layer_norm(x, shape, self.weight, self.bias, self.eps)
        return normalised.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, over={self.over.value}, norm={self.norm.value}, eps={self.eps}"
