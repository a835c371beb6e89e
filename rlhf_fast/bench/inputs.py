"""Inputs of the cases, from a fixed seed, on torch's default device.

A GPU draws its own: the CPU takes 6 s for the 6e8 logits of one case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    """A generator of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """float32 standard normal numbers times `scale` (drawn in float32: 10^8 of them take 1 s)."""
    return torch.randn(*shape, generator=generator(seed)).mul_(scale)


def token_ids(*shape: int, vocabulary: int, seed: int = 1) -> Tensor:
    """int64 ids in [0, vocabulary)."""
    return torch.randint(vocabulary, shape, generator=generator(seed))


def response_mask(B: int, T: int, seed: int = 2) -> Tensor:
    """Right padding: responses of length T/2 to T, the same ones on every device."""
    with torch.device("cpu"):
        lengths = torch.randint(max(T // 2, 1), T + 1, (B, 1), generator=generator(seed))
    return torch.arange(T) < lengths.to(torch.get_default_device())


def _off_bounds(step: Tensor, low: float, high: float) -> Tensor:
    """`step` with 0 where it lies on a clip's bound: there rounding decides about the gradient."""
    near = ((step - low).abs() < 1e-5) | ((step - high).abs() < 1e-5)
    return torch.where(near, 0.0, step)


def policy_batch(B: int, T: int) -> dict[str, Tensor]:
    """Log-probs of a policy a few steps after its rollout, advantages and the mask."""
    old = -normal(B, T, seed=3).abs()
    step = _off_bounds(normal(B, T, seed=4, scale=0.1), math.log(0.8), math.log(1.2))
    return {
        "logprob": old + step,
        "old_logprob": old,
        "advantages": normal(B, T, seed=5),
        "mask": response_mask(B, T),
    }


def value_batch(B: int, T: int) -> dict[str, Tensor]:
    """Values before and after an update, and the returns."""
    old = normal(B, T, seed=6)
    step = _off_bounds(normal(B, T, seed=7, scale=0.2), -0.2, 0.2)
    return {
        "values": old + step,
        "old_values": old,
        "returns": normal(B, T, seed=8),
    }


def reward_batch(B: int, T: int) -> dict[str, Tensor]:
    """Scores and the log-probs of policy and reference."""
    logprob = -normal(B, T, seed=3).abs()
    return {
        "scores": normal(B, seed=9),
        "logprob": logprob,
        "ref_logprob": logprob + normal(B, T, seed=4, scale=0.1),
        "mask": response_mask(B, T),
    }
