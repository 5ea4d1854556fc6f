"""Running passes: illegal graphs are caught, notes merged, cache keys differ as passes do; graphs as text."""

import contextlib
import operator
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import fx, nn
from torch._functorch.aot_autograd import (
    aot_compile_joint_with_descriptors,
    aot_export_joint_with_descriptors,
)
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import swcompile
from swcompile import Decision, Role, format_graph, joint_passes, make_recipe, pipeline, run_passes
from swcompile.graph import name_parameters
from swcompile.joint import JointPass
from swcompile.kernels import library
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.pipeline import PassResult, emit, verify

aten = torch.ops.aten
ALL: dict[str, Any] = {"include": ["*"], "skip_slower": False}
TOKENS, IN, OUT = 8, 32, 64


def x_of() -> torch.Tensor:
    return torch.randn(TOKENS, IN, requires_grad=True)


def linear_graph() -> fx.Graph:
    return swcompile.capture(nn.Linear(IN, OUT), x_of()).graph


def decision(node: str, reason: str) -> Decision:
    values: dict[str, Any] = {"role": Role.OUTPUT, "parameter": "w", "shape": (1, 2, 3), "dtype": "float32"}
    return Decision(node=node, rewritten=True, reason=reason, **values)


def behind(insert: Callable[[fx.Graph, fx.Node], fx.Node]) -> Callable[[fx.Graph], PassResult]:
    """A pass that puts a node behind the forward matmul."""

    def rewrite(graph: fx.Graph) -> PassResult:
        (matmul,) = graph.find_nodes(op="call_function", target=aten.addmm.default)
        users = list(matmul.users)
        with graph.inserting_after(matmul):
            new = insert(graph, matmul)
        for user in users:
            user.replace_input_with(matmul, new)
        return PassResult(rewrites=1)

    return rewrite


def legal(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return emit(graph, aten.relu.default, node, like=node)


def without_value(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.relu.default, (node,))


def with_value(**changes: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def insert(graph: fx.Graph, node: fx.Node) -> fx.Node:
        new = legal(graph, node)
        value = node.meta["val"]
        with value.fake_mode:
            new.meta["val"] = torch.empty(**({"size": value.shape, "dtype": value.dtype} | changes))
        return new

    return insert


def without_scale(graph: fx.Graph, node: fx.Node) -> fx.Node:
    pair = emit(graph, QUANTIZE_ROWWISE, node, like=node)
    with graph.inserting_after(pair):
        q, scale = (emit(graph, operator.getitem, pair, i, like=node) for i in (0, 1))
    q.meta["quantized_with"] = scale
    with graph.inserting_after(q):
        return emit(graph, aten.to.dtype, q, torch.float32, like=node)


def before_its_input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = legal(graph, node)
    node.prepend(new)
    return new


@pytest.mark.parametrize(
    ("insert", "error", "message"),
    [
        (without_value, AssertionError, r"relu\.default.* has no meta\['val'\]"),
        (with_value(dtype=torch.bfloat16), AssertionError, "relu.* has meta .*bfloat16.*, but its op gives"),
        (with_value(size=(8, 1)), AssertionError, r"relu.* has meta .*size=\(8, 1\).*, but its op gives"),
        (with_value(device="meta"), AssertionError, "relu.* has meta .*device='meta'.*, but its op gives"),
        (without_scale, AssertionError, r"to\.dtype.* reads getitem\S* without its scale getitem"),
        (before_its_input, RuntimeError, "used before it has been defined"),
    ],
)
def test_an_illegal_graph_is_caught(insert: Any, error: type[Exception], message: str) -> None:
    run_passes(linear_graph(), [behind(legal)])
    with pytest.raises(error, match=message):
        run_passes(linear_graph(), [behind(insert)])


def test_dead_code_goes_and_notes_are_added_to_the_reasons_of_earlier_passes() -> None:
    graph = linear_graph()
    before = format_graph(graph)

    def decide(graph: fx.Graph) -> PassResult:
        return PassResult(decisions=[decision("mm", "first"), decision("mm_1", "second")])

    def add_dead_code(graph: fx.Graph) -> PassResult:
        with graph.inserting_before(graph.output_node()):
            legal(graph, next(iter(graph.nodes)))
        return PassResult(rewrites=1, notes={"mm_1": "noted"}, decisions=[decision("mm_2", "third")])

    def note(graph: fx.Graph) -> PassResult:
        return PassResult(notes={"mm_1": "again", "mm_2": "too", "unknown": "nobody"})

    decisions = run_passes(graph, [decide, add_dead_code, note])
    reasons = {d.node: d.reason for d in decisions}
    assert reasons == {"mm": "first", "mm_1": "second; noted; again", "mm_2": "third; too"}
    assert format_graph(graph) == before


GRAPH = """\
%0: f32[4, 3] = input
%1: bf16[2, 3] = parameter weight
%2: i64[2] = input
%3: f16[4, 3] = prims.convert_element_type(%0, f16)
%4: (f16[2, 3], f16[2, 3]) = aten.split.Tensor(%3, 2)
%5: f16[2, 3] = getitem(%4, 0)
%6: f16[2, 3] = getitem(%4, 1)
%7: f64[4, 3] = aten.full([4, 3], 2, dtype=f64, layout=torch.strided, device=cpu, pin_memory=False)
%8: f16[2, 3] = prims.convert_element_type(%1, f16)
%9: f16[3, 2] = aten.permute(%8, [1, 0])
%10: f16[2, 2] = aten.mm(%5, %9)
%11: i64[2] = aten.clamp_min(%2, 1)
%12: complex64[4, 3] = prims.convert_element_type(%0, torch.complex64)
return %10, %6, %7, %11, %12"""


def test_graph_as_text() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor, i: torch.Tensor) -> Any:
            low, high = x.to(torch.float16).chunk(2)
            wide = torch.full_like(x, 2, dtype=torch.float64)
            return low @ self.weight.half().T, high, wide, i.clamp(min=1), x.to(torch.complex64)

    x, i = torch.randn(4, 3), torch.ones(2, dtype=torch.int64)
    with torch.no_grad():
        graph = swcompile.capture(Model(), x, i).graph
    assert format_graph(graph) == GRAPH


def test_graph_of_symbolic_sizes_as_text() -> None:
    x = x_of()
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        text = format_graph(swcompile.capture(nn.Linear(IN, OUT), x).graph)
    (name,) = [
        line.split()[1] for line in text.splitlines() if line.endswith("= input") and "f32" not in line
    ]
    assert f"f32[{name}, {IN}] = input" in text and f"f32[{name}, {OUT}] = aten.addmm(" in text


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's sources, which the fingerprint is then taken of."""
    package, kernels = Path(pipeline.__file__).parent, Path(library.__file__).parent
    shutil.copytree(package, tmp_path / "swcompile", ignore=shutil.ignore_patterns("kernels"))
    shutil.copytree(kernels, tmp_path / "kernels")
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "swcompile" / "pipeline.py"))
    monkeypatch.setattr(library, "__file__", str(tmp_path / "kernels" / "library.py"))
    return tmp_path


