"""Sampling in Triton: one program per row, no sort.

The first pass gives sums and each lane's maximum. The k-th largest of the maxima bounds the k-th
largest logit from below; the little more than k tokens above it become a list, in which the kept
set is found by bisection and drawn from. A row whose kept set does not fit into a list is walked
again at every step of the bisection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import LN_2, LOG2_E, online_merge, online_step
from rlhf_fast.kernels._common.launch import flat, on_device_of, rows_of

from ._triton_tokens import (
    BY_DEPTH,
    BY_ID,
    BY_MASS,
    ENDLESS,
    NOTHING,
    deepest,
    is_likely,
    load_logits,
    load_tokens,
    order_of,
    race_time,
    score_of,
    stays,
    total_weight,
    weight_before,
    words_of,
    words_of_block,
)

# Tokens of a list; (largest vocabulary, log2 of the lanes, warps).
LIST = 2048
SHAPES = ((1024, 8, 2), (None, 11, 16))
# The lowest finite float, and what order_of makes of it.
_LOWEST, _LOWEST_ORDER = tl.constexpr(-3.4028234663852886e38), tl.constexpr(-2139095040)


@triton.jit
def _scan(logits_ptr, mask_ptr, V, rate2, LOG2_LANES: tl.constexpr):
    """(each lane's maximum, the row's, sum 2**d, sum 2**d d), d = rate2 (z - maximum)."""
    LANES: tl.constexpr = 2**LOG2_LANES
    lane = tl.arange(0, LANES)
    top = tl.full([LANES], NOTHING, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(0, V, 4 * LANES):
        cols = start + lane
        x0 = load_logits(logits_ptr, mask_ptr, cols, cols < V)
        x1 = load_logits(logits_ptr, mask_ptr, cols + LANES, cols + LANES < V)
        x2 = load_logits(logits_ptr, mask_ptr, cols + 2 * LANES, cols + 2 * LANES < V)
        x3 = load_logits(logits_ptr, mask_ptr, cols + 3 * LANES, cols + 3 * LANES < V)
        top, total, weighted = online_step(top, total, weighted, x0, x1, x2, x3, rate2, True)
    row_top, row_total, row_weighted = online_merge(top, total, weighted, rate2, LOG2_LANES, True)
    return top, row_top, row_total, row_weighted


@triton.jit
def _bound_of_kth(maxima, k):
    """A lower bound of the k-th largest maximum, the upper half of its bits."""
    orders = order_of(maxima)
    # Orders are signed: bits are set on top of the least one.
    order = tl.full([], -(1 << 31), tl.int64)
    for step in range(16):
        candidate = order + (tl.full([], 1, tl.int64) << (31 - step))
        enough = tl.sum((orders >= candidate).to(tl.int32), axis=0) >= k
        order = tl.where(enough, candidate, order)
    bits = order.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bound = bits.to(tl.float32, bitcast=True)
    return tl.where(order < _LOWEST_ORDER, _LOWEST, bound)


@triton.jit
def _below(z, top, t):
    """Below every logit whose u is not below that of z (csrc/sample/sample.h)."""
    wide_z = z.to(tl.float64)
    width = (tl.abs(wide_z) + tl.abs(top.to(tl.float64))) * 4.76837158203125e-07
    bound = wide_z - (width + t.to(tl.float64) * 1e-44)
    return tl.where(bound > _LOWEST, bound, _LOWEST).to(tl.float32)


@triton.jit
def _collect(
    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, V, lowest, top, rate2, LIST: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Write the tokens with z >= lowest to the list: (how many there are, the sum of their e)."""
    count = tl.full([], 0, tl.int32)
    mass = tl.zeros([LANES], tl.float64)
    for start in range(0, V, LANES):
        cols = start + tl.arange(0, LANES)
        z = load_logits(logits_ptr, mask_ptr, cols, cols < V)
        taken = (z >= lowest).to(tl.int32)
        found = tl.sum(taken, axis=0)
        if found > 0:
            place = count + tl.cumsum(taken, axis=0) - taken
            there = (taken != 0) & (place < LIST)
            tl.store(list_z_ptr + place, z, mask=there)
            tl.store(list_id_ptr + place, cols, mask=there)
            mass += tl.where(taken != 0, tl.exp2((z - top) * rate2), 0.0).to(tl.float64)
        count += found
    return count, tl.sum(mass, axis=0)


@triton.jit
def _first_of_largest(logits_ptr, mask_ptr, V, top, LANES: tl.constexpr):
    first = tl.full([LANES], 2147483647, tl.int32)
    for start in range(0, V, LANES):
        cols = start + tl.arange(0, LANES)
        z = load_logits(logits_ptr, mask_ptr, cols, cols < V)
        first = tl.minimum(first, tl.where(z == top, cols, 2147483647))
    return tl.min(first, axis=0)


