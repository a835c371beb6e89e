"""The policy-gradient loss from hidden states in plain PyTorch.

The gradient of the loss in a token's log-prob depends on that token alone (kind "gspo": on its
sequence), so it is known as soon as the row's log-sum-exp is. The gradients of the head are then
taken in the forward pass from logits that still exist, with three matrix products instead of the
four of a backward pass that has to compute the logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from rlhf_fast import _invariant
from rlhf_fast._args import compute_dtype
from rlhf_fast.kernels._common.precision import full_precision
from rlhf_fast.kernels.kl.reference import kl_estimate_backward
from rlhf_fast.kernels.logprob.reference import live_tokens
from rlhf_fast.kernels.ppo_loss.reference import (
    STATS,
    entropy_and_kl,
    policy_loss,
    reduction_of,
)

from . import _tiles
from ._gradients import Gradients, Upstream
from ._tiles import (
    INVARIANT_ROWS,
    Head,
    Rows,
    finite,
    merge,
    pick,
    statistics,
)
from .reference_logprob import (
    backward_sweep,
    linear_logprob,
    linear_logprob_entropy,
    local_ids,
)

# The logits of this many bytes are kept between the two halves of a chunk of rows.
CHUNK_BYTES = 64 * 2**20


class Sweeps(NamedTuple):
    """The ways over a head that the loss needs, and the kernels of its tokens in float32."""

    linear_logprob: Callable[..., tuple]
    linear_logprob_entropy: Callable[..., tuple]
    backward_sweep: Callable[..., list]
    one_sweep: Callable[..., tuple]
    kept_rows: Callable[..., int]
    policy_loss: Callable[..., tuple]
    kl_estimate_backward: Callable[..., torch.Tensor]
    tensor_cores: bool = False


def unit_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which a head's unit gradient waits for the upstream gradient.

    On tensor cores its own: float32 takes 2.1 GB for a head of 131072 x 4096, and three more ways
    through memory. Scaled by anything but a power of two it is rounded a second time.
    """
    on_tensor_cores = _tiles.fits_tensor_cores(hidden)
    return hidden.dtype if on_tensor_cores else compute_dtype(hidden.dtype)


def _factors(mask, normalizer, divisor, reduction, dtype) -> torch.Tensor:
    """The factor [B, T] with which each token's terms enter the whole."""
    by = reduction_of(mask, reduction, divisor, normalizer, dtype)
    return by.spread(torch.ones_like(mask, dtype=dtype))


