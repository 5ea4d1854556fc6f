"""Row programs as `fuse_quantization` makes them of models: norms, activations and their gradients."""

import torch

from swcompile.kernels.row_program import Shape, parse
from swcompile.row_regions import MAX_SUMMED

PROGRAMS = {
    "layer_norm": """\
%0: bf16[M, K] = input
%1: bf16[M, K] = input
%2: bf16[1, K] = input
%3: bf16[1, K] = input
%4: bf16[M, K] = add(%0, %1)
%5: f32[M, K] = cast(%4)
%6: f32[M, 1] = sum(%5)
%7: f32[M, 1] = div(%6, 1280.0)
%8: f32[M, K] = sub(%5, %7)
%9: f32[M, K] = mul(%8, %8)
%10: f32[M, 1] = sum(%9)
%11: f32[M, 1] = div(%10, 1280.0)
%12: f32[M, 1] = add(%11, 1e-05)
%13: f32[M, 1] = rsqrt(%12)
%14: f32[M, K] = mul(%8, %13)
%15: f32[M, K] = mul(%14, %2)
%16: f32[M, K] = add(%15, %3)
%17: bf16[M, K] = cast(%16)
store %4
store %7
store %13
store %17
quantize %17""",
    "layer_norm_backward": """\
%0: bf16[M, K] = input
%1: bf16[M, K] = input
%2: bf16[M, K] = input
%3: f32[M, 1] = input
%4: f32[M, 1] = input
%5: bf16[1, K] = input
%6: f32[M, K] = sub(%1, %3)
%7: f32[M, K] = mul(%6, %4)
%8: f32[M, K] = mul(%0, %5)
%9: f32[M, K] = mul(%8, 1280.0)
%10: f32[M, 1] = sum(%8)
%11: f32[M, K] = mul(%8, %7)
%12: f32[M, 1] = sum(%11)
%13: f32[M, K] = mul(%7, %12)
%14: f32[M, K] = sub(%9, %10)
%15: f32[M, K] = sub(%14, %13)
%16: f32[M, 1] = div(%4, 1280.0)
%17: f32[M, K] = mul(%16, %15)
%18: bf16[M, K] = cast(%17)
%19: bf16[M, K] = add(%2, %18)
%20: f32[M, K] = mul(%0, %7)
%21: f32[M, K] = cast(%0)
store %19
quantize %19
sum_rows %20: bf16
sum_rows %21: f32
sum_rows %19: bf16""",
    "rms_norm": """\
%0: bf16[M, K] = input
%1: bf16[M, K] = input
%2: bf16[1, K] = input
%3: bf16[M, K] = add(%0, %1)
%4: f32[M, K] = cast(%3)
%5: f32[M, K] = mul(%4, %4)
%6: f32[M, 1] = sum(%5)
%7: f32[M, 1] = div(%6, 4096.0)
%8: f32[M, 1] = add(%7, 1e-06)
%9: f32[M, 1] = rsqrt(%8)
%10: f32[M, K] = mul(%4, %9)
%11: bf16[M, K] = cast(%10)
%12: bf16[M, K] = mul(%2, %11)
store %3
store %9
store %12
quantize %12""",
    "rms_norm_backward": """\
%0: bf16[M, K] = input
%1: bf16[M, K] = input
%2: bf16[M, K] = input
%3: f32[M, 1] = input
%4: bf16[1, K] = input
%5: bf16[M, K] = mul(%0, %4)
%6: f32[M, K] = cast(%1)
%7: f32[M, K] = mul(%6, %3)
%8: bf16[M, K] = cast(%7)
%9: bf16[M, K] = mul(%0, %8)
%10: f32[M, K] = cast(%5)
%11: f32[M, K] = mul(%10, %6)
%12: f32[M, K] = mul(%10, %3)
%13: f32[M, 1] = sum(%11)
%14: f32[M, 1] = mul(%3, %3)
%15: f32[M, 1] = mul(%14, %3)
%16: f32[M, 1] = mul(%13, -0.5)
%17: f32[M, 1] = mul(%16, %15)
%18: f32[M, 1] = div(%17, 4096.0)
%19: f32[M, K] = mul(%6, 2.0)
%20: f32[M, K] = mul(%18, %19)
%21: f32[M, K] = add(%12, %20)
%22: bf16[M, K] = cast(%21)
%23: bf16[M, K] = add(%2, %22)
store %23
quantize %23
sum_rows %9: bf16""",
    "gelu": """\
%0: bf16[M, K] = input
%1: f32[M, K] = mul(%0, 0.5)
%2: f32[M, K] = mul(%0, 0.7071067811865476)
%3: f32[M, K] = erf(%2)
%4: f32[M, K] = add(%3, 1.0)
%5: bf16[M, K] = mul(%1, %4)
store %5
quantize %5""",
    "gelu_backward": """\
%0: bf16[M, K] = input
%1: bf16[M, K] = input
%2: f32[M, K] = mul(%1, 0.7071067811865476)
%3: f32[M, K] = erf(%2)
%4: f32[M, K] = add(%3, 1.0)
%5: f32[M, K] = mul(%4, 0.5)
%6: f32[M, K] = mul(%1, %1)
%7: f32[M, K] = mul(%6, -0.5)
%8: f32[M, K] = exp(%7)
%9: f32[M, K] = mul(%8, 0.3989422804014327)
%10: f32[M, K] = mul(%1, %9)
%11: f32[M, K] = add(%5, %10)
%12: bf16[M, K] = mul(%0, %11)
store %12
quantize %12
sum_rows %12: bf16""",
    "swiglu": """\
%0: bf16[M, K] = input
%1: bf16[M, K] = input
%2: f32[M, K] = neg(%0)
%3: f32[M, K] = exp(%2)
%4: f32[M, K] = add(%3, 1.0)
%5: f32[M, K] = div(%0, %4)
%6: bf16[M, K] = cast(%5)
%7: bf16[M, K] = mul(%6, %1)
store %7
quantize %7""",
    "swiglu_backward": """\
%0: bf16[M, K] = input
%1: bf16[M, K] = input
%2: bf16[M, K] = input
%3: f32[M, K] = neg(%0)
%4: f32[M, K] = exp(%3)
%5: f32[M, K] = add(%4, 1.0)
%6: f32[M, K] = div(%0, %5)
%7: bf16[M, K] = cast(%6)
%8: bf16[M, K] = mul(%2, %7)
%9: bf16[M, K] = mul(%2, %1)
%10: f32[M, K] = sigmoid(%0)
%11: f32[M, K] = mul(%9, %10)
%12: f32[M, K] = sub(1.0, %10)
%13: f32[M, K] = mul(%0, %12)
%14: f32[M, K] = add(%13, 1.0)
%15: bf16[M, K] = mul(%11, %14)
store %8
store %15
quantize %8
quantize %15""",
}


def program_at(name: str, num_columns: int) -> str:
    """A program as the pass makes it for rows of a length: with as many sums over rows as a multiprocessor holds."""
    lines = PROGRAMS[name].splitlines()
    sums = [line for line in lines if line.startswith("sum_rows")]
    return "\n".join(line for line in lines if line not in sums[MAX_SUMMED // num_columns :])


def make_inputs(text: str, num_rows: int, num_columns: int, device: str) -> list[torch.Tensor]:
    """Random tensors for the inputs of a program."""
    torch.manual_seed(0)
    sizes = {Shape.MATRIX: (num_rows, num_columns), Shape.COLUMN: (num_rows, 1), Shape.ROW: (num_columns,)}
    return [torch.randn(sizes[value.shape], device=device).to(value.dtype) for value in parse(text).inputs]
