"""Where a forward graph has attention, found in the flow of data alone: no class and no module name is looked at."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import networkx
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from swcompile.forward import called_in, places
from swcompile.forward_ops import (
    ADDS,
    CASTS,
    COPIES,
    DROPOUTS,
    EXPANDS,
    GEMMS,
    LAYOUTS,
    NORMS,
    RESHAPES,
    Weights,
    args_of,
    data_flow,
    factors,
    feature_dims,
    readers_of_value,
    shape_of,
)
from swcompile.symbolic import hint

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
INDEXES = {aten.index.Tensor, aten.index_select.default, aten.gather.default}
SOFTMAXES = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
ON_SCORES = {
    *ADDS,
    *CASTS,
    *DROPOUTS,
    *LAYOUTS,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.div.Tensor,
    aten.div_.Tensor,
    aten.tanh.default,
    aten.clamp.default,
    aten.clamp_max.default,
    aten.clamp_min.default,
    aten.clip.default,
    aten.nan_to_num.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Scalar,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
"""What may stand between the scores and their softmax, and between the softmax and the values."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadSplit:
    """Queries or keys between their projection and the first op that computes with them (rotation, scores)."""

    path: tuple[fx.Node, ...]
    """From the projection to that op, layout ops alone."""
    value: fx.Node
    """The last of them in which a head's channels have a dimension to themselves, if possible the last one."""
    channel_dim: int
    """That dimension: the one over which scores are summed."""
    joint: fx.Node
    """The first of them that holds these queries (or keys) alone."""
    joint_dims: tuple[int, ...]
    """The dimensions of `joint` that hold the features, heads before channels."""
    columns: torch.Tensor
    """[heads, channels], int64: the projection's output features. Heads of grouped keys are their own."""
    weight: fx.Node
    """The projection's parameter."""
    readers: tuple[fx.Node, ...]
    """The users of the path's last node that lead to the scores."""
    is_private: bool
    """Nothing else reads these features of the projection."""
    is_indexed: bool
    """The heads are still to be picked by an index: `columns` may hold others."""
    position: int | None
    """Which argument of ``scaled_dot_product_attention`` these are."""

    def whole(self) -> Iterator[fx.Node]:
        """The projection's result, and views of it that keep its features whole and last."""
        for node, following in zip(self.path, (*self.path[1:], None), strict=True):
            yield node
            if following is None or following.target not in RESHAPES | COPIES or shape_of(node)[-1] != shape_of(following)[-1]:
                return

    def readers_of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The users of a node of the path that lead to the scores."""
        following = self.path[self.path.index(node) + 1 :][:1]
        return following or self.readers

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let `new` take the place of a node of the path on the way to the scores, and nowhere else."""
        rest = self.path[self.path.index(node) + 1 :]
        if any(set(passed.users) != set(self.readers_of(passed)) for passed in rest):
            # Something else reads a view on the way: the scores get views of their own.
            with node.graph.inserting_before(min(self.readers, key=list(node.graph.nodes).index)):
                taken = {node: new}
                for passed in rest:
                    taken[passed] = new = node.graph.node_copy(passed, lambda old: taken.get(old, old))
            last = rest[-1]
        else:
            last = node
        for reader in self.readers_of(last):
            if reader.target == SDPA and self.position is not None:
                reader.update_arg(self.position, new)  # the same tensor may be its keys and its values
            else:
                reader.replace_input_with(last, new)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """One attention: its node and where its queries and keys are split into heads."""

    node: fx.Node
    """``scaled_dot_product_attention``, or the matmul that gives the scores."""
    query: HeadSplit | str
    """Where, or why no place was found."""
    key: HeadSplit | str
    between: frozenset[fx.Node]
    """What stands between the scores and their softmax."""