def _one_sweep(rows: Rows, head: Head, local, needs, with_entropy: bool, token_gradient):
    """(logprob [N], entropy [N], gradients of the head) with each chunk's logits computed once.

    `token_gradient(logprob, chunk)` are the gradients of the loss in the chunk's log-probs and
    entropies, the latter None without `with_entropy`, when the entropy is not one.
    """
    dtype = rows.hidden.dtype
    if not rows.invariant:
        row_bytes = head.weight.shape[0] * dtype.itemsize
        fit = max(INVARIANT_ROWS, CHUNK_BYTES // row_bytes)
        rows.block = min(fit, max(rows.count, 1))
    down = head.down(rows)
    gradients = Gradients(head, rows, down, needs, slicewise=False)
    upstream = Upstream(rows, local)
    logprob, entropy = rows.new(), rows.new()
    for block in rows.blocks():
        nothing = torch.full_like(logprob[block], -torch.inf)
        stats, picked, tiles = [nothing, *torch.zeros_like(nothing).expand(2, -1)], nothing, []
        for columns in head.slices():
            w, up = head.weight[columns].to(dtype), head.up(columns, dtype)
            u, slope = head.tile(rows, block, columns, w, down, up, f"logits {columns.start}")
            picked = pick(u, local[block], columns, picked)
            tile = rows.scratch("exp", block, columns).copy_(u)
            buffer = rows.scratch("gradient", block, columns) if with_entropy else None
            stats = merge(stats, statistics(tile, buffer))
            tiles.append((columns, u, slope))
        row_max, total, weighted = stats
        empty = total == 0
        log_sum = torch.where(empty, 0.0, total.log())
        lp = torch.where(rows.live[block], (picked - finite(row_max)) - log_sum, 0.0)
        logprob[block] = lp
        entropy[block] = torch.where(empty, 0.0, log_sum - weighted / total)
        g, h = token_gradient(lp, block)
        upstream.put(block, row_max, log_sum, lp, g, entropy[block], h)
        for columns, u, slope in tiles:
            w, up = head.weight[columns].to(dtype), head.up(columns, dtype)
            dz, _ = upstream.spread(u, block, columns)
            gradients.enter(columns)
            gradients.add(dz if slope is None else dz.mul_(slope), block, w, up)
    return rows.whole(logprob), rows.whole(entropy), gradients.finish(lambda x: x)


def policy_loss_of_head(
    sweeps: Sweeps,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    scaling: float,
    ignore_index: int,
    group: str,
    invariant: bool,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    divisor: float | None,
    kind: str,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """(loss, stats, unit gradients of hidden, weight, bias, A, B and advantages).

    Gradients are in the arithmetic's dtype, that of weight in `unit_dtype`, and empty where not
    needed.
    """
    head_arguments = (
        hidden, weight, ids, bias, lora_a, lora_b, mask, temperature, temperatures, softcap,
        logit_scale, scaling, ignore_index, group, invariant,
    )  # fmt: skip
    live = live_tokens(ids, mask, ignore_index)
    tokens = live.view(old_logprob.shape)
    dtype = compute_dtype(hidden.dtype)
    clips = (kind, clip_low, clip_high, dual_clip)
    extras = (entropy_coef, kl_coef, kl_estimator)
    with_entropy = entropy_coef != 0.0
    loss_of, kl_backward = policy_loss, kl_estimate_backward
    if old_logprob.dtype == torch.float32:
        loss_of, kl_backward = sweeps.policy_loss, sweeps.kl_estimate_backward

    def whole_loss(logprob: torch.Tensor, entropy: torch.Tensor | None) -> tuple:
        """(loss, stats, unit gradients of logprob, entropy and advantages)."""
        logprob, entropy = (
            x if x is None else x.view(tokens.shape).to(old_logprob.dtype)
            for x in (logprob, entropy if with_entropy else None)
        )
        loss, stats, unit, unit_advantages = loss_of(
            logprob, old_logprob, advantages, tokens, weights, normalizer, divisor, *clips,
            reduction,
        )  # fmt: skip
        by = reduction_of(tokens, reduction, divisor, normalizer, logprob.dtype)
        extra, means, unit_extra, unit_entropy = entropy_and_kl(
            logprob, entropy, ref_logprob, by, *extras
        )
        for name, value in means.items():
            stats[STATS.index(name)] = value
        loss = loss if extra is None else loss + extra
        unit = unit if unit_extra is None else unit + unit_extra
        return loss, stats, unit, unit_entropy if with_entropy else None, unit_advantages

    parts: list[torch.Tensor | None] = [None] * 5
    if kind == "gspo" or group or not any(needs):
        # A sequence's ratio, or another rank's part of a row, is not known in time.
        entropy = None
        keep = sweeps.kept_rows(weight.shape[0], live, invariant) if any(needs) else 0
        if with_entropy:
            logprob, entropy, *saved, kept = sweeps.linear_logprob_entropy(*head_arguments, keep)
        else:
            logprob, *saved, kept = sweeps.linear_logprob(*head_arguments, keep)
        loss, stats, unit, unit_entropy, unit_advantages = whole_loss(logprob, entropy)
        if any(needs):
            units = (x if x is None else x.flatten().to(dtype) for x in (unit, unit_entropy))
            parts = sweeps.backward_sweep(
                *units, *head_arguments, logprob, *saved, entropy, kept, needs, False
            )
    else:
        rows = Rows.of(
            hidden, live, temperature, temperatures, _invariant.enabled(invariant), dtype,
            sweeps.tensor_cores,
        )  # fmt: skip
        head = Head(weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
        factors = _factors(tokens, normalizer, divisor, reduction, old_logprob.dtype)
        vectors = [
            x if x is None else rows.pad(x.flatten())
            for x in (old_logprob, advantages, tokens, factors, weights, ref_logprob)
        ]

        def token_gradient(logprob: torch.Tensor, block: slice) -> tuple:
            old, advantage, counts, factor, weight, ref = (
                x if x is None else x[block].unsqueeze(0) for x in vectors
            )
            logprob = logprob.to(old.dtype).unsqueeze(0)
            scale = factor if weight is None else torch.where(counts, factor * weight, 0.0)
            options = (scale, None, None, *clips, "token-sum")
            g = loss_of(logprob, old, advantage, counts, *options)[2]
            if ref is not None and kl_coef != 0.0:
                kl_options = (logprob, ref, counts, kl_estimator, None, None)
                g = g + kl_coef * kl_backward(factor, *kl_options)
            h = (-entropy_coef * factor)[0].to(dtype) if with_entropy else None
            return g[0].to(dtype), h

        local = rows.pad(local_ids(ids, live, weight.shape[0], ""))
        logprob, entropy, parts = sweeps.one_sweep(
            rows, head, local, needs, with_entropy, token_gradient
        )
        loss, stats, _, _, unit_advantages = whole_loss(logprob, entropy)
    if parts[1] is not None:
        parts[1] = parts[1].to(unit_dtype(hidden))
    parts = [hidden.new_empty(0) if x is None else x.contiguous() for x in parts]
    return loss, stats, *parts, unit_advantages


_SWEEPS = Sweeps(
    linear_logprob,
    linear_logprob_entropy,
    backward_sweep,
    _one_sweep,
    kept_rows=lambda *_: 0,
    policy_loss=policy_loss,
    kl_estimate_backward=kl_estimate_backward,
)


@full_precision
def linear_ppo_loss(*arguments) -> tuple[torch.Tensor, ...]:
    """`policy_loss_of_head` by the sweeps of the reference."""
    return policy_loss_of_head(_SWEEPS, *arguments)
