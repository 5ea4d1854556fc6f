"""Rewrite the matmuls of linear layers to int8."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from swcompile import graph as facts
from swcompile.cost import Candidate, predict_speedups
from swcompile.graph import Matmul
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.quantize_tensorwise import QUANTIZE_TENSORWISE, QUANTIZE_TENSORWISE_TRANSPOSE
from swcompile.kernels.scaled_mm import MAX_K, OUTPUT_DTYPES, SCALED_MM
from swcompile.pipeline import PassResult, emit
from swcompile.recipe import GemmFormat, Recipe, Role, Scaling
from swcompile.report import Decision

aten = torch.ops.aten

_QUANTIZERS = {
    (Scaling.VECTOR, False): QUANTIZE_ROWWISE,
    (Scaling.VECTOR, True): QUANTIZE_COLUMNWISE_TRANSPOSE,
    (Scaling.TENSOR, False): QUANTIZE_TENSORWISE,
    (Scaling.TENSOR, True): QUANTIZE_TENSORWISE_TRANSPOSE,
}
"""(scaling, whether the operand lies transposed in memory) -> op. All give [outer, contracted], contiguous."""

Predict = Callable[[Sequence[Candidate], Sequence[Matmul]], list[float]]
"""(the candidates of a graph, its other matmuls) -> how many times as fast each candidate would be."""


def quantize_matmuls(
    graph: fx.Graph, *, recipe: Recipe, is_whole: bool = True, predict: Predict = predict_speedups
) -> PassResult:
    """Rewrite ``mm(x, w)`` to ``scaled_mm(quantize(x), quantize(w))`` where the recipe asks for it. Changes numerics.

    Before::

        %2: f32[32, 64] = aten.permute(%0, [1, 0])
        %3: f32[8, 64] = aten.addmm(%bias, %x, %2)

    After::

        %2: (i8[8, 32], f32[8, 1]) = swcompile.quantize_rowwise(%x)
        %5: (i8[64, 32], f32[1, 1]) = swcompile.quantize_tensorwise(%0)
        %8: f32[8, 64] = swcompile.scaled_mm(%x_q, %w_q, %x_scale, %w_scale, %bias, f32)

    A weight is quantised from the parameter itself, without the cast that autocast puts between; a tensor that
    several matmuls read is quantised once. Weights are quantised again in the backward, so that no int8 copy lives
    from forward to backward.

    Args:
        graph: a joint or inference graph whose parameters are known (`swcompile.graph.parameters`).
        recipe: which matmul in which format.
        is_whole: the graph ends where the model does; one that ends at a graph break has no last matmul to spare.
        predict: predicts the speed-ups where ``recipe.skip_slower``.
    """
    found = facts.matmuls(graph)
    heads = facts.heads(graph, found) if is_whole else set()
    decisions = [_decide(matmul, recipe, heads) for matmul in found]
    wanted = [matmul for matmul, decision in zip(found, decisions, strict=True) if _is_new(matmul, decision)]
    sharing = Counter(_activation_key(matmul) for matmul in wanted)
    candidates = []
    for matmul in wanted:
        gemm = recipe.format_of(matmul.role)
        assert gemm is not None
        candidates.append(Candidate(matmul, gemm, sharing[_activation_key(matmul)]))
    others = [matmul for matmul in found if matmul not in wanted]
    speedups = predict(candidates, others) if recipe.skip_slower else [None] * len(candidates)
    predicted = {c.matmul.node: speedup for c, speedup in zip(candidates, speedups, strict=True)}

    rewriter = _Rewriter(graph, backward=facts.backward_nodes(graph), names=facts.parameters(graph))
    result = PassResult()
    for matmul, decision in zip(found, decisions, strict=True):
        speedup = predicted.get(matmul.node)
        if speedup is not None:
            decision = _weigh(decision, speedup, asked=recipe.included_by(decision.parameter or ""))
        result.decisions.append(decision)
        if _is_new(matmul, decision):
            gemm = recipe.format_of(matmul.role)
            assert gemm is not None
            rewriter.rewrite(matmul, gemm)
            result.rewrites += 1
    return result


def _is_new(matmul: Matmul, decision: Decision) -> bool:
    return decision.rewritten and not matmul.is_int8


def _weigh(decision: Decision, speedup: float, *, asked: bool) -> Decision:
    """Take a decision back where int8 would be slower."""
    if speedup >= 1:
        return dataclasses.replace(decision, speedup=speedup)
    reason = f"int8 would be slower: predicted {speedup:.2f} times as fast"
    return dataclasses.replace(decision, rewritten=False, reason=reason, speedup=speedup, violation=asked)


def _decide(matmul: Matmul, recipe: Recipe, heads: set[str]) -> Decision:
    """Whether the recipe rewrites a matmul, whatever the cost, and the reason, with the number that decided."""
    value = matmul.node.meta["val"]
    kept = Decision(
        node=matmul.node.name,
        role=matmul.role,
        parameter=matmul.parameter,
        shape=matmul.shape,
        dtype=str(value.dtype).removeprefix("torch."),
        rewritten=False,
        reason="",
    )
    if matmul.is_int8:
        return dataclasses.replace(kept, rewritten=True, reason="int8 already")
    if matmul.role is Role.OTHER or matmul.parameter is None:
        known = facts.parameters(matmul.node.graph)
        reason = "neither operand is a parameter" if known else "no parameter is known in this graph"
        return dataclasses.replace(kept, reason=reason)
    gemm = recipe.format_of(matmul.role)
    if gemm is None:
        sums = f" (sums over {matmul.shape[2]} tokens)" if matmul.role is Role.GRAD_WEIGHT else ""
        return dataclasses.replace(kept, reason=f"recipe {recipe.name} leaves {matmul.role.value}{sums}")
    pattern = recipe.excluded_by(matmul.parameter)
    if pattern is not None:
        return dataclasses.replace(kept, reason=f"excluded by {pattern!r}")
    asked = recipe.included_by(matmul.parameter)
    if not asked and recipe.include is not None:
        return dataclasses.replace(kept, reason="no include pattern matches")
    if not asked and matmul.parameter in heads:
        return dataclasses.replace(kept, reason="last matmul before the output; include='*' asks for it")
    impossible = _impossible(matmul)
    if impossible:
        return dataclasses.replace(kept, reason=impossible, violation=True)
    return dataclasses.replace(kept, rewritten=True, reason=_describe(gemm))


def _impossible(matmul: Matmul) -> str:
    """Why no int8 kernel computes this matmul, or an empty string."""
    value = matmul.node.meta["val"]
    if value.dtype not in OUTPUT_DTYPES:
        return f"{value.dtype} has no int8 form; bfloat16, float16 and float32 have"
    if value.device.type not in ("cpu", "cuda"):
        return f"no int8 kernel for device {value.device.type}"
    if matmul.node.target in (aten.mv.default, aten.addmv.default):
        return "a matrix-vector product: bound by reading the weight once"
    if matmul.shape[2] > MAX_K:
        return f"sums over {matmul.shape[2]} > {MAX_K} products, which may overflow int32"
    weight = matmul.lhs if matmul.weight_on_left else matmul.rhs
    if matmul.role is Role.GRAD_WEIGHT:
        batched = value.dim() == 3 and value.shape[0] != 1
    else:
        batched = value.dim() == 3 and value.shape[0] != 1 and weight.meta["val"].stride(0) != 0
    if batched:
        return f"a batch of {facts.sizes(weight)[0]} weights: the int8 kernel multiplies one"
    return ""


def _describe(gemm: GemmFormat) -> str:
    kinds = {Scaling.VECTOR: "row", Scaling.TENSOR: "tensor"}
    return f"int8, scales by {kinds[gemm.other]} x {kinds[gemm.weight]}"


def _activation_key(matmul: Matmul) -> tuple[object, ...]:
    """Equal for matmuls that read the same activation (or gradient), however it is viewed, in the same orientation."""
    activation = matmul.rhs if matmul.weight_on_left else matmul.lhs
    while activation.op == "call_function" and activation.target in facts.ALIASES:
        (activation, *_) = activation.all_input_nodes
    return activation, matmul.role is Role.GRAD_WEIGHT


class _Addend(NamedTuple):
    node: fx.Node
    beta: float
    alpha: float


class _Rewriter:
    """Rewrites matmuls one by one and remembers what is quantised already."""

    def __init__(self, graph: fx.Graph, *, backward: set[fx.Node], names: dict[fx.Node, str]):
        self.graph = graph
        self.backward = backward
        self.names = names
        self.quantized: dict[tuple[object, ...], tuple[fx.Node, fx.Node]] = {}

    def rewrite(self, matmul: Matmul, gemm: GemmFormat) -> None:
        """Replace one matmul by quantise and `scaled_mm`.

        An operand with one scale must be scaled_mm's second, and a batch is folded into the rows of its first: where
        the weight stands left and needs either, ``w @ x`` is computed as ``(x.T @ w.T).T``.
        """
        node = matmul.node
        value = node.meta["val"]
        swap = matmul.weight_on_left and (gemm.weight is Scaling.TENSOR or value.dim() == 3)
        scalings = [gemm.weight, gemm.other] if matmul.weight_on_left else [gemm.other, gemm.weight]
        with self.graph.inserting_before(node):
            operands = [self._matrix(matmul, left=True), self._matrix(matmul, left=False)]
            if swap:
                operands = [self._transpose(operand, node) for operand in reversed(operands)]
                scalings.reverse()
            a_q, a_scale = self._quantize(operands[0], scalings[0], node, transposed=False)
            b_q, b_scale = self._quantize(operands[1], scalings[1], node, transposed=True)
            bias, rest = (None, self._addend(matmul)) if swap else self._bias(matmul)
            out = emit(self.graph, SCALED_MM, a_q, b_q, a_scale, b_scale, bias, value.dtype, like=node)
            if swap:
                out = self._untranspose(out, matmul)
            elif value.dim() == 3:
                out = emit(self.graph, aten.view.default, out, [self._batch(matmul), -1, value.shape[2]], like=node)
            if rest is not None:
                out = self._add(out, rest, like=node)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def _matrix(self, matmul: Matmul, *, left: bool) -> fx.Node:
        """An operand as a matrix: of a batched matmul, the weight loses its batch and the activation folds it."""
        operand = matmul.lhs if left else matmul.rhs
        if operand.meta["val"].dim() == 2:
            return operand
        batch, rows, columns = operand.meta["val"].shape
        like = matmul.node
        if batch == 1 or left == matmul.weight_on_left:
            return emit(self.graph, aten.select.int, operand, 0, 0, like=like)
        if left:
            return emit(self.graph, aten.reshape.default, operand, [-1, columns], like=like)
        moved = emit(self.graph, aten.permute.default, operand, [0, 2, 1], like=like)
        return self._transpose(emit(self.graph, aten.reshape.default, moved, [-1, rows], like=like), like)

    def _batch(self, matmul: Matmul) -> int | fx.Node:
        """The number of matrices in a batched matmul; a symbolic one as a node, which a graph's arguments must be."""
        size = matmul.node.meta["val"].shape[0]
        return size if isinstance(size, int) else emit(self.graph, aten.sym_size.int, matmul.lhs, 0, like=matmul.node)

    def _untranspose(self, out: fx.Node, matmul: Matmul) -> fx.Node:
        """From [batch * columns, rows] to the layout that the original matmul gave."""
        like = matmul.node
        value = like.meta["val"]
        if value.dim() == 2:
            moved = emit(self.graph, aten.permute.default, out, [1, 0], like=like)
        else:
            split = emit(self.graph, aten.view.default, out, [self._batch(matmul), -1, value.shape[1]], like=like)
            moved = emit(self.graph, aten.permute.default, split, [0, 2, 1], like=like)
        return emit(self.graph, aten.clone.default, moved, memory_format=torch.contiguous_format, like=like)

    def _bias(self, matmul: Matmul) -> tuple[fx.Node | None, _Addend | None]:
        """(what the epilogue adds, what is left to add after it)."""
        rest = self._addend(matmul)
        if rest is not None and rest.node.meta["val"].dim() == 1 and rest.beta == 1 and rest.alpha == 1:
            return rest.node, None
        return None, rest

    def _addend(self, matmul: Matmul) -> _Addend | None:
        """The other half of ``addmm``'s ``beta * input + alpha * product``."""
        node = matmul.node
        if node.target in (aten.mm.default, aten.bmm.default):
            return None
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        assert isinstance(node.args[0], fx.Node) and isinstance(beta, (int, float)) and isinstance(alpha, (int, float))
        return _Addend(node.args[0], beta, alpha)

    def _add(self, out: fx.Node, addend: _Addend, *, like: fx.Node) -> fx.Node:
        other = addend.node
        if addend.alpha != 1:
            out = emit(self.graph, aten.mul.Tensor, out, addend.alpha, like=like)
        if addend.beta != 1:
            other = emit(self.graph, aten.mul.Tensor, other, addend.beta, like=like)
        return emit(self.graph, aten.add.Tensor, out, other, like=like)

    def _quantize(
        self, operand: fx.Node, scaling: Scaling, like: fx.Node, *, transposed: bool
    ) -> tuple[fx.Node, fx.Node]:
        """(int8 [outer, contracted], scale [outer, 1] or [1, 1]) of an operand, shared with equal requests.

        Args:
            operand: [outer, contracted], or [contracted, outer] if `transposed`.
            scaling: one scale for each outer index, or one.
            like: the matmul that asks.
            transposed: how the operand is given.
        """
        operand = self._uncast(operand, like)
        if _is_column_major(operand.meta["val"]):
            operand, transposed = self._transpose(operand, like), not transposed
        in_backward = like in self.backward
        key = (facts.memory_of(operand), scaling, transposed, in_backward)
        if key not in self.quantized:
            # What the backward quantises it quantises itself: an int8 copy is never kept for it from the forward.
            late = in_backward and operand not in self.backward
            pair = emit(self.graph, _QUANTIZERS[scaling, transposed], operand, like=like, only_in_backward=late)
            q = emit(self.graph, getitem, pair, 0, like=like, only_in_backward=late)
            scale = emit(self.graph, getitem, pair, 1, like=like, only_in_backward=late)
            q.meta["quantized_with"] = scale
            self.quantized[key] = q, scale
        return self.quantized[key]

    def _uncast(self, operand: fx.Node, like: fx.Node) -> fx.Node:
        """The same views of the parameter itself, without a cast between."""
        chain = list(facts.derivation(operand))
        if chain[-1] not in self.names or not any(node.target in facts.CASTS for node in chain):
            return operand
        source = chain.pop()
        while chain:
            view = chain.pop()
            if view.target not in facts.CASTS:
                keywords: dict[str, Any] = dict(view.kwargs)
                source = emit(self.graph, view.target, source, *view.args[1:], like=like, **keywords)
        return source

    def _transpose(self, matrix: fx.Node, like: fx.Node) -> fx.Node:
        """The transpose of a matrix; of a transpose, the matrix itself."""
        if matrix.target == aten.permute.default and matrix.args[1] == [1, 0]:
            (matrix, *_) = matrix.all_input_nodes
            return matrix
        return emit(self.graph, aten.permute.default, matrix, [1, 0], like=like)


def _is_column_major(value: torch.Tensor) -> bool:
    row, column = value.stride()
    return isinstance(row, int) and row == 1 and not (isinstance(column, int) and column == 1)

