"""The policy-gradient loss from hidden states in plain PyTorch.

The gradient of the loss in a token's log-prob depends on that token alone (kind "gspo": on its
sequence), so it is known as soon as the row's log-sum-exp is. The gradients of the head are then
taken in the forward pass from logits that still exist, with three matrix products instead of the
four of a backward pass that has to compute the logits again.
"""

from __future__ import annotations

import torch

from rlhf_fast import _invariant
from rlhf_fast._args import compute_dtype
from rlhf_fast.kernels.logprob.reference import live_tokens
from rlhf_fast.kernels.ppo_loss.reference import policy_loss, reduction_of

from ._tiles import (
    INVARIANT_ROWS,
    Gradients,
    Head,
    Rows,
    Upstream,
    finite,
    full_precision,
    merge,
    pick,
    statistics,
)
from .reference_logprob import backward_sweep, linear_logprob, local_ids

# The logits of this many bytes are kept between the two halves of a chunk of rows.
CHUNK_BYTES = 64 * 2**20


def _coefficients(mask, weights, normalizer, divisor, reduction, dtype) -> torch.Tensor:
    """The factor [B, T] with which each token's loss enters the whole."""
    by = reduction_of(mask, reduction, divisor, normalizer, dtype)
    factors = by.spread(torch.ones_like(mask, dtype=dtype))
    return factors if weights is None else torch.where(mask, factors * weights, 0.0)


def _one_sweep(rows: Rows, head: Head, local, needs, token_gradient):
    """(logprob [N], gradients of the head) with the logits of each chunk computed once.

    `token_gradient(logprob, chunk)` is the gradient of the loss in the chunk's log-probs.
    """
    dtype = rows.hidden.dtype
    if not rows.invariant:
        row_bytes = head.weight.shape[0] * dtype.itemsize
        rows.block = max(INVARIANT_ROWS, CHUNK_BYTES // row_bytes)
    down = head.down(rows)
    gradients = Gradients(head, rows, down, needs, slicewise=False)
    upstream = Upstream(rows, local)
    logprob = rows.new()
    for block in rows.blocks():
        nothing = torch.full_like(logprob[block], -torch.inf)
        stats, picked, tiles = [nothing, *torch.zeros_like(nothing).expand(2, -1)], nothing, []
        for columns in head.slices():
            w, up = head.weight[columns].to(dtype), head.up(columns, dtype)
            u, slope = head.tile(rows, block, columns, w, down, up, f"logits {columns.start}")
            picked = pick(u, local[block], columns, picked)
            stats = merge(stats, statistics(rows.scratch("exp", block, columns).copy_(u), None))
            tiles.append((columns, u, slope))
        row_max, total, _ = stats
        log_sum = torch.where(total == 0, 0.0, total.log())
        lp = torch.where(rows.live[block], (picked - finite(row_max)) - log_sum, 0.0)
        logprob[block] = lp
        upstream.put(block, row_max, log_sum, lp, token_gradient(lp, block))
        for columns, u, slope in tiles:
            w, up = head.weight[columns].to(dtype), head.up(columns, dtype)
            dz, _ = upstream.spread(u, block, columns)
            gradients.enter(columns)
            gradients.add(dz if slope is None else dz.mul_(slope), block, w, up)
    return rows.whole(logprob), gradients.finish(lambda x: x)


@full_precision
def linear_ppo_loss(
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
    normalizer: torch.Tensor | None,
    divisor: float | None,
    kind: str,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    reduction: str,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """(loss, stats, unit gradients of hidden, weight, bias, A, B and advantages).

    Gradients are in the arithmetic's dtype, and empty where not needed.
    """
    head_arguments = (
        hidden, weight, ids, bias, lora_a, lora_b, mask, temperature, temperatures, softcap,
        logit_scale, scaling, ignore_index, group, invariant,
    )  # fmt: skip
    live = live_tokens(ids, mask, ignore_index)
    tokens = live.view(old_logprob.shape)
    dtype = compute_dtype(hidden.dtype)
    clips = (kind, clip_low, clip_high, dual_clip)
    scale = (weights, normalizer, divisor)

    def whole_loss(logprob: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logprob = logprob.view(tokens.shape).to(old_logprob.dtype)
        return policy_loss(logprob, old_logprob, advantages, tokens, *scale, *clips, reduction)

    parts: list[torch.Tensor | None] = [None] * 5
    if kind == "gspo" or group or not any(needs):
        # A sequence's ratio, or another rank's part of a row, is not known in time.
        logprob, row_max, log_sum = linear_logprob(*head_arguments)
        loss, stats, unit, unit_advantages = whole_loss(logprob)
        if any(needs):
            parts = backward_sweep(
                unit.flatten().to(dtype), None, *head_arguments, logprob, row_max, log_sum, None,
                needs, False,
            )  # fmt: skip
    else:
        invariant = _invariant.enabled(invariant)
        rows = Rows.of(hidden, live, temperature, temperatures, invariant, dtype)
        head = Head(weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
        factors = _coefficients(tokens, weights, normalizer, divisor, reduction, old_logprob.dtype)
        columns = [rows.pad(x.flatten()) for x in (old_logprob, advantages, tokens, factors)]

        def token_gradient(logprob: torch.Tensor, block: slice) -> torch.Tensor:
            old, advantage, counts, factor = (x[block].unsqueeze(0) for x in columns)
            logprob = logprob.to(old.dtype).unsqueeze(0)
            options = (factor, None, None, *clips, "token-sum")
            return policy_loss(logprob, old, advantage, counts, *options)[2][0].to(dtype)

        local = rows.pad(local_ids(ids, live, weight.shape[0], ""))
        logprob, parts = _one_sweep(rows, head, local, needs, token_gradient)
        loss, stats, _, unit_advantages = whole_loss(logprob)
    parts = [hidden.new_empty(0) if x is None else x.contiguous() for x in parts]
    return loss, stats, *parts, unit_advantages
