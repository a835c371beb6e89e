"""Triton device functions of moments: count, mean and squared deviations of the numbers that count.

A mean is two floats, `mean + rest`: whitening numbers near 1e4 that differ by 0.01 needs more
digits of it than one has. Equal numbers have a mean that is exactly theirs and no deviation at all.
Sums are made by `tree_sum`, in an order that is fixed by the code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_math import tree_sum

# In place of a moment of nothing: below every mean.
_NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _anchor(x, live):
    """One of the numbers, so that sums of differences from it keep their digits; 0 for none."""
    top = tl.max(tl.where(live, x, _NOTHING), axis=0)
    return tl.where(top == _NOTHING, 0.0, top)


@triton.jit
def block_moments(x, live, LOG2_LANES: tl.constexpr):
    """(count, mean, rest, squares) of a block, where it is live.

    The corrected two-pass algorithm of Chan, Golub and LeVeque ("Algorithms for computing the
    sample variance", 1983): deviations are those from the rounded mean, and what its rounding adds
    is count rest^2.
    """
    count = tl.sum(live.to(tl.int32), axis=0).to(tl.float32)
    divisor = tl.maximum(count, 1.0)
    anchor = _anchor(x, live)
    mean = anchor + tl.div_rn(tree_sum(tl.where(live, x - anchor, 0.0), LOG2_LANES), divisor)
    deviation = tl.where(live, x - mean, 0.0)
    rest = tl.div_rn(tree_sum(deviation, LOG2_LANES), divisor)
    squares = tree_sum(deviation * deviation, LOG2_LANES) - count * rest * rest
    return count, mean, rest, tl.maximum(squares, 0.0)


@triton.jit
def merge(count, mean, rest, squares, new_count, new_mean, new_rest, new_squares):
    """The moments of both (Chan, Golub and LeVeque, "Updating formulae", 1979)."""
    total = count + new_count
    share = tl.div_rn(new_count, tl.maximum(total, 1.0))
    gap = (new_mean - mean) + (new_rest - rest)
    step = gap * share
    sum_ = mean + step
    part = sum_ - mean  # what the sum's rounding loses (Knuth's two-sum)
    lost = (mean - (sum_ - part)) + (step - part)
    squares = squares + new_squares + gap * gap * count * share
    nothing = count == 0.0
    rest = tl.where(nothing, new_rest, rest + lost)
    return total, tl.where(nothing, new_mean, sum_), rest, squares


@triton.jit
def load_parts(parts_ptr, parts, first, LANES: tl.constexpr):
    """(count, mean, rest, squares) of the parts from `first` on; parts_ptr is [4, parts]."""
    part = first + tl.arange(0, LANES)
    inside = part < parts
    count = tl.load(parts_ptr + part, mask=inside, other=0.0)
    live = count > 0.0
    mean = tl.load(parts_ptr + parts + part, mask=live, other=0.0)
    rest = tl.load(parts_ptr + 2 * parts + part, mask=live, other=0.0)
    squares = tl.load(parts_ptr + 3 * parts + part, mask=live, other=0.0)
    return count, mean, rest, squares


@triton.jit
def store_part(parts_ptr, parts, part, count, mean, rest, squares):
    tl.store(parts_ptr + part, count)
    tl.store(parts_ptr + parts + part, mean)
    tl.store(parts_ptr + 2 * parts + part, rest)
    tl.store(parts_ptr + 3 * parts + part, squares)


@triton.jit
def merged_parts(parts_ptr, parts, LOG2_LANES: tl.constexpr):
    """The moments of all parts: deviations of the parts' means from the common one, as above.

    Every program that calls this gets the same bits, so nobody has to wait for the one that merges.
    """
    LANES: tl.constexpr = 2**LOG2_LANES
    zero = tl.zeros([LANES], tl.float32)
    blocks = tl.cdiv(parts, LANES)
    counts = zero
    tops = tl.full([LANES], _NOTHING, tl.float32)
    for block in range(blocks):
        count, mean, rest, squares = load_parts(parts_ptr, parts, block * LANES, LANES)
        counts += count
        tops = tl.where((count > 0.0) & (mean > tops), mean, tops)
    total = tree_sum(counts, LOG2_LANES)
    divisor = tl.maximum(total, 1.0)
    anchor = _anchor(tops, tops > _NOTHING)
    sums = zero
    for block in range(blocks):
        count, mean, rest, squares = load_parts(parts_ptr, parts, block * LANES, LANES)
        sums += tl.where(count > 0.0, count * ((mean - anchor) + rest), 0.0)
    middle = anchor + tl.div_rn(tree_sum(sums, LOG2_LANES), divisor)
    sums = zero
    all_squares = zero
    for block in range(blocks):
        count, mean, rest, squares = load_parts(parts_ptr, parts, block * LANES, LANES)
        deviation = tl.where(count > 0.0, (mean - middle) + rest, 0.0)
        sums += count * deviation
        all_squares += squares + count * deviation * deviation
    leftover = tl.div_rn(tree_sum(sums, LOG2_LANES), divisor)
    squares_in_all = tree_sum(all_squares, LOG2_LANES) - total * leftover * leftover
    return total, middle, leftover, tl.maximum(squares_in_all, 0.0)
