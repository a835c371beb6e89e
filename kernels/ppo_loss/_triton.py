"""Policy, value and PPO losses in Triton: losses, gradients and statistics without a host read.

`loss_kernel` walks a part of a row per program, writes its gradients and keeps its sums; then the
sums of all parts are added in their order, in float64. Programs of one launch cannot wait for each
other, so what divides every gradient must be there before: where that is the number of unmasked
tokens or rows, `count_kernel` counts each row (and averages its log-ratio for gspo). It also writes
a 0, with which the programs of `loss_kernel` count how many of them are done: the last one adds the
sums. Without it, or with more parts than one program should add, `finish_kernel` does. So a call is
two launches, and three where it is large and has to count.

The length is never specialised on and parts have a fixed length, so sums have one order.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting
from rlhf_fast.kernels._common.device_math import tree_sum
from rlhf_fast.kernels._common.launch import on_device_of
from rlhf_fast.kernels.kl._triton_estimate import ESTIMATORS

from ._kernels import KINDS, LOSSES, REDUCTIONS
from ._triton_terms import (
    LOG_RATIO_LIMIT,
    clamped_log_ratio,
    difference,
    kl_term,
    policy_term,
    ratio,
    value_term,
)
from ._triton_totals import count_kernel, denominator_of, finish, finish_kernel
from .reference import STATS, bounds

# (longest row, log2 of the tokens per block, warps): four tokens per thread, 16 bytes a load; with
# up to 15 sums per lane eight would take 120 registers. From reasoning and the register table
# alone: not tuned on a GPU.
SHAPES = ((128, 7, 1), (None, 9, 4))
PART = 8  # blocks of a part
FINISH = 8, 10, 8  # log2 of the parts and of the rows that are read at once; warps
# A program of `loss_kernel` adds the sums of so many times the parts that it reads at once; a
# launch costs about as much as eight reads one behind the other. Not tuned on a GPU.
READS = 8
SCALE_BLOCK = 1024  # elements: 8 per thread of 4 warps
# The interpreter runs rows of tests: small blocks, so that they have several parts.
INTERPRETER_SHAPE, INTERPRETER_FINISH = (4, 1), (2, 1, 1)


@triton.jit
def _policy_tokens(
    logprob_ptr, old_logprob_ptr, advantages_ptr, weights_ptr, ref_logprob_ptr, grad_logprob_ptr,
    grad_advantages_ptr, i, inside, live, factor, mean_ratio, clip_low, clip_high, dual_clip,
    kl_coef, KIND: tl.constexpr, ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a block; (loss, d, k3, rho, below, above, dual, kl), 0 if masked."""
    lp = tl.load(logprob_ptr + i, mask=live, other=0.0)
    d = difference(lp, tl.load(old_logprob_ptr + i, mask=live, other=0.0))
    rho, k3 = ratio(clamped_log_ratio(d))
    if KIND == 1:
        rho = tl.where(live, mean_ratio, 0.0)
    advantage = tl.load(advantages_ptr + i, mask=live, other=0.0)
    loss, slope, below, above, dual = policy_term(
        lp, advantage, rho, tl.abs(d) > LOG_RATIO_LIMIT, clip_low, clip_high, dual_clip, KIND
    )
    grad_advantage = -lp * factor
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + i, mask=live, other=0.0)
        loss *= weight
        slope *= weight
        grad_advantage *= weight
    kl = tl.zeros(lp.shape, tl.float32)
    if ref_logprob_ptr is not None:
        ref = tl.load(ref_logprob_ptr + i, mask=live, other=0.0)
        kl, kl_slope = kl_term(lp, ref, kl_coef, ESTIMATOR)
        slope += kl_slope
    tl.store(grad_logprob_ptr + i, tl.where(live, slope * factor, 0.0), mask=inside)
    if grad_advantages_ptr is not None:
        tl.store(grad_advantages_ptr + i, tl.where(live, grad_advantage, 0.0), mask=inside)
    return loss, d, k3, tl.where(live, rho, 0.0), below & live, above & live, dual & live, kl


@triton.jit
def _value_tokens(
    values_ptr, old_values_ptr, returns_ptr, grad_values_ptr, i, inside, live, factor, value_clip,
    value_coef,
):  # fmt: skip
    """Stores the gradients of a block; (loss, clipped), 0 if masked."""
    value = tl.load(values_ptr + i, mask=live, other=0.0)
    old_value = tl.load(old_values_ptr + i, mask=live, other=0.0)
    target = tl.load(returns_ptr + i, mask=live, other=0.0)
    loss, slope, clipped = value_term(value, old_value, target, value_clip)
    some = live & (value_coef != 0.0)
    tl.store(grad_values_ptr + i, tl.where(some, slope * (value_coef * factor), 0.0), mask=inside)
    return loss, clipped & live


