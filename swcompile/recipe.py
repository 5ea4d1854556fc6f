"""Which matmul runs in which format, where, and the named recipes. Data only: the passes read it."""

import dataclasses
import difflib
import enum
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Stabilizer(enum.Enum):
    """What `swcompile.prepare` inserts."""

    LAYER_SCALE = "layer_scale"
    """A factor a feature, at the end of a residual branch."""
    QK_LAYERNORM = "qk_layernorm"
    """A norm of attention's queries and one of its keys."""


class Role(enum.Enum):
    """What a matmul is for. The three GEMMs of a linear layer, and everything else."""

    OUTPUT = "output"
    GRAD_INPUT = "grad_input"
    GRAD_WEIGHT = "grad_weight"
    OTHER = "other"


class Scaling(enum.Enum):
    """How many scales an operand gets. The operand is seen as [outer, contracted]."""

    VECTOR = "vector"
    """One scale for each outer index: a row of activations, an output channel of a weight."""
    TENSOR = "tensor"
    """One scale for the whole operand."""
    BLOCK = "block"
    """One scale for each outer index and block of 1024 contracted ones: for each channel and block of tokens of an
    activation in ``grad_weight``."""
    TOKEN = "token"
    """One scale for each contracted index: for each token of a gradient in ``grad_weight``, as ``grad_input`` has it. As no
    sum is over one token, the other operand is multiplied by these scales before it gets its own, by block."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GemmFormat:
    """How one matmul runs in 8 bit."""

    weight: Scaling
    """Scaling of the operand that is the weight (in ``grad_weight``: of the activation)."""
    other: Scaling = Scaling.VECTOR
    """Scaling of the other operand: the activation in ``output``, the output gradient in the other two.
    `Scaling.VECTOR`, as `scaled_mm` takes a scale for each row of one operand at least; or `Scaling.TOKEN` in
    ``grad_weight``, with `Scaling.BLOCK` for the activation."""

    def __post_init__(self) -> None:
        for field in ("weight", "other"):
            _check(f"GemmFormat: {field}", getattr(self, field), Scaling, "one of Scaling.VECTOR, TENSOR, BLOCK and TOKEN")
        if self.is_by_block != (self.weight is Scaling.BLOCK) or self.weight is Scaling.TOKEN or self.other is Scaling.BLOCK:
            raise ValueError(
                f"GemmFormat: weight is {self.weight} and other {self.other}, but the scales of tokens and of blocks of them go "
                "together: give weight=Scaling.BLOCK and other=Scaling.TOKEN"
            )
        if self.other is Scaling.TENSOR:
            raise ValueError(
                f"GemmFormat: other is {self.other}, but must be Scaling.VECTOR, as scaled_mm takes a scale for each "
                "row of an activation or gradient; give the weight one scale with weight=Scaling.TENSOR"
            )

    @property
    def is_by_block(self) -> bool:
        """Whether scales are for blocks of what is summed."""
        return self.other is Scaling.TOKEN


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to rewrite. Frozen; change it with `dataclasses.replace`."""

    name: str
    """The name under which reports show it."""
    output: GemmFormat | None = None
    """Format of ``x @ w.T``; None leaves it in the model's own dtype."""
    grad_input: GemmFormat | None = None
    """Format of ``grad @ w``; None leaves it."""
    grad_weight: GemmFormat | None = None
    """Format of ``grad.T @ x``; None leaves it, which is SwitchBack's point: it sums over all tokens."""
    save_int8_activations: bool = False
    """Keep the int8 activation from forward to backward; ``grad_weight`` reads it dequantised, or quantises from it."""
    include: tuple[str, ...] | None = None
    """Globs on parameter names. None means every linear layer but the last before the model's output, which the
    paper leaves in 16 bit; a pattern that matches the last one asks for it."""
    exclude: tuple[str, ...] = ()
    """Globs on parameter names to leave alone. Wins over `include`."""
    strict: bool = False
    """Raise when a matmul that was asked for is not rewritten, or when a pattern matches no parameter."""
    skip_slower: bool = True
    """Leave a matmul alone where int8 with its quantisation is slower than the original on this device, or hardly faster."""
    fuse: bool | None = None
    """Quantise a value in the kernel that computes it, and compute tables of sines and cosines once. None: on a GPU; on a CPU Inductor's own loops are faster."""
    micro_batches: int = 1
    """Forward and backward passes from one step of the optimizer to the next, within `swcompile.gradient_accumulation`:
    a weight is quantised once for all of them."""

    def __post_init__(self) -> None:
        _check("Recipe: name", self.name, str, "a string")
        for role in ("output", "grad_input", "grad_weight"):
            _check(f"Recipe: {role}", getattr(self, role), (GemmFormat, type(None)), "a GemmFormat or None")
        for role in ("output", "grad_input"):
            gemm = getattr(self, role)
            if gemm is not None and gemm.is_by_block:
                raise ValueError(f"Recipe: {role} has scales by block, but only grad_weight can have them")
        for flag in ("save_int8_activations", "strict", "skip_slower"):
            _check(f"Recipe: {flag}", getattr(self, flag), bool, "True or False")
        _check("Recipe: fuse", self.fuse, (bool, type(None)), "True, False or None")
        if type(self.micro_batches) is not int or self.micro_batches < 1:
            raise ValueError(f"Recipe: micro_batches is {self.micro_batches!r}, but must be an integer of 1 or more")
        for field, value in (("include", self.include), ("exclude", self.exclude)):
            if value is None and field == "include":
                continue
            if not isinstance(value, tuple) or not all(isinstance(pattern, str) for pattern in value):
                example = (value,) if isinstance(value, str) else ("blocks.*", "head.weight")
                raise ValueError(f"Recipe: {field} is {value!r}, but must be a tuple of globs, such as {example!r}")

    @property
    def scales_by_block(self) -> bool:
        """Whether it rewrites a matmul with scales for blocks of what is summed."""
        return self.grad_weight is not None and self.grad_weight.is_by_block

    def format_of(self, role: Role) -> GemmFormat | None:
        """The format for matmuls of that role, or None to leave them."""
        return None if role is Role.OTHER else getattr(self, role.value)

    def included_by(self, parameter: str) -> bool:
        """Whether an `include` pattern names this parameter."""
        return any(fnmatch.fnmatchcase(parameter, pattern) for pattern in self.include or ())

    def excluded_by(self, parameter: str) -> str | None:
        """The first `exclude` pattern that names this parameter."""
        return next((p for p in self.exclude if fnmatch.fnmatchcase(parameter, p)), None)

    def unmatched_patterns(self, parameters: Iterable[str]) -> dict[str, str]:
        """Patterns of `include` and `exclude` that match none of these names, each with the closest name."""
        return unmatched((*(self.include or ()), *self.exclude), parameters)


