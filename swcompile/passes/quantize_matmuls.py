"""Rewrite the matmuls of linear layers to 8 bit."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import compress
from operator import getitem, not_
from typing import Any, NamedTuple

import torch
from torch import fx

from swcompile import graph as facts
from swcompile import values
from swcompile.cost import MIN_SPEEDUP, Candidate, Prediction, predict_speedups
from swcompile.decide import decide, weigh
from swcompile.graph import Matmul
from swcompile.kernels.quantize_blockwise import QUANTIZE_BLOCKWISE_TRANSPOSE
from swcompile.kernels.quantize_columnwise import QUANTIZE_COLUMNWISE_TRANSPOSE
from swcompile.kernels.quantize_rowwise import QUANTIZE_ROWWISE
from swcompile.kernels.quantize_tensorwise import (
    QUANTIZE_BY_SCALE,
    QUANTIZE_TENSORWISE,
    QUANTIZE_TENSORWISE_TRANSPOSE,
)
from swcompile.kernels.scaled_mm import SCALED_MM
from swcompile.kernels.scaled_mm_blockwise import SCALED_MM_BLOCKWISE
from swcompile.kernels.transpose import TRANSPOSE
from swcompile.pipeline import PassResult, emit
from swcompile.recipe import GemmFormat, Recipe, Role, Scaling, fused_devices
from swcompile.report import Decision
from swcompile.row_steps import Frame

aten = torch.ops.aten
prims = torch.ops.prims

_QUANTIZERS = {
    (Scaling.VECTOR, False): QUANTIZE_ROWWISE,
    (Scaling.VECTOR, True): QUANTIZE_COLUMNWISE_TRANSPOSE,
    (Scaling.TENSOR, False): QUANTIZE_TENSORWISE,
    (Scaling.TENSOR, True): QUANTIZE_TENSORWISE_TRANSPOSE,
}
"""(scaling, whether the operand lies transposed in memory) -> op. All give [outer, contracted], contiguous."""

Predict = Callable[[Sequence[Candidate], Sequence[Matmul]], list[Prediction]]
"""(the candidates of a graph, its other matmuls) -> what each candidate is worth."""


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

    A weight is quantised from the parameter itself, without the cast that autocast puts between (a cast that says
    something about the values, to integers or 8 bit, stays); a tensor that several matmuls read is quantised once,
    also where autocast casts it for each (but once for each gradient whose scales it takes over). Weights are quantised again in the backward, so that no int8 copy lives
    from forward to backward; where they have one scale, by the forward's, so that they are read once::

        %12: i8[32, 64] = swcompile.quantize_by_scale(%0, %w_scale, True)

    Args:
        graph: a joint or inference graph whose parameters are known (`swcompile.graph.parameters`).
        recipe: which matmul in which format.
        is_whole: the graph ends where the model does; one that ends at a graph break has no last matmul to spare.
        predict: predicts the speed-ups where ``recipe.skip_slower``.
    """
    found = facts.matmuls(graph)
    heads = facts.heads(graph, found) if is_whole else set()
    alone = values.parameters_alone(graph, facts.parameters(graph))
    decisions = [decide(matmul, recipe, heads=heads, alone=alone) for matmul in found]
    wanted = [matmul for matmul, decision in zip(found, decisions, strict=True) if _is_new(matmul, decision)]
    others = [matmul for matmul in found if matmul not in wanted]
    predicted = _predictions(wanted, others, recipe, predict) if recipe.skip_slower else {}

    rewriter = _Rewriter(graph, one_scale={matmul.node for matmul in wanted if _keeps_scale(matmul, recipe)})
    result = PassResult()
    for matmul, decision in zip(found, decisions, strict=True):
        if matmul.node in predicted:
            decision = weigh(decision, predicted[matmul.node], asked=recipe.included_by(decision.parameter or ""))
        result.decisions.append(decision)
        if _is_new(matmul, decision):
            gemm = recipe.format_of(matmul.role)
            assert gemm is not None
            rewriter.rewrite(matmul, gemm)
            result.rewrites += 1
    return result


def _predictions(
    wanted: Sequence[Matmul], others: Sequence[Matmul], recipe: Recipe, predict: Predict
) -> dict[fx.Node, Prediction]:
    """Matmul -> what 8 bit is worth to it, where those alone share its costs that are rewritten, too."""
    predicted: dict[fx.Node, Prediction] = {}
    taken, left = list(wanted), list(others)
    while taken:
        timed = {node for node, prediction in predicted.items() if prediction.is_measured}
        found = predict(_candidates(taken, recipe, timed), left)
        predicted |= zip([matmul.node for matmul in taken], found, strict=True)
        # Those that would be slower go first: what others then bear of their costs, they may bear.
        limit = 1.0 if any(prediction.speedup < 1.0 for prediction in found) else MIN_SPEEDUP
        stays = [prediction.speedup >= limit for prediction in found]
        if len({*stays}) == 1:
            break
        left += compress(taken, map(not_, stays))
        taken = list(compress(taken, stays))
    return predicted


