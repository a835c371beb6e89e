"""Calls of the native ranking loss, for tensors on the CPU and on CUDA devices.

This file alone turns tensors of this op into addresses; the scores that it passes on are float32
(the table of implementations sends float64 elsewhere), all is dense and not empty.
"""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.native import address, kernel


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
    # A float32 and an int32 of each prompt, between two launches.
    parts = scores.new_empty((scores.shape[0], 2)) if scores.is_cuda else None
    kernel("ranking_loss", scores)(
        scores.data_ptr(), *addresses, address(mask), grad.data_ptr(), loss.data_ptr(),
        address(parts), *scores.shape, margin,
    )  # fmt: skip
    return loss, grad
