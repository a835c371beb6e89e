"""Where the kept set of a row ends, in Triton: one program per row, no sort, no histogram.

The kept set is the beginning of the ranking by descending u, so it is searched for like a number in
a dictionary: floats are mapped to integers of the same order (`_key`), and each pass over the row
settles two bits of the key at which the set ends. For top-k a pass counts tokens, for top-p it adds
up their probabilities, which are integers as well (a probability of 1 is 2^62): no sum depends on
an order. Min-p needs no pass: which u is likely enough follows from the largest one alone.

The passes read the same row again and again, which the caches hold. Source of the search: radix
selection (Knuth, "Sorting and Searching", 5.2.5 and 5.3.3).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import tree_sum

from ._triton_rows import double_exp, logits_at, origin_of, row_at, temperature_of


@triton.jit
def _key(u):
    """Unsigned integers in the order of the floats; -0 and 0 have the same one."""
    bits = (u + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _float(key):
    """The float whose `_key` it is."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(q):
    """A probability as an integer."""
    return (q * 4611686018427387904.0).to(tl.int64)


@triton.jit
def _stays(before, whole, limit):
    """Whether top-p keeps a token with the mass `before` ranked above it; the first one always."""
    return (before == 0) | ((whole - before).to(tl.float32) * (1.0 / 4611686018427387904.0) > limit)


@triton.jit
def _edge(base, allowed, q_row, V, t, origin, k, whole, limit, LANES: tl.constexpr):
    """(the smallest u of which a token stays, what is ranked above it).

    Top-k without `q_row`, the k-th largest u; top-p with it.
    """
    MASS: tl.constexpr = q_row is not None
    NUMBER: tl.constexpr = tl.int64 if MASS else tl.int32
    lane = tl.arange(0, LANES)
    nothing = tl.zeros([LANES], NUMBER)
    key = tl.full((), 0, tl.uint32)
    above = tl.full((), 0, NUMBER)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        w1 = nothing
        w2 = nothing
        w3 = nothing
        for start in range(0, V, LANES):
            cols = start + lane
            keys = _key(tl.div_rn(logits_at(base, allowed, cols, V) - origin, t))
            weight = 1  # what stands at -inf beyond the row counts, but is no k-th of V tokens
            if MASS:
                weight = _mass(tl.load(q_row + cols, mask=cols < V, other=0.0))
            w1 += tl.where(keys >= key + step, weight, 0)
            w2 += tl.where(keys >= key + 2 * step, weight, 0)
            w3 += tl.where(keys >= key + 3 * step, weight, 0)
        before1 = tl.sum(w1, axis=0)
        before2 = tl.sum(w2, axis=0)
        before3 = tl.sum(w3, axis=0)
        # Where a token has too much above it if all that lies at or above a bound is above it, the
        # edge is not below that bound.
        if MASS:
            out1 = ~_stays(before1, whole, limit)
            out2 = ~_stays(before2, whole, limit)
            out3 = ~_stays(before3, whole, limit)
        else:
            out1 = before1 >= k
            out2 = before2 >= k
            out3 = before3 >= k
        above = tl.where(out3, above, tl.where(out2, before3, tl.where(out1, before2, before1)))
        key += step * (out1.to(tl.uint32) + out2.to(tl.uint32) + out3.to(tl.uint32))
        step = step >> 2
    return _float(key), above


@triton.jit
def _weights(u, top_u, tau):
    """exp(u - top_u) in float64 where u >= tau, else 0; blocks without one cost no exponential."""
    inside = (u >= tau) & (u > float("-inf"))
    e = tl.zeros(u.shape, tl.float64)
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        e = tl.where(inside, double_exp(u, top_u), 0.0)
    return e


