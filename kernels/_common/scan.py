"""Triton device functions of the recursion of GAE: two associative scans over a block of tokens.

A_t = delta_t + slope_t A_{t+1} composes affine maps x -> slope x + offset, and the value that
stands behind a token in "carry" mode is the last valid one seen from the right. Both are
associative (Blelloch, "Prefix sums and their applications", 1990). Blocks are walked from the row's
end; what a block needs from the one to its right is a scalar.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest(found_a, value_a, found_b, value_b):
    """Last-valid scan: `b` stands left of `a` and, where it is valid, hides it."""
    return found_a | found_b, tl.where(found_b != 0, value_b, value_a)


@triton.jit
def _compose(slope_a, offset_a, slope_b, offset_b):
    """The map of `b` (left) after that of `a` (right); a slope of 0 cuts off even NaN."""
    offset = tl.where(slope_b == 0.0, offset_b, tl.fma(slope_b, offset_a, offset_b))
    return slope_a * slope_b, offset


@triton.jit
def first(x, lane):
    """Lane 0 of a block as a scalar."""
    return tl.sum(tl.where(lane == 0, x, 0.0), axis=0)


@triton.jit
def nearest_values(found, value, behind):
    """The nearest value at or right of each lane that is `found`; `behind` where there is none."""
    found, value = tl.associative_scan((found.to(tl.int32), value), 0, _nearest, reverse=True)
    return tl.where(found != 0, value, behind)


@triton.jit
def traces(delta, cut, walked, decay, behind):
    """A_t of a block from the A behind it."""
    slope = tl.where(walked, tl.where(cut, 0.0, decay), 1.0)
    offset = tl.where(walked, delta, 0.0)
    slope, offset = tl.associative_scan((slope, offset), 0, _compose, reverse=True)
    return tl.where(slope == 0.0, offset, tl.fma(slope, behind, offset))