def attentions(graph: fx.Graph) -> list[Attention]:
    """Every attention of a forward graph: the op, and softmax of a product of two activations in any spelling."""
    weights = Weights(graph)
    flow = data_flow(graph)
    found = []
    for node in graph.nodes:
        if node.target == SDPA:
            scores, between = node, frozenset[fx.Node]()
            operands = [(operand, -1) for operand in args_of(node)[:2]]
        elif node.target in SOFTMAXES:
            seen = _scores_of(node, weights)
            if seen is None:
                continue
            scores, between = seen
            operands = _query_and_key(scores)
        else:
            continue
        query, key = (_head_split(*operands[i], i, scores, flow, weights) for i in (0, 1))
        found.append(Attention(node=scores, query=query, key=key, between=between))
    return found


def attention_places(found: Sequence[Attention]) -> list[tuple[str, str]]:
    """Where each attention's norms go: ``layers.0.self_attn.q_norm`` and ``k_norm``."""
    calls = [called_in(attention.node) for attention in found]
    return list(zip(*(places((call, stem) for call in calls) for stem in ("q_norm", "k_norm")), strict=True))


def _scores_of(softmax: fx.Node, weights: Weights) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """(the matmul of two activations that a softmax is taken of, what stands between); None if this is no attention:
    no such matmul before it, or none after it that reads the result."""
    if args_of(softmax)[1] not in (-1, len(shape_of(softmax)) - 1):
        return None
    before, between = _reached(softmax, lambda node: node.all_input_nodes)
    after, _ = _reached(softmax, lambda node: list(node.users))
    products = [node for node in before if not any(weights.is_plain(operand) for operand in weights.of(node))]
    if len(products) != 1 or all(weights.of(node) for node in after):
        return None
    return products[0], frozenset(between)


def _reached(start: fx.Node, step: Callable[[fx.Node], list[fx.Node]]) -> tuple[list[fx.Node], set[fx.Node]]:
    """(the matmuls that are reached through elementwise ops and views alone, those ops and views)."""
    products, between, pending = [], set(), [start]
    while pending:
        for node in step(pending.pop()):
            if node.target in GEMMS and node not in products:
                products.append(node)
            elif node.target in ON_SCORES and node not in between:
                between.add(node)
                pending.append(node)
    return products, between


def _query_and_key(scores: fx.Node) -> list[tuple[fx.Node, int]]:
    """((queries, the dimension that is summed), (keys, the dimension that is summed)) of the matmul of the scores."""
    lhs, rhs = factors(scores)
    if scores.target != aten.einsum.default:
        return [(lhs, -1), (rhs, -2)]
    inputs, output = args_of(scores)[0].replace(" ", "").replace("...", "").split("->")
    terms = inputs.split(",")
    (summed,) = [letter for letter in terms[0] if letter in terms[1] and letter not in output] or " "
    operands = [(value, term.find(summed) - len(term)) for value, term in zip((lhs, rhs), terms, strict=True)]
    return operands if output[-1] in terms[1] else operands[::-1]


