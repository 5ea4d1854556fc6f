"""Compiles row programs for GPUs that need not be there, and looks for registers that did not suffice."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from row_programs import PROGRAMS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from swcompile.kernels.row_program import Action, RowProgram, Shape, parse
from swcompile.kernels.row_program_source import source
from swcompile.kernels.row_program_triton import MAX_SPILLS, candidates, compile_source, loads_ahead

MASKS = """\
%0: bf16[M, K] = input
%1: b8[M, K] = input
%2: f32[M, 1] = amax(%0)
%3: f32[M, K] = sub(%0, %2)
%4: f32[M, K] = cast(%1)
%5: f32[M, K] = add(%3, %4)
%6: b8[M, K] = gt(%5, 0.25)
%7: f32[M, K] = where(%6, %5, %1)
%8: b8[M, K] = cast(%7)
%9: f32[M, K] = tanh(%7)
%10: f32[M, K] = relu(%9)
%11: f32[M, K] = div(%10, %2)
%12: bf16[M, K] = sigmoid(%11)
store %6
store %8
quantize %12
sum_rows %7: f32"""
MANY_WIDE_INPUTS = (
    "".join(f"%{number}: f32[M, K] = input\n" for number in range(6))
    + "%6: f32[M, K] = add(%0, %1)\n%7: f32[M, K] = add(%2, %3)\n%8: f32[M, K] = add(%4, %5)\n%9: f32[M, K] = add(%6, %7)\n"
    + "%10: f32[M, K] = mul(%8, %9)\nquantize %10\nsum_rows %10: f32"
)
OWN = {"masks": MASKS, "many wide inputs": MANY_WIDE_INPUTS}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may have, by compute capability; a multiprocessor has 1 KB more."""
WIDTHS = [
    ("layer_norm", 1280), ("layer_norm_backward", 1280), ("rms_norm_backward", 4096), ("gelu", 5120), ("gelu_backward", 5120),
    ("gelu_backward", 14336), ("swiglu", 14336), ("swiglu_backward", 14336), ("masks", 1280), ("many wide inputs", 16384),
]  # fmt: skip
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1"}


def signature_of(program: RowProgram) -> dict[str, str]:
    """Types of the arguments of a program's `row_kernel`, but its constants."""
    types = {}
    for number, value in enumerate(program.inputs):
        types[f"in{number}"] = POINTERS[value.dtype]
    for number, output in enumerate(program.outputs):
        stored = POINTERS[program.value(output.ref).dtype]
        types[f"out{number}"] = {Action.STORE: stored, Action.QUANTIZE: "*i8", Action.SUM_ROWS: "*fp32"}[output.action]
        if output.action is Action.QUANTIZE:
            types[f"scale{number}"] = "*fp32"
    strides = {f"stride{n}": "i32" for n, value in enumerate(program.inputs) if value.shape is Shape.MATRIX}
    return types | strides | {"num_rows": "i32"}


def compile_for(
    capability: int, kernel: object, types: dict[str, str], constants: dict[str, object], **options: int | None
) -> CompiledKernel:
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if not name.startswith("num")}
    kernel_source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    options["enable_fp_fusion"] = False
    compiled = triton.compile(kernel_source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability], "more shared memory than there is"
    return compiled


def stack_bytes(compiled: CompiledKernel) -> int:
    """Bytes a thread that did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"STACK:(\d+)", usage)
    return int(found)


def main() -> None:
    """Every program at a width that models have; the last line that it prints says that all is well."""
    for name, num_columns in WIDTHS:
        program = parse(OWN.get(name) or PROGRAMS[name])
        for capability in (80, 90):
            for config in candidates(program, num_columns):
                constants = {"K": num_columns, "BLOCK_M": config.rows, "WIDTH": config.width, "OVERLAP": capability >= 90}
                constants |= {"EVEN_M": True, "EVEN_K": num_columns % config.width == 0}
                ahead = loads_ahead(program, config, num_columns, SHARED_MEMORY[capability] + 1024)
                module = compile_source(source(program, triton.cdiv(num_columns, config.width), ahead))
                limits = {"num_warps": config.num_warps, "maxnreg": config.max_registers}
                compiled = compile_for(capability, module.row_kernel, signature_of(program), constants, **limits)
                spilled = stack_bytes(compiled)
                if config.max_registers is None or spilled <= 4 * MAX_SPILLS:
                    break
            assert name in OWN or config.max_registers or spilled == 0, f"{name}: registers spill"
            lines = compiled.asm["ptx"].splitlines()
            loads = f".v{config.adjacent // 2}", f"0x{2 * config.adjacent:x},"  # to registers, to shared memory
            assert any(
                ("ld.global" in line and loads[0] in line) or ("cp.async" in line and loads[1] in line) for line in lines
            ), f"{name}: elements are not loaded {config.adjacent} at a time"
            print(name, capability, tuple(config), "shared memory", compiled.metadata.shared)
        sums = {f"out{n}": POINTERS[o.dtype] for n, o in enumerate(program.outputs) if o.action is Action.SUM_ROWS}
        if sums:
            types = {"partial": "*fp32", **sums, "num_programs": "i32"}
            compile_for(90, module.sum_kernel, types, {"K": num_columns, "BLOCK_P": 256, "BLOCK_K": 16, "OVERLAP": True}, num_warps=4)
    print("all compiled")


if __name__ == "__main__":
    main()
