"""materialize_sines: which values it has written to memory, and that a rotary model computes them once."""

from functools import partial

import pytest
import torch
import transformers
from torch import fx, nn

import swcompile
from swcompile import format_graph, joint_passes, make_recipe, materialize_sines
from swcompile.capture import JointGraph
from swcompile.kernels.materialize import COS, MATERIALIZE, SIN, materialize
from swcompile.pipeline import Pass

RECIPE = make_recipe({"include": "*", "skip_slower": False})
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, LENGTH, WIDTH = 2, 4, 8, 16

AFTER = """\
%14: f32[8, 16] = aten.mul.Tensor(%2, %3)
%15: f32[8, 16] = swcompile.cos(%14)
%16: bf16[8, 16] = prims.convert_element_type(%15, bf16)
%17: bf16[8, 16] = swcompile.materialize(%16)
%18: f32[8, 16] = swcompile.sin(%14)
%19: bf16[8, 16] = prims.convert_element_type(%18, bf16)
%20: bf16[8, 16] = swcompile.materialize(%19)
%21: bf16[2, 4, 8, 16] = aten.mul.Tensor(%13, %17)
%22: bf16[2, 4, 8, 16] = prims.rev(%13, [3])
%23: bf16[2, 4, 8, 16] = aten.mul.Tensor(%22, %20)
"""


class Rotary(nn.Module):
    """A layer whose output is turned by angles, or what else is computed of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        q = self.layer(x)
        cos, sin = self.tables(positions * frequencies, q.dtype)
        return q * cos + q.flip(-1) * sin

    def tables(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Halves(Rotary):
    """Frequencies come in pairs: the table is put together of two halves."""

    def tables(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (f(angles[:, : WIDTH // 2]).to(dtype) for f in (torch.cos, torch.sin))
        return torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]


class Repeated(Rotary):
    """One sequence and two heads: what is turned is little larger than a table, and then read by many heads."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        turned = super().forward(x[:1, :2], positions, frequencies)
        return turned[:, :, None].expand(1, 2, 8, -1, -1) * x[:1, :1, None]


class Returned(Rotary):
    """A table is a result, too."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, _ = self.tables(positions * frequencies, x.dtype)
        return self.layer(x) * cos, cos


class SameSize(Rotary):
    """Sines of activations, nothing of which is spread."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).sin()).cos()


def inputs(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, HEADS, length, WIDTH, dtype=torch.bfloat16)
    return x, torch.arange(length, dtype=torch.float32)[:, None], torch.rand(WIDTH)


def captured(model: nn.Module, *passes: Pass, length: int = LENGTH) -> JointGraph:
    joint = swcompile.capture(model.bfloat16(), *inputs(length))
    joint.run_passes(passes)
    return joint


def written(graph: fx.Graph) -> list[fx.Node]:
    """What is written to memory."""
    return [node.all_input_nodes[0] for node in graph.find_nodes(op="call_function", target=MATERIALIZE)]


ON_CPU = partial(materialize_sines, devices=("cpu",))


def test_graph_and_bits() -> None:
    torch.manual_seed(1)
    model = Rotary()
    tangent = torch.randn(BATCH, HEADS, LENGTH, WIDTH).bfloat16()
    before, after = captured(model, *joint_passes(RECIPE)), captured(model, *joint_passes(RECIPE), ON_CPU)
    assert AFTER in format_graph(after.graph)
    (output, *_), gradients = after(tangent)
    (plain_output, *_), plain_gradients = before(tangent)
    assert torch.equal(output, plain_output)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients[name])


def test_a_table_of_two_halves_is_written_whole() -> None:
    tables = written(captured(Halves(), *joint_passes(RECIPE), ON_CPU).graph)
    assert [tuple(table.meta["val"].shape) for table in tables] == [(LENGTH, WIDTH)] * 2


