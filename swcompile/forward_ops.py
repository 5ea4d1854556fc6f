"""Kinds of ops in a forward graph, and which of its matmuls have a parameter for an operand."""

import operator
from collections.abc import Sequence
from typing import Any

import networkx
import torch
from torch import fx, nn

from swcompile.forward import attribute
from swcompile.symbolic import hint

aten = torch.ops.aten

GEMMS = {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
}
ADDS = {aten.add.Tensor, aten.add_.Tensor}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}
DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}
TRANSPOSES = {
    aten.mT.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.numpy_T.default,
    aten.permute.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.transpose.int,
}
LAYOUTS = (
    COPIES
    | SPLITS
    | TRANSPOSES
    | {
        operator.getitem,
        aten.expand.default,
        aten.repeat_interleave.self_int,
        aten.flatten.using_ints,
        aten.narrow.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unflatten.int,
        aten.unsqueeze.default,
    }
)
"""Ops that move elements of their first argument and compute nothing."""
CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
"""Features are the second dimension of what these compute."""
ELEMENTWISE = {
    *ADDS,
    *CASTS,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
}
EXPANDS = {aten.expand.default, aten.repeat_interleave.self_int}
RESHAPES = {aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default}
SHAPE_READERS = {aten.new_empty.default, aten.empty_like.default, aten.rand_like.default, aten.sym_size.int}
NORMS = {
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.rsqrt.default,
    aten.norm.ScalarOpt_dim,
    aten.linalg_vector_norm.default,
}


class Weights:
    """Which matmuls of a forward graph have a parameter for an operand."""

    def __init__(self, graph: fx.Graph):
        module = graph.owning_module
        assert module is not None
        self.derived: set[fx.Node] = set()
        """Parameters, and what is computed from parameters, buffers and constants alone."""
        fixed: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr":
                is_parameter = isinstance(attribute(module, node.target), nn.Parameter)
                (self.derived if is_parameter else fixed).add(node)
            elif node.op == "call_function":
                sources = set(node.all_input_nodes)
                if sources <= self.derived | fixed:
                    (self.derived if sources & self.derived else fixed).add(node)

    def of(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a matmul that are parameters, or computed from them alone; the right one first."""
        return [operand for operand in reversed(factors(node)) if operand in self.derived]

    def is_plain(self, node: fx.Node) -> bool:
        """Whether an operand is a parameter, no product of parameters such as the projection of a learned query."""
        pending, seen = [node], {node}
        while pending:
            if (source := pending.pop()).target in GEMMS:
                return False
            new = set(source.all_input_nodes) - seen
            seen |= new
            pending += new
        return True

    def root(self, node: fx.Node) -> fx.Node:
        """The parameter that an operand is computed from; the first one, if there are several."""
        while node.op != "get_attr":
            node = next(source for source in node.all_input_nodes if source in self.derived)
        return node

    def scale(self, node: fx.Node) -> bool:
        """Whether a value is a product with a parameter of one dimension (but no norm's scale)."""
        if node.target != aten.mul.Tensor:
            return False
        factors = [n for n in node.all_input_nodes if n in self.derived and len(shape_of(self.root(n))) == 1]
        others = [n for n in node.all_input_nodes if n not in self.derived]
        normed = others and _is_normed(others[0])
        return bool(factors) and not normed

    def are_in(self, node: fx.Node) -> bool:
        return node.target in GEMMS and bool(self.of(node))


def _is_normed(node: fx.Node) -> bool:
    while node.target in CASTS | COPIES:
        node = args_of(node)[0]
    return node.target == aten.mul.Tensor and any(n.target in NORMS for n in node.all_input_nodes)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a node."""
    return node.args


def factors(matmul: fx.Node) -> Sequence[fx.Node]:
    if matmul.target == aten.einsum.default:
        return args_of(matmul)[1]
    first = 1 if matmul.target in (aten.addmm.default, aten.baddbmm.default) else 0
    return args_of(matmul)[first : first + 2]


def feature_dims(projection: fx.Node, weights: Weights) -> list[int]:
    """The dimensions of a projection's result that hold its output features, slowest first."""
    ndim = len(shape_of(projection))
    if projection.target == aten.einsum.default:
        inputs, output = args_of(projection)[0].replace(" ", "").split("->")
        weight, *_ = weights.of(projection)
        term = inputs.split(",")[list(factors(projection)).index(weight)]
        return [(output.index(letter) - len(output)) % ndim for letter in output if letter in term]
    return [ndim - 1 if factors(projection)[1] in weights.of(projection) else ndim - 2]


def data_flow(graph: fx.Graph) -> networkx.DiGraph:
    flow = networkx.DiGraph()
    for node in graph.nodes:
        if node.op != "output":
            flow.add_node(node)
            flow.add_edges_from((source, node) for source in node.all_input_nodes)
    return flow


def readers_of_value(node: fx.Node) -> list[fx.Node]:
    """The users of a value, without those that look at its shape alone."""
    return [user for user in node.users if user.target not in SHAPE_READERS]


def shape_of(node: Any) -> tuple[int, ...]:
    value = node.meta["val"] if isinstance(node, fx.Node) else node
    return tuple(hint(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()
