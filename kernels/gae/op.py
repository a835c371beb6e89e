"""Generalised advantage estimation: checks, schemas, fakes. Nothing here is differentiable."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf_fast import _args, _dispatch

for _op in ("gae", "gae_packed", "discounted_returns"):
    _dispatch.implementations(_op, __package__)

_OPTIONS = (
    "Tensor? mask, Tensor? dones, Tensor? bootstrap, float bootstrap_value, float gamma, "
    "float lam, float? lam_value, bool carry, str backend"
)


class GAE(NamedTuple):
    """Advantages and returns, both of the shape of the rewards."""

    advantages: torch.Tensor
    returns: torch.Tensor


def _fake_gae(rewards, *_):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def _fake_returns(rewards, *_):
    return rewards.new_empty(rewards.shape)


def _check_packed(rewards, values, cu_seqlens, *_) -> None:
    tokens = rewards.shape[0]
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens: expected non-decreasing offsets from 0 to N = {tokens}, "
            f"got {cu_seqlens.tolist()}"
        )


_dispatch.define(
    "gae",
    f"gae(Tensor rewards, Tensor values, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_gae,
)
_dispatch.define(
    "gae_packed",
    f"gae_packed(Tensor rewards, Tensor values, Tensor cu_seqlens, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_gae,
    check=_check_packed,
)
_dispatch.define(
    "discounted_returns",
    "discounted_returns(Tensor rewards, Tensor? mask, float gamma, str backend) -> Tensor",
    fake=_fake_returns,
)


def _bootstrap(
    value: float | torch.Tensor | None, rows: int, like: torch.Tensor
) -> tuple[torch.Tensor | None, float]:
    """Split `bootstrap_value` into (tensor [B], 0.0) or (None, number)."""
    if value is None:
        return None, 0.0
    if not isinstance(value, torch.Tensor):
        return None, _args.number("bootstrap_value", value)
    _args.check_float_tensor("bootstrap_value", value)
    _args.check_shape("bootstrap_value", value, (rows,), "one per row")
    _args.check_device("bootstrap_value", value, like.device, "rewards")
    return value.detach().to(like.dtype).contiguous(), 0.0


def _prepare(
    rewards, values, rows, dims, gamma, lam, mask, mask_mode, bootstrap_value, dones, lam_value
):
    """The arguments of the torch ops behind the tensors that say where rows begin and end."""
    _args.check_float_tensor("rewards", rewards)
    _args.check_float_tensor("values", values)
    if rewards.ndim != dims:
        expected = "[B, T]" if dims == 2 else "[N]"
        raise ValueError(f"rewards: expected shape {expected}, got {tuple(rewards.shape)}")
    _args.check_shape("values", values, rewards.shape, "that of rewards")
    _args.check_device("values", values, rewards.device, "rewards")
    dtype = _args.compute_dtype(torch.promote_types(rewards.dtype, values.dtype))
    rewards = rewards.detach().to(dtype).contiguous()
    values = values.detach().to(dtype).contiguous()
    mask = _args.as_mask("mask", mask, rewards.shape, rewards.device, "that of rewards")
    dones = _args.as_mask("dones", dones, rewards.shape, rewards.device, "that of rewards")
    bootstrap, bootstrap_number = _bootstrap(bootstrap_value, rows, rewards)
    carry = _args.choice("mask_mode", mask_mode, ("carry", "zero")) == "carry"
    gamma = _args.number("gamma", gamma, low=0.0)
    lam = _args.number("lam", lam, low=0.0)
    if lam_value is not None:
        lam_value = _args.number("lam_value", lam_value, low=0.0)
    options = (mask, dones, bootstrap, bootstrap_number, gamma, lam, lam_value, carry)
    return rewards, values, options


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: torch.Tensor | None = None,
    mask_mode: str = "carry",
    bootstrap_value: float | torch.Tensor | None = None,
    dones: torch.Tensor | None = None,
    lam_value: float | None = None,
) -> GAE:
    """Generalised advantage estimation and returns of padded rows.

        delta_t  = r_t + gamma V_{t+1} - V_t
        A_t      = delta_t + gamma lam A_{t+1}
        return_t = A_t + V_t

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", 2015; `lam_value` from Yue et al., "VAPO", 2025.

    Args:
        rewards: `[B, T]` rewards r_t, t in [0, T).
        values: `[B, T]` values V_t of the state before token t.
        gamma: discount per token.
        lam: lambda of the advantages.
        mask: `[B, T]`; where it is 0 both results are 0 and what stands there is not looked at.
        mask_mode: "carry" skips masked tokens as if they were not there; "zero" takes reward and
            value there as 0 and runs the recursion through them.
        bootstrap_value: V behind the last token, a number or `[B]`; 0 by default. It stands behind
            the last column in "zero" mode and behind the last unmasked token in "carry" mode.
        dones: `[B, T]`; where it is true neither value nor trace crosses from t to t + 1. A flag
            under the mask is not looked at.
        lam_value: a second lambda, for the returns only.

    Returns:
        `GAE(advantages, returns)`, `[B, T]` float32 (float64 if an input is float64), detached.
        The returns are those before any whitening.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or value.

    >>> values = torch.full((1, 2), 0.5)
    >>> rlhf_fast.gae(torch.tensor([[0.0, 1.0]]), values, lam=1.0).advantages
    tensor([[0.5000, 0.5000]])
    """
    rows = rewards.shape[0] if isinstance(rewards, torch.Tensor) and rewards.ndim else 0
    rewards, values, options = _prepare(
        rewards, values, rows, 2, gamma, lam, mask, mask_mode, bootstrap_value, dones, lam_value
    )
    return GAE(*torch.ops.rlhf_fast.gae(rewards, values, *options, _dispatch.requested("gae")))


def gae_packed(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: torch.Tensor | None = None,
    mask_mode: str = "carry",
    bootstrap_value: float | torch.Tensor | None = None,
    dones: torch.Tensor | None = None,
    lam_value: float | None = None,
) -> GAE:
    """Generalised advantage estimation of sequences that are packed without padding.

        A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t

    inside each sequence b, whose tokens are `cu_seqlens[b] : cu_seqlens[b + 1]`. Source and options
    are those of `gae`.

    Args:
        rewards: `[N]` rewards of all sequences, one behind the other.
        values: `[N]` values.
        cu_seqlens: `[B + 1]` int32 or int64 offsets, from 0 to N; empty sequences are legal.
        mask, dones: `[N]`.
        bootstrap_value: a number or `[B]`.

    Returns:
        `GAE(advantages, returns)`, `[N]` float32 (float64 if an input is float64), detached.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or value; on CPU also offsets that
            decrease or do not span [0, N].

    >>> offsets = torch.tensor([0, 1, 3])
    >>> rlhf_fast.gae_packed(torch.ones(3), torch.zeros(3), offsets, lam=1.0).returns
    tensor([1., 2., 1.])
    """
    _args.check_ids("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {tuple(cu_seqlens.shape)}")
    rows = cu_seqlens.shape[0] - 1
    rewards, values, options = _prepare(
        rewards, values, rows, 1, gamma, lam, mask, mask_mode, bootstrap_value, dones, lam_value
    )
    _args.check_device("cu_seqlens", cu_seqlens, rewards.device, "rewards")
    offsets = cu_seqlens.to(torch.int64).contiguous()
    backend = _dispatch.requested("gae_packed")
    return GAE(*torch.ops.rlhf_fast.gae_packed(rewards, values, offsets, *options, backend))


def discounted_returns(
    rewards: torch.Tensor, *, gamma: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Discounted sum of the rewards from each token on.

        R_t = r_t + gamma R_{t+1}

    Masked tokens are skipped as if they were not there. Source: Sutton and Barto, "Reinforcement
    Learning", 2nd edition, 2018, eq. 3.9.

    Args:
        rewards: `[..., T]` rewards.
        gamma: discount per token.
        mask: `[..., T]`; where it is 0 the result is 0.

    Returns:
        `[..., T]` float32 (float64 for float64 rewards), detached.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or value.

    >>> rlhf_fast.discounted_returns(torch.ones(1, 3), gamma=0.5)
    tensor([[1.7500, 1.5000, 1.0000]])
    """
    _args.check_float_tensor("rewards", rewards)
    if rewards.ndim < 1:
        raise ValueError(f"rewards: expected shape [..., T], got {tuple(rewards.shape)}")
    mask = _args.as_mask("mask", mask, rewards.shape, rewards.device, "that of rewards")
    shape = rewards.shape
    rows = rewards.detach().to(_args.compute_dtype(rewards.dtype)).contiguous()
    rows = rows.view(shape[:-1].numel(), shape[-1])
    mask = None if mask is None else mask.reshape(rows.shape)
    gamma = _args.number("gamma", gamma, low=0.0)
    backend = _dispatch.requested("discounted_returns")
    return torch.ops.rlhf_fast.discounted_returns(rows, mask, gamma, backend).view(shape)
