"""The draw from the kept set of a row in Triton: the exponential race of reference_draw.py.

A block of tokens is screened in float32 by the high words of their numbers; only what may be faster
than the best so far is settled, one token at a time, in float64. Over a row that is about ln V
tokens. What decides is computed for one token alone, so ids depend neither on an order nor on the
other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import LOG2_E, tree_sum

from ._triton_rows import (
    double_exp,
    is_kept,
    logits_at,
    origin_of,
    rate_of,
    row_at,
    temperature_of,
)

# A token so far below the largest u never wins: its time is at least 2^-65 e^60, which is 2^21, and
# the likeliest token's at most 37, the logarithm of 2^53.
FARTHEST = tl.constexpr(60.0)
# More than float32 loses: of exp2 and its argument 2e-5, of the other factors 1e-6.
MARGIN = tl.constexpr(1.0001)


@triton.jit
def race_words(seed, position, group, HALF: tl.constexpr):
    """The words of the ids 4 group to 4 group + 3: the high (HALF 0) or the low ones (1)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, group.to(tl.uint32), low, high, HALF)


@triton.jit
def _word_of(seed, position, token, HALF: tl.constexpr):
    w0, w1, w2, w3 = race_words(seed, position, token >> 2, HALF)
    even = tl.where((token & 2) != 0, w2, w0)
    odd = tl.where((token & 2) != 0, w3, w1)
    return tl.where((token & 1) != 0, odd, even)


@triton.jit
def race_number(seed, position, token):
    """The exponential number of one token id, in float64."""
    high = _word_of(seed, position, token, 0).to(tl.float64)
    low = _word_of(seed, position, token, 1).to(tl.float64)
    x = high * 2.0**-32 + (low + 0.5) * 2.0**-64
    x = tl.minimum(x, tl.full((), 1.0 - 2.0**-53, tl.float64))
    # -log1p(-x): what the rounding of 1 - x lost is put right by the quotient (Higham, "Accuracy
    # and Stability of Numerical Algorithms", 1.14.1).
    rest = 1.0 - x
    lost = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    return tl.where(rest == 1.0, x, -tl.log(rest) * (x / lost))


@triton.jit
def _high_words(seed, position, start, LANES: tl.constexpr):
    """The high words of the ids `start` to `start` + LANES - 1."""
    group = start // 4 + tl.arange(0, LANES // 4)
    w0, w1, w2, w3 = race_words(seed, position, group, 0)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _counter(number, numbers_ptr, row):
    """A seed or a position, 64 bits."""
    if numbers_ptr is not None:
        number = tl.load(numbers_ptr + row)
    return number.to(tl.int64)


@triton.jit
def kept_sum(
    base, allowed, V, t, origin, top, tau, last, LANES: tl.constexpr, LOG2_LANES: tl.constexpr
):
    """The sum of exp((z - max) / t) over the kept tokens."""
    rate = rate_of(t) * LOG2_E
    lane = tl.arange(0, LANES)
    part = tl.zeros([LANES], tl.float32)
    for start in range(0, V, LANES):
        cols = start + lane
        z = logits_at(base, allowed, cols, V)
        kept = is_kept(tl.div_rn(z - origin, t), cols, tau, last)
        part += tl.where(kept, tl.exp2((z - top) * rate), 0.0)
    return tree_sum(part, LOG2_LANES)


@triton.jit
def logs_of(total, part, tau, greedy):
    """(log of the kept sum, log of the whole one, log-mass) of a row with a token, in float64.

    `part` is looked at where the row is cut, which tau says.
    """
    log_sum = tl.log(total.to(tl.float64))
    cut = tau > float("-inf")
    log_kept = tl.where(cut, tl.log(tl.where(cut, part, 1.0).to(tl.float64)), log_sum)
    ratio = tl.where(cut, part, 1.0).to(tl.float64) / tl.where(cut, total, 1.0).to(tl.float64)
    log_mass = tl.minimum(tl.log(ratio), 0.0)
    return tl.where(greedy, 0.0, log_kept), log_sum, tl.where(greedy, 0.0, log_mass)


@triton.jit
def logprob_of(z, top, t, log_kept):
    d = (z.to(tl.float64) - top.to(tl.float64)) / t.to(tl.float64)
    return (d - log_kept).to(tl.float32) + 0.0  # no -0


@triton.jit(do_not_specialize=["inner", "seed", "position"])
def draw_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, top_ptr, total_ptr, tau_ptr, last_ptr, seeds_ptr,
    positions_ptr, ids_ptr, logprob_ptr, log_mass_ptr, inner, stride_outer, stride_inner,
    mask_stride, V, temperature, seed: tl.int64, position: tl.int64, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """(id, log-prob, log-mass) of each row; without `tau_ptr` no row is cut."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    t, greedy = temperature_of(temperature, temperatures_ptr, row)
    top = tl.load(top_ptr + row)
    total = tl.load(total_ptr + row)
    seed = _counter(seed, seeds_ptr, row)
    position = _counter(position, positions_ptr, row)
    tau = tl.full((), float("-inf"), tl.float32)
    last = -1
    if tau_ptr is not None:
        tau = tl.load(tau_ptr + row)
        last = tl.load(last_ptr + row).to(tl.int32)
    if total > 0.0:
        base = row_at(logits_ptr, inner, stride_outer, stride_inner, row)
        if mask_ptr is not None:
            mask_ptr += row * mask_stride
        origin, top_u = origin_of(top, t)
        lane = tl.arange(0, LANES)
        best = tl.full((), float("inf"), tl.float64)
        limit = float("inf")
        winner = -1
        for start in range(0, V, LANES):
            cols = start + lane
            u = tl.div_rn(logits_at(base, mask_ptr, cols, V) - origin, t)
            kept = is_kept(u, cols, tau, last)
            depth = top_u - u
            x = _high_words(seed, position, start, LANES).to(tl.float32) * 2.0**-32
            # x + x^2 / 2 is at most -log1p(-x), so this is a lower bound of the token's time.
            growth = tl.exp2(tl.minimum(depth, FARTHEST) * LOG2_E)
            bound = x * tl.fma(x, 0.5, 1.0) * growth
            bound = tl.where(kept & (depth < FARTHEST), bound, float("inf"))
            lowest = tl.min(bound, axis=0)
            while lowest < limit:
                token = tl.min(tl.where(bound == lowest, cols, 2147483647), axis=0)
                bound = tl.where(cols == token, float("inf"), bound)
                lowest = tl.min(bound, axis=0)
                u_token = tl.div_rn(tl.load(base + token).to(tl.float32) - origin, t)
                time = race_number(seed, position, token) / double_exp(u_token, top_u)
                better = (time < best) | ((time == best) & (token < winner))
                winner = tl.where(better, token, winner)
                best = tl.where(better, time, best)
                limit = (best * MARGIN).to(tl.float32)
        part = 1.0
        if (tau > float("-inf")) & (greedy == 0):
            part = kept_sum(base, mask_ptr, V, t, origin, top, tau, last, LANES, LOG2_LANES)
        log_kept, _, log_mass = logs_of(total, part, tau, greedy)
        z = tl.load(base + winner).to(tl.float32)
        tl.store(ids_ptr + row, winner.to(tl.int64))
        tl.store(logprob_ptr + row, logprob_of(z, top, t, log_kept))
        tl.store(log_mass_ptr + row, log_mass.to(tl.float32))
    else:
        tl.store(ids_ptr + row, tl.full((), -1, tl.int64))
        tl.store(logprob_ptr + row, float("-inf"))
        tl.store(log_mass_ptr + row, 0.0)
