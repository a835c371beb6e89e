"""Generalised advantage estimation in plain PyTorch: the definition of truth.

Each function has the name and the arguments of the torch op that it implements, without `backend`.
Rewards and values are float32 or float64; arithmetic and results have that dtype.
"""

from __future__ import annotations

import torch


def _advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    dones: torch.Tensor,
    bootstrap: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """Walk each row from its end; a masked token leaves the carried value and trace as they are."""
    next_value, trace = bootstrap, torch.zeros_like(bootstrap)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        cut = dones[:, t]
        delta = rewards[:, t] + gamma * torch.where(cut, 0.0, next_value) - values[:, t]
        advantage = delta + gamma * lam * torch.where(cut, 0.0, trace)
        trace = torch.where(mask[:, t], advantage, trace)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(trace)
    return torch.stack(columns[::-1], 1) if columns else torch.zeros_like(rewards)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    dones: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
    bootstrap_value: float,
    gamma: float,
    lam: float,
    lam_value: float | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages[B, T], returns[B, T]); `carry` skips masked tokens, else they count as zeros."""
    everything = torch.ones_like(rewards, dtype=torch.bool)
    mask = everything if mask is None else mask
    dones = ~everything if dones is None else dones & mask
    if bootstrap is None:
        bootstrap = rewards.new_full((rewards.shape[0],), bootstrap_value)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    walked = (rewards, values, mask if carry else everything, dones, bootstrap, gamma)
    advantages = _advantages(*walked, lam)
    traces = advantages if lam_value is None else _advantages(*walked, lam_value)
    return torch.where(mask, advantages, 0.0), torch.where(mask, traces + values, 0.0)


def gae_packed(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    dones: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
    bootstrap_value: float,
    gamma: float,
    lam: float,
    lam_value: float | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages[N], returns[N]): the sequences are padded on the left, where the walk ends."""
    if rewards.numel() == 0:
        return torch.zeros_like(rewards), torch.zeros_like(rewards)
    lengths = cu_seqlens.diff()
    width = int(lengths.max())
    column = torch.arange(width, device=rewards.device) - width
    source = cu_seqlens[1:, None] + column
    inside = source >= cu_seqlens[:-1, None]
    source = torch.where(inside, source, 0)

    def padded(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else torch.where(inside, x[source], x.new_zeros(()))

    results = gae(
        padded(rewards), padded(values), inside if mask is None else padded(mask), padded(dones),
        bootstrap, bootstrap_value, gamma, lam, lam_value, carry,
    )  # fmt: skip
    return tuple(row[inside] for row in results)


def discounted_returns(
    rewards: torch.Tensor, mask: torch.Tensor | None, gamma: float
) -> torch.Tensor:
    """R_t = r_t + gamma R_{t+1} over the unmasked tokens: GAE with lambda 1 and values of 0."""
    zeros = torch.zeros_like(rewards)
    return gae(rewards, zeros, mask, None, None, 0.0, gamma, 1.0, None, True)[0]