@triton.jit
def _equals_that_stay(above, each, whole, limit, V):
    """How many tokens of the mass `each` stay behind those of the mass `above`; the first does."""
    few = tl.full((), 1, tl.int64)
    many = tl.maximum((whole - above) // tl.maximum(each, 1), 1)
    many = tl.where(each == 0, V, many)
    while few < many:
        middle = (few + many + 1) // 2
        stays = _stays(above + (middle - 1) * each, whole, limit)
        few = tl.where(stays, middle, few)
        many = tl.where(stays, many, middle - 1)
    return few


@triton.jit
def _id_of(base, allowed, V, t, origin, tau, number, LANES: tl.constexpr):
    """The id of the `number`-th token with u == tau by ascending id, or of the last one."""
    lane = tl.arange(0, LANES)
    found = tl.full([LANES], -1, tl.int32)
    passed = 0
    for start in range(0, V, LANES):
        cols = start + lane
        equal = tl.div_rn(logits_at(base, allowed, cols, V) - origin, t) == tau
        rank = passed + tl.cumsum(equal.to(tl.int32), axis=0)
        found = tl.maximum(found, tl.where(equal & (rank <= number), cols, -1))
        passed += tl.sum(equal.to(tl.int32), axis=0)
    return tl.max(found, axis=0)


@triton.jit
def _first_of(base, allowed, V, top, LANES: tl.constexpr):
    """The lowest id of the largest logit."""
    lane = tl.arange(0, LANES)
    found = tl.full([LANES], 2147483647, tl.int32)
    for start in range(0, V, LANES):
        cols = start + lane
        best = logits_at(base, allowed, cols, V) == top
        found = tl.minimum(found, tl.where(best, cols, 2147483647))
    return tl.min(found, axis=0)


@triton.jit
def _lowest_likely(top_u, min_p):
    """The smallest float u with float32(exp(u - top_u)) >= min_p."""
    top_key = _key(top_u)
    key = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        middle = tl.minimum(key + (step - 1), top_key)
        d = _float(middle).to(tl.float64) - top_u.to(tl.float64)
        likely = tl.exp(d).to(tl.float32) >= min_p
        key = tl.where(likely, key, key + step)
        step = step >> 1
    return _float(key)


@triton.jit
def _limit_of(limit, top_ps_ptr, row):
    """float32(1 - top_p), which is 0 where top-p is off."""
    if top_ps_ptr is not None:
        limit = (1.0 - tl.load(top_ps_ptr + row)).to(tl.float32)
    return limit


@triton.jit
def _with_min_p(tau, last, top_u, V, min_p, min_ps_ptr, row):
    """(tau, last) after min-p."""
    if min_ps_ptr is not None:
        min_p = tl.load(min_ps_ptr + row).to(tl.float32)
    if min_p > 0.0:
        floor = _lowest_likely(top_u, min_p)
        last = tl.where(floor > tau, V - 1, last)
        tau = tl.maximum(floor, tau)
    return tau, last


@triton.jit
def _store(tau_ptr, last_ptr, row, tau, last):
    tl.store(tau_ptr + row, tau)
    tl.store(last_ptr + row, tl.where(tau == float("-inf"), -1, last).to(tl.int64))


@triton.jit(do_not_specialize=["inner", "top_k"])
def top_k_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, top_ptr, total_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr,
    tau_ptr, last_ptr, inner, stride_outer, stride_inner, mask_stride, V, temperature, top_k, limit,
    min_p, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """(tau, last) as reference.py defines them, by greedy, top-k and, without top-p, min-p."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    t, greedy = temperature_of(temperature, temperatures_ptr, row)
    origin, top_u = origin_of(tl.load(top_ptr + row), t)
    base = row_at(logits_ptr, inner, stride_outer, stride_inner, row)
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    k = top_k
    if top_ks_ptr is not None:
        k = tl.minimum(tl.load(top_ks_ptr + row), V).to(tl.int32)
    tau = float("-inf")
    last = V - 1
    if tl.load(total_ptr + row) > 0.0:
        if greedy:
            tau = top_u
            last = _first_of(base, mask_ptr, V, tau, LANES)
        else:
            if (k > 0) & (k < V):
                tau, _ = _edge(base, mask_ptr, None, V, t, origin, k, 0, 0.0, LANES)
            if _limit_of(limit, top_ps_ptr, row) == 0.0:
                tau, last = _with_min_p(tau, last, top_u, V, min_p, min_ps_ptr, row)
    _store(tau_ptr, last_ptr, row, tau, last)


@triton.jit(do_not_specialize=["inner", "first"])
def masses_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, top_ptr, total_ptr, top_ps_ptr, tau_ptr, q_ptr, sum_ptr,
    whole_ptr, inner, stride_outer, stride_inner, mask_stride, V, temperature, first, limit,
    LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """Probabilities among the tokens that top-k left, for top-p, of the rows from `first` on.

    Program n writes its row's to row n of `q_ptr`, as float32; what was written comes to `whole`,
    and exp(u - max) to `sum` in float64.
    """
    row = first + tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    t, greedy = temperature_of(temperature, temperatures_ptr, row)
    wanted = (tl.load(total_ptr + row) > 0.0) & (_limit_of(limit, top_ps_ptr, row) > 0.0)
    if wanted & (greedy == 0):
        base = row_at(logits_ptr, inner, stride_outer, stride_inner, row)
        if mask_ptr is not None:
            mask_ptr += row * mask_stride
        origin, top_u = origin_of(tl.load(top_ptr + row), t)
        tau = tl.load(tau_ptr + row)
        q_ptr += tl.program_id(0).to(tl.int64) * V
        lane = tl.arange(0, LANES)
        sums = tl.zeros([LANES], tl.float64)
        for start in range(0, V, LANES):
            u = tl.div_rn(logits_at(base, mask_ptr, start + lane, V) - origin, t)
            sums += _weights(u, top_u, tau)
        total = tree_sum(sums, LOG2_LANES)
        masses = tl.zeros([LANES], tl.int64)
        for start in range(0, V, LANES):
            cols = start + lane
            u = tl.div_rn(logits_at(base, mask_ptr, cols, V) - origin, t)
            q = (_weights(u, top_u, tau) / total).to(tl.float32)
            masses += _mass(q)
            tl.store(q_ptr + cols, q, mask=cols < V)
        tl.store(sum_ptr + row, total)
        tl.store(whole_ptr + row, tl.sum(masses, axis=0))


@triton.jit(do_not_specialize=["inner", "first"])
def top_p_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, top_ptr, total_ptr, top_ps_ptr, min_ps_ptr, q_ptr,
    sum_ptr, whole_ptr, tau_ptr, last_ptr, inner, stride_outer, stride_inner, mask_stride, V,
    temperature, first, limit, min_p, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """(tau, last) after top-p and min-p of the rows from `first` on."""
    row = first + tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    t, greedy = temperature_of(temperature, temperatures_ptr, row)
    limit = _limit_of(limit, top_ps_ptr, row)
    if (tl.load(total_ptr + row) > 0.0) & (limit > 0.0) & (greedy == 0):
        base = row_at(logits_ptr, inner, stride_outer, stride_inner, row)
        if mask_ptr is not None:
            mask_ptr += row * mask_stride
        origin, top_u = origin_of(tl.load(top_ptr + row), t)
        q_ptr += tl.program_id(0).to(tl.int64) * V
        whole = tl.load(whole_ptr + row)
        # What the mask forbids has no mass.
        tau, above = _edge(base, None, q_ptr, V, t, origin, 0, whole, limit, LANES)
        each = _mass((double_exp(tau, top_u) / tl.load(sum_ptr + row)).to(tl.float32))
        number = _equals_that_stay(above, each, whole, limit, V)
        last = _id_of(base, mask_ptr, V, t, origin, tau, number, LANES)
        tau, last = _with_min_p(tau, last, top_u, V, min_p, min_ps_ptr, row)
        _store(tau_ptr, last_ptr, row, tau, last)
