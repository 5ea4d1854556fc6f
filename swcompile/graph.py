"""Facts about a joint graph: which inputs are parameters, what each matmul is for, which one is the head.

Reads graphs and never changes them, but for `name_parameters`, which writes the one fact that a graph does not
carry by itself: the qualified names of its parameters.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import networkx
import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors

from swcompile.kernels.formats import INT8, NumberFormat
from swcompile.kernels.scaled_mm import SCALED_MM
from swcompile.kernels.scaled_mm_blockwise import SCALED_MM_BLOCKWISE
from swcompile.recipe import Role
from swcompile.symbolic import hint
from swcompile.values import CASTS, VIEWS, derivation, parameter_root, parameters_alone

aten = torch.ops.aten

_GRADIENT_SUMS = {
    aten.add.Tensor,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.cat.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.constant_pad_nd.default,
}
"""Ops by which autograd puts the parts of one parameter's gradient together."""

MATMULS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.addmv.default,
    SCALED_MM,
    SCALED_MM_BLOCKWISE,
}
_BIASED = {aten.addmm.default, aten.baddbmm.default, aten.addmv.default}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Matmul:
    """One matmul of a graph and what it is for."""

    node: fx.Node
    role: Role
    weight: fx.Node | None = None
    """The parameter: the operand in ``output`` and ``grad_input``, the result's owner in ``grad_weight``."""
    parameter: str | None = None
    """Its qualified name, which two parameters of a graph may share."""
    weight_on_left: bool = False
    """The weight (in ``grad_weight``: the activation) is the left operand."""

    @property
    def lhs(self) -> fx.Node:
        """The left operand."""
        return operands(self.node)[0]

    @property
    def rhs(self) -> fx.Node:
        """The right operand."""
        return operands(self.node)[1]

    @property
    def weight_operand(self) -> fx.Node:
        """The operand that a `GemmFormat` calls weight: in ``grad_weight`` the activation."""
        return self.lhs if self.weight_on_left else self.rhs

    @property
    def other_operand(self) -> fx.Node:
        """The activation, or the gradient of the output."""
        return self.rhs if self.weight_on_left else self.lhs

    @property
    def number_format(self) -> NumberFormat | None:
        """The 8-bit format that it runs in, if it is rewritten already; its right operand then lies [N, K]."""
        return INT8 if self.node.target in (SCALED_MM, SCALED_MM_BLOCKWISE) else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K) of the product with its batch folded into M, symbolic sizes by their hints."""
        *batch, m, k = sizes(self.lhs)
        _, *columns = sizes(self.rhs)[-2:]
        n = sizes(self.rhs)[0] if self.number_format else (columns or [1])[0]
        for size in batch:
            m *= size
        return m, n, k


def operands(matmul: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two factors of a matmul node."""
    lhs, rhs = matmul.args[1:3] if matmul.target in _BIASED else matmul.args[:2]
    assert isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node)
    return lhs, rhs


def sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value, symbolic sizes by their hints (without adding guards)."""
    return tuple(hint(size) for size in node.meta["val"].shape)


def name_parameters(graph: fx.Graph, names: Mapping[int, str]) -> None:
    """Write parameter names to the placeholders of a joint graph.

    Args:
        graph: a joint (or inference) graph of AOTAutograd.
        names: index among the inputs of the traced function -> qualified parameter name.
    """
    for node in graph.find_nodes(op="placeholder"):
        source = node.meta.get("desc")
        if isinstance(source, descriptors.PlainAOTInput) and source.idx in names:
            node.meta["parameter"] = names[source.idx]


def parameters(graph: fx.Graph) -> dict[fx.Node, str]:
    """Placeholder -> qualified name of the parameter that it holds.

    Known from `name_parameters`, or from AOTAutograd's own descriptors where the graph was exported from a module
    (`torch._functorch.aot_autograd.aot_export_joint_with_descriptors`).
    """
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        if "parameter" in node.meta:
            found[node] = node.meta["parameter"]
        elif isinstance(source := node.meta.get("desc"), descriptors.ParamAOTInput):
            found[node] = source.target
    return found


def matmuls(graph: fx.Graph) -> list[Matmul]:
    """Every matmul of the graph with its role, in graph order.

    Roles: ``output`` if an operand derives from a parameter through views and casts alone, and the other one not
    from parameters alone; ``grad_input`` likewise if the other operand depends on a tangent; ``grad_weight`` if the
    result flows into a parameter's gradient; ``other`` for the rest (attention, and products of two activations).
    """
    names = parameters(graph)
    backward = backward_nodes(graph)
    alone = parameters_alone(graph, names)
    owners = _gradient_owners(graph, names)
    weights: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in MATMULS:
            continue
        lhs, rhs = operands(node)
        left, right = parameter_root(lhs, names), parameter_root(rhs, names)
        if node in backward:
            # A parameter can be an activation too (learned queries): it is the weight only where a forward matmul
            # used it as one.
            left, right = (root if root in weights else None for root in (left, right))
            if lhs in backward and rhs in backward:
                left = right = None
        elif alone.get(lhs) and alone.get(rhs):
            left = right = None  # part of how a weight is computed (merged LoRA), or learned queries
        is_blockwise = node.target == SCALED_MM_BLOCKWISE  # whose activation has scales of the gradient in it
        role, weight = Role.OTHER, right or left
        if weight:
            role = Role.GRAD_INPUT if node in backward else Role.OUTPUT
            if role is Role.OUTPUT:
                weights.add(weight)
        elif (is_blockwise or (lhs in backward) != (rhs in backward)) and (owner := _owner(node, owners)) in weights:
            role, weight = Role.GRAD_WEIGHT, owner
        found.append(
            Matmul(
                node=node,
                role=role,
                weight=weight,
                parameter=names[weight] if weight else None,
                weight_on_left=lhs not in backward if role is Role.GRAD_WEIGHT else left is not None and not right,
            )
        )
    return found


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on a tangent."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = isinstance(node.meta.get("desc"), descriptors.TangentAOTInput)
        if is_tangent or any(source in found for source in node.all_input_nodes):
            found.add(node)
    found.discard(graph.output_node())
    return found


def heads(graph: fx.Graph, found: Iterable[Matmul]) -> set[fx.Node]:
    """The matmuls that are the last before the model's output, and those of the backward that belong to them.

    A head has no other linear layer after it and does not end in a residual add, so the last layer of a block
    without a head behind it is not one. Of a layer that is applied several times, only the last use is.
    """
    found = list(found)
    names = parameters(graph)
    backward = backward_nodes(graph)
    flow = networkx.DiGraph()
    for node in graph.nodes:
        if node not in backward and node.op != "output":
            flow.add_edges_from((source, node) for source in node.all_input_nodes)
    uses = [matmul for matmul in found if matmul.role is Role.OUTPUT]
    outputs = {matmul.node for matmul in uses}
    leads_on: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if any(user in outputs or user in leads_on for user in node.users if user not in backward):
            leads_on.add(node)
    last = {node for node in outputs if node not in leads_on and not _joins_residual(flow, node, names)}
    gradients = [matmul for matmul in found if matmul.role in (Role.GRAD_INPUT, Role.GRAD_WEIGHT)]
    return last | {matmul.node for matmul in gradients if _forward_use(matmul, uses) in last}


def _forward_use(gradient: Matmul, uses: Iterable[Matmul]) -> fx.Node | None:
    """The forward matmul to which one of the backward belongs, or None where autograd does not tell.

    Of a weight's several uses it is the one with autograd's sequence number, which both directions of an op carry.
    """
    of_weight = [use.node for use in uses if use.weight is gradient.weight]
    if len(of_weight) == 1:
        return of_weight[0]
    number = gradient.node.meta.get("seq_nr")
    matching = [node for node in of_weight if number is not None and node.meta.get("seq_nr") == number]
    return matching[0] if matching else None


def _joins_residual(flow: networkx.DiGraph, node: fx.Node, names: Mapping[fx.Node, str]) -> bool:
    """Whether the value is added, somewhere downstream, to what it was computed from or to what came in beside it."""
    if node not in flow:
        return False
    before = networkx.ancestors(flow, node)
    after = {node} | networkx.descendants(flow, node)
    for add in after:
        if add.target != aten.add.Tensor:
            continue
        for source in add.all_input_nodes:
            *_, root = derivation(source)
            came_in = root.op == "placeholder" and root not in names and sizes(source) == sizes(add)
            if source not in after and (source in before or came_in):
                return True
    return False


def _gradient_owners(graph: fx.Graph, names: Mapping[fx.Node, str]) -> dict[fx.Node, fx.Node]:
    """Output value -> the parameter whose gradient it is."""
    by_input = {
        source.idx if isinstance(source, descriptors.PlainAOTInput) else source: node
        for node in names
        if (source := node.meta.get("desc")) is not None
    }
    output = graph.output_node()
    owners = {}
    values = output.args[0] if isinstance(output.args[0], (list, tuple)) else output.args
    for value, target in zip(values, output.meta.get("desc") or (), strict=False):
        if isinstance(target, descriptors.GradAOTOutput) and isinstance(value, fx.Node):
            of = target.grad_of
            key = of.idx if isinstance(of, descriptors.PlainAOTInput) else of
            if key in by_input:
                owners[value] = by_input[key]
    return owners


def _owner(node: fx.Node, owners: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """The parameter into whose gradient a value flows through views, casts, sums and constant factors alone."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current in owners:
            return owners[current]
        for user in current.users:
            scaled = user.target in (aten.mul.Tensor, aten.mul.Scalar) and len(user.all_input_nodes) == 1
            passes_on = scaled or user.target in VIEWS | CASTS | _GRADIENT_SUMS
            if passes_on and user not in seen:
                seen.add(user)
                pending.append(user)
    return None
