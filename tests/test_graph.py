"""Facts about graphs: roles, heads and parameters of small models, memory, and sizes that are symbolic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from partition import run_partitioned
from torch import fx, nn
from torch._functorch._aot_autograd import descriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

import swcompile
from swcompile import Role, joint_passes, make_recipe, values
from swcompile import graph as facts
from swcompile.symbolic import hint

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
    # What is computed from parameters alone is as good as a parameter, learned queries as well as a merged LoRA.
    "low rank": (
        lambda m, x: x @ (m.w + m.b @ m.a),
        "",
        {"w": SQUARE, "a": (4, WIDTH), "b": (WIDTH, 4)},
        {None: [OTHER] * 6},
    ),
    "queries": (queries, "a b", {"w": SQUARE}, {"b.weight": ONCE, None: [OTHER] * 9}),
    "shared with queries": (
        lambda m, x: m.a(x) @ m.a(m.w).T,
        "a",
        {"w": SQUARE},
        {"a.weight": [OUTPUT] + [GRAD_INPUT] * 2 + [GRAD_WEIGHT] * 2, None: [OTHER] * 4},
    ),
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
    "tied": (lambda m, x: m.a(m.b(m.a(x))), ["a"]),
    "a bias that is added": (lambda m, x: m.a(x) + m.c.weight[0], ["a"]),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str) -> None:
    call, expected = HEADS[case]
    graph = capture(call, "a b c d", *[x_of() for _ in range(call.__code__.co_argcount - 1)])
    found = facts.matmuls(graph)
    heads = facts.heads(graph, found)
    for role in (OUTPUT, GRAD_INPUT, GRAD_WEIGHT):
        of_role = sorted(m.parameter or "" for m in found if m.node in heads and m.role is role)
        assert of_role == [f"{name}.weight" for name in expected]


def four_times(m: Any, x: torch.Tensor) -> torch.Tensor:
    for _ in range(4):
        x = m.a(x).tanh()
    return x


def head_and_residual(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x + m.a(x.sin()), m.a(x.cos())


REPEATED = {"four times": (four_times, 3), "head and residual": (head_and_residual, 1), "tied": (HEADS["tied"][0], 1)}


@pytest.mark.parametrize("case", REPEATED)
def test_of_several_uses_of_a_weight_only_the_last_is_a_head(case: str) -> None:
    call, place = REPEATED[case]
    graph = capture(call, "a b")
    found = facts.matmuls(graph)
    heads = facts.heads(graph, found)
    uses = [m for m in found if m.parameter == "a.weight" and m.role is OUTPUT]
    assert [m.node in heads for m in uses] == [index == place for index in range(len(uses))]
    # Of the backward, the two matmuls that read the gradient of that use's result: the first ones in the backward,
    # and of two results the second one's.
    backward = facts.backward_nodes(graph)
    of_head = {m.role: operand_in(backward, m) for m in found if m.node in heads and m.role is not OUTPUT}
    assert set(of_head) == {GRAD_INPUT, GRAD_WEIGHT} and len(heads) == 3
    tangents = [node for node in graph.find_nodes(op="placeholder") if node.name.startswith("tangents")]
    assert {tangents_before(gradient) for gradient in of_head.values()} == {frozenset(tangents[-1:])}
    others = [m for m in found if m.node not in heads and m.role is GRAD_INPUT and m.parameter == "a.weight"]
    assert len(others) == len(uses) - 1


def operand_in(backward: set[fx.Node], matmul: facts.Matmul) -> fx.Node:
    (gradient,) = (operand for operand in (matmul.lhs, matmul.rhs) if operand in backward)
    return gradient


def tangents_before(node: fx.Node) -> frozenset[fx.Node]:
    """The tangents that a value depends on, without going through a matmul."""
    if node.op == "placeholder":
        return frozenset({node} if node.name.startswith("tangents") else ())
    if node.target in facts.MATMULS:
        return frozenset()
    return frozenset().union(*map(tangents_before, node.all_input_nodes))


def test_heads_are_told_apart_where_weights_share_a_name() -> None:
    graph = capture(lambda m, x: m.b(m.a(x).tanh()), "a b")
    for node in facts.parameters(graph):
        node.meta["parameter"] = "weight"
    found = facts.matmuls(graph)
    heads = facts.heads(graph, found)
    assert [m.role for m in found] == [OUTPUT, OUTPUT, GRAD_WEIGHT, GRAD_INPUT, GRAD_WEIGHT, GRAD_INPUT]
    assert [m.node in heads for m in found] == [False, True, True, True, False, False]


def test_heads_of_inference() -> None:
    with torch.no_grad():
        graph = capture(lambda m, x: m.c(residual(m, x)), "a b c")
    found = facts.matmuls(graph)
    assert facts.heads(graph, found) == {m.node for m in found if m.parameter == "c.weight"}


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


class Builder:
    """Adds nodes to a graph, with values."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()

    def input(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> fx.Node:
        node = self.graph.placeholder("x")
        with self.mode:
            node.meta["val"] = torch.empty(4, 4, dtype=dtype, device=device)
        return node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda argument: argument.meta["val"]), **kwargs)
        return node