def _candidates(matmuls: Sequence[Matmul], recipe: Recipe, timed: Collection[fx.Node] = ()) -> list[Candidate]:
    """The matmuls, each with what it shares; those that were timed before are timed again."""
    weights = [_weight_key(matmul) for matmul in matmuls]
    weight_readers = Counter(weights)
    activations = [_activation_key(matmul, recipe) for matmul in matmuls]
    activation_readers: dict[Hashable, set[fx.Node]] = defaultdict(set)
    for matmul, activation in zip(matmuls, activations, strict=True):
        activation_readers[activation].add(matmul.node)
    finders: dict[fx.Node, Hashable] = {}
    candidates = []
    for matmul, of_weight, activation in zip(matmuls, weights, activations, strict=True):
        gemm = recipe.format_of(matmul.role)
        assert gemm is not None
        weight, _ = of_weight
        is_held = weight_readers[of_weight] == 1 and _can_be_held(matmul, gemm)
        keeps_scale = _keeps_scale(matmul, recipe)
        fuses = matmul.other_operand.meta["val"].device.type in fused_devices(recipe)
        is_fused = fuses and _will_be_fused(matmul, gemm)
        total = _sum_of(matmul.node)
        bias = None if gemm.is_by_block else _bias(total, matmul)
        candidates.append(
            Candidate(
                matmul,
                gemm,
                activation=activation,
                is_fused=is_fused,
                weight=None if gemm.is_by_block else of_weight,
                weight_passes=recipe.micro_batches if is_held else 1,
                scale=weight if keeps_scale else None,
                finds_scale=not keeps_scale or finders.setdefault(weight, of_weight) == of_weight,
                gradient=values.source_of(matmul.other_operand) if gemm.is_by_block else None,
                spared=activation if is_fused and _reads_alone(matmul, activation_readers[activation]) else None,
                has_bias=bias is not None,
                is_plain=matmul.node.meta["val"].dim() == 2 and not _is_swapped(matmul, gemm) and not _adds(total, bias),
                is_timed=matmul.node in timed,
            )
        )
    return candidates


def _is_new(matmul: Matmul, decision: Decision) -> bool:
    return decision.rewritten and not matmul.number_format


def _activation_key(matmul: Matmul, recipe: Recipe) -> tuple[object, ...]:
    """Equal for matmuls that read the same quantised activation (or gradient), however it is viewed."""
    activation, gemm = matmul.other_operand, recipe.format_of(matmul.role)
    by_rows = matmul.role is not Role.GRAD_WEIGHT or (gemm is not None and gemm.is_by_block)
    return values.source_of(activation), by_rows


def _weight_key(matmul: Matmul) -> tuple[fx.Node, Role]:
    """Equal for matmuls that read the same weight in the same orientation."""
    weight = matmul.weight_operand
    while weight.target == aten.permute.default or values.is_precision_cast(weight):
        (weight, *_) = weight.all_input_nodes
    return weight, matmul.role


def _can_be_held(matmul: Matmul, gemm: GemmFormat) -> bool:
    """Whether `hold_weights` will find the weight: a parameter as a whole, which becomes the second operand."""
    is_second = not matmul.weight_on_left or gemm.weight is Scaling.TENSOR
    is_parameter = _weight_key(matmul)[0].op == "placeholder"
    return is_second and is_parameter and matmul.role is not Role.GRAD_WEIGHT  # which reads an activation


def _keeps_scale(matmul: Matmul, recipe: Recipe) -> bool:
    """Whether the weight is quantised by one scale that is found for all matmuls that read it.

    Not for what a `torch.utils.checkpoint` computes again: the backward would find the scale again, for this alone (as it does
    where a memory budget of functorch's decides what is computed again); and not where `hold_weights` looks for a weight
    with its own scale.
    """
    gemm = recipe.format_of(matmul.role)
    has_one_scale = gemm is not None and gemm.weight is Scaling.TENSOR and matmul.role is not Role.GRAD_WEIGHT
    return has_one_scale and recipe.micro_batches == 1 and "recompute" not in matmul.node.meta


def _will_be_fused(matmul: Matmul, gemm: GemmFormat) -> bool:
    """Whether `fuse_quantization`, where it runs, will most likely quantise the activation in the kernel that computes it."""
    activation = matmul.other_operand
    if matmul.role is Role.GRAD_WEIGHT and not gemm.is_by_block:
        return False
    is_transposed = (matmul.role is Role.GRAD_WEIGHT) != matmul.weight_on_left
    features = facts.sizes(activation)[-2 if is_transposed else -1]
    *_, origin = values.derivation(activation)
    frame = Frame.of(origin)
    return frame is not None and frame.num_columns == features and frame.computes(origin)


