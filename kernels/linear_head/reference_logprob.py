"""Log-prob and entropy from hidden states in plain PyTorch."""

from __future__ import annotations

import torch

from rlhf_fast import _dispatch, _invariant
from rlhf_fast._args import compute_dtype
from rlhf_fast.kernels._common.precision import full_precision
from rlhf_fast.kernels.logprob.reference import live_tokens

from . import _shards
from ._gradients import Gradients, Upstream
from ._tiles import (
    Head,
    Rows,
    finite,
    merge,
    pick,
    statistics,
)


def local_ids(ids, live, vocabulary: int, group: str) -> torch.Tensor:
    """Ids counted from this rank's first one; rows that do not count get a negative one.

    With a group, only here is the size of the whole vocabulary known, so ids are checked here.
    """
    first, total = _shards.place(vocabulary, group, ids.device)
    if group and _dispatch.checks_values(ids):
        bad = live & ((ids < 0) | (ids >= total))
        if bad.any():
            raise IndexError(f"ids: expected values in [0, {int(total)}), got {int(ids[bad][0])}")
    return torch.where(live, ids - first, torch.iinfo(torch.int32).min)


def _forward(
    with_entropy: bool,
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
    keep: int = 0,
) -> tuple[torch.Tensor, ...]:
    """(logprob, entropy, row_max, log_sum), each [N], and kept logits, of which there are none.

    All of them are 0 where a token is masked.

    This is both ops of the name `linear_logprob*`: without `with_entropy` the entropy is not one.
    """
    live = live_tokens(ids, mask, ignore_index)
    local = local_ids(ids, live, weight.shape[0], group)
    dtype = compute_dtype(hidden.dtype)
    invariant = _invariant.enabled(invariant)
    rows = Rows.of(hidden, live, temperature, temperatures, invariant, dtype)
    head = Head(weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
    local, down = rows.pad(local), head.down(rows)
    nothing = torch.full_like(rows.hidden[:, 0], -torch.inf)
    stats = [nothing.clone(), rows.new(), rows.new(), nothing.clone()]
    for columns in head.slices():
        w, up = weight[columns].to(dtype), head.up(columns, dtype)
        for block in rows.blocks():
            u, _ = head.tile(rows, block, columns, w, down, up)
            picked = pick(u, local[block], columns, stats[3][block])
            buffer = rows.scratch("exp", block, columns) if with_entropy else None
            tile = statistics(u, buffer)
            merged = [*merge([x[block] for x in stats], tile), picked]
            for x, value in zip(stats, merged, strict=True):
                x[block] = value
    stats, *others = _shards.gather_stats([x[: rows.count] for x in stats], group)
    for other in others:
        stats = [*merge(stats, other), torch.maximum(stats[3], other[3])]
    row_max, total, weighted, picked = stats
    empty = total == 0
    log_sum = torch.where(empty, 0.0, total.log())
    entropy = torch.where(empty, 0.0, log_sum - weighted / total)
    values = ((picked - finite(row_max)) - log_sum, entropy, row_max, log_sum)
    return *map(rows.whole, values), hidden.new_empty(keep, weight.shape[0], dtype=dtype)


@full_precision
def linear_logprob_entropy(*arguments) -> tuple[torch.Tensor, ...]:
    """(logprob, entropy, row_max, log_sum), each [N], and no kept logits."""
    return _forward(True, *arguments)


@full_precision
def linear_logprob(*arguments) -> tuple[torch.Tensor, ...]:
    """(logprob, row_max, log_sum), each [N], and no kept logits."""
    lp, _, row_max, log_sum, kept = _forward(False, *arguments)
    return lp, row_max, log_sum, kept


def backward_sweep(
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
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
    logprob: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor | None,
    kept: torch.Tensor,
    needs: list[bool],
    slicewise: bool = True,
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weight, bias, A and B, None where `needs` is false.

    The logits are recomputed tile by tile; a log-prob of -inf passes no gradient on.
    """
    live = live_tokens(ids, mask, ignore_index)
    local = local_ids(ids, live, weight.shape[0], group)
    # A token whose upstream gradient is 0 (no advantage, clipped) takes part in nothing below.
    wanted = (
        grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    )
    live = live & wanted
    dtype = logprob.dtype
    invariant = _invariant.enabled(invariant)
    rows = Rows.of(hidden, live, temperature, temperatures, invariant, dtype)
    head = Head(weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
    upstream = Upstream(rows, rows.pad(local))
    values = (row_max, log_sum, logprob, grad_logprob, entropy, grad_entropy)
    upstream.put(slice(None), *(x if x is None else rows.pad(x) for x in values))
    down = head.down(rows)
    gradients = Gradients(head, rows, down, needs, slicewise)
    for columns in head.slices():
        w, up = weight[columns].to(dtype), head.up(columns, dtype)
        gradients.enter(columns)
        for block in rows.blocks():
            u, slope = head.tile(rows, block, columns, w, down, up)
            dz, _ = upstream.spread(u, block, columns)
            gradients.add(dz if slope is None else dz.mul_(slope), block, w, up)
        gradients.leave(columns)
    return gradients.finish(lambda x: _shards.sum_over_ranks(x, group))


@full_precision
def linear_logprob_backward(
    grad_logprob: torch.Tensor, grad_entropy: torch.Tensor | None, hidden: torch.Tensor, *others
) -> tuple[torch.Tensor, ...]:
    """Gradients of hidden, weight, bias, A and B; an empty tensor where not needed."""
    return as_outputs(backward_sweep(grad_logprob, grad_entropy, hidden, *others), hidden)


def as_outputs(parts: list, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ops return tensors: an empty one stands for a gradient that is not needed."""
    grad_hidden, *others = parts
    if grad_hidden is not None:
        grad_hidden = grad_hidden.to(hidden.dtype).contiguous()
    return tuple(hidden.new_empty(0) if x is None else x for x in (grad_hidden, *others))
