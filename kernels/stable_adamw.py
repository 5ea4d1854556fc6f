# mypy: allow-untyped-defs
"""StableAdamW on many tensors at once: how far each second moment lags behind, then the update.

Two ops in two forms. One takes lists of tensors: it is what an emitted graph shows, and what the CPU runs. The other
takes a `TensorTable` of their addresses: what that graph is lowered to on CUDA, where passing hundreds of tensors to an
op costs the host more than the step takes. Shapes: T tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch

from swcompile.kernels.launch import INTERPRETED, tl, triton
from swcompile.kernels.library import Work, define_op
from swcompile.kernels.tensor_table import CHUNK, are_aligned, make_table

Tensors = Sequence[torch.Tensor]

SMALLEST_GUARD = torch.finfo(torch.float32).tiny
"""The second moment is divided by as if it were no smaller, where eps² is."""


def second_moment_ratios(
    weights2: torch.Tensor, scales: torch.Tensor, eps: torch.Tensor, grads: Tensors, exp_avg_sqs: Tensors
) -> torch.Tensor:
    """Sum of ``g² / max(u, eps²)`` of each tensor, with u as this step will leave it (arXiv 2304.13013, Algorithm 2).

    ``g = grad * scale`` and ``u = exp_avg_sq + weight2 * (g² - exp_avg_sq)``, in float32.

    Args:
        weights2: [T] float32, ``1 - β̂2``.
        scales: [T] float32, what gradients are multiplied by.
        eps: [T] float32.
        grads: T floating-point tensors; an empty one in place of a gradient that is not there.
        exp_avg_sqs: T float32 tensors, each laid out as its gradient. Only read.

    Returns:
        [T] float64; NaN or Inf if a gradient, or its square, is not finite. 0 without gradient.
    """
    return SECOND_MOMENT_RATIOS(weights2, scales, eps, grads, exp_avg_sqs)


def stable_adamw_update_(
    takes: torch.Tensor,
    rates: torch.Tensor,
    decays: torch.Tensor,
    weights1: torch.Tensor,
    weights2: torch.Tensor,
    scales: torch.Tensor,
    eps: torch.Tensor,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    remainders: Tensors,
) -> torch.Tensor:
    """Update moments and parameters in place (arXiv 2304.13013, Algorithm 2), tensor by tensor, in float32.

    ``v += weight1 * (g - v)``, ``u += weight2 * (g² - u)``, ``θ -= decay * θ + rate * v / (sqrt(u) + eps)``.

    Args:
        takes: [T] bool; a tensor with False stays as it is, moments included.
        rates: [T] float32, the learning rate after clipping.
        decays: [T] float32, the share of θ that is taken off.
        weights1: [T] float32, ``1 - β̂1``.
        weights2: [T] float32, ``1 - β̂2``.
        scales: [T] float32, what gradients are multiplied by.
        eps: [T] float32.
        params: T tensors, float32 or bfloat16. Updated.
        grads: T floating-point tensors, of any one dtype.
        exp_avgs: T float32 tensors, v. Updated.
        exp_avg_sqs: T float32 tensors, u. Updated.
        remainders: T int16 tensors that make bfloat16 parameters float32 ones (see `join_remainder`), updated; or none.

    Returns:
        [T] float32, the sum of the squares of what was taken off θ.
    """
    return STABLE_ADAMW_UPDATE(
        takes, rates, decays, weights1, weights2, scales, eps, params, grads, exp_avgs, exp_avg_sqs, remainders
    )


def join_remainder(p: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 tensor that a bfloat16 one and its remainder stand for, bit for bit.

    bfloat16 is the upper half of float32: the remainder is the lower half, counted from the nearest bfloat16 (ties
    away from zero), so that p itself is the rounded value.
    """
    return ((p.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def split_remainder(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, remainder) for which `join_remainder` gives the float32 `x`."""
    bits = x.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def second_moment_ratios_reference(
    weights2: torch.Tensor, scales: torch.Tensor, eps: torch.Tensor, grads: Tensors, exp_avg_sqs: Tensors
) -> torch.Tensor:
    """`second_moment_ratios` in plain PyTorch; sums in another order than the kernel."""
    sums = torch.zeros_like(weights2, dtype=torch.float64)
    guards = (eps * eps).clamp_(min=SMALLEST_GUARD)
    for index, (grad, u) in enumerate(zip(grads, exp_avg_sqs, strict=True)):
        if grad.numel():
            squared = (grad.float() * scales[index]).square_()
            new_u = squared.sub(u).mul_(weights2[index]).add_(u)
            sums[index] = squared.div_(new_u.clamp_(min=guards[index])).sum(dtype=torch.float64)
    return sums


def stable_adamw_update_reference(
    takes: torch.Tensor,
    rates: torch.Tensor,
    decays: torch.Tensor,
    weights1: torch.Tensor,
    weights2: torch.Tensor,
    scales: torch.Tensor,
    eps: torch.Tensor,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    remainders: Tensors,
) -> torch.Tensor:
    """`stable_adamw_update_` in plain PyTorch: parameters and moments bit for bit."""
    changes = torch.zeros_like(rates)
    for index in takes.nonzero().flatten().tolist():
        p, v, u = params[index], exp_avgs[index], exp_avg_sqs[index]
        if not p.numel():
            continue
        g = grads[index].float() * scales[index]
        v.add_((g - v).mul_(weights1[index]))
        u.add_(g.square_().sub_(u).mul_(weights2[index]))
        x = join_remainder(p, remainders[index]) if remainders else p.float()
        root = u.double().sqrt_().float()  # the CPU's float32 square root is off by a bit now and then
        change = (v / root.add_(eps[index])).mul_(rates[index])
        change = (x * decays[index]).add_(change)
        x = x - change
        if remainders:
            rounded, remainder = split_remainder(x)
            remainders[index].copy_(remainder)
            p.copy_(rounded)
        else:
            p.copy_(x)
        changes[index] = change.square_().sum()
    return changes


def stable_adamw_update_work(num_elements: int, param_itemsize: int, grad_itemsize: int, *, has_remainder: bool = False) -> Work:
    """Parameter, its remainder and both moments read and written, the gradient read; 16 operations an element."""
    state = param_itemsize + (2 if has_remainder else 0) + 8
    return Work(flops=16 * num_elements, bytes=num_elements * (2 * state + grad_itemsize))


def second_moment_ratios_work(num_elements: int, grad_itemsize: int) -> Work:
    """Gradient and second moment read once; 8 operations an element."""
    return Work(flops=8 * num_elements, bytes=num_elements * (grad_itemsize + 4))


def second_moment_ratios_triton(
    weights2: torch.Tensor, scales: torch.Tensor, eps: torch.Tensor, grads: Tensors, exp_avg_sqs: Tensors
) -> torch.Tensor:
    """`second_moment_ratios` by the Triton kernels: what the op does on CUDA."""
    table = make_table(exp_avg_sqs, [[], grads, [], exp_avg_sqs, []], weights2.device)
    facts = _dtype(grads), are_aligned([*grads, *exp_avg_sqs])
    return second_moment_ratios_of_table(*(weights2, scales, eps, *table, *facts))


def stable_adamw_update_triton(
    takes: torch.Tensor,
    rates: torch.Tensor,
    decays: torch.Tensor,
    weights1: torch.Tensor,
    weights2: torch.Tensor,
    scales: torch.Tensor,
    eps: torch.Tensor,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    remainders: Tensors,
) -> torch.Tensor:
    """`stable_adamw_update_` by the Triton kernels: what the op does on CUDA."""
    table = make_table(params, [params, grads, exp_avgs, exp_avg_sqs, remainders], takes.device)
    is_aligned = are_aligned([*params, *grads, *exp_avgs, *exp_avg_sqs, *remainders])
    facts = _dtype(params), _dtype(grads), is_aligned, bool(remainders)
    numbers = takes, rates, decays, weights1, weights2, scales, eps
    return stable_adamw_update_of_table(*(*numbers, *table, *facts))


PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, REMAINDER = range(5)
"""Columns of the table."""
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _REMAINDER = map(tl.constexpr, range(5))


def second_moment_ratios_of_table(
    weights2: torch.Tensor,
    scales: torch.Tensor,
    eps: torch.Tensor,
    addresses: torch.Tensor,
    num_elements: torch.Tensor,
    chunks: torch.Tensor,
    first_chunks: torch.Tensor,
    grad_dtype: torch.dtype,
    is_aligned: bool,
) -> torch.Tensor:
    """`second_moment_ratios` of the tensors that a `TensorTable` of five columns points to."""
    check_table(addresses)
    partial = torch.empty(chunks.shape[0], dtype=torch.float32, device=chunks.device)
    if chunks.shape[0]:
        _ratios_kernel[(chunks.shape[0],)](
            weights2,
            scales,
            eps,
            addresses,
            num_elements,
            chunks,
            partial,
            addresses.shape[1],
            IS_ALIGNED=is_aligned,
            GRAD_DTYPE=_triton_dtype(grad_dtype),
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return _sum_chunks(partial, first_chunks)


def stable_adamw_update_of_table(
    takes: torch.Tensor,
    rates: torch.Tensor,
    decays: torch.Tensor,
    weights1: torch.Tensor,
    weights2: torch.Tensor,
    scales: torch.Tensor,
    eps: torch.Tensor,
    addresses: torch.Tensor,
    num_elements: torch.Tensor,
    chunks: torch.Tensor,
    first_chunks: torch.Tensor,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    is_aligned: bool,
    has_remainder: bool,
) -> torch.Tensor:
    """`stable_adamw_update_` of the tensors that a `TensorTable` of five columns points to."""
    check_table(addresses)
    partial = torch.empty(chunks.shape[0], dtype=torch.float32, device=chunks.device)
    if chunks.shape[0]:
        _update_kernel[(chunks.shape[0],)](
            takes,
            rates,
            decays,
            weights1,
            weights2,
            scales,
            eps,
            addresses,
            num_elements,
            chunks,
            partial,
            addresses.shape[1],
            IS_ALIGNED=is_aligned,
            PARAM_DTYPE=_triton_dtype(param_dtype),
            GRAD_DTYPE=_triton_dtype(grad_dtype),
            HAS_REMAINDER=has_remainder,
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return _sum_chunks(partial, first_chunks).float()


def check_table(addresses: torch.Tensor) -> None:
    """Raise `RuntimeError` where the addresses cannot be read by a kernel."""
    if addresses.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("a table of addresses is for kernels on a GPU; on the CPU use the op that takes lists")


def _sum_chunks(partial: torch.Tensor, first_chunks: torch.Tensor) -> torch.Tensor:
    sums = torch.empty(first_chunks.shape[0] - 1, dtype=torch.float64, device=partial.device)
    if sums.shape[0]:
        _sum_chunks_kernel[(sums.shape[0],)](partial, first_chunks, sums, BLOCK=512, num_warps=4)
    return sums


def _dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of all tensors that are not empty."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.numel()} or {torch.float32}
    if len(dtypes) > 1:
        raise ValueError(f"tensors of one launch have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop()


def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


_BLOCK = 1024


@triton.jit
def _chunk(num_elements_ptr, chunks_ptr, CHUNK: tl.constexpr):
    """(tensor, where this program's chunk of it begins and ends)."""
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    begin = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(num_elements_ptr + tensor))
    return tensor, begin, end


@triton.jit
def _pointer(address_ptr, dtype: tl.constexpr, IS_ALIGNED: tl.constexpr):
    pointer = tl.load(address_ptr).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if IS_ALIGNED else pointer


@triton.jit
def _ratios_kernel(
    weights2_ptr,
    scales_ptr,
    eps_ptr,
    addresses_ptr,
    num_elements_ptr,
    chunks_ptr,
    partial_ptr,
    num_tensors,
    IS_ALIGNED: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, begin, end = _chunk(num_elements_ptr, chunks_ptr, CHUNK)
    grad_address_ptr = addresses_ptr + _GRAD * num_tensors + tensor
    sums = tl.zeros([BLOCK], tl.float32)
    if tl.load(grad_address_ptr) != 0:
        grad_ptr = _pointer(grad_address_ptr, GRAD_DTYPE, IS_ALIGNED)
        u_ptr = _pointer(addresses_ptr + _EXP_AVG_SQ * num_tensors + tensor, tl.float32, IS_ALIGNED)
        weight2, scale, eps = tl.load(weights2_ptr + tensor), tl.load(scales_ptr + tensor), tl.load(eps_ptr + tensor)
        guard = tl.maximum(eps * eps, _SMALLEST_GUARD)
        whole = begin + (end - begin) // BLOCK * BLOCK  # without a mask, which would forbid wide loads
        for start in range(begin, whole, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            sums += _ratio(tl.load(grad_ptr + offsets), tl.load(u_ptr + offsets), weight2, scale, guard)
        if whole < end:
            offsets = whole + tl.arange(0, BLOCK)
            mask = offsets < end
            grad, u = tl.load(grad_ptr + offsets, mask=mask, other=0.0), tl.load(u_ptr + offsets, mask=mask, other=0.0)
            sums += _ratio(grad, u, weight2, scale, guard)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit
def _ratio(grad, u, weight2, scale, guard):
    g = grad.to(tl.float32) * scale
    squared = g * g
    u = u + weight2 * (squared - u)
    # A NaN has to stay: `maximum` may drop it, and `squared` holds it.
    return tl.div_rn(squared, tl.maximum(u, guard))


@triton.jit
def _sum_chunks_kernel(partial_ptr, first_chunks_ptr, sums_ptr, BLOCK: tl.constexpr):
    """Program t: sum over the chunks of tensor t, always in the same order."""
    begin = tl.load(first_chunks_ptr + tl.program_id(0))
    end = tl.load(first_chunks_ptr + tl.program_id(0) + 1)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float64)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit
def _update_kernel(
    takes_ptr,
    rates_ptr,
    decays_ptr,
    weights1_ptr,
    weights2_ptr,
    scales_ptr,
    eps_ptr,
    addresses_ptr,
    num_elements_ptr,
    chunks_ptr,
    partial_ptr,
    num_tensors,
    IS_ALIGNED: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    HAS_REMAINDER: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, begin, end = _chunk(num_elements_ptr, chunks_ptr, CHUNK)
    sums = tl.zeros([BLOCK], tl.float32)
    if tl.load(takes_ptr + tensor) != 0:
        addresses_ptr += tensor
        param_ptr = _pointer(addresses_ptr + _PARAM * num_tensors, PARAM_DTYPE, IS_ALIGNED)
        grad_ptr = _pointer(addresses_ptr + _GRAD * num_tensors, GRAD_DTYPE, IS_ALIGNED)
        v_ptr = _pointer(addresses_ptr + _EXP_AVG * num_tensors, tl.float32, IS_ALIGNED)
        u_ptr = _pointer(addresses_ptr + _EXP_AVG_SQ * num_tensors, tl.float32, IS_ALIGNED)
        remainder_ptr = _pointer(addresses_ptr + _REMAINDER * num_tensors, tl.int16, IS_ALIGNED)
        rate, decay = tl.load(rates_ptr + tensor), tl.load(decays_ptr + tensor)
        weight1, weight2 = tl.load(weights1_ptr + tensor), tl.load(weights2_ptr + tensor)
        scale, eps = tl.load(scales_ptr + tensor), tl.load(eps_ptr + tensor)
        whole = begin + (end - begin) // BLOCK * BLOCK
        for start in range(begin, whole, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            sums += _update(
                param_ptr, grad_ptr, v_ptr, u_ptr, remainder_ptr, offsets, None,
                rate, decay, weight1, weight2, scale, eps, PARAM_DTYPE, HAS_REMAINDER,
            )  # fmt: skip
        if whole < end:
            offsets = whole + tl.arange(0, BLOCK)
            sums += _update(
                param_ptr, grad_ptr, v_ptr, u_ptr, remainder_ptr, offsets, offsets < end,
                rate, decay, weight1, weight2, scale, eps, PARAM_DTYPE, HAS_REMAINDER,
            )  # fmt: skip
    tl.store(partial_ptr + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit
def _update(
    param_ptr, grad_ptr, v_ptr, u_ptr, remainder_ptr, offsets, mask,
    rate, decay, weight1, weight2, scale, eps, PARAM_DTYPE: tl.constexpr, HAS_REMAINDER: tl.constexpr,
):  # fmt: skip
    """Update the elements at `offsets`; the squares of what is taken off the parameter."""
    param = tl.load(param_ptr + offsets, mask=mask)
    g = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32) * scale
    v, u = tl.load(v_ptr + offsets, mask=mask), tl.load(u_ptr + offsets, mask=mask)
    v = v + weight1 * (g - v)
    u = u + weight2 * (g * g - u)
    if HAS_REMAINDER:
        remainder = tl.load(remainder_ptr + offsets, mask=mask).to(tl.int32)
        bits = (param.to(tl.int16, bitcast=True).to(tl.int32) << 16) + remainder
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = param.to(tl.float32)
    change = x * decay + rate * tl.div_rn(v, tl.sqrt_rn(u) + eps)
    x = x - change
    if HAS_REMAINDER:
        bits = x.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(remainder_ptr + offsets, (bits - (upper << 16)).to(tl.int16), mask=mask)
        tl.store(param_ptr + offsets, upper.to(tl.int16).to(PARAM_DTYPE, bitcast=True), mask=mask)
    else:
        tl.store(param_ptr + offsets, x.to(PARAM_DTYPE), mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    tl.store(u_ptr + offsets, u, mask=mask)
    if mask is not None:
        change = tl.where(mask, change, 0.0)
    return change * change


_SMALLEST_GUARD = tl.constexpr(SMALLEST_GUARD)


def _fake_ratios(weights2: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(weights2, dtype=torch.float64)


def _fake_update(takes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(takes, dtype=torch.float32)


_TABLE = "Tensor addresses, Tensor num_elements, Tensor chunks, Tensor first_chunks"
_COEFFICIENTS = (
    "Tensor takes, Tensor rates, Tensor decays, Tensor weights1, Tensor weights2, Tensor scales, Tensor eps"
)

SECOND_MOMENT_RATIOS = define_op(
    "second_moment_ratios(Tensor weights2, Tensor scales, Tensor eps, Tensor[] grads, Tensor[] exp_avg_sqs) -> Tensor",
    reference=second_moment_ratios_reference,
    cuda=second_moment_ratios_triton,
    fake=_fake_ratios,
)
STABLE_ADAMW_UPDATE = define_op(
    f"stable_adamw_update_({_COEFFICIENTS}, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] remainders) -> Tensor",
    reference=stable_adamw_update_reference,
    cuda=stable_adamw_update_triton,
    fake=_fake_update,
)
SECOND_MOMENT_RATIOS_OF_TABLE = define_op(
    f"second_moment_ratios_of_table(Tensor weights2, Tensor scales, Tensor eps, {_TABLE}, ScalarType grad_dtype, bool is_aligned) -> Tensor",
    reference=second_moment_ratios_of_table,
    cuda=second_moment_ratios_of_table,
    fake=_fake_ratios,
)
STABLE_ADAMW_UPDATE_OF_TABLE = define_op(
    f"stable_adamw_update_of_table({_COEFFICIENTS}, {_TABLE}, ScalarType param_dtype, ScalarType grad_dtype, "
    "bool is_aligned, bool has_remainder) -> Tensor",
    reference=stable_adamw_update_of_table,
    cuda=stable_adamw_update_of_table,
    fake=_fake_update,
)
