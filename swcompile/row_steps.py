"""What a node of a post-grad graph is in a row program: which shape its value has there, and which steps compute it."""


from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

from swcompile.graph import MATMULS
from swcompile.kernels.row_program import FLOAT_DTYPES, POINTWISE, Output, Ref, RowProgram, Shape, Step, Value
from swcompile.values import CASTS, RESHAPES, derivation

aten = torch.ops.aten
prims = torch.ops.prims

_SAME: dict[Any, str] = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.erf.default: "erf",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.relu.default: "relu",
    aten.where.self: "where",
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.le.Tensor: "le",
    aten.le.Scalar: "le",
    aten.lt.Tensor: "lt",
    aten.lt.Scalar: "lt",
    aten.ge.Tensor: "ge",
    aten.ge.Scalar: "ge",
    aten.gt.Tensor: "gt",
    aten.gt.Scalar: "gt",
}
"""Ops that are one step, beside casts."""

_OF_BOOLS = ("le", "lt", "ge", "gt", "where")
"""Steps that may give booleans."""
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.var_mean.correction}
_ALIASES = RESHAPES | {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
"""Ops that move nothing as long as the rows stay in their order."""
_CONSTANTS = {aten.full.default, aten.scalar_tensor.default}
_POWERS = (1.0, 2.0, 3.0, 0.5, -0.5)
_RANDOM = {
    aten.rand.default,
    aten.rand_like.default,
    aten.bernoulli.p,
    prims.inductor_random.default,
}
"""Inductor makes these numbers where they are used; as a row kernel's input they would be written out first."""


class Frame(NamedTuple):
    """The rows of a kernel."""

    num_rows: int | torch.SymInt
    num_columns: int

    def shape_of(self, value: Any) -> Shape | None:
        """What a value spans in this frame, whatever its leading dimensions are; None if it does not fit in."""
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return None
        last, total = value.shape[-1], value.numel()
        if statically_known_true(last == self.num_columns):
            if statically_known_true(total == self.num_rows * self.num_columns):
                return Shape.MATRIX
            return Shape.ROW if statically_known_true(total == self.num_columns) else None
        if value.dim() > 1 and statically_known_true(last == 1) and statically_known_true(total == self.num_rows):
            return Shape.COLUMN
        return None

    @classmethod
    def of(cls, node: fx.Node) -> "Frame | None":
        """The frame of a value whose last dimension is the features; None where their number is not fixed."""
        value: Any = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return None
        if not isinstance(value.shape[-1], int) or value.shape[-1] < 2:
            return None
        return cls(value.numel() // value.shape[-1], value.shape[-1])

    def takes(self, node: fx.Node) -> bool:
        """Whether a node's value can be an input."""
        value: Any = node.meta.get("val")
        return self.shape_of(value) is not None and value.dtype in (*FLOAT_DTYPES, torch.bool)

    def computes(self, node: fx.Node) -> bool:
        """Whether a program can compute a node from its arguments."""
        if node.op != "call_function":
            return False
        if node.target is getitem:
            (source, *_) = node.all_input_nodes
            return source.target is aten.var_mean.correction and self.computes(source) and self.takes(node)
        tensors = sources(node)
        if not tensors or not all(self.takes(source) for source in tensors):
            return False
        if any(_origin(source).target in _RANDOM for source in tensors):
            return False
        if node.target is aten.var_mean.correction:
            return self._reduces_rows(node)
        if not self.takes(node):
            return False
        if node.target in _ALIASES:
            return self._is_alias(node)
        if node.target in CASTS:
            return not set(node.kwargs) - {"dtype"} and self._narrows_well(node)
        if node.target in _REDUCTIONS:
            return self._reduces_rows(node) and node.meta["val"].dtype in FLOAT_DTYPES
        if node.target is aten.pow.Tensor_Scalar:
            return node.args[1] in _POWERS and node.meta["val"].dtype in FLOAT_DTYPES
        return self._is_step(node)

    def _is_step(self, node: fx.Node) -> bool:
        """Whether a node is one step of a program, with arguments that a step can have."""
        op = _SAME.get(node.target)
        if op is None or node.kwargs or len(node.args) != POINTWISE[op].arity:
            return False
        if node.meta["val"].dtype == torch.bool and op not in _OF_BOOLS:
            return False  # a sum of booleans is a boolean, which is no arithmetic in float32
        return all(
            isinstance(arg, (int, float)) or (isinstance(arg, fx.Node) and (constant(arg) is not None or arg in sources(node)))
            for arg in node.args
        )

    def _is_alias(self, node: fx.Node) -> bool:
        (source,) = sources(node)
        before, after = (self.shape_of(n.meta["val"]) for n in (source, node))
        if node.target is aten.permute.default:
            order: Any = node.args[1]
            moved = [d for d in order if not statically_known_true(source.meta["val"].shape[d] == 1)]
            return before is after and moved == sorted(moved)
        widens = node.target is aten.expand.default and before in (Shape.COLUMN, Shape.ROW)
        return before is after or (widens and after is Shape.MATRIX)

    def _narrows_well(self, cast: fx.Node) -> bool:
        """Whether to cast to a narrower dtype in the kernel: not what Inductor computes, as it would be written wide."""
        (source, *_) = cast.all_input_nodes
        if cast.meta["val"].dtype.itemsize >= source.meta["val"].dtype.itemsize or self.computes(source):
            return True
        origin = _origin(source)
        return origin.op == "placeholder" or origin.target in MATMULS

    def _reduces_rows(self, node: fx.Node) -> bool:
        """Whether a reduction gives one number for each row of a matrix, with the dimension kept."""
        (source, *_) = node.all_input_nodes
        value = source.meta["val"]
        if value.dtype == torch.bool:
            return False
        dims = node.args[1] if len(node.args) > 1 else None
        keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        last = isinstance(dims, (list, tuple)) and [d % value.dim() for d in dims] == [value.dim() - 1]  # type: ignore[operator]
        plain = not set(node.kwargs) - {"keepdim", "correction"} and len(node.args) <= 3
        return last and bool(keeps) and plain and self.shape_of(value) is Shape.MATRIX

    def sums_rows(self, node: fx.Node) -> bool:
        """Whether a node is the sum of a matrix over its rows: the gradient of a bias, or of a norm's weight."""
        if node.target is not aten.sum.dim_IntList or node.kwargs:
            return False
        (source, *_) = node.all_input_nodes
        dims: Any = node.args[1]
        value = source.meta["val"]
        if self.shape_of(value) is not Shape.MATRIX or value.dtype not in FLOAT_DTYPES or not dims or value.dim() < 2:
            return False
        all_but_last = sorted(d % value.dim() for d in dims) == list(range(value.dim() - 1))
        return all_but_last and node.meta["val"].dtype in FLOAT_DTYPES


def _origin(node: fx.Node) -> fx.Node:
    """What a node is a view or a cast of."""
    *_, origin = derivation(node)
    return origin


def constant(node: fx.Node) -> float | None:
    """The number that a node of no dimensions holds, rounded to its dtype, where the graph says it."""
    if node.target not in _CONSTANTS or node.meta["val"].dim() != 0 or node.meta["val"].dtype == torch.bool:
        return None
    number = node.args[1] if node.target is aten.full.default else node.args[0]
    if not isinstance(number, (int, float)):
        return None
    with unset_fake_temporarily():
        return float(torch.tensor(number).to(node.meta["val"].dtype).item())


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values, not only sizes, a node reads, without those that are a number (`constant`)."""
    arguments = node.args[:1] if node.target in _ALIASES else node.all_input_nodes
    return [a for a in arguments if isinstance(a, fx.Node) and not _is_size(a) and constant(a) is None]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


class ProgramWriter:
    """Makes a row program of nodes that a frame computes, given in the order of their graph."""

    def __init__(self, frame: Frame, inputs: list[fx.Node]):
        self.frame = frame
        self.inputs = [self._value(node) for node in inputs]
        self.steps: list[Step] = []
        self.refs: dict[fx.Node, Ref | float] = {node: Ref(number) for number, node in enumerate(inputs)}
        self._known: dict[Step, Ref] = {}
        self._moments: dict[fx.Node, tuple[Ref, Ref]] = {}

    def add(self, node: fx.Node) -> None:
        """Append the steps of a node whose arguments are inputs or added already."""
        target = node.target
        if target is aten.var_mean.correction:
            self._moments[node] = self._var_mean(node)
        elif target is getitem:
            self.refs[node] = self._moments[node.all_input_nodes[0]][node.args[1]]  # type: ignore[index]
        elif target in _ALIASES:
            self.refs[node] = self._argument(node.args[0])
        elif target is aten.pow.Tensor_Scalar:
            self.refs[node] = self._power(node)
        elif target in _REDUCTIONS:
            argument = self._argument(node.args[0])
            kind = "amax" if target is aten.amax.default else "sum"
            dtype = node.meta["val"].dtype
            if target is aten.mean.dim:
                total = self._reduce(kind, argument, torch.float32)
                self.refs[node] = self._step("div", (total, float(self.frame.num_columns)), dtype)
            else:
                self.refs[node] = self._reduce(kind, argument, dtype)
        elif target in CASTS:
            self.refs[node] = self._step("cast", (self._argument(node.args[0]),), node.meta["val"].dtype)
        else:
            arguments = tuple(self._argument(argument) for argument in node.args)
            self.refs[node] = self._step(_SAME[target], arguments, node.meta["val"].dtype)

    def ref(self, node: fx.Node) -> Ref | None:
        """The value of a node; None if it is a number."""
        found = self.refs[node]
        return found if isinstance(found, Ref) else None

    def value(self, ref: Ref) -> Value:
        """Shape and dtype of a value."""
        return RowProgram.value(self, ref)  # type: ignore[arg-type]

    def finish(self, outputs: list[Output]) -> RowProgram:
        """The program with these outputs."""
        return RowProgram(tuple(self.inputs), tuple(self.steps), tuple(outputs))

    def _value(self, node: fx.Node) -> Value:
        shape = self.frame.shape_of(node.meta["val"])
        assert shape is not None, f"{node.format_node()} does not fit into {self.frame}"
        return Value(shape, node.meta["val"].dtype)

    def _argument(self, argument: Any) -> Ref | float:
        if not isinstance(argument, fx.Node):
            return float(argument)
        number = constant(argument)
        return self.refs[argument] if number is None else number

    def _step(self, op: str, arguments: tuple[Ref | float, ...], dtype: torch.dtype) -> Ref:
        shapes = {self.value(argument).shape for argument in arguments if isinstance(argument, Ref)}
        if Shape.MATRIX in shapes or len(shapes) == 2:
            shape = Shape.MATRIX
        else:
            (shape,) = shapes
        return self._append(Step(op, arguments, Value(shape, dtype)))

    def _reduce(self, op: str, argument: Ref | float, dtype: torch.dtype) -> Ref:
        return self._append(Step(op, (argument,), Value(Shape.COLUMN, dtype)))

    def _append(self, step: Step) -> Ref:
        if step not in self._known:
            self._known[step] = Ref(len(self.inputs) + len(self.steps))
            self.steps.append(step)
        return self._known[step]

    def _var_mean(self, node: fx.Node) -> tuple[Ref, Ref]:
        """(variance, mean), in two passes over the row, as the second one costs nothing where it is in registers."""
        argument, dtype = self._argument(node.args[0]), node.all_input_nodes[0].meta["val"].dtype
        num_columns = float(self.frame.num_columns)
        total = self._reduce("sum", argument, torch.float32)
        mean = self._step("div", (total, num_columns), torch.float32)
        centred = self._step("sub", (argument, mean), torch.float32)
        square = self._step("mul", (centred, centred), torch.float32)
        squares = self._reduce("sum", square, torch.float32)
        correction = node.kwargs.get("correction", 1)
        variance = self._step("div", (squares, num_columns - float(correction)), torch.float32)  # type: ignore[arg-type]
        if dtype is not torch.float32:
            return self._step("cast", (variance,), dtype), self._step("cast", (mean,), dtype)
        return variance, mean

    def _power(self, node: fx.Node) -> Ref | float:
        base, exponent = self._argument(node.args[0]), node.args[1]
        dtype = node.meta["val"].dtype
        if exponent == 1:
            return base
        if exponent in (0.5, -0.5):
            return self._step("sqrt" if exponent == 0.5 else "rsqrt", (base,), dtype)
        if exponent == 2:
            return self._step("mul", (base, base), dtype)
        return self._step("mul", (self._step("mul", (base, base), torch.float32), base), dtype)