def fingerprint() -> str:
    return pipeline.source_fingerprint.__wrapped__()


SOURCES = ["swcompile/graph.py", "swcompile/passes/quantize_matmuls.py", "kernels/int8.py", "kernels/new.py"]


@pytest.mark.parametrize("file", SOURCES)
def test_the_fingerprint_follows_every_source(copied: Path, file: str) -> None:
    before = fingerprint()
    (copied / "swcompile" / "notes.txt").write_text("not a source")
    assert fingerprint() == before
    with (copied / file).open("a") as source:
        source.write("# an edit\n")
    edited = fingerprint()
    assert edited != before
    (copied / file).rename((copied / file).with_name("renamed.py"))
    assert fingerprint() not in (before, edited)


class Hook(CustomGraphPass):
    """A pass of the user's own, which keeps what it finds."""

    def __init__(self, identity: str | None = "mine"):
        self.identity = identity
        self.targets: list[set[Any]] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.targets.append({node.target for node in graph.nodes})

    def uuid(self) -> str | None:
        return self.identity


def adds_nothing(graph: fx.Graph, factor: Any = 1) -> PassResult:
    """A pass of the user's own."""
    return PassResult()


def made(value: int) -> Callable[[fx.Graph], PassResult]:
    """A pass whose closure decides what it does."""

    def rewrite(graph: fx.Graph) -> PassResult:
        return PassResult(rewrites=value)

    return rewrite


class Counter:
    """A pass that is an object, without a uuid."""

    def __call__(self, graph: fx.Graph) -> PassResult:
        return PassResult(decisions=[decision("mm", "counted")])


@pytest.mark.parametrize(
    "rewrite",
    [
        made(1),
        behind(legal),
        lambda graph: PassResult(),
        Counter(),
        Counter().__call__,
        Hook(None),
        partial(adds_nothing, factor=made(1)),
        partial(adds_nothing, factor=[Counter()]),
        partial(adds_nothing, factor=torch.ones(2)),
        partial(made(1)),
    ],
)
def test_a_pass_that_nobody_can_tell_from_another_is_never_cached(rewrite: Any) -> None:
    assert JointPass([rewrite], names={}).uuid() is None


def test_a_default_is_part_of_a_pass() -> None:
    def with_default(value: int) -> Callable[[fx.Graph], PassResult]:
        def rewrite(graph: fx.Graph, value: int = value) -> PassResult:
            return PassResult(rewrites=value)

        return rewrite

    keys = {JointPass([with_default(value)], names={}).uuid() for value in (1, 2, 1)}
    assert len(keys) == 2 and None not in keys


def test_an_object_runs_as_a_pass() -> None:
    for rewrite in (Counter(), partial(Counter())):
        assert [d.reason for d in run_passes(linear_graph(), [rewrite])] == ["counted"]


