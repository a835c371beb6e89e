"""Policy, value and PPO losses in plain PyTorch: the definition of truth.

Each function has the name and the arguments of the torch op that it implements, without `backend`.
Tensors are [B, T], a row is a sequence; all are of one dtype, float32 or float64, in which the
arithmetic is done. A loss comes with its gradient for an upstream gradient of 1 ("unit gradient"):

    loss = sum_bt scale_b weight_bt l_bt / denominator
    unit_bt = scale_b weight_bt dl_bt / denominator
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from rlhf_fast.kernels.kl.reference import kl_estimate, kl_estimate_backward
from rlhf_fast.kernels.logprob.reference import row_sum

STATS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "kl",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "value_clip_fraction",
    "approx_kl_k1",
    "approx_kl_k3",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "tokens",
    "dual_clip_fraction",
)
LOG_RATIO_LIMIT = 20.0
SAPO_TAU = (1.0, 1.05)  # where the advantage is positive, elsewhere


class Reduction(NamedTuple):
    """How token losses become a scalar: sum of row sums times `scale`, over `denominator`."""

    mask: torch.Tensor  # [B, T]
    scale: torch.Tensor  # [B, 1]
    denominator: torch.Tensor  # []
    tokens: torch.Tensor  # [], 0 when everything is masked

    def reduce(self, terms: torch.Tensor) -> torch.Tensor:
        """The loss of token terms that are 0 where masked."""
        return (terms.sum(1, keepdim=True) * self.scale).sum() / self.denominator

    def spread(self, slopes: torch.Tensor) -> torch.Tensor:
        """The unit gradient from the slopes of the token terms."""
        return torch.where(self.mask, slopes * self.scale / self.denominator, 0.0)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over the unmasked tokens, 0 without one."""
        return torch.where(self.mask, x, 0.0).sum() / self.tokens.clamp(min=1)


def reduction_of(
    mask: torch.Tensor,
    reduction: str,
    divisor: float | None,
    normalizer: torch.Tensor | None,
    dtype: torch.dtype,
) -> Reduction:
    """`divisor` or `normalizer`, if given, takes the place of the denominator.

    A denominator of 0 goes with a numerator of 0 (no token counts), and is replaced by 1.
    """
    counts = mask.sum(1, keepdim=True)
    tokens = counts.sum().to(dtype)  # summed as integers: float32 cannot count beyond 2^24
    counts = counts.to(dtype)
    scale = torch.ones_like(counts)
    if reduction == "seq-mean-token-mean":
        scale = 1.0 / counts.clamp(min=1)
    if normalizer is not None:
        denominator = normalizer.to(dtype)
    elif divisor is not None:
        denominator = torch.full_like(tokens, divisor)
    elif reduction == "token-mean":
        denominator = tokens
    elif reduction == "token-sum":
        denominator = torch.ones_like(tokens)
    else:
        denominator = (counts > 0).sum().to(dtype)
    return Reduction(mask, scale, torch.where(denominator == 0, 1.0, denominator), tokens)


class Ratios(NamedTuple):
    """Probability ratios of the tokens, and what they are made of."""

    difference: torch.Tensor  # logprob - old_logprob
    log_ratio: torch.Tensor  # the same, clamped
    inside: torch.Tensor  # whether the clamp let it through
    rho: torch.Tensor  # exp(log_ratio), in gspo that of the sequence


def _ratios(
    logprob: torch.Tensor, old_logprob: torch.Tensor, mask: torch.Tensor, kind: str
) -> Ratios:
    # Two log-probs that are both -inf have the ratio 1, not NaN.
    difference = torch.where(logprob == old_logprob, 0.0, logprob - old_logprob)
    log_ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    inside = ~(difference.abs() > LOG_RATIO_LIMIT)
    exponent = log_ratio
    if kind == "gspo":
        counts = mask.sum(1, keepdim=True).clamp(min=1)
        exponent = (row_sum(log_ratio).unsqueeze(1) / counts).expand_as(log_ratio)
    return Ratios(difference, log_ratio, inside, exponent.exp())