class Scaled(Rotary):
    """Beside the table, sines of activations: in a number that scales it, and behind a second table of the same cosine."""

    def tables(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        cos = angles.cos()
        return (cos * self.layer.weight.sin().mean()).to(dtype), cos.double().to(dtype)


class Part(Rotary):
    """A table is made for many more positions than there are."""

    def tables(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        many = torch.cat([angles] * 16)
        return many.cos()[: angles.shape[0]].to(dtype), angles.sin().to(dtype)


def test_only_the_sines_of_a_table_are_pytorchs() -> None:
    graph = captured(Scaled(), *joint_passes(RECIPE), ON_CPU).graph
    (cos,) = graph.find_nodes(op="call_function", target=COS)
    assert cos.meta["val"].shape == (LENGTH, WIDTH) and not graph.find_nodes(op="call_function", target=SIN)
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)


def test_a_table_of_which_a_part_is_read_is_left_to_inductor() -> None:
    graph = captured(Part(), *joint_passes(RECIPE), ON_CPU).graph
    assert not graph.find_nodes(op="call_function", target=COS) and len(written(graph)) == 2
    assert len(graph.find_nodes(op="call_function", target=SIN)) == 1


def test_a_table_that_is_a_result() -> None:
    joint = captured(Returned(), *joint_passes(RECIPE), ON_CPU)
    (table,) = written(joint.graph)
    (_, positions, frequencies), tangents = inputs(), (torch.ones(BATCH, HEADS, LENGTH, WIDTH).bfloat16(),)
    (_, cos, *_), _ = joint(*tangents)
    assert torch.equal(cos, (positions * frequencies).cos().bfloat16()) and table.meta["val"].shape == cos.shape


@pytest.mark.parametrize("op", [SIN, COS])
def test_sines_are_pytorchs(op: torch._ops.OpOverload) -> None:
    x = 1e5 * torch.randn(4, 5, device=DEVICE).t()
    expected = {SIN: torch.sin, COS: torch.cos}[op](x.double())
    assert 0 < (op(x) - expected).abs().max() < 1e-6
    torch.library.opcheck(op, (x,))


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5)])
def test_op(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=DEVICE)
    x = x.t() if x.dim() == 2 else x
    out = materialize(x)
    assert torch.equal(out, x) and (out.data_ptr() != x.data_ptr() or x.numel() == 0)
    torch.library.opcheck(MATERIALIZE, (x,))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """As the eager model rounds its tables."""
    model, arguments = Rotary().bfloat16().cuda(), [tensor.cuda() for tensor in inputs()]
    options = {"include": "*", "skip_slower": False}
    with torch.no_grad():
        compiled = torch.compile(model, backend="switchback", options=options, fullgraph=True)
        out, (code,) = torch._inductor.utils.run_and_get_code(compiled, *arguments)
        expected = model(*arguments)
    for op, count in ((MATERIALIZE, 2), (SIN, 1), (COS, 1)):
        assert code.count(f"swcompile.{op._schema.name.removeprefix('swcompile::')}.default(") == count
    assert "tl_math.sin" not in code and "tl_math.cos" not in code
    assert 0 < (out - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("model", "passes"),
    [
        pytest.param(SameSize(), [*joint_passes(RECIPE), ON_CPU], id="same-size"),
        pytest.param(Repeated(), [*joint_passes(RECIPE), ON_CPU], id="what-is-turned-is-no-table"),
        pytest.param(Rotary(), [*joint_passes(RECIPE), materialize_sines], id="other-device"),
        pytest.param(Rotary(), [ON_CPU], id="nothing-quantised"),
    ],
)
def test_left_alone(model: nn.Module, passes: list[Pass]) -> None:
    assert not written(captured(model, *passes).graph)


def test_no_position_at_all() -> None:
    assert not written(captured(Rotary(), *joint_passes(RECIPE), ON_CPU, length=0).graph)


def test_compiled_with_any_number_of_positions() -> None:
    """Sines are computed of the table alone, once in the forward and once in the backward, and Inductor computes none."""
    model = Rotary().bfloat16()
    x, positions, frequencies = inputs()
    codes, gradients = [], []
    for fuse in (True, False):
        torch._dynamo.reset()
        options = {"include": "*", "skip_slower": False, "fuse": fuse, "inductor": {"fx_graph_cache": False}}
        compiled = torch.compile(model, backend="switchback", options=options, fullgraph=True, dynamic=True)

        def step(call: nn.Module = compiled) -> None:
            model.zero_grad()
            call(x.requires_grad_(), positions, frequencies).float().square().mean().backward()

        _, code = torch._inductor.utils.run_and_get_code(step)
        codes.append(code)
        (weight,) = model.parameters()
        assert weight.grad is not None
        gradients.append(weight.grad)
    for function in ("cos", "sin"):
        assert [text.count(f"swcompile.{function}.default(") for text in codes[0]] == [1, 1]
        assert [f"std::{function}(" in text for code in codes for text in code] == [False, False, True, True]
    once, again = gradients
    assert (once - again).norm() <= 1e-2 * again.norm()


def test_llama() -> None:
    """All layers share both tables."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(32, (2, 16))
    joint = swcompile.capture(model, kwargs={"input_ids": ids, "labels": ids, "use_cache": False})
    joint.run_passes([*joint_passes(RECIPE), ON_CPU])
    assert len(written(joint.graph)) == 2
