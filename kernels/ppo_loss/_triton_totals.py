"""What surrounds the losses' pass over the tokens in Triton: counts, denominators, last sums."""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import tree_sum

from ._triton_terms import clamped_log_ratio, difference


@triton.jit(do_not_specialize=["T"])
def count_kernel(
    logprob_ptr, old_logprob_ptr, mask_ptr, counts_ptr, means_ptr, T, LOG2_BLOCK: tl.constexpr
):
    """Unmasked tokens of each row; with `means_ptr` also the mean of their clamped log-ratios.

    Behind the counts stands a 0: how many programs of `loss_kernel` have stored their sums.
    """
    BLOCK: tl.constexpr = 2**LOG2_BLOCK
    row = tl.program_id(0)
    begin = row.to(tl.int64) * T
    counts = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = t < T
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + begin + t, mask=live, other=0) != 0)
        counts += live.to(tl.int32)
        if means_ptr is not None:
            a = tl.load(logprob_ptr + begin + t, mask=live, other=0.0)
            b = tl.load(old_logprob_ptr + begin + t, mask=live, other=0.0)
            sums += clamped_log_ratio(difference(a, b))
    count = tl.sum(counts, axis=0)
    tl.store(counts_ptr + row, count)
    tl.store(counts_ptr + tl.num_programs(0), 0, mask=row == 0)
    if means_ptr is not None:
        divisor = tl.maximum(count, 1).to(tl.float32)
        tl.store(means_ptr + row, tl.div_rn(tree_sum(sums, LOG2_BLOCK), divisor))


@triton.jit
def denominator_of(
    counts_ptr, normalizer_ptr, rows, T, divisor, REDUCTION: tl.constexpr, LOG2_ROWS: tl.constexpr
):
    """(denominator, unmasked tokens). A denominator of 0 goes with a numerator of 0; 1 replaces it.

    A negative divisor is none.
    """
    tokens, sequences = rows * T, rows
    if counts_ptr is not None:
        lanes = tl.zeros([2**LOG2_ROWS], tl.int32)
        some = tl.zeros([2**LOG2_ROWS], tl.int32)
        for start in range(0, rows, 2**LOG2_ROWS):
            row = start + tl.arange(0, 2**LOG2_ROWS)
            count = tl.load(counts_ptr + row, mask=row < rows, other=0)
            lanes += count
            some += (count > 0).to(tl.int32)
        tokens, sequences = tl.sum(lanes, axis=0), tl.sum(some, axis=0)
    if REDUCTION == 0:
        denominator = tokens.to(tl.float32)
    elif REDUCTION == 1:
        denominator = 1.0
    else:
        denominator = sequences.to(tl.float32)
    if normalizer_ptr is not None:
        denominator = tl.load(normalizer_ptr)
    else:
        denominator = tl.where(divisor >= 0.0, divisor, denominator)
    return tl.where(denominator == 0.0, 1.0, denominator), tokens


@triton.jit
def _pick(x, lane, k):
    """Element k of x, NaN of others left out."""
    return tl.sum(tl.where(lane == k, x, 0.0), axis=0)


@triton.jit
def finish(
    sums_ptr, loss_ptr, stats_ptr, parts, denominator, tokens, value_coef, entropy_coef, kl_coef,
    COUNTED: tl.constexpr, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """Loss and statistics. A term with coefficient 0 is left out: an infinite one does no harm."""
    LANES: tl.constexpr = 2**LOG2_LANES
    column = tl.arange(0, 16)
    sums = tl.zeros([16, LANES], tl.float64)
    smallest = tl.full([LANES], float("inf"), tl.float32)
    largest = tl.zeros([LANES], tl.float32)
    for start in range(0, parts, LANES):
        part = start + tl.arange(0, LANES)
        inside = part < parts
        added = column < 13
        if not COUNTED:
            added = added | (column == 15)
        summed = added[:, None] & inside[None, :]
        places = sums_ptr + column[:, None] * parts + part[None, :]
        sums += tl.load(places, mask=summed, other=0.0).to(tl.float64)
        low = tl.load(sums_ptr + 13 * parts + part, mask=inside, other=float("inf"))
        smallest = tl.minimum(smallest, low)
        largest = tl.maximum(largest, tl.load(sums_ptr + 14 * parts + part, mask=inside, other=0.0))
    for step in tl.static_range(LOG2_LANES):
        sums = tl.sum(tl.reshape(sums, [16, 2 ** (LOG2_LANES - step - 1), 2]), axis=2)
    totals = tl.sum(sums, axis=1)
    if not COUNTED:
        tokens = _pick(totals, column, 15)
    n = tl.maximum(tokens.to(tl.float64), 1.0)
    weighted = totals / denominator.to(tl.float64)
    means = totals / n
    policy, value = _pick(weighted, column, 0), _pick(weighted, column, 1)
    entropy, kl = _pick(weighted, column, 2), _pick(weighted, column, 3)
    loss = policy + tl.where(value_coef != 0.0, value_coef * value, 0.0)
    loss -= tl.where(entropy_coef != 0.0, entropy_coef * entropy, 0.0)
    loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
    tl.store(loss_ptr, loss)
    below, above = _pick(means, column, 9), _pick(means, column, 10)
    rho = _pick(means, column, 8)
    # Comparisons pass NaN over, sums do not. Without a ratio at all the largest is 0.
    smallest = tl.where(rho == rho, tl.min(smallest, axis=0), rho)
    largest = tl.where(rho == rho, tl.max(largest, axis=0), rho)
    tl.store(stats_ptr, policy)
    tl.store(stats_ptr + 1, value)
    tl.store(stats_ptr + 2, _pick(means, column, 4))
    tl.store(stats_ptr + 3, _pick(means, column, 5))
    tl.store(stats_ptr + 4, below + above)
    tl.store(stats_ptr + 5, below)
    tl.store(stats_ptr + 6, above)
    tl.store(stats_ptr + 7, _pick(means, column, 12))
    tl.store(stats_ptr + 8, -_pick(means, column, 6))
    tl.store(stats_ptr + 9, _pick(means, column, 7))
    tl.store(stats_ptr + 10, rho)
    tl.store(stats_ptr + 11, tl.where(largest == 0.0, 0.0, smallest))
    tl.store(stats_ptr + 12, largest)
    tl.store(stats_ptr + 13, tokens.to(tl.float32))
    tl.store(stats_ptr + 14, _pick(means, column, 11))


@triton.jit(do_not_specialize=["parts", "rows", "T"])
def finish_kernel(
    sums_ptr, counts_ptr, normalizer_ptr, loss_ptr, stats_ptr, parts, rows, T, divisor, value_coef,
    entropy_coef, kl_coef, REDUCTION: tl.constexpr, LOG2_LANES: tl.constexpr,
    LOG2_ROWS: tl.constexpr,
):  # fmt: skip
    """One program, where no program of `loss_kernel` can know that it is the last."""
    denominator, tokens = denominator_of(
        counts_ptr, normalizer_ptr, rows, T, divisor, REDUCTION, LOG2_ROWS
    )
    finish(
        sums_ptr, loss_ptr, stats_ptr, parts, denominator, tokens, value_coef, entropy_coef,
        kl_coef, counts_ptr is not None, LOG2_LANES,
    )  # fmt: skip