def sigmoids(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigmoid(x), sigmoid(-x)), to full relative accuracy at both ends.

    `torch.sigmoid` rounds the last few elements of a tensor differently from the others, so that a
    token's bits would depend on its place; exp does not.
    """
    e = torch.exp(-x.abs())
    small, large = e / (1 + e), 1 / (1 + e)
    return torch.where(x < 0, small, large), torch.where(x < 0, large, small)


def bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    """The interval of the ratio; `clip_low=None` turns its clip off altogether."""
    if clip_low is None:
        return -torch.inf, torch.inf
    return 1.0 - clip_low, 1.0 + (clip_low if clip_high is None else clip_high)


class Terms(NamedTuple):
    """Token losses, their slopes in the log-prob, and which tokens were clipped."""

    loss: torch.Tensor
    slope: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    dual: torch.Tensor


def _clipped_terms(
    advantages: torch.Tensor, rho: torch.Tensor, low: float, high: float, dual_clip: float | None
) -> Terms:
    """max(-A rho, -A clip(rho)), then min(-A c, .) where A < 0.

    A clip has no slope where it is strictly active; at a tie the slope is that of -A rho.
    """
    plain = -advantages * rho
    clip = -advantages * rho.clamp(low, high)
    clipped = clip > plain
    loss = torch.where(clipped, clip, plain)
    dual = torch.zeros_like(clipped)
    if dual_clip is not None:
        cap = -advantages * dual_clip
        dual = (advantages < 0) & (loss > cap)
        loss = torch.where(dual, cap, loss)
    slope = torch.where(clipped | dual, 0.0, plain)
    return Terms(loss, slope, clipped & (rho < low), clipped & (rho > high), dual)


def _terms(
    logprob: torch.Tensor,
    advantages: torch.Tensor,
    ratios: Ratios,
    kind: str,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
) -> Terms:
    rho = ratios.rho
    low, high = bounds(clip_low, clip_high)
    none = torch.zeros_like(ratios.inside)
    if kind in ("reinforce", "a2c"):
        # 0 * -inf: a token without advantage says nothing, however impossible it is.
        loss = torch.where(advantages == 0, 0.0, -advantages * logprob)
        return Terms(loss, -advantages, none, none, none)
    if kind == "cispo":
        slope = -advantages * rho.clamp(low, high)
        loss = torch.where(advantages == 0, 0.0, slope * logprob)
        terms = Terms(loss, slope, rho < low, rho > high, none)
    elif kind == "sapo":
        positive, other = SAPO_TAU
        tau = torch.where(advantages > 0, positive, other).to(rho.dtype)
        gate, rest = sigmoids(tau * (rho - 1))
        loss = -advantages * (4 / tau) * gate
        slope = -4 * advantages * rho * gate * rest
        terms = Terms(loss, slope, none, none, none)
    else:
        terms = _clipped_terms(advantages, rho, low, high, dual_clip)
    return terms._replace(slope=torch.where(ratios.inside, terms.slope, 0.0))


def _policy_stats(ratios: Ratios, terms: Terms, by: Reduction) -> dict[str, torch.Tensor]:
    rho, some = ratios.rho, by.tokens > 0
    stats = {
        "clip_fraction": by.mean((terms.low | terms.high).to(rho.dtype)),
        "clip_fraction_low": by.mean(terms.low.to(rho.dtype)),
        "clip_fraction_high": by.mean(terms.high.to(rho.dtype)),
        "dual_clip_fraction": by.mean(terms.dual.to(rho.dtype)),
        "approx_kl_k1": by.mean(-ratios.difference),
        "approx_kl_k3": by.mean(torch.expm1(ratios.log_ratio) - ratios.log_ratio),
        "ratio_mean": by.mean(rho),
        "tokens": by.tokens,
    }
    if rho.numel():
        smallest = torch.where(by.mask, rho, torch.inf).amin()
        largest = torch.where(by.mask, rho, 0.0).amax()
        stats["ratio_min"] = torch.where(some, smallest, 0.0)
        stats["ratio_max"] = largest
    return stats


def _stacked(stats: dict[str, torch.Tensor]) -> torch.Tensor:
    zero = torch.zeros_like(stats["tokens"])
    return torch.stack([stats.get(name, zero) for name in STATS])


def _everything(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


def _policy(
    logprob, old_logprob, advantages, weights, by, kind, clip_low, clip_high, dual_clip
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(loss, statistics, unit gradient of logprob, the cleaned logprob)."""
    logprob, old_logprob, advantages = (
        torch.where(by.mask, x, 0.0) for x in (logprob, old_logprob, advantages)
    )
    ratios = _ratios(logprob, old_logprob, by.mask, kind)
    terms = _terms(logprob, advantages, ratios, kind, clip_low, clip_high, dual_clip)
    token_loss, slope = terms.loss, terms.slope
    if weights is not None:
        weights = torch.where(by.mask, weights, 0.0)
        token_loss, slope = token_loss * weights, slope * weights
    loss = by.reduce(token_loss)
    return loss, _policy_stats(ratios, terms, by) | {"policy_loss": loss}, by.spread(slope), logprob


