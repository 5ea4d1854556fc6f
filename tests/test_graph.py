"""Facts about graphs: roles, heads and parameters of small models, memory, and sizes that are symbolic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._functorch._aot_autograd import descriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

import swcompile
from swcompile import Role, joint_passes, make_recipe
from swcompile import graph as facts
from swcompile.joint import JointPass, parameter_names, trace_joint

TOKENS, WIDTH = 8, 32
OUTPUT, GRAD_INPUT, GRAD_WEIGHT, OTHER = Role.OUTPUT, Role.GRAD_INPUT, Role.GRAD_WEIGHT, Role.OTHER


class Model(nn.Module):
    """A function of its inputs, with square layers and parameters under given names."""

    def __init__(self, call: Callable[..., Any], layers: str = "", **parameters: tuple[int, ...]):
        super().__init__()
        self.call = call
        for name in layers.split():
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        for name, shape in parameters.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (TOKENS, WIDTH)), requires_grad=True)


def capture(call: Callable[..., Any], layers: str = "", *inputs: torch.Tensor, **parameters: Any) -> fx.Graph:
    return swcompile.capture(Model(call, layers, **parameters), *(inputs or (x_of(),))).graph


def roles(graph: fx.Graph) -> dict[str | None, list[Role]]:
    """Weight -> the roles of its matmuls, in the order of the graph."""
    found: dict[str | None, list[Role]] = {}
    for matmul in facts.matmuls(graph):
        found.setdefault(matmul.parameter, []).append(matmul.role)
    return found


def heads(graph: fx.Graph) -> list[str]:
    return sorted(facts.heads(graph, facts.matmuls(graph)))


def test_matmuls_of_two_layers() -> None:
    graph = capture(lambda m, x: m.b(m.a(x).tanh()), "a b")
    forward, wide, long = (TOKENS, WIDTH, WIDTH), (TOKENS, WIDTH, WIDTH), (WIDTH, WIDTH, TOKENS)
    assert [(m.role, m.parameter, m.shape, m.weight_on_left) for m in facts.matmuls(graph)] == [
        (OUTPUT, "a.weight", forward, False),
        (OUTPUT, "b.weight", forward, False),
        (GRAD_WEIGHT, "b.weight", long, False),
        (GRAD_INPUT, "b.weight", wide, False),
        (GRAD_WEIGHT, "a.weight", long, False),
        (GRAD_INPUT, "a.weight", wide, False),
    ]


def test_matmuls_of_a_weight_on_the_left() -> None:
    graph = capture(lambda m, x: (m.w @ x.T).tanh(), w=(40, WIDTH))
    found = {m.role: (m.shape, m.weight_on_left) for m in facts.matmuls(graph)}
    assert found == {
        OUTPUT: ((40, TOKENS, WIDTH), True),
        GRAD_INPUT: ((TOKENS, WIDTH, 40), False),  # autograd puts it right in the transpose of the gradient
        GRAD_WEIGHT: ((40, WIDTH, TOKENS), False),
    }


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + m.o((m.q(x) @ m.k(x).T).softmax(-1) @ m.v(x))


def queries(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (m.a(m.w) @ x.T).softmax(-1) @ m.b(x)


ONCE, TWICE = [OUTPUT, GRAD_INPUT, GRAD_WEIGHT], [OUTPUT] * 2 + [GRAD_INPUT] * 2 + [GRAD_WEIGHT] * 2
SQUARE = (WIDTH, WIDTH)
ROLES: dict[str, tuple[Any, str, dict[str, Any], dict[str | None, list[Role]]]] = {
    "attention": (attention, "q k v o", {}, {f"{n}.weight": ONCE for n in "qkvo"} | {None: [OTHER] * 6}),
    "shared": (lambda m, x: m.a(m.a(x).tanh()), "a", {}, {"a.weight": TWICE}),
    "tied": (lambda m, x: (x @ m.w).tanh() @ m.w.T, "", {"w": SQUARE}, {"w": TWICE}),
    "rows": (lambda m, x: linear(linear(x, m.w[:32]), m.w[32:]), "", {"w": (64, WIDTH)}, {"w": TWICE}),
    "columns": (lambda m, x: linear(linear(x, m.w[:, :32]), m.w[:, 32:]), "", {"w": (32, 64)}, {"w": TWICE}),
    "chunks": (lambda m, x: sum(linear(x, w) for w in m.w.chunk(2)), "", {"w": (64, WIDTH)}, {"w": TWICE}),
    "stacked": (lambda m, x: linear(linear(x, m.w[0]), m.w[1]), "", {"w": (2, *SQUARE)}, {"w": TWICE}),
    "cast": (lambda m, x: linear(x.half(), m.w.half().double().half()), "", {"w": SQUARE}, {"w": ONCE}),
    "scaled": (lambda m, x: x @ (0.5 * m.w), "", {"w": SQUARE}, {None: [OTHER] * 3}),
    "normalised": (lambda m, x: x @ (m.w / m.w.norm()), "", {"w": SQUARE}, {None: [OTHER] * 3}),
    "merged": (lambda m, x: x @ (m.w + m.v), "", {"w": SQUARE, "v": SQUARE}, {None: [OTHER] * 3}),
    # Learned queries are an activation: their gradient is `grad_input` of the layer that reads them.
    "queries": (queries, "a b", {"w": SQUARE}, {f"{n}.weight": ONCE for n in "ab"} | {None: [OTHER] * 6}),
}


@pytest.mark.parametrize("case", ROLES)
def test_roles(case: str) -> None:
    call, layers, parameters, expected = ROLES[case]
    found: dict[str | None, list[Role]] = {}
    for matmul in facts.matmuls(capture(call, layers, **parameters)):
        found.setdefault(matmul.parameter, []).append(matmul.role)
    order = list(Role)
    assert {name: sorted(of_name, key=order.index) for name, of_name in found.items()} == expected


def test_weight_norm_is_a_derived_weight() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    assert {m.role for m in facts.matmuls(swcompile.capture(model, x_of()).graph)} == {OTHER}


def residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + m.b(gelu(m.a(x)))


def loss(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = residual(m, x)
    return cross_entropy(m.c(h), torch.zeros(TOKENS, dtype=torch.int64)) + h.pow(2).mean()


HEADS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "one": (lambda m, x: m.b(m.a(x)), ["b"]),
    "two": (lambda m, x: (m.b(h := m.a(x).tanh()), m.c(h)), ["b", "c"]),
    "a second output on the way": (lambda m, x: (h := m.a(x), m.b(h)), ["b"]),
    "residual": (residual, []),
    "post-norm residual": (lambda m, x: layer_norm(residual(m, x), (WIDTH,)), []),
    "gated residual": (lambda m, x: x + m.a(x) * m.b(x).sigmoid(), []),
    "scaled residual": (lambda m, x: 0.5 * (x + m.b(m.a(x)).tanh() * 0.1), []),
    "residual that came in beside": (lambda m, x, y: y + m.a(x), []),
    "residual of a view": (lambda m, x: (x.view(2, -1, WIDTH) + m.a(x).view(2, -1, WIDTH)).flatten(0, 1), []),
    "residual and head": (lambda m, x: m.c(residual(m, x)), ["c"]),
    "loss": (loss, ["c"]),
    "low-rank branch beside the head": (lambda m, x: m.b(h := m.a(x)) + m.d(m.c(h)), ["b", "d"]),
    "shared by head and body": (lambda m, x: m.a(m.b(m.a(x))), ["a"]),
    "a bias that is added": (lambda m, x: m.a(x) + m.c.weight[0], ["a"]),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str) -> None:
    call, expected = HEADS[case]
    graph = capture(call, "a b c d", *[x_of() for _ in range(call.__code__.co_argcount - 1)])
    assert sorted(facts.heads(graph, facts.matmuls(graph))) == [f"{name}.weight" for name in expected]


def test_heads_of_inference() -> None:
    with torch.no_grad():
        graph = capture(lambda m, x: m.c(residual(m, x)), "a b c")
    assert facts.heads(graph, facts.matmuls(graph)) == {"c.weight"}


def test_parameters_known_by_descriptor() -> None:
    graph = capture(lambda m, x: m.a(x), "a")
    (weight, x) = graph.find_nodes(op="placeholder")[:2]
    assert facts.parameters(graph) == {weight: "a.weight"}
    del weight.meta["parameter"]
    assert facts.parameters(graph) == {} and {m.role for m in facts.matmuls(graph)} == {OTHER}
    x.meta["desc"] = descriptors.BufferAOTInput(target="buffer")
    weight.meta["desc"] = descriptors.ParamAOTInput(target="own.name")
    assert facts.parameters(graph) == {weight: "own.name"}
    facts.name_parameters(graph, {0: "other", 1: "another"})  # indices of plain inputs, which these are not
    assert facts.parameters(graph) == {weight: "own.name"}


def test_memory_is_the_same_for_the_same_elements_only() -> None:
    graph, mode = fx.Graph(), FakeTensorMode()

    def add(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args) if target else graph.placeholder("x")
        with mode:
            values = fx.node.map_arg(args, lambda argument: argument.meta["val"])
            node.meta["val"] = target(*values) if target else torch.empty(4, 4)
        return node

    aten = torch.ops.aten
    x = add(None)
    transposed = add(aten.t.default, x)
    same = [
        x,
        add(aten.permute.default, transposed, [1, 0]),
        add(aten.view.default, add(aten.view.default, x, [16]), [4, 4]),
        add(aten.squeeze.dim, add(aten.unsqueeze.default, x, 1), 1),
        add(aten.slice.Tensor, x, 0, 0, 4),
        add(aten.detach.default, x),
    ]
    assert {facts.memory_of(node) for node in same} == {facts.memory_of(x)}
    others = [
        add(None),
        transposed,
        add(aten.view.default, x, [2, 8]),
        add(aten.slice.Tensor, x, 0, 0, 2),
        add(aten.slice.Tensor, x, 0, 2, 4),
        add(aten.select.int, x, 0, 0),
        add(aten.select.int, x, 1, 0),
        add(aten.clone.default, x),
        add(aten.relu.default, x),
    ]
    assert len({facts.memory_of(node) for node in [x, *others]}) == 1 + len(others)


BATCHED: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "linear": lambda m, x: linear(x, m.w),
    "bmm": lambda m, x: torch.bmm(x, m.w.T.expand(x.shape[0], WIDTH, 48)),
    "weight on the left": lambda m, x: torch.bmm(m.w.expand(x.shape[0], 48, WIDTH), x.mT).mT,
    "einsum": lambda m, x: torch.einsum("oi,bti->bto", m.w, x),
}


def guards(model: nn.Module, x: torch.Tensor, recipe: str | None) -> list[str]:
    """The guards on symbolic sizes after tracing, with our passes or without."""
    found: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        (env,) = {value.node.shape_env for value in inputs if isinstance(value, torch.SymInt)}
        options = {"recipe": recipe, "include": "*", "skip_slower": False}
        passes = joint_passes(make_recipe(options)) if recipe else []
        trace_joint(gm, inputs, JointPass(passes, names=parameter_names(gm, inputs)))
        found.extend(str(guard.expr) for guard in env.guards)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=True)(x)
    return found


@pytest.mark.parametrize("spelling", BATCHED)
def test_passes_add_no_guard_on_symbolic_sizes(spelling: str) -> None:
    model, x = Model(BATCHED[spelling], w=(48, WIDTH)), x_of(4, 6, WIDTH)
    without = guards(model, x, None)
    for recipe in ("switchback_m", "llm_int8"):
        assert guards(model, x, recipe) == without


def test_symbolic_sizes_are_reported_by_the_example() -> None:
    x = x_of(4, 6, WIDTH)
    torch._dynamo.mark_dynamic(x, [0, 1])
    graph = capture(BATCHED["bmm"], "", x, w=(48, WIDTH))
    assert {type(size) for m in facts.matmuls(graph) for size in m.shape} == {int}
    assert [m.shape for m in facts.matmuls(graph) if m.role is OUTPUT] == [(24, 48, WIDTH)]


def test_hint_of_a_size_that_depends_on_data() -> None:
    assert facts.hint(7) == 7 and isinstance(facts.hint(ShapeEnv().create_unbacked_symint()), int)


def test_one_compilation_for_all_batch_sizes_and_lengths() -> None:
    model = Model(BATCHED["bmm"], w=(48, WIDTH))
    options = {"include": "*", "skip_slower": False}
    compiled = torch.compile(model, backend="switchback", dynamic=True, fullgraph=True, options=options)
    for batch, length in ((4, 6), (3, 8), (9, 5), (16, 16)):
        x = torch.randn(batch, length, WIDTH)
        with torch.no_grad():
            assert 0 < (compiled(x) - model(x)).norm() / model(x).norm() < 0.03
    assert len(swcompile.reports()) == 1
