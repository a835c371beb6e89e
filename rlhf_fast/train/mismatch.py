"""How far the sampler's log-probs are from the trainer's: docs/rollouts.md says why it matters."""

from __future__ import annotations

import torch


def sums(sampled: torch.Tensor, trained: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[5]` float64 sums over the unmasked tokens, which add up over ranks: see `metrics`.

    Args:
        sampled, trained: `[N, T]` log-probs of the drawn tokens, as the sampler and as the trainer
            computed them.
        mask: `[N, T]` bool.
    """
    d = torch.where(mask, trained.double() - sampled.double(), 0.0)
    ratio = torch.where(mask, d.exp(), 0.0)
    k3 = torch.where(mask, torch.expm1(d) - d, 0.0)
    return torch.stack([x.sum() for x in (d.abs(), k3, ratio, ratio.square(), mask.double())])


def largest(sampled: torch.Tensor, trained: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[1]` float64: the largest |trained - sampled| of an unmasked token, 0 without one."""
    gap = torch.where(mask, trained.double() - sampled.double(), 0.0).abs()
    return torch.cat((gap.flatten(), gap.new_zeros(1))).amax(0, keepdim=True)


def metrics(totals: list[float], most: float) -> dict[str, float]:
    """The meter of a rollout, from the sums and the largest gap of all ranks.

    d             = log pi(token) - log mu(token)       trainer's and sampler's log-prob
    sampler_gap   = mean |d|
    sampler_max   = max |d|
    sampler_k3    = mean exp(d) - 1 - d                 KL(mu || pi) per token
    sampler_ess   = (sum rho)^2 / (n sum rho^2)         rho = exp(d), 1 where nothing differs
    """
    gap, k3, ratio, square, tokens = totals
    count = max(tokens, 1.0)
    return {
        "sampler_gap": gap / count,
        "sampler_max": most,
        "sampler_k3": k3 / count,
        "sampler_ess": ratio * ratio / (count * square) if square else 1.0,
    }
