"""Calls of the native ranking loss, for tensors on the CPU.

This file alone turns tensors of this op into addresses; the scores that it passes on are float32
(the table of implementations sends float64 elsewhere), all is dense and not empty.
"""

from __future__ import annotations

import torch

from rlhf_fast import _C


def ranking_loss(
    scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, unit gradient of scores); 0 without any pair."""
    if scores.numel() == 0:
        return scores.new_zeros(()), torch.empty_like(scores)
    loss, grad = scores.new_empty(()), torch.empty_like(scores)
    # Wide enough for every number of every type, so that no two ranks become equal.
    exact = torch.float64 if ranks.is_floating_point() else torch.int64
    ranks = ranks.to(exact)
    addresses = (0, ranks.data_ptr()) if ranks.is_floating_point() else (ranks.data_ptr(), 0)
    _C.cpu_ranking_loss(
        scores.data_ptr(), *addresses, 0 if mask is None else mask.data_ptr(), grad.data_ptr(),
        loss.data_ptr(), *scores.shape, margin, torch.get_num_threads(),
    )  # fmt: skip
    return loss, grad
