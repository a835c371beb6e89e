"""Calls of the native loss kernels, for tensors on the CPU."""

from __future__ import annotations

from functools import partial

import torch

from rlhf_fast import _C
from rlhf_fast.kernels._common.native import ESTIMATORS, address

from ._kernels import KINDS, LOSSES, REDUCTIONS, bounds
from .reference import STATS, scale_unit_gradient

__all__ = ["policy_loss", "ppo_loss", "scale_unit_gradient", "value_loss"]


def _launch(tokens, grads, normalizer, divisor, kind, estimator, reduction, clips, coefficients):
    """(loss, stats) of the tensors `tokens`; fills `grads`. Both in the order of bindings.cpp."""
    like = next(x for x in tokens if x is not None)
    if like.numel() == 0:
        return like.new_zeros(()), like.new_zeros(len(STATS))
    loss, stats = like.new_empty(()), like.new_empty(len(STATS))
    clip_low, clip_high, dual_clip, value_clip = clips
    _C.cpu_ppo_loss(
        [*map(address, (*tokens, *grads, loss, stats, normalizer))],
        (
            -1.0 if divisor is None else divisor, KINDS[kind], ESTIMATORS[estimator],
            REDUCTIONS[reduction], *bounds(clip_low, clip_high), dual_clip or 0.0,
            -1.0 if value_clip is None else value_clip, *coefficients,
        ),
        *like.shape, torch.get_num_threads(),
    )  # fmt: skip
    return loss, stats


policy_loss, value_loss, ppo_loss = (partial(loss, _launch) for loss in LOSSES)
