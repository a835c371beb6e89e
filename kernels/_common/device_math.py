"""Triton device functions for rows of logits: softcap, expm1, and an online softmax.

Sums are fixed by what is written here and by nothing else: lanes are combined by `tree_sum`, not by
`tl.sum` over many elements, whose order follows the layout that the compiler chose (and so the
alignment of the pointers). Kernels that use these helpers are launched with
`enable_fp_fusion=False`; where a fused multiply-add is wanted it is spelled `tl.fma`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import ELSEWHERE

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NOT_HERE = tl.constexpr(ELSEWHERE)


@triton.jit
def tree_sum(x, LOG2_LANES: tl.constexpr):
    """Sum of a [2**LOG2_LANES] block, neighbours first: the first steps stay inside a thread."""
    for step in tl.static_range(LOG2_LANES):
        x = tl.sum(tl.reshape(x, [2 ** (LOG2_LANES - step - 1), 2]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def accurate_exp2(x):
    """2**x for x <= 0 to 1 ulp (2**-126 below -126), where `tl.exp2` on a GPU is off by up to 2."""
    x = tl.where(x < -126.0, -126.0, x)
    shifted = x + 12582912.0  # 1.5 * 2**23: the sum's last bits are those of round(x)
    f = x - (shifted - 12582912.0)
    # Taylor series of 2**f = exp(f ln 2), |f| <= 1/2: its remainder is 5e-9.
    series = tl.fma(f, 1.5252734e-05, 1.5403530e-04)
    series = tl.fma(f, series, 1.3333558e-03)
    series = tl.fma(f, series, 9.6181291e-03)
    series = tl.fma(f, series, 5.5504109e-02)
    series = tl.fma(f, series, 2.4022651e-01)
    series = tl.fma(f, series, LN_2)
    series = tl.fma(f, series, 1.0)
    bits = series.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    # A GPU's NaN, 0x7fffffff, would become 3.4e38.
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def softcapped(z, softcap):
    """(c tanh(z / c), its derivative 1 - tanh^2), with -inf left at -inf.

    Triton has no tanh of its own. With e = exp(-2 |z / c|) it is 1 - 2 e / (1 + e), which cancels
    near 0; there the Taylor series up to y^15 serves (its relative error at the switch is 1e-8).
    Errors of tanh come out multiplied by c / temperature, so each step here is good to about half
    an ulp, where `/` and `tl.exp2` on a GPU are off by up to 2.
    """
    inverse = tl.div_rn(1.0, softcap)
    quotient = z * inverse
    y = tl.fma(tl.fma(-quotient, softcap, z), inverse, quotient)
    y = tl.where(tl.abs(quotient) == float("inf"), quotient, y)
    size = tl.abs(y)
    e = accurate_exp2(size * (-2 * LOG2_E))
    above = 1.0 + e
    below = 1.0 / above
    # One step of Newton towards 1 / (1 + e), with what the rounding of 1 + e lost.
    lost = e - (above - 1.0)
    below = tl.fma(below, tl.fma(-below, above, 1.0) - below * lost, below)
    large = tl.fma(-2.0 * e, below, 1.0)
    square = y * y
    series = tl.fma(square, -929569.0 / 638512875.0, 21844.0 / 6081075.0)
    series = tl.fma(square, series, -1382.0 / 155925.0)
    series = tl.fma(square, series, 62.0 / 2835.0)
    series = tl.fma(square, series, -17.0 / 315.0)
    series = tl.fma(square, series, 2.0 / 15.0)
    series = tl.fma(square, series, -1.0 / 3.0)
    small = tl.fma(y * square, series, y)
    tanh = tl.where(size < 0.5, small, tl.where(y < 0, -large, large))
    capped = tl.where(z == float("-inf"), z, softcap * tanh)
    return capped, 4.0 * e * below * below


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0; a Taylor series where the difference would cancel."""
    series = tl.fma(x, 1.0 / 40320.0, 1.0 / 5040.0)
    series = tl.fma(x, series, 1.0 / 720.0)
    series = tl.fma(x, series, 1.0 / 120.0)
    series = tl.fma(x, series, 1.0 / 24.0)
    series = tl.fma(x, series, 1.0 / 6.0)
    series = tl.fma(x, series, 0.5)
    series = tl.fma(x * x, series, x)
    return tl.where(x > -0.5, series, tl.exp2(x * LOG2_E) - 1.0)


@triton.jit
def online_step(top, total, weighted, x0, x1, x2, x3, rate, WEIGHTED: tl.constexpr):
    """Fold four blocks of logits into each lane's running maximum, sum and weighted sum.

        total    = sum e,     e = 2**d
        weighted = sum e d,   d = rate (x - top)

    Every lane has a state of its own, so the loop over the vocabulary crosses no threads and each
    sum has few terms (V / lanes). One rescaling serves four elements: 1.25 exponentials each. The
    start is top = -inf, total = weighted = 0. A NaN makes its lane's total NaN.
    """
    new = tl.maximum(tl.maximum(top, tl.maximum(x0, x1)), tl.maximum(x2, x3))
    # Nothing but -inf so far: subtract 0, for -inf - -inf is NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    shift = (top - base) * rate
    shrink = tl.exp2(shift)
    d0 = (x0 - base) * rate
    d1 = (x1 - base) * rate
    d2 = (x2 - base) * rate
    d3 = (x3 - base) * rate
    e0 = tl.exp2(d0)
    e1 = tl.exp2(d1)
    e2 = tl.exp2(d2)
    e3 = tl.exp2(d3)
    if WEIGHTED:
        # 2**-256 is 0 in float32; the floor keeps 0 * -inf out.
        weighted = shrink * tl.fma(tl.maximum(shift, -256.0), total, weighted)
        weighted = tl.fma(e0, tl.maximum(d0, -256.0), weighted)
        weighted = tl.fma(e1, tl.maximum(d1, -256.0), weighted)
        weighted = tl.fma(e2, tl.maximum(d2, -256.0), weighted)
        weighted = tl.fma(e3, tl.maximum(d3, -256.0), weighted)
    total = tl.fma(total, shrink, (e0 + e1) + (e2 + e3))
    return new, total, weighted


@triton.jit
def online_merge(top, total, weighted, rate, LOG2_LANES: tl.constexpr, WEIGHTED: tl.constexpr):
    """The lanes' states as three numbers of the row; total is 0 for a row of -inf alone."""
    row_top = tl.max(top, axis=0)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    shift = (top - base) * rate
    shrink = tl.exp2(shift)
    row_weighted = 0.0
    if WEIGHTED:
        weighted = shrink * tl.fma(tl.maximum(shift, -256.0), total, weighted)
        row_weighted = tree_sum(weighted, LOG2_LANES)
    return row_top, tree_sum(shrink * total, LOG2_LANES), row_weighted


@triton.jit
def row_rate(inv_temperature, temperatures_ptr, row):
    """1 / temperature, at most 2e38 so that 0 * rate stays 0 at any legal temperature."""
    if temperatures_ptr is not None:
        inv_temperature = tl.minimum(tl.div_rn(1.0, tl.load(temperatures_ptr + row)), 2e38)
    return inv_temperature
