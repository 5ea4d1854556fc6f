"""What was rewritten, what was not, and why: one table that is read by people and one dict for programs."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from swcompile.recipe import Role, Stabilizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What happened to one matmul, or at one site for a stabiliser."""

    node: str
    """Name of the graph node before the rewrite."""
    role: Role | Stabilizer
    parameter: str | None
    """Qualified name of the weight, where the matmul has one; of the module, at a site."""
    shape: tuple[int, ...]
    """(M, N, K) as executed, symbolic sizes by their example values; at a site, of what is inserted."""
    dtype: str
    """dtype of the result."""
    rewritten: bool
    """The matmul runs in 8 bit; the stabiliser is inserted."""
    number_format: str | None = None
    """Name of the 8-bit format that a rewritten matmul runs in."""
    reason: str
    """Why it was rewritten or not, with the number that decided."""
    speedup: float | None = None
    """Time of the original over that in 8 bit with its quantisation, predicted, or measured where that is near 1; None where nobody asked."""
    violation: bool = False
    """It was asked for and is not rewritten: `strict` raises."""


class Report:
    """The decisions of one compiled graph, or of all graphs of a model.

    ``str(report)`` is a table with one line for each kind of matmul (layers that differ in a number alone are
    folded); `decisions` has every one; `as_dict` is plain data.
    """

    def __init__(
        self, recipe: str, decisions: Sequence[Decision] | None = None, *, find: Callable[[], list[Decision]] | None = None
    ):
        self.recipe = recipe
        self._decisions = None if decisions is None else list(decisions)
        self._find = find
        self.unmatched: dict[str, str] = {}
        """Patterns of the recipe that match no parameter -> the closest name."""

    @property
    def decisions(self) -> list[Decision]:
        """Every matmul, in graph order.

        A compilation that came from Inductor's cache ran no pass; the decisions are then found again from the graph.
        """
        if self._decisions is None:
            assert self._find is not None, "a report has decisions, or a way to find them"
            self._decisions = self._find()
            self._find = None
        return self._decisions

    @property
    def is_recorded(self) -> bool:
        """Whether passes have run, or the decisions of those that ran earlier have been found again."""
        return self._decisions is not None

    def record(self, decisions: Iterable[Decision]) -> None:
        """Add the decisions of one graph."""
        self._decisions = [*(self._decisions or ()), *decisions]

    def num_rewritten(self, role: Role | Stabilizer | None = None) -> int:
        """How many matmuls run in 8 bit, of one role or of all."""
        return sum(d.rewritten for d in self.decisions if role in (None, d.role))

    def summary(self) -> str:
        """One line: how many matmuls of each role run in int8."""
        if not self.decisions:
            return f"{self.recipe}: no matmul in this graph"
        counts = []
        has_matmuls = any(isinstance(d.role, Role) for d in self.decisions)
        for role in (Role.OUTPUT, Role.GRAD_INPUT, Role.GRAD_WEIGHT):
            of_role = [d for d in self.decisions if d.role is role]
            if of_role:
                counts.append(f"{self.num_rewritten(role)} of {len(of_role)} {role.value}")
        others = sum(d.role is Role.OTHER for d in self.decisions)
        if others:
            counts.append(f"{others} other left alone")
        for stabilizer in Stabilizer:
            of_kind = sum(d.role is stabilizer for d in self.decisions)
            if of_kind:
                counts.append(f"{stabilizer.value} in {self.num_rewritten(stabilizer)} of {of_kind}")
        return f"{self.recipe}: " + ("int8 in " if has_matmuls else "") + ", ".join(counts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the recipe's name and a list with one entry a matmul."""
        rows = [dataclasses.asdict(d) | {"role": d.role.value} for d in self.decisions]
        return {"recipe": self.recipe, "summary": self.summary(), "matmuls": rows}

    def __str__(self) -> str:
        if not self.decisions:
            return self.summary()
        has_matmuls = any(isinstance(d.role, Role) for d in self.decisions)
        header = ("weight", "matmul", "count", "M x N x K", "runs in", "speed-up", "reason")
        header = header if has_matmuls else ("module", "site", "count", "size", "", "", "reason")
        rows = [_row(group) for group in _folded(self.decisions)]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        align = [str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.rjust, str.ljust]
        lines = [
            "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)).rstrip()
            for row in (header, tuple("-" * width for width in widths), *rows)
        ]
        lines += [f"pattern {p!r} matches no parameter; closest: {name!r}" for p, name in self.unmatched.items()]
        return "\n".join([self.summary(), "", *lines])

    def __repr__(self) -> str:
        return f"<Report {self.summary()}>"


def _folded(decisions: Iterable[Decision]) -> list[list[Decision]]:
    """Decisions that differ in the numbers of their names alone together; the matmuls of one weight side by side."""
    groups = collections.defaultdict(list)
    for decision in decisions:
        name = re.sub(r"\d+", "#", decision.parameter or "")
        # Without a weight, the numbers in a reason are those of parameters' names.
        reason = decision.reason if decision.parameter else re.sub(r"\d+", "#", decision.reason)
        speedup = None if decision.speedup is None else round(decision.speedup, 2)
        key = (name, decision.role, decision.shape, decision.dtype, decision.rewritten, reason, speedup)
        groups[key].append(decision)
    order: dict[str, int] = {}
    for key in groups:
        order.setdefault(str(key[0]), len(order))
    return [groups[key] for key in sorted(groups, key=lambda key: order[str(key[0])])]


def _row(group: Sequence[Decision]) -> tuple[str, ...]:
    first = group[0]
    return (
        _folded_name([d.parameter or "-" for d in group]),
        first.role.value,
        str(len(group)),
        " x ".join(str(size) for size in first.shape),
        (first.number_format or first.dtype) if isinstance(first.role, Role) else "",
        "" if first.speedup is None else f"{first.speedup:.2f}",
        first.reason if first.parameter else _folded_name([d.reason for d in group]),
    )


def _folded_name(names: Sequence[str]) -> str:
    """``layer.{0-11}.fc.weight`` for names that differ in numbers alone."""
    parts = [re.split(r"(\d+)", name) for name in names]
    folded = []
    for column in zip(*parts, strict=True):
        if len(set(column)) == 1:
            folded.append(column[0])
        else:
            folded.append("{" + _ranges(sorted({int(number) for number in column})) + "}")
    return "".join(folded)


def _ranges(numbers: Sequence[int]) -> str:
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *_, last = [number for _, number in run] * 2
        runs.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(runs)
