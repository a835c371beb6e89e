"""Batches of the losses, and their formulas written literally for float64 and autograd."""

import math

import torch

from rlhf_fast.testing import device_of, randn, random_mask

KINDS = ("ppo", "grpo", "reinforce", "a2c", "cispo", "gspo", "sapo")
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")


def batch(B=4, T=7, seed=0, spread=0.5):
    """Log-probs about `spread` apart; one row without a token, NaN and inf under the mask."""
    mask = random_mask(B, T, seed=seed)
    mask[-1] = False
    mask[0, 0] = True
    old = -randn(B, T, seed=seed + 1).abs()
    out = {
        "logprob": old + spread * randn(B, T, seed=seed + 2),
        "old_logprob": old,
        "advantages": randn(B, T, seed=seed + 3),
    }
    out["old_logprob"][~mask] = math.nan
    out["advantages"][~mask] = math.inf
    return {**out, "mask": mask}


def value_batch(B=4, T=7, seed=0):
    old = randn(B, T, seed=seed + 5)
    return {
        "values": old + 0.3 * randn(B, T, seed=seed + 6),
        "old_values": old,
        "returns": randn(B, T, seed=seed + 7),
    }


def on(backend, batch, *differentiable):
    """The batch on the backend's device; the named tensors require grad."""
    batch = {k: x.detach().clone().to(device_of(backend)) for k, x in batch.items()}
    for name in differentiable:
        batch[name].requires_grad_()
    return batch


def reduced(terms, mask, reduction, normalizer=None):
    """The reduction written as loops over the rows."""
    rows = [terms[b][mask[b]] for b in range(len(terms)) if mask[b].any()]
    if not rows:
        return (terms * 0).nan_to_num().sum()
    if reduction in ("token-mean", "token-sum"):
        size = mask.sum() if reduction == "token-mean" else 1
        return torch.cat(rows).sum() / (size if normalizer is None else normalizer)
    per_row = [row.mean() if reduction.endswith("token-mean") else row.sum() for row in rows]
    return torch.stack(per_row).sum() / (len(rows) if normalizer is None else normalizer)


def clean(x, mask, dtype=torch.float64):
    return torch.where(mask, x.detach(), 0.0).to(dtype)


def token_terms(lp, old, A, mask, kind, clip_low=0.2, clip_high=None, dual_clip=None):
    """(token losses under autograd, rho, term is clipped) from the formulas of the docstring."""
    log_ratio = (lp - old).clamp(-20, 20)
    rho = log_ratio.exp()
    if kind == "gspo":
        mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        rho = (mean.detach() + lp - lp.detach()).exp()
    if kind in ("reinforce", "a2c"):
        return -(A if kind == "reinforce" else A.detach()) * lp, rho, torch.zeros_like(mask)
    if kind == "sapo":
        tau = torch.where(A > 0, 1.0, 1.05).to(lp.dtype)
        return -A * 4 / tau * torch.sigmoid(tau * (rho - 1)), rho, torch.zeros_like(mask)
    near = rho
    if clip_low is not None:
        near = rho.clamp(1 - clip_low, 1 + (clip_low if clip_high is None else clip_high))
    if kind == "cispo":
        return -near.detach() * A * lp, rho, near != rho
    terms = torch.maximum(-A * rho, -A * near)
    if dual_clip is not None:
        terms = torch.where(A < 0, torch.minimum(-A * dual_clip, terms), terms)
    return terms, rho, -A * near > -A * rho


def policy_truth(data, kind, reduction="token-mean", normalizer=None, weights=None, **options):
    """(loss, gradient of logprob, gradient of advantages, rho, clipped) in float64."""
    mask = data["mask"]
    lp, old, A = (clean(data[k], mask) for k in ("logprob", "old_logprob", "advantages"))
    lp.requires_grad_(), A.requires_grad_()
    terms, rho, clipped = token_terms(lp, old, A, mask, kind, **options)
    if weights is not None:
        terms = terms * clean(weights, mask)
    loss = reduced(terms, mask, reduction, normalizer)
    grads = torch.autograd.grad(loss, (lp, A), allow_unused=True, materialize_grads=True)
    return loss, grads[0] * mask, grads[1] * mask, rho.detach(), clipped


def value_truth(data, mask, clip, reduction, normalizer=None, dtype=torch.float64):
    v, old, R = (clean(data[k], mask, dtype) for k in ("values", "old_values", "returns"))
    v.requires_grad_()
    near = v if clip is None else torch.clamp(v, old - clip, old + clip)
    terms = 0.5 * torch.maximum((v - R) ** 2, (near - R) ** 2)
    loss = reduced(terms, mask, reduction, normalizer)
    (grad,) = torch.autograd.grad(loss, v)
    return loss, grad * mask, ((near - R) ** 2 > (v - R) ** 2) & mask


def estimate(d, estimator):
    k3 = torch.exp(-d) - 1 + d
    return {"k1": d, "abs": d.abs(), "k2": 0.5 * d * d, "k3": k3}[estimator]
