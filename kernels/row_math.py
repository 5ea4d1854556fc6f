# mypy: allow-untyped-defs
"""Functions that row programs are made of, in Triton, in float32.

Triton's own `erf` and `sigmoid` take 29 and 14 instructions an element on Hopper, most of them for subnormals, and
bandwidth leaves time for about 30 in all. Here they take 12 and 4.
"""

from swcompile.kernels.launch import INTERPRETED, tl, triton

_LOG2_E = tl.constexpr(1.4426950408889634)
_SIGN = tl.constexpr(-0x80000000)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_bfloat16(x):
    """A matrix in bfloat16, by way of float32, two elements an instruction.

    The compiler's own conversion of a value that is needed in float32 again is one element an instruction, and of a
    kind that a multiprocessor issues an eighth as often as an addition.
    """
    if _INTERPRETED:
        return x.to(tl.bfloat16)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x.to(tl.float32)], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def from_bfloat16(x):
    """A matrix of bfloat16 in float32, an instruction an element: two elements lie in one register, a half each."""
    if _INTERPRETED:
        return x.to(tl.float32)
    else:
        halves = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=&r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2
        )
        return halves.to(tl.float32, bitcast=True)


@triton.jit
def inverse_of_positive(x):
    """1 / x for x in [2^-100, 2^100], and 0 for Inf. Off by an ulp at most, one instruction."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return inverse_of_positive(1.0 + tl.exp2(x * -_LOG2_E))


@triton.jit
def tanh(x):
    """1 - 2 / (1 + e^2x), and x - x^3 / 3 near 0, where the difference would have no correct bits left."""
    square = x * x
    result = 1.0 - 2.0 * inverse_of_positive(1.0 + tl.exp2(x * (2.0 * _LOG2_E)))
    return tl.where(square < 1e-3, tl.fma(square * x, tl.full(x.shape, -1.0 / 3.0, tl.float32), x), result)


@triton.jit
def erf(x, SCALE: tl.constexpr):
    """Error function of ``SCALE * x``, for a SCALE above 0. Off by less than 6e-7."""
    return erf_by(x, tl.exp2(x * x * (-SCALE * SCALE * _LOG2_E)), SCALE)


@triton.jit
def erf_by(x, gaussian, SCALE: tl.constexpr):
    """`erf` where ``e^-(SCALE x)²`` is known: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    t = inverse_of_positive(tl.fma(tl.abs(x), tl.full(x.shape, 0.3275911 * SCALE, tl.float32), 1.0))
    polynomial = tl.fma(t, tl.full(x.shape, 1.061405429, tl.float32), -1.453152027)
    polynomial = tl.fma(polynomial, t, 1.421413741)
    polynomial = tl.fma(polynomial, t, -0.284496736)
    polynomial = tl.fma(polynomial, t, 0.254829592)
    result = tl.fma(polynomial * t, -gaussian, 1.0)
    sign = x.to(tl.int32, bitcast=True) & _SIGN
    return (result.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def relu(x):
    """max(x, 0), where NaN stays NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def larger(x, y):
    """The larger one; NaN where one of both is."""
    return tl.maximum(x, y, tl.PropagateNan.ALL)