@triton.jit
def _cut(
    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, V, count, listed, base, t, top_u, k, limit,
    LANES: tl.constexpr,
):  # fmt: skip
    """(depth, last): a token stays if it is less deep, or as deep and its id at most `last`."""
    cut = tl.full([], ENDLESS, tl.int64)
    last = tl.full([], ENDLESS, tl.int64)
    rate = tl.full([], 1.0, tl.float64)
    widest = order_of(top_u) - _LOWEST_ORDER
    if k > 0:
        low = tl.full([], 0, tl.int64)
        high = widest
        while low < high:
            middle = (low + high + 1) // 2
            before = weight_before(
                list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, cut,
                rate, middle, BY_DEPTH, LANES,
            )  # fmt: skip
            enough = before < k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        cut = low
    if limit > 0.0:
        # Without top-k the probabilities are those among all tokens, not among the listed ones.
        some = listed & (k > 0)
        among = tl.where(some, count, V)
        total = total_weight(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, among, some, base, t, top_u, cut, LANES
        )
        rate = 70368744177664.0 / total.to(tl.float64)
        whole = weight_before(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, among, some, base, t, top_u, cut, rate,
            tl.full([], ENDLESS, tl.int64), BY_MASS, LANES,
        )  # fmt: skip
        low = tl.full([], 0, tl.int64)
        high = tl.minimum(cut, widest)
        while low < high:
            middle = (low + high + 1) // 2
            before = weight_before(
                list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, cut,
                rate, middle, BY_MASS, LANES,
            )  # fmt: skip
            enough = stays(whole, before, limit)
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        edge = deepest(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, low, LANES
        )
        before = weight_before(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, cut, rate,
            edge, BY_MASS, LANES,
        )  # fmt: skip
        behind = weight_before(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, cut, rate,
            edge + 1, BY_MASS, LANES,
        )  # fmt: skip
        cut = edge
        equals = weight_before(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, cut, rate,
            tl.full([], ENDLESS, tl.int64), BY_ID, LANES,
        )  # fmt: skip
        # Of the last equals as many as stay, the lowest ids first.
        each = (behind - before) // tl.maximum(equals, 1)
        few = tl.full([], 1, tl.int64)
        many = equals
        while few < many:
            middle = (few + many + 1) // 2
            enough = stays(whole, before + (middle - 1) * each, limit)
            few = tl.where(enough, middle, few)
            many = tl.where(enough, many, middle - 1)
        if few < equals:
            low = tl.full([], 0, tl.int64)
            high = V.to(tl.int64) - 1
            while low < high:
                middle = (low + high + 1) // 2
                lower = weight_before(
                    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u,
                    cut, rate, middle, BY_ID, LANES,
                )  # fmt: skip
                enough = lower < few
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            last = low
    return cut, last


@triton.jit
def _scores(
    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, base, t, top, top_u, rate2,
    cut, last, min_p, seed, position, LANES: tl.constexpr,
):  # fmt: skip
    """(id, u, e, whether it is kept, score) of a block of tokens."""
    z, ids = load_tokens(list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, LANES)
    u = tl.div_rn(z - base, t)
    depth = order_of(top_u) - order_of(u)
    kept = (u > NOTHING) & ((depth < cut) | ((depth == cut) & (ids <= last)))
    if min_p > 0.0:
        kept = kept & is_likely(u, top_u, min_p)
    high = tl.zeros([LANES], tl.uint32)
    if listed:
        high = words_of(seed, position, ids, 0)
    else:
        high = words_of_block(seed, position, start, LANES)
    log2_e = (z - top) * rate2
    score = tl.where(kept, score_of(tl.where(kept, log2_e, 0.0), high), NOTHING)
    return ids, u, tl.exp2(log2_e), kept, score


