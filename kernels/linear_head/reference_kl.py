"""Exact KL from the hidden states of policy and reference in plain PyTorch."""

from __future__ import annotations

import torch

from rlhf_fast import _invariant
from rlhf_fast._args import compute_dtype
from rlhf_fast.kernels._common.precision import full_precision
from rlhf_fast.kernels.logprob.reference import live_tokens

from ._gradients import Gradients, Upstream
from ._tiles import (
    Head,
    Rows,
    finite,
    merge,
    pick,
    statistics,
)
from .reference_logprob import as_outputs, local_ids

IGNORE_INDEX = -100


def _cross(u, r, row_max, ref_row_max) -> torch.Tensor:
    """sum e ((u - m) - (r - m_ref)) of each row of a tile, with e = exp(u - m).

    A token that the reference alone makes impossible gives +inf, however small its probability.
    """
    u = u - finite(row_max).unsqueeze(-1)
    difference = u - (r - finite(ref_row_max).unsqueeze(-1))
    terms = torch.where(difference == torch.inf, torch.inf, u.exp() * difference)
    return torch.where(u == -torch.inf, 0.0, terms).sum(-1)


def _merge_cross(parts, row_max, ref_row_max) -> torch.Tensor:
    """The cross sums of two disjoint parts together: `parts` holds (m, s, cross, m_ref) of each."""
    total = 0.0
    for part_max, part_sum, cross, part_ref_max in parts:
        down = torch.where(part_max == -torch.inf, 0.0, part_max - finite(row_max))
        ref_down = torch.where(part_ref_max == -torch.inf, 0.0, part_ref_max - finite(ref_row_max))
        factor = down.exp()
        moved = factor * (cross + part_sum * (down - ref_down))
        moved = torch.where((factor == 0) | (part_sum == 0), 0.0, moved)
        total = total + torch.where(cross == torch.inf, torch.inf, moved)
    return total


def kl_setup(
    hidden, weight, ref_hidden, ref_weight, ids, mask, temperature, temperatures, invariant,
    tensor_cores=False,
):  # fmt: skip
    """The rows and heads of both models; without ids the tokens are 0."""
    if ids is None:
        ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    live = live_tokens(ids, mask, IGNORE_INDEX)
    dtype = compute_dtype(torch.promote_types(hidden.dtype, ref_hidden.dtype))
    options = (live, temperature, temperatures, _invariant.enabled(invariant), dtype, tensor_cores)
    rows, ref_rows = Rows.of(hidden, *options), Rows.of(ref_hidden, *options)
    local = rows.pad(local_ids(ids, live, weight.shape[0], ""))
    return live, local, rows, Head(weight), ref_rows, Head(ref_weight), dtype


@full_precision
def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    invariant: bool,
    keep: int = 0,
) -> tuple[torch.Tensor, ...]:
    """(kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum), each [N],
    and kept logits of policy and reference, of which there are none.

    Without `ids` the two log-probs are those of token 0.
    """
    _, local, rows, head, ref_rows, ref_head, dtype = kl_setup(
        hidden, weight, ref_hidden, ref_weight, ids, mask, temperature, temperatures, invariant
    )
    nothing = torch.full_like(rows.hidden[:, 0], -torch.inf)
    # Policy: m, s, w, u_y; reference: m, s, w, r_y; and the cross sum.
    stats = [nothing.clone(), rows.new(), rows.new(), nothing.clone()]
    ref_stats = [x.clone() for x in stats]
    cross = rows.new()
    for columns in head.slices():
        w, ref_w = weight[columns].to(dtype), ref_weight[columns].to(dtype)
        for block in rows.blocks():
            u, _ = head.tile(rows, block, columns, w, None, None)
            r, _ = ref_head.tile(ref_rows, block, columns, ref_w, None, None)
            old, ref_old = [x[block] for x in stats], [x[block] for x in ref_stats]
            picked = pick(u, local[block], columns, old[3])
            ref_picked = pick(r, local[block], columns, ref_old[3])
            tile_cross = _cross(u, r, u.amax(-1), r.amax(-1))
            tile = statistics(u, rows.scratch("exp", block, columns))
            ref_tile = statistics(r, None)
            new, ref_new = merge(old, tile), merge(ref_old, ref_tile)
            parts = (
                (*old[:2], cross[block], ref_old[0]),
                (*tile[:2], tile_cross, ref_tile[0]),
            )
            cross[block] = _merge_cross(parts, new[0], ref_new[0])
            new, ref_new = [*new, picked], [*ref_new, ref_picked]
            for x, value in zip((*stats, *ref_stats), (*new, *ref_new), strict=True):
                x[block] = value
    row_max, total, weighted, picked = (x[: rows.count] for x in stats)
    ref_row_max, ref_total, _, ref_picked = (x[: rows.count] for x in ref_stats)
    empty = total == 0
    log_sum = torch.where(empty, 0.0, total.log())
    ref_log_sum = torch.where(ref_total == 0, 0.0, ref_total.log())
    kl = torch.where(empty, 0.0, cross[: rows.count] / total - log_sum + ref_log_sum)
    values = (
        kl,
        (picked - finite(row_max)) - log_sum,
        (ref_picked - finite(ref_row_max)) - ref_log_sum,
        torch.where(empty, 0.0, log_sum - weighted / total),
        row_max,
        log_sum,
        ref_row_max,
        ref_log_sum,
    )
    kept = (hidden.new_empty(keep, weight.shape[0], dtype=dtype) for _ in range(2))
    return *(rows.whole(value) for value in values), *kept


@full_precision
def linear_kl_backward(
    grad_kl: torch.Tensor,
    grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    temperatures: torch.Tensor | None,
    invariant: bool,
    kl: torch.Tensor,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    ref_row_max: torch.Tensor,
    ref_log_sum: torch.Tensor,
    kept: torch.Tensor,
    ref_kept: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight; a row whose KL is +inf gives none to kl."""
    live, local, rows, head, ref_rows, ref_head, dtype = kl_setup(
        hidden, weight, ref_hidden, ref_weight, ids, mask, temperature, temperatures, invariant
    )
    upstream = Upstream(rows, local)
    values = (row_max, log_sum, logprob, grad_logprob, entropy, grad_entropy)
    upstream.put(slice(None), *(rows.pad(x) for x in values))
    g = torch.where(live & (kl != torch.inf), grad_kl, 0.0)
    g = rows.pad(g).unsqueeze(-1) * upstream.inverse
    mean = torch.where(kl == torch.inf, 0.0, kl) + log_sum - ref_log_sum
    # u - r - mean needs r - m_ref + mean, one number per row.
    ref_shift = rows.pad(finite(ref_row_max) - mean).unsqueeze(-1)
    gradients = Gradients(head, rows, None, [*needs, False, False, False])
    for columns in head.slices():
        w, ref_w = weight[columns].to(dtype), ref_weight[columns].to(dtype)
        gradients.enter(columns)
        for block in rows.blocks():
            u, _ = head.tile(rows, block, columns, w, None, None)
            r, _ = ref_head.tile(ref_rows, block, columns, ref_w, None, None)
            dz, e = upstream.spread(u, block, columns)
            difference = u.sub_(r.sub_(ref_shift[block]))
            slope = torch.where((e == 0) | (g[block] == 0), 0.0, e.mul_(difference))
            gradients.add(dz.addcmul_(slope, g[block]), block, w, None)
        gradients.leave(columns)
    return as_outputs(gradients.finish(lambda x: x)[:2], hidden)
