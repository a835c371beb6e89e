"""Triton device functions of sampling: a row's tokens, the edges of its kept set, the race.

A program walks over tokens in blocks: over those of a short list, which its first passes wrote to a
scratch row by ascending id, or over the whole vocabulary. Everything that decides is a sum of
integers (e in units of 2**-46, probabilities in units of 2**-62) or belongs to one token alone, as
in csrc/sample/finish.cuh and race.cuh, so that no order of threads can change an id.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What `weight_before` adds up: tokens by depth, their mass by depth, equal tokens by id.
BY_DEPTH, BY_MASS, BY_ID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NOTHING = tl.constexpr(float("-inf"))
ENDLESS = tl.constexpr(1 << 40)  # beyond every depth and id


# ------------------------------------------------------------------------------- tokens


@triton.jit
def load_logits(logits_ptr, mask_ptr, cols, inside):
    """Logits as float32; -inf outside and where the mask forbids a token."""
    z = tl.load(logits_ptr + cols, mask=inside, other=NOTHING).to(tl.float32)
    if mask_ptr is not None:
        z = tl.where(tl.load(mask_ptr + cols, mask=inside, other=0) != 0, z, NOTHING)
    return z


@triton.jit
def load_tokens(list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, LANES: tl.constexpr):  # fmt: skip
    """(z, id) of the block of tokens from `start` on; z is -inf behind the last one."""
    ids = start + tl.arange(0, LANES)
    inside = ids < count
    z = tl.full([LANES], NOTHING, tl.float32)
    if listed:
        z = tl.load(list_z_ptr + ids, mask=inside, other=NOTHING)
        ids = tl.load(list_id_ptr + ids, mask=inside, other=0)
    else:
        z = load_logits(logits_ptr, mask_ptr, ids, inside)
    return z, ids


@triton.jit
def order_of(x):
    """An int64 that orders like the float32 x, in which -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def exp64(d):
    """exp(d) in float64; 0 below -700."""
    return tl.where(d < -700.0, 0.0, tl.exp(tl.where(d < -700.0, -700.0, d)))


@triton.jit
def probability(u, top_u, rate):
    return (exp64(u.to(tl.float64) - top_u.to(tl.float64)) * rate).to(tl.float32)


@triton.jit
def is_likely(u, top_u, min_p):
    """Whether float32(exp(u - top_u)) >= min_p."""
    d = u.to(tl.float64) - top_u.to(tl.float64)
    return exp64(d).to(tl.float32) >= min_p


# ------------------------------------------------------------------------------- edges


@triton.jit
def weight_before(
    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, cut, rate, bound,
    KIND: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The weight of the tokens whose depth (BY_ID: id) is below `bound`.

    BY_MASS: of those with depth <= cut; BY_ID: of those with depth == cut.
    """
    total = tl.zeros([LANES], tl.int64)
    for start in range(0, count, LANES):
        z, ids = load_tokens(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, LANES
        )
        u = tl.div_rn(z - base, t)
        depth = order_of(top_u) - order_of(u)
        there = u > NOTHING
        if KIND == BY_DEPTH:
            total += (there & (depth < bound)).to(tl.int64)
        elif KIND == BY_MASS:
            mass = (probability(u, top_u, rate).to(tl.float64) * 4611686018427387904.0).to(tl.int64)
            total += tl.where(there & (depth <= cut) & (depth < bound), mass, 0)
        else:
            total += (there & (depth == cut) & (ids < bound)).to(tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def deepest(
    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, bound,
    LANES: tl.constexpr,
):  # fmt: skip
    """The largest depth of a token that is at most `bound`."""
    found = tl.zeros([LANES], tl.int64)
    for start in range(0, count, LANES):
        z, _ = load_tokens(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, LANES
        )
        u = tl.div_rn(z - base, t)
        depth = order_of(top_u) - order_of(u)
        found = tl.maximum(found, tl.where((u > NOTHING) & (depth <= bound), depth, 0))
    return tl.max(found, axis=0)


@triton.jit
def total_weight(
    list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, base, t, top_u, cut,
    LANES: tl.constexpr,
):  # fmt: skip
    """The sum of e over the tokens with depth <= cut, in units of 2**-46."""
    total = tl.zeros([LANES], tl.int64)
    for start in range(0, count, LANES):
        z, _ = load_tokens(
            list_z_ptr, list_id_ptr, logits_ptr, mask_ptr, count, listed, start, LANES
        )
        u = tl.div_rn(z - base, t)
        e = exp64(u.to(tl.float64) - top_u.to(tl.float64))
        weight = (e * 70368744177664.0 + 0.5).to(tl.int64)
        inside = (u > NOTHING) & (order_of(top_u) - order_of(u) <= cut)
        total += tl.where(inside, weight, 0)
    return tl.sum(total, axis=0)


@triton.jit
def stays(whole, before, limit):
    """Whether top-p keeps a token with the mass `before` above it; the first one always."""
    return (before == 0) | ((whole - before).to(tl.float32) * 2.168404344971009e-19 > limit)


# ------------------------------------------------------------------------------- the race


@triton.jit
def race_words(seed, position, group, half: tl.constexpr):
    """The four words of the ids 4 group to 4 group + 3: the high (`half` 0) or the low ones (1)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = group.to(tl.uint32)
    return tl.philox(seed, c0, c0 * 0 + low, c0 * 0 + high, c0 * 0 + half)


@triton.jit
def words_of(seed, position, ids, half: tl.constexpr):
    """The word of each id."""
    w0, w1, w2, w3 = race_words(seed, position, ids >> 2, half)
    even = tl.where((ids & 2) != 0, w2, w0)
    odd = tl.where((ids & 2) != 0, w3, w1)
    return tl.where((ids & 1) != 0, odd, even)


@triton.jit
def words_of_block(seed, position, start, LANES: tl.constexpr):
    """The high words of the ids from `start` on, one call for four of them."""
    group = start // 4 + tl.arange(0, LANES // 4)
    w0, w1, w2, w3 = race_words(seed, position, group, 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [LANES])


@triton.jit
def score_of(log2_e, high):
    """log2 e - log2 E' with E' <= E by the high word: at least -log2 r, up to rounding."""
    x = high.to(tl.float32) * 2.3283064365386963e-10
    series = tl.fma(x, 0.25, 0.3333333333333333)
    series = tl.fma(x, series, 0.5)
    series = tl.fma(x, series, 1.0)
    return log2_e - tl.log2(x * series)


@triton.jit
def race_time(seed, position, ids, u, top_u):
    """r = E / e in float64, as reference_draw.py has it."""
    high = words_of(seed, position, ids, 0).to(tl.float64)
    low = words_of(seed, position, ids, 1).to(tl.float64)
    x = high * 2.3283064365386963e-10 + (low + 0.5) * 5.421010862427522e-20
    x = tl.minimum(x, 0.9999999999999999)
    # -log1p(-x) by Kahan's correction of what 1 - x rounds away.
    w = 1.0 - x
    gone = w == 1.0
    exponential = tl.where(gone, x, -tl.log(w) * (x / tl.where(gone, 1.0, 1.0 - w)))
    return exponential / exp64(u.to(tl.float64) - top_u.to(tl.float64))