def _reads_alone(matmul: Matmul, readers: Collection[fx.Node]) -> bool:
    """Whether all that reads the activation (or gradient) are these, and sums that its kernel computes with it."""
    *_, origin = values.derivation(matmul.other_operand)
    pending = [origin]
    while pending:
        for user in pending.pop().users:
            if user.target in values.VIEWS | values.CASTS:
                pending.append(user)
            elif user not in readers and user.target != aten.sum.dim_IntList:
                return False
    return True


class _Sum(NamedTuple):
    """``beta * addend + alpha * product``, which ``addmm`` and its like compute."""

    addend: fx.Node | None
    """None where there is none to add: ``beta == 0`` ignores it, NaN and all."""
    beta: Any = 1
    alpha: Any = 1


class _Rewriter:
    """Rewrites matmuls one by one and remembers what is quantised already.

    Args:
        graph: whose matmuls they are.
        one_scale: those whose weights are quantised by one scale, found by the first of them that needs the weight as it lies
            in memory.
    """

    def __init__(self, graph: fx.Graph, *, one_scale: set[fx.Node]):
        self.graph = graph
        self.one_scale = one_scale
        self.backward = facts.backward_nodes(graph)
        self.quantized: dict[tuple[object, ...], tuple[fx.Node, fx.Node]] = {}
        self.scales: dict[object, fx.Node] = {}
        self.transposed: dict[fx.Node, fx.Node] = {}

    def rewrite(self, matmul: Matmul, gemm: GemmFormat) -> None:
        """Replace one matmul by quantise and `scaled_mm`.

        An operand with one scale, or scales by block, must be scaled_mm's second, and a batch is folded into the rows of its
        first: where the weight stands left and needs any of these, ``w @ x`` is computed as ``(x.T @ w.T).T``. What scaled_mm
        cannot add itself is added to its product in float32, before the one cast to the matmul's dtype.
        """
        node = matmul.node
        value = node.meta["val"]
        swap = _is_swapped(matmul, gemm)
        scalings = [gemm.weight, gemm.other] if matmul.weight_on_left else [gemm.other, gemm.weight]
        total = _sum_of(node)
        bias = None if swap or gemm.is_by_block else _bias(total, matmul)
        adds = _adds(total, bias)
        with self.graph.inserting_before(node):
            operands = [self._matrix(matmul, left=True), self._matrix(matmul, left=False)]
            if swap:
                operands = [self._transpose(operand, node) for operand in reversed(operands)]
                scalings.reverse()
            dtype = torch.float32 if adds else value.dtype
            if gemm.is_by_block:
                gradient_q, token_scale = self._quantize(self._transpose(operands[0], node), Scaling.VECTOR, node, transposed=False)
                a_q = self._transposed(gradient_q, node)
                b_q, b_scale = self._quantized(QUANTIZE_BLOCKWISE_TRANSPOSE, node, operands[1], token_scale)
                out = emit(self.graph, SCALED_MM_BLOCKWISE, a_q, b_q, b_scale, dtype, like=node)
            else:
                a_q, a_scale = self._quantize(operands[0], scalings[0], node, transposed=False)
                b_q, b_scale = self._quantize(operands[1], scalings[1], node, transposed=True)
                out = emit(self.graph, SCALED_MM, a_q, b_q, a_scale, b_scale, bias, dtype, like=node)
            out.meta["rewritten_from"] = node.name
            if swap:
                out = self._untranspose(out, matmul)
            elif value.dim() == 3:
                out = emit(self.graph, aten.view.default, out, [self._batch(matmul), -1, value.shape[2]], like=node)
            if adds:
                out = self._add(out, total, like=node)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def _matrix(self, matmul: Matmul, *, left: bool) -> fx.Node:
        """An operand as a matrix: of a batched matmul, the weight loses its batch and the activation folds it."""
        operand = matmul.lhs if left else matmul.rhs
        like = matmul.node
        is_weight = left == matmul.weight_on_left
        if is_weight and matmul.role is not Role.GRAD_WEIGHT:
            operand = self._unrounded(operand, like)
        if operand.meta["val"].dim() == 2:
            return operand
        batch, rows, columns = operand.meta["val"].shape
        if batch == 1 or is_weight:
            return emit(self.graph, aten.select.int, operand, 0, 0, like=like)
        if left:
            return emit(self.graph, aten.reshape.default, operand, [-1, columns], like=like)
        moved = emit(self.graph, aten.permute.default, operand, [0, 2, 1], like=like)
        return self._transpose(emit(self.graph, aten.reshape.default, moved, [-1, rows], like=like), like)

    def _unrounded(self, weight: fx.Node, like: fx.Node) -> fx.Node:
        """The same views of what autocast has cast, or the weight as it is where there is no such cast."""
        source, views = values.unrounded(weight)
        for view in views:
            # A cast may have laid out anew what a view of the source cannot.
            target = aten.reshape.default if view.target in values.RESHAPES else view.target
            keywords: dict[str, Any] = dict(view.kwargs)
            source = emit(self.graph, target, source, *view.args[1:], like=like, **keywords)
        return source

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

    def _add(self, product: fx.Node, total: _Sum, *, like: fx.Node) -> fx.Node:
        """``beta * addend + alpha * product`` in float32, then one cast."""
        terms = [(product, total.alpha)] + ([] if total.addend is None else [(total.addend, total.beta)])
        scaled = []
        for term, factor in terms:
            term = self._cast(term, torch.float32, like)
            scaled.append(term if factor == 1 else emit(self.graph, aten.mul.Tensor, term, factor, like=like))
        out = scaled[0] if len(scaled) == 1 else emit(self.graph, aten.add.Tensor, *scaled, like=like)
        return self._cast(out, like.meta["val"].dtype, like)

    def _cast(self, node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        if node.meta["val"].dtype == dtype:
            return node
        return emit(self.graph, prims.convert_element_type.default, node, dtype, like=like)

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
        if values.is_column_major(operand.meta["val"]):
            operand, transposed = self._transpose(operand, like), not transposed
        return self._quantized(_QUANTIZERS[scaling, transposed], like, operand)

    def _quantized(self, quantizer: Any, like: fx.Node, operand: fx.Node, *factors: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What an op makes of an operand (and factors): emitted once for the forward, and once for the backward."""
        in_backward = like in self.backward
        memory = values.memory_of(operand)
        key = (memory, quantizer, in_backward, *factors)
        if key not in self.quantized:
            # What the backward quantises it quantises itself: an 8-bit copy is never kept for it from the forward.
            late = in_backward and operand not in self.backward
            finds_one_scale = like in self.one_scale and quantizer in (QUANTIZE_TENSORWISE, QUANTIZE_TENSORWISE_TRANSPOSE)
            if finds_one_scale and memory in self.scales:
                scale, transpose = self.scales[memory], quantizer == QUANTIZE_TENSORWISE_TRANSPOSE
                q = emit(self.graph, QUANTIZE_BY_SCALE, operand, scale, transpose, like=like, only_in_backward=late)
            else:
                pair = emit(self.graph, quantizer, operand, *factors, like=like, only_in_backward=late)
                q = emit(self.graph, getitem, pair, 0, like=like, only_in_backward=late)
                scale = emit(self.graph, getitem, pair, 1, like=like, only_in_backward=late)
                if finds_one_scale:
                    self.scales[memory] = scale
            q.meta["quantized_with"] = scale
            self.quantized[key] = q, scale
        return self.quantized[key]

    def _transposed(self, q: fx.Node, like: fx.Node) -> fx.Node:
        """The transpose of an int8 matrix in memory of its own, emitted once."""
        if q not in self.transposed:
            self.transposed[q] = emit(self.graph, TRANSPOSE, q, like=like)
        return self.transposed[q]

    def _transpose(self, matrix: fx.Node, like: fx.Node) -> fx.Node:
        """The transpose of a matrix; of a transpose, the matrix itself."""
        if matrix.target == aten.permute.default and matrix.args[1] == [1, 0]:
            (matrix, *_) = matrix.all_input_nodes
            return matrix
        return emit(self.graph, aten.permute.default, matrix, [1, 0], like=like)


def _sum_of(node: fx.Node) -> _Sum:
    if node.target in (aten.mm.default, aten.bmm.default):
        return _Sum(None)
    addend = node.args[0]
    assert isinstance(addend, fx.Node)
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    return _Sum(None if beta == 0 else addend, beta, alpha)


def _is_swapped(matmul: Matmul, gemm: GemmFormat) -> bool:
    """Whether ``w @ x`` is computed as ``(x.T @ w.T).T``."""
    return matmul.weight_on_left and (gemm.weight in (Scaling.TENSOR, Scaling.BLOCK) or matmul.node.meta["val"].dim() == 3)


def _adds(total: _Sum, bias: fx.Node | None) -> bool:
    """Whether something is left to add that `scaled_mm`, which may add a bias, does not."""
    return total.alpha != 1 or (total.addend is not None and bias is None)


def _bias(total: _Sum, matmul: Matmul) -> fx.Node | None:
    """The addend, where scaled_mm's epilogue can add it: a vector of one element a column, as it is."""
    is_plain = total.beta == 1 and total.alpha == 1
    fits = total.addend is not None and facts.sizes(total.addend) == facts.sizes(matmul.node)[-1:]
    return total.addend if is_plain and fits else None
