"""Plain PyTorch as trainers write it: what our ops are timed against, and in float64 the truth.

Half-precision logits are upcast first, as trainers do, since a log-softmax in bfloat16 loses three
digits. Every function works at the dtype of its inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def pick(logp: Tensor, ids: Tensor) -> Tensor:
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------ logits, KL


def logprob(logits: Tensor, ids: Tensor) -> Tensor:
    return pick(upcast(logits).log_softmax(-1), ids)


def logprob_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp = upcast(logits).log_softmax(-1)
    return pick(logp, ids), -(logp.exp() * logp).sum(-1)


def kl_full(
    logits: Tensor, ref_logits: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kl, logprob, ref_logprob, entropy)."""
    logp, logq = upcast(logits).log_softmax(-1), upcast(ref_logits).log_softmax(-1)
    p = logp.exp()
    return (p * (logp - logq)).sum(-1), pick(logp, ids), pick(logq, ids), -(p * logp).sum(-1)


# ------------------------------------------------------------------------------ rewards, advantages


def shaped_rewards(
    scores: Tensor, logprob: Tensor, ref_logprob: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    kl = (logprob - ref_logprob) * mask
    rewards = -kl_coef * kl
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rewards[torch.arange(len(last), device=last.device), last] += scores
    return rewards, kl


def gae_loop(
    rewards: Tensor, values: Tensor, gamma: float, lam: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop over time of every trainer; masked tokens are skipped as if they were not there."""
    advantage = next_value = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        new = delta + gamma * lam * advantage
        if mask is None:
            advantage, next_value = new, values[:, t]
        else:
            advantage = torch.where(mask[:, t], new, advantage)
            next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    returns = advantages + values
    return (advantages, returns) if mask is None else (advantages * mask, returns * mask)


def gae_scan(
    rewards: Tensor, values: Tensor, gamma: float, lam: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Without a loop over time: log2(T) doubling steps. Masks must be right padding."""
    if mask is not None:
        rewards, values = rewards * mask, values * mask
    a = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    step, decay = 1, gamma * lam
    while step < a.shape[1]:
        a = a + decay * F.pad(a[:, step:], (0, step))
        step, decay = 2 * step, decay * decay
    return (a, a + values) if mask is None else (a * mask, (a + values) * mask)


def discounted_loop(rewards: Tensor, gamma: float) -> Tensor:
    total = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + gamma * total
        columns.append(total)
    return torch.stack(columns[::-1], 1)


def discounted_scan(rewards: Tensor, gamma: float) -> Tensor:
    """`discounted_loop` in log2(T) doubling steps."""
    return gae_scan(rewards, torch.zeros_like(rewards), gamma, 1.0)[0]


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = masked_mean(x, mask)
    count = mask.sum()
    variance = masked_mean((x - mean) ** 2, mask) * count / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def group_advantages_loop(scores: Tensor, group_ids: Tensor) -> Tensor:
    """A dictionary from group to rows, then a loop over groups."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(group_ids.tolist()):
        rows.setdefault(group, []).append(row)
    out = torch.empty_like(scores)
    for members in rows.values():
        r = scores[members]
        out[members] = (r - r.mean()) / (r.std() + 1e-4)
    return out


def group_advantages_view(scores: Tensor, group: int) -> Tensor:
    """Groups of equal size that lie side by side."""
    r = scores.view(-1, group)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1)


# ------------------------------------------------------------------------------------------ losses


def policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, what a trainer logs)."""
    log_ratio = logprob - old_logprob
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    with torch.no_grad():
        logged = (
            masked_mean((clipped > plain).to(ratio.dtype), mask),
            masked_mean(-log_ratio, mask),
            masked_mean(ratio - 1 - log_ratio, mask),
            masked_mean(ratio, mask),
        )
        return loss, torch.stack(logged)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, the fraction of clipped values)."""
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask)
    with torch.no_grad():
        return loss, masked_mean((clipped > plain).to(values.dtype), mask)


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """A loop over the K-choose-2 pairs of each prompt; all ranks differ."""
    total = scores.new_zeros(())
    completions = scores.shape[1]
    for i in range(completions):
        for j in range(i + 1, completions):
            margin = (scores[:, i] - scores[:, j]) * torch.sign(ranks[:, j] - ranks[:, i])
            total = total - F.logsigmoid(margin).mean()
    return total / (completions * (completions - 1) / 2)


# ---------------------------------------------------------------------------------------- sampling


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(tempered logits, the same with -inf outside the top k and the top p)."""
    u = upcast(logits) / temperature
    kept = u
    if top_k:
        kept = kept.masked_fill(kept < kept.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1.0:
        ascending, order = kept.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        drop[..., -1:] = False
        kept = kept.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return u, kept


def describe(u: Tensor, kept: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob in the kept set, log of its mass, entropy of the whole distribution)."""
    whole = u.log_softmax(-1)
    mass = kept.logsumexp(-1) - u.logsumexp(-1)
    return pick(kept.log_softmax(-1), ids), mass, -(whole.exp() * whole).sum(-1)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, logprob, log_mass, entropy); the ids come from torch's own generator."""
    u, kept = filtered(logits, temperature, top_k, top_p)
    ids = torch.multinomial(kept.softmax(-1), 1).squeeze(-1)
    return (ids, *describe(u, kept, ids))
