"""Calls of the native loss kernels, for tensors on the CPU or on a CUDA device."""

from __future__ import annotations

from functools import partial

import torch

from rlhf_fast.kernels._common.native import DTYPES, ESTIMATORS, address, kernel

from . import reference
from ._kernels import KINDS, LOSSES, REDUCTIONS
from .reference import STATS, bounds

__all__ = ["policy_loss", "ppo_loss", "scale_unit_gradient", "value_loss"]


def _workspace(like: torch.Tensor) -> torch.Tensor:
    """96 bytes for each of 1024 blocks, then 16 for each part of 4096 tokens of a row."""
    rows, length = like.shape
    return like.new_empty(12 * 1024 + 2 * rows * -(-length // 4096), dtype=torch.float64)


def _launch(tokens, grads, normalizer, divisor, kind, estimator, reduction, clips, coefficients):
    """(loss, stats) of the tensors `tokens`; fills `grads`. Both in the order of bindings.cpp."""
    like = next(x for x in tokens if x is not None)
    if like.numel() == 0:
        return like.new_zeros(()), like.new_zeros(len(STATS))
    loss, stats = like.new_empty(()), like.new_empty(len(STATS))
    clip_low, clip_high, dual_clip, value_clip = clips
    workspace = _workspace(like) if like.is_cuda else None
    kernel("ppo_loss", like)(
        [*map(address, (*tokens, *grads, loss, stats, normalizer, workspace))],
        (
            -1.0 if divisor is None else divisor, KINDS[kind], ESTIMATORS[estimator],
            REDUCTIONS[reduction], *bounds(clip_low, clip_high), dual_clip or 0.0,
            -1.0 if value_clip is None else value_clip, *coefficients,
        ),
        *like.shape,
    )  # fmt: skip
    return loss, stats


policy_loss, value_loss, ppo_loss = (partial(loss, _launch) for loss in LOSSES)


def scale_unit_gradient(
    grad: torch.Tensor, unit: torch.Tensor, owned: bool = False
) -> torch.Tensor:
    """grad * unit, where grad is a scalar on the device; in place of `unit` if it is `owned`."""
    served = unit.is_cuda and grad.dtype == torch.float32 and unit.dtype in DTYPES
    if not served or unit.numel() == 0:
        return reference.scale_unit_gradient(grad, unit)
    unit = unit.contiguous()
    out = unit if owned else torch.empty_like(unit)
    kernel("scale_unit_gradient", unit)(
        *map(address, (grad, unit, out)), DTYPES[unit.dtype], unit.numel()
    )
    return out
