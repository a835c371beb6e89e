"""Calls of the native kernels of rewards, advantages and whitening, on the CPU and on CUDA devices.

What is passed on is float32 (the table of implementations sends float64 elsewhere), dense and not
empty.
"""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.native import ESTIMATORS, address, kernel

from .reference import merge_moments, moments_of_group

GROUP_KINDS = {"grpo": 0, "dr_grpo": 1, "rloo": 2}
# On CUDA a block has the moments of every so many-th 2048 numbers; each block reads all parts.
_PART, _MOST_PARTS = 2048, 512
# Beyond so many tokens a row may be split over 8 blocks (csrc/gae/scan.cuh), each with its moments.
_SPLIT_FROM, _SPLIT = 16384, 8


def _bound(clamp: float | None) -> float:
    return torch.inf if clamp is None else clamp


def _launch(scores, logprob, ref_logprob, values, mask, at, penalty, options, outputs):
    kl_coef, estimator, clamp_in, clamp_out = penalty
    if logprob.numel():
        parts = None
        if logprob.is_cuda and options[3]:  # whitened
            rows, length = logprob.shape
            blocks = rows * (_SPLIT if length > _SPLIT_FROM else 1)
            parts = logprob.new_empty((blocks, 3), dtype=torch.float64)
        tensors = (scores, logprob, ref_logprob, values, mask, at, *outputs, parts)
        kernel("advantages", logprob)(
            [*map(address, tensors)],
            (kl_coef, ESTIMATORS[estimator], _bound(clamp_in), _bound(clamp_out), *options),
            *logprob.shape,
        )  # fmt: skip


def shaped_rewards(
    scores: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    at: torch.Tensor | None,
    kl_coef: float,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards, kl): -kl_coef kl, plus the score at its place; a coefficient of 0 ignores kl."""
    rewards, kl = torch.empty_like(logprob), torch.empty_like(logprob)
    _launch(
        scores, logprob, ref_logprob, None, mask, at, (kl_coef, estimator, clamp_in, clamp_out),
        (1.0, 1.0, True, False, True, 0.0), (rewards, kl, None, None),
    )  # fmt: skip
    return rewards, kl


def ppo_advantages(
    scores: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    at: torch.Tensor | None,
    kl_coef: float,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
    gamma: float,
    lam: float,
    carry: bool,
    whitened: bool,
    unbiased: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(advantages, returns, rewards, kl), each [B, T]."""
    rewards, kl, advantages, returns = (torch.empty_like(logprob) for _ in range(4))
    _launch(
        scores, logprob, ref_logprob, values, mask, at, (kl_coef, estimator, clamp_in, clamp_out),
        (gamma, gamma * lam, carry, whitened, unbiased, eps), (rewards, kl, advantages, returns),
    )  # fmt: skip
    return advantages, returns, rewards, kl


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    group: str,
) -> torch.Tensor:
    """(x - mean) rsqrt(var + eps), plus the mean without `shift_mean`; 0 where masked."""
    size = x.numel()
    count = min(-(-size // _PART), _MOST_PARTS) if x.is_cuda else 1
    parts = (torch.empty if size else torch.zeros)((count, 3), dtype=torch.float64, device=x.device)
    if size:
        kernel("moments", x)(x.data_ptr(), address(mask), parts.data_ptr(), size, count)
    if group:  # every rank calls, one without a token too
        parts = moments_of_group(merge_moments(parts), group).unsqueeze(0)
    out = torch.empty_like(x)
    if size:
        kernel("whiten", x)(
            x.data_ptr(), address(mask), out.data_ptr(), size, parts.data_ptr(), parts.shape[0],
            shift_mean, unbiased, eps,
        )  # fmt: skip
    return out


def group_advantages(
    scores: torch.Tensor, group_ids: torch.Tensor, kind: str, eps: float
) -> torch.Tensor:
    """Advantages [B]; 0 in a group of one."""
    out = torch.empty_like(scores)
    if scores.numel():
        kernel("group_advantages", scores)(
            scores.data_ptr(), group_ids.data_ptr(), out.data_ptr(), scores.numel(),
            GROUP_KINDS[kind], eps,
        )  # fmt: skip
    return out