def _head_split(
    operand: fx.Node, dim: int, position: int, reader: fx.Node, flow: networkx.DiGraph, weights: Weights
) -> HeadSplit | str:
    """Follow queries or keys back to their projection, and from there to where the heads are apart."""
    upstream, projections, pending = {operand}, [], [operand]
    while pending:
        node = pending.pop()
        if node.target in NORMS:
            return "is normalised already"
        if weights.are_in(node):
            projections.append(node)
            continue
        for source in flow.pred[node]:
            if source not in upstream:
                upstream.add(source)
                pending.append(source)
    if len(projections) != 1:
        return f"comes from {len(projections)} projections" if projections else "comes from no projection"
    (node,) = projections
    onward = {reader} | networkx.descendants(flow.subgraph(upstream), node)
    num_channels = shape_of(operand)[dim]
    path, columns = [node], [_columns(node, weights)]
    while len(users := [user for user in node.users if user in onward]) == 1 and users[0].target in LAYOUTS:
        (node,) = users
        path.append(node)
        columns.append(columns[-1] if node.target in COPIES else _moved(node, columns[-1]))
        if node.target in EXPANDS:
            break  # grouped keys, repeated for each query head
    readers = tuple(user for user in node.users if user in onward)
    apart = []
    for index, numbers in enumerate(columns):
        if isinstance(numbers, torch.Tensor) and path[index].target not in EXPANDS:
            fitting = [d for d in _feature_dims(numbers) if numbers.shape[d] == num_channels]
            apart += [(fitting[-1] == numbers.ndim - 1, index, fitting[-1])] if fitting else []
    if not apart and readers and readers[0].target in (aten.mul.Tensor, aten.div.Tensor):
        return f"is scaled before a dimension has the {num_channels} channels of a head"
    if not apart:
        return f"no dimension has the {num_channels} channels of a head before they are mixed"
    _, value, channel_dim = max(apart)  # channels last if they are anywhere, as late as can be
    heads = _reduced(columns[value].movedim(channel_dim, -1)).reshape(-1, num_channels).unique(dim=0)
    (joint, *_) = [
        index
        for index, numbers in enumerate(columns)
        if isinstance(numbers, torch.Tensor) and torch.equal(_reduced(numbers).unique(), heads.unique())
    ]
    if _leaks(path[value], reader, onward, flow):
        return "shares what follows with other values"
    others = [
        (user, columns[index])
        for index, node in enumerate(path[: value + 1])
        for user in readers_of_value(node)
        if user not in path and user not in onward
    ]
    return HeadSplit(
        path=tuple(path),
        value=path[value],
        channel_dim=channel_dim,
        joint=path[joint],
        joint_dims=_feature_dims(columns[joint]),
        columns=heads,
        weight=weights.root(weights.of(path[0])[0]),
        readers=readers,
        is_private=all(_reads_others(user, numbers, heads) for user, numbers in others)
        and (reader not in readers or tree_leaves(list(args_of(reader))).count(node) == 1),
        is_indexed=any(node.target in INDEXES for node in readers),
        position=position if reader.target == SDPA else None,
    )


def _leaks(value: fx.Node, reader: fx.Node, onward: set[fx.Node], flow: networkx.DiGraph) -> bool:
    """Whether something besides the scores is computed from what is made of `value` on the way to them."""
    made = networkx.descendants(flow.subgraph(onward - {reader} | {value}), value)
    for node in made:
        users = readers_of_value(node)
        if not set(users) <= onward or (reader in users and tree_leaves(list(args_of(reader))).count(node) > 1):
            return True
    return False


def _columns(projection: fx.Node, weights: Weights) -> torch.Tensor:
    """The number of the output feature that each element of a projection's result belongs to."""
    shape, dims = shape_of(projection), feature_dims(projection, weights)
    numbers = torch.arange(math.prod(shape[dim] for dim in dims))
    return numbers.view([size if dim in dims else 1 for dim, size in enumerate(shape)]).expand(shape)


def _moved(node: fx.Node, columns: Any) -> Any:
    """What a layout op does to the feature numbers."""
    args = fx.node.map_arg(args_of(node)[1:], lambda source: hint(source.meta["val"]))
    op: Any = node.target
    return op(columns, *args, **node.kwargs)


def _reads_others(user: fx.Node, columns: Any, heads: torch.Tensor) -> bool:
    """Whether a user of a value reads none of the features in `heads`."""
    if user.target not in LAYOUTS:
        return False
    read = _moved(user, columns)
    if isinstance(read, torch.Tensor):
        return not torch.isin(_reduced(read), heads).any()
    return all(_reads_others(part, read, heads) for part in user.users)


def _feature_dims(columns: torch.Tensor) -> tuple[int, ...]:
    """The dimensions along which the feature numbers change, slowest first."""
    dims = [dim for dim in range(columns.ndim) if not _is_constant(columns, dim)]
    return tuple(sorted(dims, key=lambda dim: -int(columns.diff(dim=dim).flatten()[0])))


def _reduced(columns: torch.Tensor) -> torch.Tensor:
    """The feature numbers without the dimensions along which they do not change."""
    for dim in range(columns.ndim):
        if _is_constant(columns, dim):
            columns = columns.narrow(dim, 0, 1)
    return columns


def _is_constant(columns: torch.Tensor, dim: int) -> bool:
    first = columns.narrow(dim, 0, 1)
    return columns.stride(dim) == 0 or columns.shape[dim] == 1 or torch.equal(columns, first.expand_as(columns))