def test_uuid_tells_what_decides_apart() -> None:
    def uuid(hooked: Any = None, more: Any = (), is_whole: bool = True, **changes: Any) -> str | None:
        given = {key: changes.pop(key) for key in ("names", "identity", "before") if key in changes}
        passes = joint_passes(make_recipe(changes), is_whole=is_whole)
        with inductor_config.patch(joint_custom_pre_pass=hooked):
            return JointPass([*passes, *more], **({"names": {0: "weight"}} | given)).uuid()

    assert uuid() == uuid() and uuid(Hook()) == uuid(before=Hook())
    different: list[dict[str, Any]] = [
        {},
        *({"recipe": name} for name in swcompile.RECIPES if name != "switchback"),
        *({option: glob} for option in ("include", "exclude") for glob in ("*", "head")),
        *({"names": names} for names in ({0: "other"}, {1: "weight"}, {0: "weight", 1: "bias"})),
        {"skip_slower": False},
        {"hooked": Hook()},
        {"before": Hook("other")},
        {"before": [Hook(), Hook("other")]},
        {"more": [swcompile.save_int8_activations]},
        {"more": [adds_nothing]},
        {"more": [partial(adds_nothing, factor=2)]},
        {"more": [partial(adds_nothing, factor=legal)]},
        {"more": [partial(adds_nothing, factor=without_value)]},
        {"more": [partial(adds_nothing, factor={"a": [1, 2], "b": {Role.OUTPUT}})]},
        {"more": [Hook("pass")]},
        {"more": [Hook("another pass")]},
        {"is_whole": False},
        {"identity": "rates"},
    ]
    keys = [uuid(**case) for case in different]
    assert len(set(keys)) == len(keys) and None not in keys
    for without in (Hook(None), lambda graph: None, [Hook(), Hook(None)]):
        assert uuid(without) is None and uuid(before=without) is None


def test_a_users_own_pass_still_runs_and_before_ours() -> None:
    hook, model, x = Hook(), nn.Linear(IN, OUT), x_of()
    with inductor_config.patch(joint_custom_pre_pass=hook):
        torch.compile(model, backend="switchback", options=ALL)(x)
    (targets,) = hook.targets
    assert aten.addmm.default in targets and QUANTIZE_ROWWISE not in targets
    assert swcompile.reports()[-1].num_rewritten() == 2


def check(compiled: Callable[[torch.Tensor], torch.Tensor], expected: torch.Tensor, x: torch.Tensor) -> None:
    """Output and the input's gradient are the oracle's."""
    out = compiled(x)
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-5, atol=1e-5)


def test_passes_in_inductors_own_hook() -> None:
    class Int8(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            name_parameters(graph, {0: "weight", 1: "bias"})
            decisions.extend(run_passes(graph, joint_passes(make_recipe(ALL))))

        def uuid(self) -> None:
            pass

    torch.manual_seed(0)
    decisions: list[Decision] = []
    model, x = nn.Linear(IN, OUT), x_of()
    expected = oracle.linear(x, model.weight, model.bias)
    with inductor_config.patch(joint_custom_pre_pass=Int8()):
        check(torch.compile(model, fullgraph=True), expected, x)
    assert [d.rewritten for d in decisions] == [True, True, False]
    assert not torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_passes_on_an_exported_joint_graph_that_names_its_parameters_itself() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 10)), x_of()
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, model, (x,))
        decisions = run_passes(joint.graph_module.graph, joint_passes(make_recipe({"skip_slower": False})))
        joint.graph_module.recompile()
        compiled = aot_compile_joint_with_descriptors(joint)
    rewritten = {(d.parameter, d.role) for d in decisions if d.rewritten}
    assert rewritten == {("0.weight", Role.OUTPUT), ("0.weight", Role.GRAD_INPUT)}  # "2.weight" is the head
    expected = model[2](oracle.linear(x, model[0].weight, model[0].bias).tanh())
    check(lambda x: compiled(*model.parameters(), x), expected, x)
    assert not torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)


def test_the_scales_of_tokens_must_be_those_of_the_gradient() -> None:
    joint = swcompile.capture(nn.Linear(16, 32), torch.randn(8, 16))
    joint.run_passes(joint_passes(make_recipe({"recipe": "switchback_full", "include": "*", "skip_slower": False})))
    verify(joint.graph.nodes)
    (block,) = joint.graph.find_nodes(op="call_function", target=QUANTIZE_BLOCKWISE_TRANSPOSE)
    of_activation, _ = joint.graph.find_nodes(op="call_function", target=QUANTIZE_ROWWISE)
    (scale,) = (item for item in of_activation.users if item.args[1] == 1)
    block.args = block.args[0], scale
    with pytest.raises(AssertionError, match="transpose.* reads getitem.* without its scale"):
        verify(joint.graph.nodes)
