"""Where a forward graph has residual branches, found in the flow of data alone: no class and no module name is looked at."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import networkx
import torch
from torch import fx

from swcompile.attention import Attention
from swcompile.forward import ForwardGraph, attribute, called_in, path_of, places
from swcompile.forward_ops import (
    ADDS,
    CASTS,
    CONVOLUTIONS,
    COPIES,
    DROPOUTS,
    ELEMENTWISE,
    LAYOUTS,
    RESHAPES,
    SPLITS,
    TRANSPOSES,
    Weights,
    args_of,
    data_flow,
    feature_dims,
    readers_of_value,
    shape_of,
)

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResidualBranch:
    """What is added to the value that it was computed from."""

    add: fx.Node
    path: tuple[fx.Node, ...]
    """From the operand of `add` back to the branch's end: dropout, drop-path and views between, each of which feeds
    the one before it alone."""
    weight: fx.Node
    """The parameter of the branch's last linear layer."""
    has_layer_scale: bool
    """The branch ends in a product with a parameter of one dimension."""
    readers: tuple[fx.Node, ...]
    """What reads the branch's end on the way to `add`."""
    has_features_last: bool
    """The last dimension of the branch's end holds the features, for all that can be seen."""

    @property
    def end(self) -> fx.Node:
        """The last value that the branch computes."""
        return self.path[-1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """The linear layer at the end of a branch, as something that a gamma can be folded into."""

    weight: str
    feature_dim: int
    """The weight's dimension of output features."""
    bias: str | None


def residual_branches(graph: fx.Graph, found: Iterable[Attention]) -> list[ResidualBranch]:
    """Every branch that is added to what it was computed from, with a linear layer in it.

    Of parallel branches (attention and MLP in one sum) each counts. Additions to attention's scores do not.

    Args:
        graph: a forward graph.
        found: its attentions.
    """
    weights = Weights(graph)
    flow = data_flow(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    scores = set().union(*(attention.between for attention in found))
    branches = []
    for add in graph.nodes:
        if add.target not in ADDS or add in scores or add.kwargs.get("alpha", 1) != 1:
            continue
        lhs, rhs = args_of(add)
        if not isinstance(rhs, fx.Node) or shape_of(lhs) != shape_of(rhs) or not add.meta["val"].is_floating_point():
            continue
        ways = ((source, branch) for skip, branch in ((lhs, rhs), (rhs, lhs)) for source in _sources(skip))
        for source, branch in ways:
            between = _between(source, branch, flow, order)
            if not any(weights.are_in(node) for node in between):
                continue
            for end in _parallel(branch, source, flow, order):
                path = tuple(_back(end, between, weights))
                linears = [n for n in _between(source, end, flow, order) if weights.are_in(n)]
                if linears:
                    onward = {*between, add}
                    branches.append(
                        ResidualBranch(
                            add=add,
                            path=path,
                            weight=weights.root(weights.of(max(linears, key=order.__getitem__))[0]),
                            has_layer_scale=weights.scale(path[-1]),
                            readers=path[-2:-1] or tuple(user for user in end.users if user in onward),
                            has_features_last=_has_features_last(path[-1], weights),
                        )
                    )
            break
    return branches


def branch_module(branch: ResidualBranch) -> str:
    """The module that ends a branch, below the one that adds it; the latter itself if its own code ends it."""
    owner = path_of(called_in(branch.add))
    end = path_of(called_in(branch.end))
    return end if not owner or end.startswith(f"{owner}.") else owner


def branch_places(branches: Sequence[ResidualBranch]) -> list[str]:
    """Where each branch's layer-scale goes: beside the module that makes the branch, ``layers.0.mlp_layer_scale``."""
    named = []
    for branch in branches:
        owner, end = path_of(called_in(branch.add)), branch_module(branch)
        child = end.removeprefix(owner).removeprefix(".").partition(".")[0]
        named.append((called_in(branch.add), f"{child}_layer_scale" if child else "layer_scale"))
    return places(named)


def merges_of(captured: ForwardGraph, branches: Sequence[ResidualBranch]) -> list[Merge | str]:
    """For each branch the linear layer that ends it, or why a gamma cannot be folded into that."""
    uses: dict[str, int] = {}
    names: dict[int, str] = {}
    for node in captured.graph.find_nodes(op="get_attr"):
        value = attribute(captured.module, node.target)
        name = names.setdefault(id(value), node.target)
        uses[name] = uses.get(name, 0) + len(node.users)
    found: list[Merge | str] = []
    for branch in branches:
        end = branch.end
        if end.target == aten.linear.default:
            weight, bias, dim = args_of(end)[1], (*args_of(end), None)[2], 0
        elif end.target == aten.addmm.default:
            bias, _, weight = args_of(end)
            dim = 1
        else:
            found.append(f"the branch ends in {end.name}, not in a linear layer")
            continue
        parameters = [node for node in (weight, bias) if node is not None]
        if any(not isinstance(node, fx.Node) or node.op != "get_attr" for node in parameters):
            found.append("the weight of the branch's last linear layer is computed")
            continue
        shared = [str(node.target) for node in parameters if uses[names[id(attribute(captured.module, node.target))]] > 1]
        if shared:
            found.append(f"{shared[0]} has other uses")
            continue
        found.append(Merge(weight=weight.target, feature_dim=dim, bias=None if bias is None else bias.target))
    return found


def _between(start: fx.Node, end: fx.Node, flow: networkx.DiGraph, order: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes on all ways from `start` to `end`, without `start`; none if there is no way."""
    if order[start] >= order[end]:
        return set()
    seen, pending = {end}, [end]
    while pending:  # backwards, and never before `start`
        for source in flow.pred[pending.pop()]:
            if source not in seen and order[source] >= order[start]:
                seen.add(source)
                pending.append(source)
    return networkx.descendants(flow.subgraph(seen), start) if start in seen else set()


def _parallel(branch: fx.Node, source: fx.Node, flow: networkx.DiGraph, order: dict[fx.Node, int]) -> list[fx.Node]:
    """The branches of a sum of branches that start at `source` and none of which is part of another."""
    if _scales_alike(branch) and len(branch.users) == 1:  # of all alike
        inside = _parallel(args_of(branch)[0], source, flow, order)
        return inside if len(inside) > 1 else [branch]
    if branch.target in ADDS and isinstance(args_of(branch)[1], fx.Node):
        lhs, rhs = args_of(branch)
        both = (_between(source, lhs, flow, order), _between(source, rhs, flow, order))
        apart = lhs not in both[1] and rhs not in both[0] and shape_of(lhs) == shape_of(rhs)
        if all(both) and apart and len(branch.users) == 1:
            return [end for side in (lhs, rhs) for end in _parallel(side, source, flow, order)]
    return [branch]


def _back(node: fx.Node, between: set[fx.Node], weights: Weights) -> Iterator[fx.Node]:
    """From a branch's operand back through dropout, drop-path, and views that keep the features last or moved them."""
    yield node
    while _scales_alike(node) or node.target in TRANSPOSES:
        source = args_of(node)[0]
        if source not in between or readers_of_value(source) != [node]:
            return
        if not _scales_alike(node) and not _has_features_last(source, weights, proven=True):
            return
        node = source
        yield node


def _scales_alike(node: fx.Node) -> bool:
    """Whether scaling each feature of the first argument is scaling it in the result."""
    if node.target in DROPOUTS | COPIES:
        return True
    if node.target in (aten.mul.Tensor, aten.div.Tensor):  # drop-path: a factor a sample
        factor = args_of(node)[1]
        if not isinstance(factor, fx.Node):
            return True
        shape = shape_of(factor)
        return math.prod(shape[1:] if len(shape) > 1 else shape) == 1
    if node.target not in LAYOUTS or node.target in SPLITS | {operator.getitem}:
        return False
    ndim = len(shape_of(args_of(node)[0]))
    if node.target == aten.transpose.int:
        return all(dim % ndim != ndim - 1 for dim in args_of(node)[1:])
    if node.target == aten.permute.default:
        return args_of(node)[1][-1] % ndim == ndim - 1
    return node.target in RESHAPES and shape_of(args_of(node)[0])[-1] == shape_of(node)[-1]


def _has_features_last(end: fx.Node, weights: Weights, *, proven: bool = False) -> bool:
    """Whether the last dimension holds the features of a linear layer; where nothing tells, yes, or no if `proven`."""
    node = end
    while True:
        if weights.are_in(node):
            return feature_dims(node, weights) == [len(shape_of(node)) - 1]
        if node.target in CONVOLUTIONS:
            return False
        if node.target in LAYOUTS and not _scales_alike(node):
            return not proven and node.target not in TRANSPOSES
        sources = [source for source in node.all_input_nodes if source.op == "call_function"]
        same = [source for source in sources if shape_of(source) == shape_of(node)] or sources[:1]
        if not same or (node.target not in ELEMENTWISE and not _scales_alike(node)):
            return not proven
        node = same[0]


def _sources(skip: fx.Node) -> Iterator[fx.Node]:
    """What a branch beside `skip` may start from: `skip`, and what other branches have been added to on the way."""
    source = _without_scaling(skip)
    yield source
    if source.target in ADDS:
        lhs, rhs = args_of(source)
        if isinstance(rhs, fx.Node) and shape_of(lhs) == shape_of(rhs):
            yield from _sources(lhs)
            yield from _sources(rhs)


def _without_scaling(node: fx.Node) -> fx.Node:
    """What the way round a branch starts from: before constant factors, casts, copies and dropout."""
    while node.target in CASTS | COPIES | DROPOUTS or (
        node.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(args_of(node)[1], fx.Node)
    ):
        node = args_of(node)[0]
    return node