aten, cast = torch.ops.aten, torch.ops.prims.convert_element_type.default


def test_memory_is_the_same_for_the_same_elements_only() -> None:
    add = Builder()
    x = add.input()
    transposed = add(aten.t.default, x)
    same = [
        x,
        add(aten.permute.default, transposed, [1, 0]),
        add(aten.view.default, add(aten.view.default, x, [16]), [4, 4]),
        add(aten.squeeze.dim, add(aten.unsqueeze.default, x, 1), 1),
        add(aten.slice.Tensor, x, 0, 0, 4),
        add(aten.detach.default, x),
    ]
    assert {values.memory_of(node) for node in same} == {values.memory_of(x)}
    assert values.memory_of(x, transposed=True) == values.memory_of(transposed)
    others = [
        add.input(),
        transposed,
        add(aten.view.default, x, [2, 8]),
        add(aten.slice.Tensor, x, 0, 0, 2),
        add(aten.slice.Tensor, x, 0, 2, 4),
        add(aten.select.int, x, 0, 0),
        add(aten.select.int, x, 1, 0),
        add(aten.clone.default, x),
        add(aten.relu.default, x),
        add(cast, x, torch.bfloat16),
        add(cast, x, torch.float16),
        add(cast, transposed, torch.bfloat16),
        add(cast, add(aten.slice.Tensor, x, 0, 2, 4), torch.bfloat16),
    ]
    assert len({values.memory_of(node) for node in [x, *others]}) == 1 + len(others)


def test_equal_casts_of_the_same_elements_are_the_same() -> None:
    add = Builder()
    x = add.input()
    casts = [add(cast, node, torch.bfloat16) for node in (x, x, add(aten.detach.default, x))]
    assert len({values.memory_of(node) for node in casts}) == len({values.source_of(node) for node in casts}) == 1
    rows = [add(aten.slice.Tensor, node, 0, 0, 2) for node in casts]
    assert len({values.memory_of(node) for node in rows}) == 1
    assert values.source_of(rows[0]) == values.source_of(casts[0])
    assert values.memory_of(rows[0]) != values.memory_of(casts[0])


PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def test_precision_casts_are_those_of_autocast() -> None:
    add = Builder()
    for source in PRECISIONS:
        x = add.input(source)
        assert all(values.is_precision_cast(add(cast, x, dtype)) for dtype in PRECISIONS)
        for dtype in (torch.float64, torch.int32, torch.int8, torch.float8_e5m2):
            narrow = add(cast, x, dtype)
            assert not values.is_precision_cast(narrow) and not values.is_precision_cast(add(cast, narrow, source))
        moved = add(aten._to_copy.default, x, device=torch.device("meta"))
        assert not values.is_precision_cast(moved) and not values.is_precision_cast(add(aten.relu.default, x))


def test_unrounded_stops_at_the_first_cast_that_says_something() -> None:
    add = Builder()
    x = add.input()
    transposed = add(aten.permute.default, x, [1, 0])
    rounded = add(cast, transposed, torch.bfloat16)
    view = add(aten.unsqueeze.default, rounded, 0)
    assert values.unrounded(view) == (x, [transposed, view])
    assert values.unrounded(transposed) == (transposed, [])
    integers = add(cast, view, torch.int32)
    back = add(cast, integers, torch.float32)
    assert values.unrounded(back) == (back, [])
    again = add(cast, back, torch.float16)
    assert values.unrounded(again) == (back, [])


def test_parameters_alone() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ (m.w + m.b @ m.a).expand(x.shape[0], -1, -1)

    x = x_of(4, 6, WIDTH)
    torch._dynamo.mark_dynamic(x, 0)
    graph = capture(call, "", x, w=SQUARE, a=(4, WIDTH), b=(WIDTH, 4))
    alone = values.parameters_alone(graph, facts.parameters(graph))
    (low_rank, *_), (product, *_) = (
        [m.node for m in facts.matmuls(graph) if m.node.target in targets]
        for targets in ({aten.mm.default}, {aten.bmm.default})
    )
    assert alone[low_rank] == {"a", "b"} and alone[facts.operands(product)[1]] == {"w", "a", "b"}
    assert product not in alone and facts.operands(product)[0] not in alone


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
        run_partitioned(gm, inputs, joint_passes(make_recipe(options)) if recipe else [])
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
    assert hint(7) == 7 and isinstance(hint(ShapeEnv().create_unbacked_symint()), int)


def test_one_compilation_for_all_batch_sizes_and_lengths() -> None:
    model = Model(BATCHED["bmm"], w=(48, WIDTH))
    options = {"include": "*", "skip_slower": False}
    compiled = torch.compile(model, backend="switchback", dynamic=True, fullgraph=True, options=options)
    for batch, length in ((4, 6), (3, 8), (9, 5), (16, 16)):
        x = torch.randn(batch, length, WIDTH)
        with torch.no_grad():
            assert 0 < (compiled(x) - model(x)).norm() / model(x).norm() < 0.03
    assert len(swcompile.reports()) == 1
