"""Ranking loss in plain PyTorch: the definition of truth.

With i ranked before j (rank_i < rank_j), both unmasked:

    x_ij = score_i - score_j - margin
    l_ij = -log sigmoid(x_ij),   dl_ij/dscore_i = -sigmoid(-x_ij) = -dl_ij/dscore_j
    loss = mean over prompts with a pair of (mean over the prompt's pairs of l_ij)
"""

from __future__ import annotations

import torch

from rlhf_fast.kernels.ppo_loss.reference import sigmoids


def ranking_loss(
    scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, unit gradient of scores); 0 without any pair."""
    pairs = ranks.unsqueeze(2) < ranks.unsqueeze(1)
    if mask is not None:
        scores = torch.where(mask, scores, 0.0)
        pairs = pairs & mask.unsqueeze(2) & mask.unsqueeze(1)
    x = scores.unsqueeze(2) - scores.unsqueeze(1) - margin
    counts = pairs.sum((1, 2))
    weight = 1.0 / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1)).to(x.dtype)
    losses = torch.log1p(torch.exp(-x.abs())) + torch.clamp(-x, min=0.0)
    terms = torch.where(pairs, losses, 0.0)
    slopes = torch.where(pairs, sigmoids(x)[1], 0.0) * weight[:, None, None]
    return (terms.sum((1, 2)) * weight).sum(), slopes.sum(1) - slopes.sum(2)
