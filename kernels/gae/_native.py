"""Calls of the native GAE kernels, for tensors on the CPU and on CUDA devices.

What is passed on is float32 (the table of implementations sends float64 elsewhere), dense and not
empty.
"""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.native import address, kernel


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _launch(
    rewards, values, offsets, mask, dones, bootstrap, bootstrap_value, gamma, lam,
    lam_value, carry, with_returns=True,
):  # fmt: skip
    if rewards.dtype != torch.float32:
        raise TypeError(f"rewards: expected float32, got {str(rewards.dtype)[6:]}")
    rewards, values, mask, dones = (_dense(x) for x in (rewards, values, mask, dones))
    advantages = torch.empty_like(rewards)
    returns = torch.empty_like(rewards) if with_returns else None
    rows = rewards.shape[0] if offsets is None else offsets.shape[0] - 1
    if rewards.numel():
        decay = gamma * lam
        kernel("gae", rewards)(
            rewards.data_ptr(), address(values), address(offsets), address(mask),
            address(dones), address(bootstrap), advantages.data_ptr(), address(returns),
            rows, rewards.shape[-1], bootstrap_value, gamma, decay,
            decay if lam_value is None else gamma * lam_value, carry,
        )  # fmt: skip
    return advantages, returns


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
    return _launch(
        rewards, values, None, mask, dones, bootstrap, bootstrap_value, gamma, lam,
        lam_value, carry,
    )  # fmt: skip


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
    """(advantages[N], returns[N]); sequence b is `cu_seqlens[b] : cu_seqlens[b + 1]`."""
    return _launch(
        rewards, values, cu_seqlens, mask, dones, bootstrap, bootstrap_value, gamma,
        lam, lam_value, carry,
    )  # fmt: skip


def discounted_returns(
    rewards: torch.Tensor, mask: torch.Tensor | None, gamma: float
) -> torch.Tensor:
    """R_t = r_t + gamma R_{t+1} over the unmasked tokens: GAE with lambda 1 and no values."""
    return _launch(rewards, None, None, mask, None, None, 0.0, gamma, 1.0, None, True, False)[0]