def fused_devices(recipe: Recipe) -> tuple[str, ...]:
    """The types of devices on which `fuse` holds."""
    if recipe.fuse is None:
        return ("cuda",)
    return ("cpu", "cuda") if recipe.fuse else ()


def _check(what: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kinds):
        raise ValueError(f"{what} is {value!r}, but must be {wanted}")  # noqa: TRY004 (as for any wrong option)


def switchback() -> Recipe:
    """SwitchBack (arXiv 2304.13013, Algorithm 1): activations and gradients row-wise, weights tensor-wise."""
    gemm = GemmFormat(weight=Scaling.TENSOR)
    return Recipe(name="switchback", output=gemm, grad_input=gemm)


def switchback_m() -> Recipe:
    """SwitchBackM, the memory-efficient variant: activations are kept for the backward in int8."""
    return dataclasses.replace(switchback(), name="switchback_m", save_int8_activations=True)


def switchback_q() -> Recipe:
    """SwitchBackQ: weights row-wise in the forward and column-wise in the backward."""
    gemm = GemmFormat(weight=Scaling.VECTOR)
    return Recipe(name="switchback_q", output=gemm, grad_input=gemm)


def llm_int8() -> Recipe:
    """LLM.int8() without outliers, the paper's baseline: all three matmuls int8 with vector-wise scales."""
    gemm = GemmFormat(weight=Scaling.VECTOR)
    return Recipe(name="llm_int8", output=gemm, grad_input=gemm, grad_weight=gemm)