@triton.jit(do_not_specialize=["rows", "T"])
def loss_kernel(
    logprob_ptr, old_logprob_ptr, advantages_ptr, weights_ptr, values_ptr, old_values_ptr,
    returns_ptr, entropy_ptr, ref_logprob_ptr, mask_ptr, grad_logprob_ptr, grad_advantages_ptr,
    grad_values_ptr, grad_entropy_ptr, normalizer_ptr, counts_ptr, means_ptr, sums_ptr, loss_ptr,
    stats_ptr, rows, T, divisor, clip_low, clip_high, dual_clip, value_clip, value_coef,
    entropy_coef, kl_coef, KIND: tl.constexpr, ESTIMATOR: tl.constexpr, REDUCTION: tl.constexpr,
    LOG2_BLOCK: tl.constexpr, PART: tl.constexpr, LOG2_ROWS: tl.constexpr,
    LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of a part of a row, and its sums in the columns of sums_ptr [16, parts].

    With loss_ptr the last program adds them.
    """
    BLOCK: tl.constexpr = 2**LOG2_BLOCK
    part = tl.program_id(0)
    parts_of_row = tl.cdiv(T, BLOCK * PART)
    row = part // parts_of_row
    begin = row.to(tl.int64) * T
    denominator, _ = denominator_of(
        counts_ptr, normalizer_ptr, rows, T, divisor, REDUCTION, LOG2_ROWS
    )
    scale = 1.0
    if REDUCTION == 2:
        count = T
        if counts_ptr is not None:
            count = tl.load(counts_ptr + row)
        scale = tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32))
    factor = tl.div_rn(scale, denominator)
    mean_ratio = 1.0
    if KIND == 1:
        mean_ratio, _ = ratio(tl.load(means_ptr + row))

    zero = tl.zeros([BLOCK], tl.float32)
    policy, differences, k3s, ratios, kls = zero, zero, zero, zero, zero
    ratio_min, ratio_max = tl.full([BLOCK], float("inf"), tl.float32), zero
    belows, aboves, duals, value_clips = zero, zero, zero, zero
    value_losses, entropies, tokens = zero, zero, zero
    first = part % parts_of_row * (BLOCK * PART)
    for start in range(first, tl.minimum(first + BLOCK * PART, T), BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < T
        i = begin + t
        live = inside
        if mask_ptr is not None:
            live = inside & (tl.load(mask_ptr + i, mask=inside, other=0) != 0)
        if counts_ptr is None:
            tokens += live.to(tl.float32)
        if logprob_ptr is not None:
            loss, d, k3, rho, below, above, dual, kl = _policy_tokens(
                logprob_ptr, old_logprob_ptr, advantages_ptr, weights_ptr, ref_logprob_ptr,
                grad_logprob_ptr, grad_advantages_ptr, i, inside, live, factor, mean_ratio,
                clip_low, clip_high, dual_clip, kl_coef, KIND, ESTIMATOR,
            )  # fmt: skip
            policy += loss
            differences += d
            k3s += k3
            ratios += rho
            kls += kl
            ratio_min = tl.minimum(ratio_min, tl.where(live, rho, float("inf")))
            ratio_max = tl.maximum(ratio_max, rho)
            belows += below.to(tl.float32)
            aboves += above.to(tl.float32)
            duals += dual.to(tl.float32)
        if values_ptr is not None:
            loss, clipped = _value_tokens(
                values_ptr, old_values_ptr, returns_ptr, grad_values_ptr, i, inside, live, factor,
                value_clip, value_coef,
            )  # fmt: skip
            value_losses += loss
            value_clips += clipped.to(tl.float32)
        if entropy_ptr is not None:
            entropies += tl.load(entropy_ptr + i, mask=live, other=0.0)
            grad = tl.where(live, -entropy_coef * factor, 0.0)
            tl.store(grad_entropy_ptr + i, grad, mask=inside)

    out = sums_ptr + part
    parts = tl.num_programs(0)
    entropy = tree_sum(entropies, LOG2_BLOCK)
    kl = tree_sum(kls, LOG2_BLOCK)
    tl.store(out, tree_sum(policy, LOG2_BLOCK) * scale)
    tl.store(out + parts, tree_sum(value_losses, LOG2_BLOCK) * scale)
    tl.store(out + 2 * parts, entropy * scale)
    tl.store(out + 3 * parts, kl * scale)
    tl.store(out + 4 * parts, entropy)
    tl.store(out + 5 * parts, kl)
    tl.store(out + 6 * parts, tree_sum(differences, LOG2_BLOCK))
    tl.store(out + 7 * parts, tree_sum(k3s, LOG2_BLOCK))
    tl.store(out + 8 * parts, tree_sum(ratios, LOG2_BLOCK))
    tl.store(out + 9 * parts, tree_sum(belows, LOG2_BLOCK))
    tl.store(out + 10 * parts, tree_sum(aboves, LOG2_BLOCK))
    tl.store(out + 11 * parts, tree_sum(duals, LOG2_BLOCK))
    tl.store(out + 12 * parts, tree_sum(value_clips, LOG2_BLOCK))
    tl.store(out + 13 * parts, tl.min(ratio_min, axis=0))
    tl.store(out + 14 * parts, tl.max(ratio_max, axis=0))
    if counts_ptr is None:
        tl.store(out + 15 * parts, tree_sum(tokens, LOG2_BLOCK))
    if loss_ptr is not None:
        # All threads have stored before the one that counts them releases their sums; the last
        # program acquires those of all others, and reads them in the parts' order.
        tl.debug_barrier()
        done = tl.atomic_add(counts_ptr + rows, 1, sem="acq_rel", scope="gpu")
        if done == parts - 1:  # to keep what divides so long would cost a spill
            denominator, counted = denominator_of(
                counts_ptr, normalizer_ptr, rows, T, divisor, REDUCTION, LOG2_ROWS
            )
            finish(
                sums_ptr, loss_ptr, stats_ptr, parts, denominator, counted, value_coef,
                entropy_coef, kl_coef, True, LOG2_LANES,
            )  # fmt: skip


def _shape(length: int) -> tuple[int, int]:
    """(log2 of the tokens per block, warps)."""
    if interpreting():
        return INTERPRETER_SHAPE
    return next(shape for longest, *shape in SHAPES if longest is None or length <= longest)


def _own_lanes(warps: int) -> int:
    """log2 of the parts that a program of `loss_kernel` reads at once: 8 doubles per thread."""
    return 3 + warps.bit_length()


def _counts(tokens, kind, divided, reduction, log2_block, warps):
    """(unmasked tokens of each row and a 0, their mean log-ratio for gspo); None if not needed."""
    logprob, old_logprob, *_, mask = tokens
    given = reduction == "token-sum" or (divided and reduction != "seq-mean-token-mean")
    if kind != "gspo" and (mask is None or given):
        return None, None
    like = logprob if mask is None else mask
    rows, length = like.shape
    counts = torch.empty(rows + 1, dtype=torch.int32, device=like.device)
    means = logprob.new_empty(rows) if kind == "gspo" else None
    count_kernel[(rows,)](
        logprob, old_logprob, mask, counts, means, length, log2_block,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return counts, means


def _launch(tokens, grads, normalizer, divisor, kind, estimator, reduction, clips, coefficients):
    """(loss, stats) of the tensors `tokens`; fills `grads`. Both in the order of `loss_kernel`."""
    like = next(x for x in tokens if x is not None)
    if like.numel() == 0:
        return like.new_zeros(()), like.new_zeros(len(STATS))
    loss, stats = like.new_empty(()), like.new_empty(len(STATS))
    rows, length = like.shape
    log2_block, warps = _shape(length)
    log2_lanes, log2_rows, finish_warps = INTERPRETER_FINISH if interpreting() else FINISH
    parts = rows * triton.cdiv(length, PART << log2_block)
    sums = like.new_empty(16, parts)
    divided = normalizer is not None or divisor is not None
    divisor = -1.0 if divisor is None else divisor
    clip_low, clip_high, dual_clip, value_clip = clips
    clips = (
        *bounds(clip_low, clip_high),
        dual_clip or 0.0,
        -1.0 if value_clip is None else value_clip,
    )
    by = REDUCTIONS[reduction]
    with on_device_of(like):
        counts, means = _counts(tokens, kind, divided, reduction, log2_block, warps)
        own_lanes = log2_lanes if interpreting() else _own_lanes(warps)
        alone = counts is not None and parts <= READS << own_lanes
        results = (loss, stats) if alone else (None, None)
        loss_kernel[(parts,)](
            *tokens, *grads, normalizer, counts, means, sums, *results, rows, length, divisor,
            *clips, *coefficients, KINDS[kind], ESTIMATORS[estimator], by, log2_block, PART,
            log2_rows, own_lanes, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
        if not alone:
            finish_kernel[(1,)](
                sums, counts, normalizer, loss, stats, parts, rows, length, divisor, *coefficients,
                by, log2_lanes, log2_rows, num_warps=finish_warps, enable_fp_fusion=False,
            )  # fmt: skip
    return loss, stats


@triton.jit(do_not_specialize=["size"])
def scale_kernel(
    grad_ptr, unit_ptr, out_ptr, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grad * unit; 0 stays 0 where grad overflowed: a masked token gets nothing, not 0 * inf."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr).to(tl.float32)
    if IN_PLACE:  # a product with 1 is there already: nothing is read or written
        size = tl.where(grad == 1.0, 0, size)
    inside = i < size
    unit = tl.load(unit_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, tl.where(unit == 0.0, 0.0, unit * grad), mask=inside)


def scale_unit_gradient(
    grad: torch.Tensor, unit: torch.Tensor, owned: bool = False
) -> torch.Tensor:
    """grad * unit, where grad is a scalar on the device; in place of `unit` if it is `owned`."""
    unit = unit.contiguous()
    out = unit if owned else torch.empty_like(unit)
    if size := unit.numel():
        with on_device_of(unit):
            scale_kernel[(triton.cdiv(size, SCALE_BLOCK),)](
                grad, unit, out, size, owned, SCALE_BLOCK, num_warps=4, enable_fp_fusion=False
            )
    return out


policy_loss, value_loss, ppo_loss = (partial(loss, _launch) for loss in LOSSES)

_FLOATS = (
    "logprob", "old_logprob", "advantages", "weights", "values", "old_values", "returns", "entropy",
    "ref_logprob", "grad_logprob", "grad_advantages", "grad_values", "grad_entropy", "means",
    "sums", "normalizer", "loss", "stats",
)  # fmt: skip
_POINTERS = {f"{name}_ptr": "*fp32:16" for name in _FLOATS} | {
    "mask_ptr": "*i1:16",
    "counts_ptr": "*i32:16",
}
_SCALARS = (
    "divisor", "clip_low", "clip_high", "dual_clip", "value_clip", "value_coef", "entropy_coef",
    "kl_coef",
)  # fmt: skip
_TYPES = _POINTERS | dict.fromkeys(_SCALARS, "fp32") | dict.fromkeys(("rows", "T", "parts"), "i32")


def _aot(kernel, warps, without=(), **constants):
    """One entry of AOT_SIGNATURES; pointers that are left out are None."""
    absent = {f"{name}_ptr" for name in without}
    types = {k: _TYPES[k] for k in kernel.arg_names if k in _TYPES and k not in absent}
    return kernel, types, constants, warps


def _aot_loss(shape, kind, without, reduction=0, estimator=3):
    log2_block, warps = shape
    return _aot(
        loss_kernel, warps, without, KIND=kind, ESTIMATOR=estimator, REDUCTION=reduction,
        LOG2_BLOCK=log2_block, PART=PART, LOG2_ROWS=FINISH[1], LOG2_LANES=_own_lanes(warps),
    )  # fmt: skip


def _aot_finish(without):
    log2_lanes, log2_rows, warps = FINISH
    return _aot(
        finish_kernel, warps, without, REDUCTION=0, LOG2_LANES=log2_lanes, LOG2_ROWS=log2_rows
    )


_POLICY_ALONE = (
    "values", "old_values", "returns", "entropy", "ref_logprob", "grad_values", "grad_entropy",
)  # fmt: skip
_NO_REINFORCE = ("grad_advantages", "means")
# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    *(_aot(count_kernel, warps, LOG2_BLOCK=block) for _, block, warps in SHAPES),
    *(
        _aot_loss(shape, 0, ("weights", *_NO_REINFORCE), reduction, estimator)
        for _, *shape in SHAPES
        for reduction, estimator in ((0, 3), (2, 1))
    ),
    *(_aot_loss(SHAPES[-1][1:], kind, (*_POLICY_ALONE, *_NO_REINFORCE)) for kind in (0, 3, 4)),
    _aot_loss(SHAPES[-1][1:], 1, (*_POLICY_ALONE, "grad_advantages"), 3),
    _aot_loss(SHAPES[-1][1:], 2, (*_POLICY_ALONE, "means"), 1),
    # Nothing to count first, so that `finish_kernel` adds the sums.
    _aot_loss(SHAPES[-1][1:], 0, ("weights", "counts", "loss", "stats", *_NO_REINFORCE)),
    (
        scale_kernel,
        {"grad_ptr": "*fp32:16", "unit_ptr": "*fp32:16", "out_ptr": "*fp32:16", "size": "i32"},
        {"IN_PLACE": True, "BLOCK": SCALE_BLOCK},
        4,
    ),
    *(_aot_finish(without) for without in ((), ("counts",))),
]
