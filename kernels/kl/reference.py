"""KL divergence in plain PyTorch: the definition of truth.

Each function has the name and the arguments of the torch op that it implements, without `backend`.
Sampled estimates, with d = logprob - ref_logprob:

    k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = expm1(-d) + d

Exact, with u and r the logits of policy and reference less their row's maximum, tempered, s and
s_ref their log-sums, p = exp(u - s) and q = exp(r - s_ref):

    kl = sum p (u - r) - s + s_ref
    d kl / du_j = p_j (u_j - r_j - sum p (u - r))
"""

from __future__ import annotations

import torch

from rlhf_fast._args import compute_dtype
from rlhf_fast.kernels.logprob.reference import (
    live_tokens,
    logprob,
    logprob_backward,
    logprob_entropy,
    row_sum,
    shifted,
)

IGNORE_INDEX = -100


def _difference(
    logprob: torch.Tensor, ref_logprob: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """logprob - ref_logprob; 0 under the mask and where both are the same infinity."""
    d = torch.where(logprob == ref_logprob, 0.0, logprob - ref_logprob)
    return d if mask is None else torch.where(mask, d, 0.0)


def _estimate(d: torch.Tensor, estimator: str) -> torch.Tensor:
    if estimator == "k1":
        return d.clone()
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d * d
    # d = -inf (a token that only the reference can draw) would give inf - inf.
    return torch.where(d == -torch.inf, torch.inf, torch.expm1(-d) + d)


def kl_estimate(
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> torch.Tensor:
    """The estimate of each token; 0 where masked."""
    d = _difference(logprob, ref_logprob, mask)
    if clamp_in is not None:
        d = d.clamp(-clamp_in, clamp_in)
    k = _estimate(d, estimator)
    return (k if clamp_out is None else k.clamp(-clamp_out, clamp_out)).contiguous()


def kl_estimate_backward(
    grad: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> torch.Tensor:
    """Gradient of `logprob`; that of `ref_logprob` is its negative.

    It is 0 under the mask, beyond either clamp, and where a log-prob is infinite.
    """
    d = _difference(logprob, ref_logprob, mask)
    live = logprob.isfinite() & ref_logprob.isfinite()
    if mask is not None:
        live = live & mask
    if clamp_in is not None:
        live = live & (d.abs() <= clamp_in)
    if clamp_out is not None:
        live = live & (_estimate(d, estimator).abs() <= clamp_out)
    if estimator == "k1":
        slope = torch.ones_like(d)
    elif estimator == "abs":
        slope = d.sign()
    elif estimator == "k2":
        slope = d
    else:
        slope = -torch.expm1(-d)
    return torch.where(live, grad * slope, 0.0).contiguous()


def _rows(
    logits: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    row_max: torch.Tensor,
) -> torch.Tensor:
    """Logits less their row's maximum, tempered; rows that are masked are 0."""
    if mask is not None:
        logits = torch.where(mask.unsqueeze(-1), logits, 0.0)
    return shifted(logits, row_max, temperature)


def _temperature(
    temperature: float, temperatures: torch.Tensor | None, mask: torch.Tensor | None
) -> float | torch.Tensor:
    """The number, or one per row; 1 where masked."""
    if temperatures is None:
        return temperature
    return (temperatures if mask is None else torch.where(mask, temperatures, 1.0)).unsqueeze(-1)


def _against(u: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """u - r, 0 where the policy is -inf (whatever the reference is there)."""
    return torch.where(u == -torch.inf, 0.0, u - r)


def _token_mask(ids: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of exact KL: without ids only `mask` counts."""
    return mask if ids is None else live_tokens(ids, mask, IGNORE_INDEX)


def kl_divergence_full(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum).

    Each has the shape of a row index and is 0 where masked. Without `ids` the two log-probs are
    those of token 0.
    """
    mask = _token_mask(ids, mask)
    if ids is None:
        ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    dtype = compute_dtype(torch.promote_types(logits.dtype, ref_logits.dtype))
    options = (mask, temperature, temperatures, None, IGNORE_INDEX)
    z, ref = logits.to(dtype), ref_logits.to(dtype)
    lp, entropy, row_max, log_sum = logprob_entropy(z, ids, *options)
    ref_lp, ref_row_max, ref_log_sum = logprob(ref, ids, *options)
    t = _temperature(temperature, temperatures, mask)
    u = _rows(z, mask, t, row_max)
    difference = _against(u, _rows(ref, mask, t, ref_row_max))
    p = (u - log_sum.unsqueeze(-1)).exp()
    # A p that underflows to 0 times a difference of +inf is +inf, not NaN.
    terms = torch.where(difference == torch.inf, torch.inf, p * difference)
    kl = row_sum(terms) - log_sum + ref_log_sum
    kl = torch.where(row_max == -torch.inf, 0.0, kl)
    if mask is not None:
        kl = torch.where(mask, kl, 0.0)
    return kl, lp, ref_lp, entropy, row_max, log_sum, ref_row_max, ref_log_sum


def kl_divergence(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, row_max, log_sum, ref_row_max, ref_log_sum), each of the shape of a row index."""
    out = kl_divergence_full(logits, ref_logits, None, mask, temperature, temperatures)
    return out[0], *out[4:]


def kl_divergence_backward(
    grad_kl: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    ref_row_max: torch.Tensor,
    ref_log_sum: torch.Tensor,
    kl: torch.Tensor,
    entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the policy's logits, in their dtype; a row whose KL is +inf gives none to kl."""
    mask = _token_mask(ids, mask)
    z, ref = logits.to(kl.dtype), ref_logits.to(kl.dtype)
    t = _temperature(temperature, temperatures, mask)
    u = _rows(z, mask, t, row_max)
    difference = _against(u, _rows(ref, mask, t, ref_row_max))
    p = (u - log_sum.unsqueeze(-1)).exp()
    dead = (kl == torch.inf) | (row_max == -torch.inf)
    if mask is not None:
        dead = dead | ~mask
    mean = (kl + log_sum - ref_log_sum).unsqueeze(-1)
    slope = torch.where(p == 0, 0.0, p * (difference - mean))
    dz = torch.where(dead.unsqueeze(-1), 0.0, grad_kl.unsqueeze(-1) / t * slope)
    if ids is not None and (grad_logprob is not None or grad_entropy is not None):
        dz = dz + logprob_backward(
            torch.zeros_like(kl) if grad_logprob is None else grad_logprob,
            grad_entropy, z, ids, mask, temperature, temperatures, None, IGNORE_INDEX, row_max,
            log_sum, entropy,
        )  # fmt: skip
    return dz.to(logits.dtype).contiguous()


def kl_divergence_and_grad(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor,
    grad_kl: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy, gradient of the policy's logits)."""
    options = (mask, temperature, temperatures)
    *values, entropy, row_max, log_sum, ref_row_max, ref_log_sum = kl_divergence_full(
        logits, ref_logits, ids, *options
    )
    saved = (row_max, log_sum, ref_row_max, ref_log_sum, values[0], entropy)
    grads = grad_kl, grad_logprob, grad_entropy
    grad = kl_divergence_backward(*grads, logits, ref_logits, ids, *options, *saved)
    return *values, entropy, grad


def kl_divergence_and_grad_inplace(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    ids: torch.Tensor,
    grad_kl: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy); the gradient replaces the policy's logits."""
    options = (mask, temperature, temperatures)
    *values, grad = kl_divergence_and_grad(
        logits, ref_logits, ids, grad_kl, grad_logprob, grad_entropy, *options
    )
    logits.copy_(grad)
    return tuple(values)
