"""Compiles row programs for GPUs that need not be there, and looks for registers that did not suffice."""

import torch
from row_programs import PROGRAMS

from swcompile.kernels.row_program import Action, Shape, parse


def main() -> None:
    """Every program at a width that models have; the last line that it prints says that all is well."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swcompile.kernels.row_program_triton import PIECE_PER_WARP, candidates, compile_source, source

    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    for name, num_columns in (
        ("layer_norm", 1280), ("layer_norm_backward", 1280), ("rms_norm_backward", 4096), ("gelu", 5120), ("gelu_backward", 5120),
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
