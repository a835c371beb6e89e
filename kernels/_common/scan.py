"""Triton device functions of the recursion of GAE: two associative scans over a block of tokens.

A_t = delta_t + slope_t A_{t+1} composes affine maps x -> slope x + offset, and the value that
stands behind a token in "carry" mode is the last valid one seen from the right. Both are
associative (Blelloch, "Prefix sums and their applications", 1990). Blocks are walked from the row's
end; what a block needs from the one to its right is a scalar.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting

# (longest row, log2 of the tokens per block, warps): 8 tokens per thread from 256 tokens on, so
# that a block's loads hide their latency. From this reasoning and the register table alone: not
# tuned on a GPU.
SHAPES = ((64, 6, 1), (256, 8, 1), (1024, 10, 4), (None, 11, 8))
# The interpreter takes 0.1 ms per element of a scan: small blocks waste less on short rows.
INTERPRETER_SHAPE = (6, 1)


def shape(length: int) -> tuple[int, int]:
    """(log2 of the tokens per block, warps) for rows of `length` tokens."""
    if interpreting():
        return INTERPRETER_SHAPE
    for longest, log2_block, warps in SHAPES:
        if longest is None or length <= longest:
            return log2_block, warps
    raise AssertionError("SHAPES ends with None")


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
def passed_on(slope, offset, behind):
    """What each lane hands to its left when `behind` enters the last one and all apply theirs."""
    slope, offset = tl.associative_scan((slope, offset), 0, _compose, reverse=True)
    return tl.where(slope == 0.0, offset, tl.fma(slope, behind, offset))


@triton.jit
def traces(delta, cut, walked, decay, behind):
    """A_t of a block from the A behind it."""
    slope = tl.where(walked, tl.where(cut, 0.0, decay), 1.0)
    return passed_on(slope, tl.where(walked, delta, 0.0), behind)
