"""What is found out about a launch is kept for calls that look alike, and for no others."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from swcompile.kernels import launch
from swcompile.kernels.dequantize import dequantize_triton
from swcompile.kernels.launch import Described, Launcher, Plans
from swcompile.kernels.map_rows import map_rows_triton
from swcompile.kernels.quantize_columnwise import quantize_columnwise_transpose_triton
from swcompile.kernels.quantize_rowwise import quantize_rowwise_reference, quantize_rowwise_triton
from swcompile.kernels.quantize_tensorwise import quantize_tensorwise_triton
from swcompile.kernels.scaled_mm import scaled_mm_reference, scaled_mm_triton


def plans_that_count() -> tuple[Plans[str], list[tuple[Any, ...]]]:
    seen: list[tuple[Any, ...]] = []

    def prepare(*call: Any) -> str:
        seen.append(call)
        return f"plan {len(seen)}"

    return Plans(prepare), seen


def test_calls_that_look_alike_share_a_plan() -> None:
    plans, seen = plans_that_count()
    first, second = torch.zeros(4, 8), torch.ones(4, 8)
    assert plans.find([first, None], 3) == plans.find([second, None], 3) == "plan 1"
    (call,) = seen
    assert call[0] is first and call[1:] == (None, 3)


LINE = torch.zeros(200)


@pytest.mark.parametrize(
    "other",
    [
        LINE[:64].view(8, 8), LINE[:64].view(16, 4).t(), LINE[:64].view(4, 16).double(), LINE[:128].view(4, 32)[:, :16],
        LINE[1:65].view(4, 16), LINE[:64], None,
    ],
    ids=["shape", "strides", "dtype", "rows apart", "alignment", "dimensions", "nothing"],
)  # fmt: skip
def test_calls_that_differ_do_not(other: torch.Tensor | None) -> None:
    plans, seen = plans_that_count()
    x = LINE[:64].view(4, 16)
    assert plans.find([x, x]) == "plan 1"
    assert plans.find([x, other]) == "plan 2" and plans.find([x, other]) == "plan 2"
    assert plans.find([x, x], torch.int8) == "plan 3" and plans.find([x, x]) == "plan 1"
    assert len(seen) == 3


def test_nothing_is_a_plan_too() -> None:
    calls = []
    plans: Plans[None] = Plans(calls.append)
    assert plans.find([LINE]) is None and plans.find([LINE]) is None and len(calls) == 1


def test_a_plan_made_during_a_capture_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plans, _ = plans_that_count()
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    assert plans.find([LINE]) == "plan 1" and plans.find([LINE]) == "plan 2"
    monkeypatch.setattr(launch, "is_capturing", lambda: False)
    assert plans.find([LINE]) == "plan 3" and plans.find([LINE]) == "plan 3"


def test_plans_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MAX_PLANS", 8)
    plans, seen = plans_that_count()
    for size in range(1, 50):
        plans.find([LINE[:size]])
        assert len(plans._known) <= 8
    assert len(seen) == 49


class Kernel:
    """Like a function under `triton.jit`, or like one in the interpreter, which compiles nothing."""

    arg_names = ("x_ptr", "out_ptr", "num_rows", "WIDTH", "EVEN")

    def __init__(self, *, is_compiled: bool) -> None:
        self.is_compiled = is_compiled
        self.found_out: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> "Kernel.Compiled | None":
            self.found_out.append((grid, args, options))
            return Kernel.Compiled(self) if self.is_compiled else None

        return run

    class Compiled:
        def __init__(self, kernel: "Kernel") -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *args: self.kernel.launched.append((grid, args))


def test_triton_is_asked_once() -> None:
    kernel = Kernel(is_compiled=True)
    launcher = Launcher(kernel, (5,), 7, EVEN=True, WIDTH=64, num_warps=4)
    for number in range(3):
        launcher(f"x{number}", f"out{number}")
    assert kernel.found_out == [((5,), ("x0", "out0", 7), {"EVEN": True, "WIDTH": 64, "num_warps": 4})]
    assert kernel.launched == [((5, 1, 1), (f"x{n}", f"out{n}", 7, 64, True)) for n in (1, 2)]


def test_the_interpreter_is_asked_every_time() -> None:
    kernel = Kernel(is_compiled=False)
    launcher = Launcher(kernel, (5, 2), 7, EVEN=True, WIDTH=64)
    launcher("x", "out")
    launcher("x", "out")
    assert len(kernel.found_out) == 2 and not kernel.launched


def test_descriptors_differ_in_their_tensor_alone() -> None:
    descriptors = pytest.importorskip("triton.tools.tensor_descriptor")
    described = Described(lambda tensor: descriptors.TensorDescriptor(tensor, tensor.shape, (tensor.shape[1], 1), [16, 64]))
    first, second = torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, 64, dtype=torch.int8)
    made = [described(first), described(second)]
    assert made[0].base is first and made[1].base is second
    assert type(made[0]) is type(made[1]) and vars(made[0]).keys() == vars(made[1]).keys()
    assert all(vars(made[0])[name] == vars(made[1])[name] for name in vars(made[0]) if name != "base")
    gone = weakref.ref(first)
    del first, made
    gc.collect()
    assert gone() is None, "a tensor lives no longer than its descriptor"


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_alike_but_for_alignment() -> None:
    line = torch.randn(64 * 256 + 8, device=DEVICE, dtype=torch.bfloat16)
    for start in (0, 0, 1, 1, 8, 2):
        x = line[start : start + 64 * 256].view(64, 256)
        for actual, expected in zip(quantize_rowwise_triton(x), quantize_rowwise_reference(x), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_plans_serve_every_stream_and_a_capture() -> None:
    """Matmuls by all kinds of kernels, whose plans are known: new tensors, another stream, a CUDA graph."""
    for shape in ((4096, 1024, 1024), (64, 64, 64), (60, 60, 60)):
        (m, n, k), results = shape, []
        a, b = (torch.randint(-127, 128, (size, k), dtype=torch.int8, device="cuda") for size in (m, n))
        scales = torch.rand(m, 1, device="cuda"), torch.rand(1, 1, device="cuda")
        for _ in range(2):
            results.append(scaled_mm_triton(a, b.clone(), *scales, None, torch.bfloat16))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(scaled_mm_triton(a.clone(), b, *scales, None, torch.bfloat16))
        torch.cuda.current_stream().wait_stream(stream)
        graph, source = torch.cuda.CUDAGraph(), torch.zeros_like(a)
        with torch.cuda.graph(graph):
            results.append(scaled_mm_triton(source, b, *scales, None, torch.bfloat16))
        source.copy_(a)
        graph.replay()
        expected = scaled_mm_reference(a, b, *scales, None, torch.bfloat16)
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 0), (0, 3), (2, 3, 4), (2, 0, 4)])
def test_empty_is_torch_empty(shape: tuple[int, ...], device: str) -> None:
    expected = torch.empty(shape, dtype=torch.int8, device=device)
    for size in (shape, expected.shape):
        made = launch.empty(size, torch.int8, torch.device(device))
        assert made.shape == expected.shape and made.stride() == expected.stride() and made.is_contiguous()
        assert (made.dtype, made.device.type, made.requires_grad) == (torch.int8, device, False)


def test_threads_that_need_the_same_kernel_compile_it_once() -> None:
    class Kernel:
        arg_names: tuple[str, ...] = ("x", "SIZE")

        def __init__(self) -> None:
            self.compiled: dict[Any, Any] = {}
            self.num_compiling = self.most_at_once = 0

        def __getitem__(self, grid: Any) -> Any:
            return self.call

        def call(self, x: torch.Tensor, SIZE: int) -> Any:
            if SIZE not in self.compiled:
                self.num_compiling += 1
                self.most_at_once = max(self.most_at_once, self.num_compiling)
                others.wait() if SIZE == 1 else time.sleep(0.05)  # the barrier breaks unless another size is compiled meanwhile
                assert SIZE not in self.compiled
                self.num_compiling -= 1
                self.compiled[SIZE] = {(1, 1, 1): lambda *args: None}
            if SIZE == 2:
                others.wait()
            return self.compiled[SIZE]

    kernel, others = Kernel(), threading.Barrier(2, timeout=30)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda size: Launcher(kernel, (1,), SIZE=size)(LINE), (1, 3, 3, 2)))
    assert sorted(kernel.compiled) == [1, 2, 3] and kernel.most_at_once > 1


def test_plans_keep_no_tensor() -> None:
    x = torch.randn(32, 64, device=DEVICE, dtype=torch.bfloat16)
    program = "%0: bf16[M, K] = input\n%1: bf16[M, K] = mul(%0, 2.0)\nstore %1\nquantize %1\nsum_rows %1: f32"
    (x_q, scale), (_, weight_scale) = quantize_rowwise_triton(x), quantize_tensorwise_triton(x)
    results = [
        x_q, scale, weight_scale, *quantize_columnwise_transpose_triton(x), dequantize_triton(x_q, scale, torch.float32),
        *map_rows_triton([x], program), scaled_mm_triton(x_q, x_q.clone(), scale, weight_scale, None, torch.float32),
    ]  # fmt: skip
    alive = [weakref.ref(tensor) for tensor in (x, *results)]
    del x, x_q, scale, weight_scale, _, results
    gc.collect()
    assert not any(tensor() is not None for tensor in alive)
