"""The kernels of exact KL in Triton, which `_triton.py` launches: one program per row.

The forward reads each logit of both models once and keeps a state per lane; the backward reads once
and writes once, from the end of the row, which a forward before it in the same program read last.
As in the log-prob room nothing crosses rows, nothing is atomic, no sum's order depends on the
layout of the input, and an id out of range, unchecked on CUDA, gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import (
    LOG2_E,
    NOT_HERE,
    expm1,
    row_rate,
    tree_sum,
)


@triton.jit
def _token(ids_ptr, mask_ptr, ignore_index, row):
    """(id, whether the token counts); without ids (-1, the mask)."""
    token = tl.full([], -1, tl.int64)
    live = True
    if ids_ptr is not None:
        token = tl.load(ids_ptr + row).to(tl.int64)
        live = token != ignore_index
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row) != 0)
    return token, live


@triton.jit
def _logits(base, cols, limit):
    inside = (cols >= 0) & (cols < limit)
    return tl.load(base + cols, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _base(top):
    """What is subtracted for a maximum: 0 for -inf, since -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _raise(top, ref_top, total, ref_total, weighted, cross, new, ref_new, rate):
    """Move the sums of `_fold` to larger maxima."""
    shift = top - _base(new)
    ref_shift = ref_top - _base(ref_new)
    shrink = tl.exp2(shift * rate)
    ref_total *= tl.exp2(ref_shift * rate)
    # Without a logit of the reference there is no difference yet.
    ref_shift = tl.where(ref_top == float("-inf"), 0.0, ref_shift)
    gone = shrink == 0.0
    cross = tl.where(gone, 0.0, shrink * tl.fma(shift - ref_shift, total, cross))
    weighted = tl.where(gone, 0.0, shrink * tl.fma(shift, total, weighted))
    return total * shrink, ref_total, weighted, cross


@triton.jit
def _fold(total, ref_total, weighted, cross, widest, z, q, base, ref_base, rate):
    """Add a block of logits to each lane's sums; d = z - max, r = q - ref_max, e = 2**(rate d):

        total = sum e,  ref_total = sum 2**(rate r),  weighted = sum e d,  cross = sum e (d - r)

    d and r are not yet tempered: a finite difference stays finite at any temperature. `widest` is
    the largest d - r, +inf where the reference alone rules a token out.
    """
    d = z - base
    r = q - ref_base
    e = tl.exp2(d * rate)
    difference = d - r
    widest = tl.maximum(widest, difference)  # NaN, where both are -inf, is passed over
    cross = tl.fma(e, tl.where(e == 0.0, 0.0, difference), cross)
    weighted = tl.fma(e, tl.where(e == 0.0, 0.0, d), weighted)
    return total + e, ref_total + tl.exp2(r * rate), weighted, cross, widest