@triton.jit
def _draw(
    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top, top_u, rate2, cut,
    last, min_p, seed, position, LANES: tl.constexpr,
):  # fmt: skip
    """(id of the winner among the kept tokens, their sum of e in units of 2**-46)."""
    part = tl.zeros([LANES], tl.int64)
    best = tl.full([LANES], NOTHING, tl.float32)
    best_id = tl.full([LANES], -1, tl.int32)
    for start in range(0, count, LANES):
        ids, u, e, kept, score = _scores(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, base, t, top,
            top_u, rate2, cut, last, min_p, seed, position, LANES,
        )  # fmt: skip
        weight = (e.to(tl.float64) * 70368744177664.0 + 0.5).to(tl.int64)
        part += tl.where(kept, weight, 0)
        better = score > best
        best = tl.where(better, score, best)
        best_id = tl.where(better, ids, best_id)
    # The best score is settled; only what comes within the rounding of it can be better.
    peak = tl.max(best, axis=0)
    first = tl.max(tl.where(best == peak, best_id, -1), axis=0)
    limit = tl.full([], NOTHING, tl.float32)
    if first >= 0:
        z = tl.load(logits_ptr + first).to(tl.float32)
        r = race_time(seed, position, first, tl.div_rn(z - base, t), top_u)
        slack = (tl.abs(top) * rate2 + 512.0) * 9.5367431640625e-07
        limit = -tl.log2(r.to(tl.float32)) - slack
        limit = tl.where(limit == limit, limit, NOTHING)
    least = tl.full([LANES], float("inf"), tl.float64)
    winner = tl.full([LANES], 2147483647, tl.int32)
    for start in range(0, count, LANES):
        ids, u, e, kept, score = _scores(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, base, t, top,
            top_u, rate2, cut, last, min_p, seed, position, LANES,
        )  # fmt: skip
        close = kept & (score >= limit)
        if tl.max(close.to(tl.int32), axis=0) > 0:
            r = race_time(seed, position, ids, tl.where(close, u, top_u), top_u)
            better = close & (r < least)  # ids ascend: of equal ones the first is the lowest
            least = tl.where(better, r, least)
            winner = tl.where(better, ids, winner)
    row_least = tl.min(least, axis=0)
    return tl.min(tl.where(least == row_least, winner, 2147483647), axis=0), tl.sum(part, axis=0)


