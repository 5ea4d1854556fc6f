"""Row programs of the kinds that models need; run as a program, it compiles them for GPUs that need not be there."""

import torch

from swcompile.kernels.row_program import Action, Shape, parse

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


def make_inputs(text: str, num_rows: int, num_columns: int, device: str) -> list[torch.Tensor]:
    """Random tensors for the inputs of a program."""
    torch.manual_seed(0)
    sizes = {Shape.MATRIX: (num_rows, num_columns), Shape.COLUMN: (num_rows, 1), Shape.ROW: (num_columns,)}
    return [torch.randn(sizes[value.shape], device=device).to(value.dtype) for value in parse(text).inputs]


def main() -> None:
    """Compile every program for a few generations of GPUs, and look for registers that did not suffice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swcompile.kernels.row_program_triton import PIECE_PER_WARP, candidates, compile_source, source

    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    for name, num_columns in (
        ("layer_norm", 1280), ("layer_norm_backward", 1280), ("gelu", 5120), ("gelu_backward", 5120),
        ("swiglu", 14336), ("swiglu_backward", 14336),
    ):  # fmt: skip
        program = parse(PROGRAMS[name])
        config = candidates(program, num_columns)[0]
        width = PIECE_PER_WARP * config.warps_per_row
        kernel = compile_source(source(program, triton.cdiv(num_columns, width))).row_kernel
        signature = {}
        for number, value in enumerate(program.inputs):
            signature[f"in{number}"] = pointers[value.dtype]
            if value.shape is Shape.MATRIX:
                signature[f"stride{number}"] = "i32"
        for number, output in enumerate(program.outputs):
            stored = pointers[program.value(output.ref).dtype]
            signature[f"out{number}"] = {Action.STORE: stored, Action.QUANTIZE: "*i8", Action.SUM_ROWS: "*fp32"}[output.action]
            if output.action is Action.QUANTIZE:
                signature[f"scale{number}"] = "*fp32"
        signature["num_rows"] = "i32"
        names = kernel.arg_names
        aligned = {(names.index(argument),): [["tt.divisibility", 16]] for argument in signature if argument != "num_rows"}
        constants = {"K": num_columns, "BLOCK_M": config.num_warps // config.warps_per_row, "WIDTH": width}
        constants |= {"EVEN_M": True, "EVEN_K": num_columns % width == 0}
        for capability in (80, 90):
            compiled = triton.compile(
                ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": config.num_warps, "enable_fp_fusion": False},
            )
            ptx = compiled.asm["ptx"]
            assert "st.local" not in ptx and "ld.local" not in ptx, name
            loads = [line for line in ptx.splitlines() if "ld.global" in line and ".v4" in line]
            assert loads, f"{name}: no load of 16 bytes"
            print(name, capability, "shared memory", compiled.metadata.shared)
    print("all compiled")


if __name__ == "__main__":
    main()
