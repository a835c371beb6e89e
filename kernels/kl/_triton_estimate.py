"""Sampled KL estimates in Triton, element by element; `_triton.py` serves them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._common.device_math import LN_2, LOG2_E
from rlhf_fast.kernels._common.launch import flat, on_device_of

ESTIMATORS = {"k1": 0, "abs": 1, "k2": 2, "k3": 3}
BLOCK = 1024  # tokens per program: 8 per thread of 4 warps


@triton.jit
def _exponentials(x):
    """exp(x) - 1 and exp(x) - 1 - x, each to a few ulp of its own."""
    high = x * LOG2_E
    # What the product lost and what the float nearest to log2 e lacks; 0 where x is infinite.
    low = tl.fma(x, LOG2_E, -high) + x * 1.925963e-08
    e = tl.exp2(high) * tl.where(tl.abs(x) < 1e30, tl.fma(low, LN_2, 1.0), 1.0)
    # Taylor: the first term left out is 4e-8 of the sum at |x| = 1.
    series = tl.fma(x, 1.0 / 3628800.0, 1.0 / 362880.0)
    series = tl.fma(x, series, 1.0 / 40320.0)
    series = tl.fma(x, series, 1.0 / 5040.0)
    series = tl.fma(x, series, 1.0 / 720.0)
    series = tl.fma(x, series, 1.0 / 120.0)
    series = tl.fma(x, series, 1.0 / 24.0)
    series = tl.fma(x, series, 1.0 / 6.0)
    series = tl.fma(x, series, 0.5) * x * x
    near = tl.abs(x) < 1.0
    above = e - 1.0
    beyond = tl.where(e == float("inf"), e, above - x)  # exp(inf) - inf is infinite here
    return tl.where(near, series + x, above), tl.where(near, series, beyond)


@triton.jit
def _clamped(x, bound):
    """NaN stays NaN."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _estimate(d, ESTIMATOR: tl.constexpr):
    """(the estimate, its derivative)."""
    if ESTIMATOR == 0:
        value, slope = d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == 1:
        value, slope = tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    elif ESTIMATOR == 2:
        value, slope = d * 0.5 * d, d
    else:
        minus_one, value = _exponentials(-d)
        slope = -minus_one
    return value, slope


@triton.jit(do_not_specialize=["size"])
def estimate_kernel(
    grad_ptr, logprob_ptr, ref_logprob_ptr, mask_ptr, out_ptr, size, clamp_in, clamp_out,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The estimate; with `grad_ptr` the gradient of logprob."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    a = tl.load(logprob_ptr + i, mask=inside, other=0.0)
    b = tl.load(ref_logprob_ptr + i, mask=inside, other=0.0)
    d = tl.where(a == b, 0.0, a - b)
    if grad_ptr is None:
        value, _ = _estimate(_clamped(d, clamp_in), ESTIMATOR)
        out = _clamped(value, clamp_out)
    else:
        value, slope = _estimate(d, ESTIMATOR)
        live = (tl.abs(a) < float("inf")) & (tl.abs(b) < float("inf"))
        live = live & (tl.abs(d) <= clamp_in) & (tl.abs(value) <= clamp_out)
        out = tl.where(live, tl.load(grad_ptr + i, mask=inside, other=0.0) * slope, 0.0)
    if mask_ptr is not None:
        out = tl.where(tl.load(mask_ptr + i, mask=inside, other=0) != 0, out, 0.0)
    tl.store(out_ptr + i, out, mask=inside)


def _estimates(grad, logprob, ref_logprob, mask, estimator, clamp_in, clamp_out):
    out = torch.empty(logprob.shape, dtype=torch.float32, device=logprob.device)
    if size := out.numel():
        bounds = (math.inf if bound is None else bound for bound in (clamp_in, clamp_out))
        with on_device_of(logprob):
            estimate_kernel[(triton.cdiv(size, BLOCK),)](
                flat(grad), flat(logprob), flat(ref_logprob), flat(mask), out, size, *bounds,
                ESTIMATORS[estimator], BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def kl_estimate(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> torch.Tensor:
    """The estimate of each token; 0 where masked."""
    return _estimates(None, logprob, ref_logprob, mask, estimator, clamp_in, clamp_out)


def kl_estimate_backward(
    grad: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> torch.Tensor:
    """Gradient of `logprob`; that of `ref_logprob` is its negative."""
    return _estimates(grad, logprob, ref_logprob, mask, estimator, clamp_in, clamp_out)