@triton.jit(do_not_specialize=["top_k", "seed", "position", "inner", "mask_stride"])
def _sample_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, seeds_ptr,
    positions_ptr, list_z_ptr, list_id_ptr, ids_ptr, logprob_ptr, log_mass_ptr, entropy_ptr, inner,
    stride_outer, stride_inner, mask_stride, V, temperature, top_k, limit, min_p, seed, position,
    LIST: tl.constexpr, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """`limit` is float32(1 - top_p), 0 where top-p is off."""
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 2**LOG2_LANES
    t = temperature
    if temperatures_ptr is not None:
        t = tl.load(temperatures_ptr + row)
    k = top_k.to(tl.int64)
    if top_ks_ptr is not None:
        k = tl.load(top_ks_ptr + row)
    if top_ps_ptr is not None:
        limit = (1.0 - tl.load(top_ps_ptr + row)).to(tl.float32)
    if min_ps_ptr is not None:
        min_p = tl.load(min_ps_ptr + row).to(tl.float32)
    seed = seed.to(tl.int64)
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + row)
    position = position.to(tl.int64)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + row)
    k = tl.where(k >= V, 0, k)
    greedy = t == 0.0
    t = tl.where(greedy, 1.0, t)
    rate2 = tl.minimum(tl.div_rn(1.0, t), 2e38) * LOG2_E
    logits_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    list_z_ptr += row * LIST
    list_id_ptr += row * LIST

    maxima, top, total, weighted = _scan(logits_ptr, mask_ptr, V, rate2, LOG2_LANES)
    winner = tl.full([], -1, tl.int32)
    logprob = tl.full([], NOTHING, tl.float32)
    log_mass = tl.full([], 0.0, tl.float32)
    entropy = tl.full([], 0.0, tl.float32)
    if (total > 0.0) & (top < float("inf")):  # neither NaN nor +inf, and a token that is possible
        if greedy:
            winner = _first_of_largest(logits_ptr, mask_ptr, V, top, LANES)
            logprob = tl.full([], 0.0, tl.float32)
        else:
            top_u = tl.div_rn(top, t)
            overflows = tl.abs(top_u) == float("inf")
            base = tl.where(overflows, top, 0.0)
            top_u = tl.where(overflows, 0.0, top_u)
            filters = (k > 0) | (limit > 0.0) | (min_p > 0.0)
            # A logit that no token which matters to the kept set lies below.
            lowest = tl.full([], _LOWEST, tl.float32)
            alone = (k == 0) & (limit > 0.0)
            if filters & (V > LIST):
                most = tl.where(alone, LANES // 2, k)
                if (most > 0) & (most <= LANES // 2):
                    lowest = _below(_bound_of_kth(maxima, most), top, t)
                if (limit == 0.0) & (min_p > 0.0):
                    log_min_p = tl.log(min_p.to(tl.float64)) - 1e-6
                    likely = top.to(tl.float64) + t.to(tl.float64) * log_min_p
                    lowest = tl.maximum(lowest, _below(likely, top, t))
            count = V
            listed = filters & ((lowest > _LOWEST) | (V <= LIST))
            if listed:
                found, mass = _collect(
                    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, V, lowest, top, rate2, LIST,
                    LANES,
                )  # fmt: skip
                tl.debug_barrier()  # all warps see the list
                slack = (tl.abs(top) * rate2 + 512.0) * 9.5367431640625e-07
                needed = (1.0 - limit + 2.0 * slack + 1e-6) * total
                enough = (alone == 0) | (V <= LIST) | (mass > needed.to(tl.float64))
                listed = enough & (found <= LIST)
                count = tl.where(listed, found, V)
            cut = tl.full([], ENDLESS, tl.int64)
            last = tl.full([], ENDLESS, tl.int64)
            if (k > 0) | (limit > 0.0):
                cut, last = _cut(
                    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, V, count, listed, base, t,
                    top_u, k, limit, LANES,
                )  # fmt: skip
            winner, part = _draw(
                list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top, top_u,
                rate2, cut, last, min_p, seed, position, LANES,
            )  # fmt: skip
            whole = total.to(tl.float64)
            log_sum = tl.log(whole)
            log_kept = log_sum
            if filters:
                kept = part.to(tl.float64) * 1.4210854715202004e-14
                log_kept = tl.log(kept)
                log_mass = tl.minimum(tl.log(kept / whole).to(tl.float32), 0.0)
            z = tl.load(logits_ptr + winner).to(tl.float64)
            d = (z - top.to(tl.float64)) / t.to(tl.float64)
            logprob = (d - log_kept).to(tl.float32) + 0.0  # no -0
            mean = weighted.to(tl.float64) / whole * LN_2
            entropy = (log_sum - mean).to(tl.float32)
    tl.store(ids_ptr + row, winner.to(tl.int64))
    tl.store(logprob_ptr + row, logprob)
    tl.store(log_mass_ptr + row, log_mass)
    tl.store(entropy_ptr + row, entropy)


def _aot(dtype, log2_lanes, warps, *, per_row=False, mask=False):
    """One entry of AOT_SIGNATURES; arguments that are left out are None."""
    types = dict.fromkeys(("list_z_ptr", "logprob_ptr", "log_mass_ptr", "entropy_ptr"), "*fp32:16")
    types |= {"logits_ptr": f"*{dtype}:16", "list_id_ptr": "*i32:16", "ids_ptr": "*i64:16"}
    types |= dict.fromkeys(("temperature", "limit", "min_p"), "fp32")
    types |= dict.fromkeys(("inner", "mask_stride", "top_k", "seed", "position"), "i32")
    types |= dict.fromkeys(("stride_outer", "stride_inner", "V"), "i32:16")
    if per_row:
        types |= dict.fromkeys(("top_ks_ptr", "seeds_ptr", "positions_ptr"), "*i64:16")
        types |= {
            "temperatures_ptr": "*fp32:16",
            "top_ps_ptr": "*fp64:16",
            "min_ps_ptr": "*fp64:16",
        }
    if mask:
        types["mask_ptr"] = "*i1:16"
    types = {name: types[name] for name in _sample_kernel.arg_names if name in types}
    return _sample_kernel, types, {"LIST": LIST, "LOG2_LANES": log2_lanes}, warps


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    *(_aot("bf16", *shape[1:]) for shape in SHAPES),
    _aot("fp32", *SHAPES[-1][1:]),
    _aot("bf16", *SHAPES[-1][1:], per_row=True, mask=True),
]


def sample(
    logits: torch.Tensor,
    logit_mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    top_k: int,
    top_ks: torch.Tensor | None,
    top_p: float,
    top_ps: torch.Tensor | None,
    min_p: float,
    min_ps: torch.Tensor | None,
    seed: int,
    seeds: torch.Tensor | None,
    position: int,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, logprob, log_mass, entropy), each [B]; -1, -inf, 0, 0 in a row without a token."""
    rows, vocabulary = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    out = [torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)]
    if rows == 0:
        return ids, *out
    log2_lanes, warps = next(s[1:] for s in SHAPES if s[0] is None or vocabulary <= s[0])
    logits, inner, stride_outer, stride_inner = rows_of(logits)
    mask = logit_mask
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    list_z = torch.empty(rows, LIST, dtype=torch.float32, device=logits.device)
    list_id = torch.empty(rows, LIST, dtype=torch.int32, device=logits.device)
    vectors = [flat(x) for x in (temperatures, top_ks, top_ps, min_ps, seeds, positions)]
    with on_device_of(logits):
        _sample_kernel[(rows,)](
            logits, mask, *vectors, list_z, list_id, ids, *out, inner, stride_outer, stride_inner,
            0 if mask is None else mask.stride(0), vocabulary, min(temperature, 3e38), top_k,
            1.0 - top_p, min_p, seed, position, LIST, log2_lanes,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return ids, *out