@triton.jit(do_not_specialize=["ignore_index", "inner", "ref_inner"])
def forward_kernel(
    logits_ptr, ref_logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, kl_ptr, logprob_ptr,
    ref_logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr, ref_max_ptr, ref_log_sum_ptr, inner,
    stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner, V, ignore_index,
    inv_temperature, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    token, live = _token(ids_ptr, mask_ptr, ignore_index, row)
    kl = 0.0
    logprob = 0.0
    ref_logprob = 0.0
    entropy = 0.0
    row_max = 0.0
    log_sum = 0.0
    ref_max = 0.0
    ref_log_sum = 0.0
    if live:
        rate = row_rate(inv_temperature, temperatures_ptr, row)
        rate2 = rate * LOG2_E
        z_base = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
        q_base = ref_logits_ptr + (row // ref_inner) * ref_stride_outer
        q_base += (row % ref_inner) * ref_stride_inner
        lane = tl.arange(0, LANES)
        top = tl.full([LANES], float("-inf"), tl.float32)
        ref_top = top
        widest = top
        total = tl.zeros([LANES], tl.float32)
        ref_total = total
        weighted = total
        cross = total
        for start in range(0, V, 2 * LANES):
            cols = start + lane
            z0 = _logits(z_base, cols, V)
            z1 = _logits(z_base, cols + LANES, V)
            q0 = _logits(q_base, cols, V)
            q1 = _logits(q_base, cols + LANES, V)
            new = tl.maximum(top, tl.maximum(z0, z1))
            ref_new = tl.maximum(ref_top, tl.maximum(q0, q1))
            total, ref_total, weighted, cross = _raise(
                top, ref_top, total, ref_total, weighted, cross, new, ref_new, rate2
            )
            top = new
            ref_top = ref_new
            base = _base(top)
            ref_base = _base(ref_top)
            total, ref_total, weighted, cross, widest = _fold(
                total, ref_total, weighted, cross, widest, z0, q0, base, ref_base, rate2
            )
            total, ref_total, weighted, cross, widest = _fold(
                total, ref_total, weighted, cross, widest, z1, q1, base, ref_base, rate2
            )
        row_max = tl.max(top, axis=0)
        ref_max = tl.max(ref_top, axis=0)
        total, ref_total, weighted, cross = _raise(
            top, ref_top, total, ref_total, weighted, cross, row_max, ref_max, rate2
        )
        # Rounded once: a KL of 60 out of terms of 60 would lose digits at each step of a tree.
        exact_total = tree_sum(total.to(tl.float64), LOG2_LANES)
        exact_cross = tree_sum(cross.to(tl.float64), LOG2_LANES)
        total_sum = exact_total.to(tl.float32)
        ref_sum = tree_sum(ref_total, LOG2_LANES)
        empty = total_sum == 0.0
        total_sum = tl.where(empty, 1.0, total_sum)
        log_sum = tl.log(total_sum)
        ref_log_sum = tl.log(tl.where(ref_sum == 0.0, 1.0, ref_sum))
        mean = exact_cross / tl.where(empty, 1.0, exact_total) * rate
        kl = (mean - log_sum + ref_log_sum).to(tl.float32)
        kl = tl.where(tl.max(widest, axis=0) == float("inf"), float("inf"), kl)
        known = log_sum + ref_log_sum
        kl = tl.where(empty, 0.0, tl.where(known == known, kl, known))
        entropy = log_sum - tl.div_rn(tree_sum(weighted, LOG2_LANES), total_sum) * rate
        if ids_ptr is not None:
            legal = (token >= 0) & (token < V)
            z = tl.where(legal, _logits(z_base, token, V), float("nan"))
            q = tl.where(legal, _logits(q_base, token, V), float("nan"))
            logprob = (z - _base(row_max)) * rate - log_sum
            ref_logprob = (q - _base(ref_max)) * rate - ref_log_sum
    tl.store(kl_ptr + row, kl)
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(ref_max_ptr + row, ref_max)
    tl.store(ref_log_sum_ptr + row, ref_log_sum)
    if ids_ptr is not None:
        tl.store(logprob_ptr + row, logprob)
        tl.store(ref_logprob_ptr + row, ref_logprob)
        tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["ignore_index", "inner", "ref_inner"])
def backward_kernel(
    grad_kl_ptr, grad_logprob_ptr, grad_entropy_ptr, logits_ptr, ref_logits_ptr, ids_ptr, mask_ptr,
    temperatures_ptr, max_ptr, log_sum_ptr, ref_max_ptr, ref_log_sum_ptr, kl_ptr, entropy_ptr,
    out_ptr, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner, V,
    ignore_index, inv_temperature, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * V
    lane = tl.arange(0, BLOCK_V)
    token, live = _token(ids_ptr, mask_ptr, ignore_index, row)
    if live:
        rate = row_rate(inv_temperature, temperatures_ptr, row)
        z_base = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
        q_base = ref_logits_ptr + (row // ref_inner) * ref_stride_outer
        q_base += (row % ref_inner) * ref_stride_inner
        row_max = _base(tl.load(max_ptr + row))
        ref_max = _base(tl.load(ref_max_ptr + row))
        log_sum = tl.load(log_sum_ptr + row)
        kl = tl.load(kl_ptr + row)
        with_kl = kl != float("inf")  # an infinite KL has no gradient; what is beside it has
        k = tl.where(with_kl, tl.load(grad_kl_ptr + row) * rate, 0.0)
        # sum p (d - r) in two floats, for it cancels where one token has all of p.
        exact = kl.to(tl.float64) + log_sum - tl.load(ref_log_sum_ptr + row)
        mean = tl.where(with_kl, exact, 0.0).to(tl.float32)
        lost = tl.where(with_kl, exact - mean, 0.0).to(tl.float32)
        if grad_logprob_ptr is not None:
            logprob = (_logits(z_base, token, V) - row_max) * rate - log_sum
            g = tl.load(grad_logprob_ptr + row) * rate
            inside = (token >= 0) & (token < V)
            g = tl.where(inside & (logprob == float("-inf")), 0.0, g)
            g = tl.where(inside | (token == NOT_HERE), g, float("nan"))
            g_token = -g * expm1(logprob)
        if grad_entropy_ptr is not None:
            h = tl.load(grad_entropy_ptr + row) * rate
            entropy_mean = log_sum - tl.load(entropy_ptr + row)
        tl.debug_barrier()  # out may be the logits: all warps have read the token's by now
        last = (V - 1) // BLOCK_V * BLOCK_V
        for back in range(0, V, BLOCK_V):
            cols = last - back + lane
            d = (_logits(z_base, cols, V) - row_max) * rate
            r = (_logits(q_base, cols, V) - ref_max) * rate
            p = tl.exp2((d - log_sum) * LOG2_E)
            slope = tl.where(with_kl, (d - r - mean - lost) * k, 0.0)
            if grad_entropy_ptr is not None:
                # p is 0 below -256; the floor keeps 0 * -inf out.
                slope -= h * (tl.maximum(d, -256.0) - entropy_mean)
            du = tl.where(p == 0.0, 0.0, p * slope)
            if grad_logprob_ptr is not None:
                du += tl.where(cols == token, g_token, -g * p)
            tl.store(out_ptr + cols, du.to(out_ptr.dtype.element_ty), mask=cols < V)
    else:
        for start in range(0, V, BLOCK_V):
            cols = start + lane
            zeros = tl.zeros([BLOCK_V], out_ptr.dtype.element_ty)
            tl.store(out_ptr + cols, zeros, mask=cols < V)


@triton.jit(do_not_specialize=["ignore_index", "inner", "ref_inner"])
def one_pass_kernel(
    grad_kl_ptr, grad_logprob_ptr, grad_entropy_ptr, logits_ptr, ref_logits_ptr, ids_ptr, mask_ptr,
    temperatures_ptr, kl_ptr, logprob_ptr, ref_logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr,
    ref_max_ptr, ref_log_sum_ptr, out_ptr, inner, stride_outer, stride_inner, ref_inner,
    ref_stride_outer, ref_stride_inner, V, ignore_index, inv_temperature, LOG2_LANES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    forward_kernel(
        logits_ptr, ref_logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, kl_ptr, logprob_ptr,
        ref_logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr, ref_max_ptr, ref_log_sum_ptr, inner,
        stride_outer, stride_inner, ref_inner, ref_stride_outer, ref_stride_inner, V, ignore_index,
        inv_temperature, LOG2_LANES,
    )  # fmt: skip
    tl.debug_barrier()  # all warps see what the forward has stored
    backward_kernel(
        grad_kl_ptr, grad_logprob_ptr, grad_entropy_ptr, logits_ptr, ref_logits_ptr, ids_ptr,
        mask_ptr, temperatures_ptr, max_ptr, log_sum_ptr, ref_max_ptr, ref_log_sum_ptr, kl_ptr,
        entropy_ptr, out_ptr, inner, stride_outer, stride_inner, ref_inner, ref_stride_outer,
        ref_stride_inner, V, ignore_index, inv_temperature, BLOCK_V,
    )  # fmt: skip
