"""Triton device functions of the losses' token terms; csrc/ppo_loss/formulas.h has the same ones.

Clipped surrogate: Schulman et al., "Proximal Policy Optimization Algorithms", 2017.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import LN_2, LOG2_E
from rlhf_fast.kernels.kl._triton_estimate import _clamped, _estimate, _exponentials

LOG_RATIO_LIMIT = tl.constexpr(20.0)


@triton.jit
def exp(x):
    """exp(x) to a few ulp; what the product with log2 e loses comes back as a factor."""
    high = x * LOG2_E
    low = tl.fma(x, LOG2_E, -high) + x * 1.925963e-08
    return tl.exp2(high) * tl.fma(low, LN_2, 1.0)


@triton.jit
def difference(a, b):
    """a - b, 0 where both are the same infinity."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def clamped_log_ratio(d):
    return _clamped(d, LOG_RATIO_LIMIT)


@triton.jit
def ratio(log_ratio):
    """(rho, rho - 1 - log rho)."""
    _, k3 = _exponentials(log_ratio)
    return exp(log_ratio), k3


@triton.jit
def _within(rho, low, high):
    return tl.where(rho > high, high, tl.where(rho < low, low, rho))


@triton.jit
def _clipped_term(advantage, rho, low, high, dual_clip):
    """max(-A rho, -A clip(rho)), then min(-A dual_clip, .) where A < 0; dual_clip 0 is none.

    A clip has no slope where it is strictly active; at a tie the slope is that of -A rho.
    """
    plain = -advantage * rho
    cut = -advantage * _within(rho, low, high)
    clipped = cut > plain
    loss = tl.where(clipped, cut, plain)
    cap = -advantage * dual_clip
    dual = (advantage < 0.0) & (loss > cap) & (dual_clip > 0.0)
    loss = tl.where(dual, cap, loss)
    slope = tl.where(clipped | dual, 0.0, plain)
    return loss, slope, clipped & (rho < low), clipped & (rho > high), dual


@triton.jit
def policy_term(logprob, advantage, rho, outside, low, high, dual_clip, KIND: tl.constexpr):
    """(loss, slope in the log-prob, clipped below, clipped above, at the dual clip).

    KIND is 0 for the clipped surrogate, 1 for gspo, 2 for reinforce, 3 for cispo and 4 for sapo.
    `outside`: the log-ratio is beyond its limit, where no kind with a ratio has a slope.
    """
    none = rho < 0.0  # a ratio is positive
    if KIND == 2:
        # 0 * -inf: a token without advantage says nothing, however impossible it is.
        loss = tl.where(advantage == 0.0, 0.0, -advantage * logprob)
        slope, below, above, dual = -advantage, none, none, none
    elif KIND == 3:
        slope = -advantage * _within(rho, low, high)
        loss = tl.where(advantage == 0.0, 0.0, slope * logprob)
        below, above, dual = rho < low, rho > high, none
    elif KIND == 4:
        tau = tl.where(advantage > 0.0, 1.0, 1.05)
        x = tau * (rho - 1.0)
        e = exp(-tl.abs(x))
        small, large = tl.div_rn(e, 1.0 + e), tl.div_rn(1.0, 1.0 + e)
        gate = tl.where(x < 0.0, small, large)  # sigmoid(x)
        loss = -advantage * tl.div_rn(4.0, tau) * gate
        slope = advantage * -4.0 * rho * small * large
        below, above, dual = none, none, none
    else:
        loss, slope, below, above, dual = _clipped_term(advantage, rho, low, high, dual_clip)
    if KIND != 2:
        slope = tl.where(outside, 0.0, slope)
    return loss, slope, below, above, dual


@triton.jit
def value_term(value, old_value, target, clip):
    """(loss, slope, clipped) of 0.5 max((v - R)^2, (clip(v) - R)^2); a negative clip is none."""
    error = value - target
    squares = error * error
    near = _within(value, old_value - clip, old_value + clip) - target
    near_squares = near * near
    clipped = (near_squares > squares) & (clip >= 0.0)
    return 0.5 * tl.where(clipped, near_squares, squares), tl.where(clipped, 0.0, error), clipped


@triton.jit
def kl_term(logprob, ref_logprob, kl_coef, ESTIMATOR: tl.constexpr):
    """(the estimate of KL, what it adds to the slope in the log-prob)."""
    kl, slope = _estimate(difference(logprob, ref_logprob), ESTIMATOR)
    finite = (tl.abs(logprob) < float("inf")) & (tl.abs(ref_logprob) < float("inf"))
    return kl, tl.where(finite & (kl_coef != 0.0), slope * kl_coef, 0.0)
