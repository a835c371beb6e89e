"""A row of logits in Triton: what the kernels of this room share.

u = z / t is the float32 quotient, correctly rounded, as reference.py has it: kept sets are decided
on it. Sums of exponentials go by (z - max) * rate instead, which loses nothing at any offset.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def temperature_of(temperature, temperatures_ptr, row):
    """(temperature, whether the row is greedy); a greedy row has temperature 1."""
    t = tl.full((), temperature, tl.float32)  # the interpreter takes 1e-40 for a float64
    if temperatures_ptr is not None:
        t = tl.load(temperatures_ptr + row)
    greedy = t == 0.0
    return tl.where(greedy, 1.0, t), greedy


@triton.jit
def rate_of(t):
    """1 / t, at most 2e38 so that 0 * rate stays 0."""
    return tl.minimum(tl.div_rn(1.0, t), 2e38)


@triton.jit
def row_at(logits_ptr, inner, stride_outer, stride_inner, row):
    """Where the row's logits begin."""
    return logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def logits_at(base, allowed, cols, V):
    """Logits as float32, -inf beyond the row and where the mask forbids a token."""
    inside = cols < V
    if allowed is not None:
        inside = inside & (tl.load(allowed + cols, mask=inside, other=0) != 0)
    return tl.load(base + cols, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def origin_of(top, t):
    """(base, the largest u): u = (z - base) / t.

    base is 0, or the largest logit where a tiny temperature makes its quotient overflow.
    """
    quotient = tl.div_rn(top, t)
    overflows = (tl.abs(top) < float("inf")) & (tl.abs(quotient) == float("inf"))
    return tl.where(overflows, top, 0.0), tl.where(overflows, 0.0, quotient)


@triton.jit
def is_kept(u, cols, tau, last):
    return (u > tau) | ((u == tau) & (cols <= last))


@triton.jit
def double_exp(u, top_u):
    """exp(u - top_u) in float64."""
    return tl.exp(u.to(tl.float64) - top_u.to(tl.float64))