def policy_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    weights: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    divisor: float | None,
    kind: str,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, stats, unit gradient of logprob, that of advantages: empty unless "reinforce")."""
    mask = _everything(mask, logprob)
    by = reduction_of(mask, reduction, divisor, normalizer, logprob.dtype)
    loss, stats, unit, clean = _policy(
        logprob, old_logprob, advantages, weights, by, kind, clip_low, clip_high, dual_clip
    )
    unit_advantages = logprob.new_empty(0)
    if kind == "reinforce":
        unit_advantages = by.spread(-clean if weights is None else -clean * weights)
    return loss, _stacked(stats), unit, unit_advantages


def _value(
    values, old_values, returns, by, clip
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """(loss, statistics, unit gradient of values)."""
    values, old_values, returns = (
        torch.where(by.mask, x, 0.0) for x in (values, old_values, returns)
    )
    error = values - returns
    squares, slope = error * error, error
    clipped = torch.zeros_like(by.mask)
    if clip is not None:
        near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        clip_squares = (near - returns) ** 2
        clipped = clip_squares > squares
        squares = torch.where(clipped, clip_squares, squares)
        slope = torch.where(clipped, 0.0, error)
    loss = by.reduce(0.5 * squares)
    stats = {
        "value_loss": loss,
        "value_clip_fraction": by.mean(clipped.to(values.dtype)),
        "tokens": by.tokens,
    }
    return loss, stats, by.spread(slope)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    divisor: float | None,
    clip: float | None,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, stats, unit gradient of values)."""
    mask = _everything(mask, values)
    by = reduction_of(mask, reduction, divisor, normalizer, values.dtype)
    loss, stats, unit = _value(values, old_values, returns, by, clip)
    return loss, _stacked(stats), unit


def entropy_and_kl(
    logprob: torch.Tensor,
    entropy: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    by: Reduction,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """(-entropy_coef entropy + kl_coef kl, statistics, unit gradients of logprob and entropy).

    A term with coefficient 0 is left out, so that an infinite one does no harm; None where nothing
    is left. The gradient of an entropy that was not given is empty.
    """
    stats: dict[str, torch.Tensor] = {}
    loss = unit = None
    unit_entropy = logprob.new_empty(0)
    if entropy is not None:
        entropy = torch.where(by.mask, entropy, 0.0)
        stats["entropy"] = by.mean(entropy)
        unit_entropy = by.spread(torch.full_like(entropy, -entropy_coef))
        if entropy_coef != 0.0:
            loss = -entropy_coef * by.reduce(entropy)
    if ref_logprob is not None:
        options = (logprob, ref_logprob, by.mask, kl_estimator, None, None)
        kl = kl_estimate(*options)
        stats["kl"] = by.mean(kl)
        if kl_coef != 0.0:
            penalty = kl_coef * by.reduce(kl)
            loss = penalty if loss is None else loss + penalty
            slope = kl_estimate_backward(torch.ones_like(kl), *options)
            unit = kl_coef * by.spread(slope)
    return loss, stats, unit, unit_entropy


def ppo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    entropy: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    divisor: float | None,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, stats, unit gradients of logprob, values and entropy: the last empty without one)."""
    mask = _everything(mask, logprob)
    by = reduction_of(mask, reduction, divisor, normalizer, logprob.dtype)
    loss, stats, unit, _ = _policy(
        logprob, old_logprob, advantages, None, by, "ppo", clip_low, clip_high, dual_clip
    )
    value, value_stats, unit_values = _value(values, old_values, returns, by, value_clip)
    stats |= value_stats
    if value_coef != 0.0:
        loss = loss + value_coef * value
        unit_values = value_coef * unit_values
    else:
        unit_values = torch.zeros_like(unit_values)
    extra, extra_stats, unit_extra, unit_entropy = entropy_and_kl(
        logprob, entropy, ref_logprob, by, entropy_coef, kl_coef, kl_estimator
    )
    stats |= extra_stats
    if extra is not None:
        loss = loss + extra
    if unit_extra is not None:
        unit = unit + unit_extra
    # A loss without value, entropy and KL term is the policy's own tensor: outputs share nothing.
    return loss.clone(), _stacked(stats), unit, unit_values, unit_entropy


def scale_unit_gradient(
    grad: torch.Tensor, unit: torch.Tensor, owned: bool = False
) -> torch.Tensor:
    """grad * unit; `unit` may be overwritten if it is `owned`. 0 stays 0 where the upstream
    gradient, a scalar, overflowed: a masked token gets nothing, not 0 * inf."""
    if grad.device.type == "cpu" and math.isfinite(grad):
        return unit * grad
    return torch.where(unit == 0, 0.0, unit * grad)
