"""Calls known by their sizes: that they call what they say, on what they say."""

import ctypes
from itertools import product

import pytest
import torch

from swcompile.calls import Call, Flag, Op
from swcompile.kernels.int8 import num_blocks, padded
from swcompile.values import is_column_major

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32]


def results(call: Call, device: torch.device) -> tuple[torch.Tensor, ...]:
    result = call.prepare(device)()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [Op.MATMUL, Op.SCALED_MM, Op.SCALED_MM_BLOCKWISE])
def test_what_multiplies(op: Op, dtype: torch.dtype) -> None:
    call = Call(op, (3 * 16, 2 * 16, 2048 + 16), dtype)
    first, second, *_ = call.prepare(CPU).args
    assert first.numel() == 48 * 2064 and second.numel() == 32 * 2064
    assert {first.dtype, second.dtype} == {dtype if op is Op.MATMUL else torch.int8}
    if op is not Op.MATMUL:
        assert len(first.unique()) > 200, "all of int8, and no zeros alone"
    (product,) = results(call, CPU)
    assert product.shape == (48, 32) and product.dtype == dtype and product.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [op for op in Op if "quantize" in op])
def test_what_quantises(op: Op, dtype: torch.dtype) -> None:
    num_rows, num_columns = 1032, 64
    call = Call(op, (num_rows, num_columns), dtype)
    x, *_ = call.prepare(CPU).args
    assert x.shape == (num_rows, num_columns) and x.dtype == dtype and x.float().std() > 0.9
    x_q, *scales = results(call, CPU)
    turned = num_columns, padded(num_rows) if "blockwise" in op else num_rows
    assert x_q.dtype == torch.int8 and x_q.shape == (turned if "transpose" in op else (num_rows, num_columns))
    num_scales = {
        Op.QUANTIZE_ROWWISE: num_rows, Op.QUANTIZE_COLUMNWISE_TRANSPOSE: num_columns, Op.QUANTIZE_TENSORWISE: 1,
        Op.QUANTIZE_TENSORWISE_TRANSPOSE: 1, Op.QUANTIZE_BLOCKWISE_TRANSPOSE: num_blocks(num_rows) * num_columns,
    }  # fmt: skip
    assert sum(scale.numel() for scale in scales) == num_scales.get(op, 0)


@pytest.mark.parametrize("flags", list(product([False, True], repeat=3)), ids=str)
def test_how_operands_lie(flags: tuple[bool, bool, bool]) -> None:
    chosen = Flag.those_of(dict(zip((Flag.BIAS, Flag.LHS_TRANSPOSED, Flag.RHS_TRANSPOSED), flags, strict=True)))
    call = Call(Op.MATMUL, (48, 32, 16), torch.bfloat16, chosen)
    *bias, lhs, rhs = call.prepare(CPU).args
    assert [tensor.shape for tensor in (*bias, lhs, rhs)] == [(32,)] * flags[0] + [(48, 16), (16, 32)]
    assert (is_column_major(lhs), is_column_major(rhs)) == flags[1:]
    assert results(call, CPU)[0].shape == (48, 32) and all(flag in str(call) for flag in chosen)


@pytest.mark.parametrize("flags", list(product([False, True], repeat=2)), ids=str)
def test_what_is_scaled_and_added(flags: tuple[bool, bool]) -> None:
    chosen = Flag.those_of(dict(zip((Flag.BIAS, Flag.COLUMN_SCALES), flags, strict=True)))
    _, _, a_scale, b_scale, bias, _ = Call(Op.SCALED_MM, (48, 32, 16), torch.bfloat16, chosen).prepare(CPU).args
    assert a_scale.shape == (48, 1) and b_scale.shape == (32 if flags[1] else 1, 1)
    assert (bias is not None) == flags[0] and (bias is None or bias.shape == (32,))


def test_what_turns() -> None:
    (x,) = Call(Op.TRANSPOSE, (48, 32), torch.int8).prepare(CPU).args
    assert x.shape == (48, 32) and x.dtype == torch.int8
    assert results(Call(Op.TRANSPOSE, (48, 32), torch.int8), CPU)[0].shape == (32, 48)


def test_what_it_is_called() -> None:
    assert str(Call(Op.SCALED_MM, (4096, 1024, 512), torch.bfloat16)) == "scaled_mm 4096 x 1024 x 512 torch.bfloat16"
    calls = [Call(op, sizes, dtype) for op in Op for sizes in ((64, 32), (6, 432)) for dtype in DTYPES]
    assert len({str(call) for call in calls}) == len(calls)


KERNEL, MEMSET = 0, 2
"""`CUgraphNodeType` of CUDA's driver."""


def node_kinds(graph: torch.cuda.CUDAGraph) -> list[int]:
    """What a CUDA graph launches."""
    driver, handle, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(number)) == 0
    nodes = (ctypes.c_void_p * number.value)()
    assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(number)) == 0
    kinds = []
    for node in nodes:
        kind = ctypes.c_int()
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds.append(kind.value)
    return kinds


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in Op if op is not Op.MATMUL])
def test_how_many_kernels(op: Op) -> None:
    call = Call(op, (2048, 1024, 512) if "mm" in op else (2048, 1024), torch.bfloat16)
    run = call.prepare(torch.device("cuda"))
    for _ in range(3):  # which chooses the kernel
        run()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        run()
    kinds = node_kinds(graph)
    assert len(kinds) == call.num_kernels and set(kinds) <= {KERNEL, MEMSET}, kinds
