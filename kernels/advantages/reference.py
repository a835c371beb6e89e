"""Rewards, whitening and advantages in plain PyTorch: the definition of truth.

Each function has the name and the arguments of the torch op that it implements, without `backend`.
Tensors are float32 or float64, results have that dtype. Sums over many numbers are made in float64,
so that an offset of the data (whitening values near 1e4) costs no digits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from rlhf_fast.kernels.gae.reference import gae
from rlhf_fast.kernels.kl.reference import kl_estimate


def score_place(mask: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """[B, T] bool: where each row's score lands. A row whose score is dropped has no place."""
    column = torch.arange(mask.shape[1], device=mask.device)
    if at is None:
        at = torch.where(mask, column, -1).amax(1) if mask.shape[1] else mask.sum(1)
    return (column == at.unsqueeze(1)) & mask


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
    mask = torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask
    kl = kl_estimate(logprob, ref_logprob, mask, estimator, clamp_in, clamp_out)
    rewards = torch.zeros_like(kl) if kl_coef == 0.0 else torch.where(mask, -kl_coef * kl, 0.0)
    rewards = rewards + torch.where(score_place(mask, at), scores.unsqueeze(1), 0.0)
    return rewards, kl


def moments(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(count, mean, sum of squared deviations) of the unmasked tokens, float64 [3]."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x = torch.where(mask, x, 0.0).double()
    count = mask.sum().double()
    mean = x.sum() / count.clamp(min=1)
    deviation = torch.where(mask, x - mean, 0.0)
    return torch.stack((count, mean, (deviation * deviation).sum()))


def merge_moments(parts: torch.Tensor) -> torch.Tensor:
    """The moments of the union from those of its parts [R, 3]; parts without a token are legal.

    Each part's deviations are moved to the common mean (Chan, Golub and LeVeque, 1979). E[x^2] -
    E[x]^2 would lose every digit of a variance that is small beside the squared mean.
    """
    counts, means, squares = parts.unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return torch.stack((count, mean, (squares + counts * (means - mean) ** 2).sum()))


def moments_of_group(local: torch.Tensor, group: str) -> torch.Tensor:
    """The merged moments of all ranks, the same bits on each: one collective of 24 bytes."""
    if not group:
        return local
    ranks = dist.distributed_c10d._resolve_process_group(group)
    parts = [torch.empty_like(local) for _ in range(ranks.size())]
    dist.all_gather(parts, local, group=ranks)
    return merge_moments(torch.stack(parts))


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    group: str,
) -> torch.Tensor:
    """(x - mean) rsqrt(var + eps), plus the mean without `shift_mean`; 0 where masked."""
    count, mean, squares = moments_of_group(moments(x, mask), group).unbind()
    degrees = count - 1 if unbiased else count
    variance = torch.where(count > 1, squares / degrees.clamp(min=1), 0.0)
    deviation = x.double() - mean
    # With eps = 0 equal numbers would give 0 * inf.
    out = torch.where(deviation == 0, 0.0, deviation * torch.rsqrt(variance + eps))
    out = out if shift_mean else out + mean
    out = torch.where(count > 1, out, torch.zeros_like(out) if shift_mean else mean)
    out = out if mask is None else torch.where(mask, out, 0.0)
    return out.to(x.dtype).contiguous()


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
    rewards, kl = shaped_rewards(
        scores, logprob, ref_logprob, mask, at, kl_coef, estimator, clamp_in, clamp_out
    )
    advantages, returns = gae(rewards, values, mask, None, None, 0.0, gamma, lam, None, carry)
    if whitened:
        advantages = whiten(advantages, mask, True, unbiased, eps, "")
    return advantages, returns, rewards, kl


def _segment_totals(x: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Sum of each element's segment; `start` and `end` are the segment's first and last index.

    log2(B) doubling steps (Hillis and Steele, "Data parallel algorithms", 1986). The order of the
    additions depends on the place inside the segment only, never on what else is in the batch.
    """
    index = torch.arange(x.shape[0], device=x.device)
    step = 1
    while step < x.shape[0]:
        inside = index - step >= start
        x = x + torch.where(inside, x[(index - step).clamp(min=0)], 0.0)
        step *= 2
    return x[end]


def group_advantages(
    scores: torch.Tensor, group_ids: torch.Tensor, kind: str, eps: float
) -> torch.Tensor:
    """Advantages [B]. Rows are sorted by (group, score), so their order in the batch is no matter.

    Neither a loop over groups nor `unique`: the number of groups stays on the device.
    """
    if scores.numel() == 0:
        return torch.zeros_like(scores)
    by_score = torch.argsort(scores, stable=True)
    order = by_score[torch.argsort(group_ids[by_score], stable=True)]
    ids, r = group_ids[order], scores[order].double()
    rows = ids.shape[0]
    index = torch.arange(rows, device=ids.device)
    edge = torch.ones_like(ids[:1], dtype=torch.bool)
    changes = ids[1:] != ids[:-1]
    start = torch.cummax(torch.where(torch.cat((edge, changes)), index, 0), 0).values
    last = torch.where(torch.cat((changes, edge)), index, rows)
    end = torch.cummin(last.flip(0), 0).values.flip(0)
    count = (end - start + 1).double()
    deviation = r - _segment_totals(r, start, end) / count
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        out = deviation * count / others
    elif kind == "dr_grpo":
        out = deviation
    else:
        std = (_segment_totals(deviation * deviation, start, end) / others).sqrt()
        out = torch.where(deviation == 0, 0.0, deviation / (std + eps))
    out = torch.where(count > 1, out, 0.0).to(scores.dtype)
    return torch.empty_like(out).scatter_(0, order, out)
