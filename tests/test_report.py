"""The report: one line for each kind of matmul, plain data, and decisions found when they are asked for."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from swcompile import Decision, Report, Role


def decision(parameter: str | None = "fc.weight", role: Role = Role.OUTPUT, **changes: Any) -> Decision:
    values = {"node": "mm", "shape": (8, 64, 32), "dtype": "bfloat16", "rewritten": True, "reason": "int8"}
    values |= changes
    return Decision(parameter=parameter, role=role, number_format="int8" if values["rewritten"] else None, **values)


def rows(decisions: Sequence[Decision]) -> list[tuple[str, str]]:
    """(weight, count) of each line of the table."""
    lines = str(Report("switchback", decisions)).splitlines()[4:]
    return [(line.split()[0], line.split()[2]) for line in lines]


TABLE = """\
switchback: int8 in 3 of 4 output, 1 of 1 grad_input, 0 of 1 grad_weight, 1 other left alone

weight                matmul       count     M x N x K  runs in   speed-up  reason
--------------------  -----------  -----  ------------  --------  --------  -------
layer.{0-1}.a.weight  output           2   8 x 64 x 32  int8          1.25  int8
layer.2.a.weight      output           1  16 x 64 x 32  int8          1.25  int8
layer.0.a.weight      grad_input       1   8 x 32 x 64  int8                int8
layer.0.a.weight      grad_weight      1   64 x 32 x 8  bfloat16            sums
-                     other            1    8 x 8 x 16  float32             neither
head.weight           output           1   8 x 64 x 32  bfloat16      0.50  slower
pattern 'haed' matches no parameter; closest: 'head.weight'"""


def test_table() -> None:
    report = Report(
        "switchback",
        [
            decision("layer.0.a.weight", speedup=1.251),
            decision(None, Role.OTHER, rewritten=False, reason="neither", shape=(8, 8, 16), dtype="float32"),
            decision("layer.1.a.weight", speedup=1.249),
            decision("layer.2.a.weight", speedup=1.25, shape=(16, 64, 32)),
            decision("head.weight", rewritten=False, reason="slower", speedup=0.5),
            decision("layer.0.a.weight", Role.GRAD_INPUT, shape=(8, 32, 64)),
            decision("layer.0.a.weight", Role.GRAD_WEIGHT, shape=(64, 32, 8), rewritten=False, reason="sums"),
        ],
    )
    report.unmatched = {"haed": "head.weight"}
    assert str(report) == TABLE
    assert repr(report) == f"<Report {report.summary()}>"


@pytest.mark.parametrize(
    ("numbers", "folded"),
    [
        ([0], "0"),
        ([0, 1], "{0-1}"),
        ([0, 2], "{0,2}"),
        ([2, 0, 1], "{0-2}"),
        ([0, 1, 2, 5, 7, 8], "{0-2,5,7-8}"),
        ([8, 9, 10, 11], "{8-11}"),
    ],
)
def test_names_that_differ_in_a_number_are_folded(numbers: list[int], folded: str) -> None:
    decisions = [decision(f"layer.{number}.fc1.weight") for number in numbers]
    assert rows(decisions) == [(f"layer.{folded}.fc1.weight", str(len(numbers)))]


def test_names_with_several_numbers() -> None:
    names = ["stage.0.block.0.w", "stage.0.block.1.w", "stage.1.block.0.w", "stage.1.block.1.w"]
    assert rows([decision(name) for name in names]) == [("stage.{0-1}.block.{0-1}.w", "4")]
    names = ["a.1.w", "a.w", "a.b.w", "a.1.1.w"]
    assert rows([decision(name) for name in names]) == [(name, "1") for name in names]


def test_reasons_that_name_parameters_are_folded_by_their_numbers() -> None:
    reason = "computed from h.{}.a, h.{}.b"
    decisions = [decision(None, Role.OTHER, rewritten=False, reason=reason.format(i, i)) for i in range(12)]
    (line,) = str(Report("r", decisions)).splitlines()[4:]
    assert line.split()[:3] == ["-", "other", "12"] and line.endswith(reason.format("{0-11}", "{0-11}"))


@pytest.mark.parametrize(
    "change",
    [
        {"role": Role.GRAD_INPUT},
        {"shape": (8, 64, 33)},
        {"dtype": "float16"},
        {"rewritten": False},
        {"reason": "another"},
        {"speedup": 1.5},
        {"parameter": "layer.1.other"},
    ],
)
def test_matmuls_that_differ_otherwise_have_lines_of_their_own(change: dict[str, Any]) -> None:
    assert len(rows([decision("layer.0.w"), decision(**({"parameter": "layer.1.w"} | change))])) == 2


def test_lines_of_one_weight_stand_together() -> None:
    decisions = [decision("a"), decision("b"), decision("b", Role.GRAD_INPUT), decision("a", Role.GRAD_INPUT)]
    assert [name for name, _ in rows(decisions)] == ["a", "a", "b", "b"]


def test_as_dict_is_plain_data() -> None:
    other = decision(None, Role.OTHER, rewritten=False, violation=True)
    report = Report("switchback_q", [decision(speedup=1.5), other])
    assert json.loads(json.dumps(report.as_dict())) == {
        "recipe": "switchback_q",
        "summary": "switchback_q: int8 in 1 of 1 output, 1 other left alone",
        "matmuls": [
            {"node": "mm", "role": "output", "parameter": "fc.weight", "rewritten": True, "reason": "int8"}
            | {"shape": [8, 64, 32], "dtype": "bfloat16", "speedup": 1.5, "violation": False, "number_format": "int8"},
            {"node": "mm", "role": "other", "parameter": None, "rewritten": False, "reason": "int8"}
            | {"shape": [8, 64, 32], "dtype": "bfloat16", "speedup": None, "violation": True, "number_format": None},
        ],
    }


def test_counts() -> None:
    report = Report("r", [decision(), decision(rewritten=False), decision(role=Role.GRAD_INPUT)])
    assert report.num_rewritten() == 2
    counts = {role: report.num_rewritten(role) for role in Role}
    assert counts == {Role.OUTPUT: 1, Role.GRAD_INPUT: 1, Role.GRAD_WEIGHT: 0, Role.OTHER: 0}
    assert report.summary() == "r: int8 in 1 of 2 output, 1 of 1 grad_input"


def test_decisions_are_found_once_and_only_when_asked_for() -> None:
    calls = []

    def find() -> list[Decision]:
        calls.append("find")
        return [decision()]

    report = Report("switchback", find=find)
    assert calls == []
    assert report.num_rewritten() == 1 and str(report).count("fc.weight") == 1 and len(report.decisions) == 1
    assert calls == ["find"]


def test_decisions_that_a_pass_recorded_need_no_finding() -> None:
    report = Report("switchback", find=lambda: pytest.fail("the decisions are known"))
    report.record([decision("a")])
    report.record([decision("b")])
    assert [d.parameter for d in report.decisions] == ["a", "b"]


def test_recording_no_decision_is_knowing_that_there_is_none() -> None:
    report = Report("switchback", find=lambda: pytest.fail("there is no matmul"))
    report.record([])
    assert report.decisions == [] and str(report) == "switchback: no matmul in this graph"


def test_empty_report() -> None:
    report = Report("switchback", [])
    assert str(report) == report.summary() == "switchback: no matmul in this graph"
    assert report.as_dict() == {"recipe": "switchback", "summary": report.summary(), "matmuls": []}
    assert report.num_rewritten() == 0