def switchback_full() -> Recipe:
    """SwitchBack with the weight's gradient in int8, too.

    The paper keeps this matmul in 16 bit, as int8 with a scale a tensor can lose most of a gradient. Here the gradient
    of the output is the one that ``grad_input`` reads, in int8 with a scale a token, and the activation takes these scales over
    and gets one for each channel and block of 1024 tokens. So it loses 2 to 3 % of a layer's, and 22 % where one scale a tensor
    loses 65 %, over up to 2,176 tokens (`benchmarks/grad_weight_error.py`).
    """
    grad_weight = GemmFormat(weight=Scaling.BLOCK, other=Scaling.TOKEN)
    return dataclasses.replace(switchback(), name="switchback_full", grad_weight=grad_weight)


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (switchback, switchback_m, switchback_q, switchback_full, llm_int8)
}

_RECIPE_OPTIONS = ("include", "exclude", "strict", "skip_slower", "fuse", "micro_batches")
OPTIONS = ("recipe", *_RECIPE_OPTIONS)
"""The options that `make_recipe` takes."""


def make_recipe(options: Mapping[str, Any]) -> Recipe:
    """Build a recipe from the options of ``torch.compile(..., options=...)``.

    Args:
        options: ``recipe`` (a name in `RECIPES` or a `Recipe`; default ``"switchback"``), ``include`` and
            ``exclude`` (a glob on parameter names, or several), ``strict``, ``skip_slower``, ``fuse``, ``micro_batches``.

    Raises:
        ValueError: an unknown option or recipe, naming the closest legal one; a value of the wrong type.
    """
    check_options(options, OPTIONS)
    recipe = options.get("recipe", "switchback")
    if not isinstance(recipe, Recipe):
        if not isinstance(recipe, str) or recipe not in RECIPES:
            raise ValueError(
                f"unknown recipe {recipe!r}; did you mean {closest(str(recipe), RECIPES)!r}? "
                f"Known: {', '.join(RECIPES)}"
            )
        recipe = RECIPES[recipe]()
    changes: dict[str, Any] = {}
    for option in ("include", "exclude"):
        if options.get(option) is not None:
            changes[option] = patterns(option, options[option])
    for option in ("strict", "skip_slower", "fuse"):
        if option in options and not (option == "fuse" and options[option] is None):
            if not isinstance(options[option], bool):
                raise ValueError(f"option {option!r} is {options[option]!r}; it takes True or False")
            changes[option] = options[option]
    if "micro_batches" in options:
        changes["micro_batches"] = options["micro_batches"]
    return dataclasses.replace(recipe, **changes)


def check_options(options: Iterable[Any], known: Iterable[str]) -> None:
    """Raise `ValueError` for an option that is not known, with what to write instead."""
    known = tuple(known)
    for option in options:
        if option in _OF_PREPARE:
            raise ValueError(
                f"option {option!r} adds parameters to the model, which must exist before the optimizer is built: call "
                f"swcompile.prepare(model, *inputs, {option}=True) first, and compile the model without the option"
            )
        if option not in known:
            raise ValueError(f"unknown option {option!r}; did you mean {closest(str(option), known)!r}?")


_OF_PREPARE = ("layer_scale", "qk_layernorm")


def closest(word: str, known: Iterable[str]) -> str:
    """The legal word that is nearest to a wrong one."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def unmatched(globs: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """The globs that match none of these names, each with the closest name (empty where there is no name)."""
    known = list(names)
    found = {}
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in known):
            found[glob] = closest(glob, known) if known else ""
    return found


def patterns(option: str, value: Any) -> tuple[str, ...]:
    """The value of an option that takes a glob or several."""
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"option {option!r} is {value!r}; it takes a glob or a list of globs")
    return tuple(globs)
