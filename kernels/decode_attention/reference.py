"""Decode attention in plain PyTorch: the definition of truth.

It pads to the longest slot and makes the scores of all columns, for readability; what lies behind a
slot's length or before its window is replaced before it meets any number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_fast import _args


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    prefix: Sequence[torch.Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`[B, Hq, D]` in the query's dtype; 0 for a slot that sees no column."""
    key_heads = keys.shape[1]
    column = torch.arange(keys.shape[2], device=keys.device)
    seen, position = column < lengths[:, None], column.expand(len(lengths), -1)
    if prefix:
        before = prefix[3][:, None]
        column = torch.arange(prefix[0].shape[2], device=keys.device).expand(len(lengths), -1)
        seen = torch.cat((column < before, seen), 1)
        position = torch.cat((column, before + position), 1)
        rows = prefix[2]
        keys, values = (
            torch.cat((p[rows], x), 2) for p, x in zip(prefix[:2], (keys, values), strict=True)
        )
        lengths = lengths + prefix[3]
    if keys.shape[2] == 0 or query.numel() == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    if window is not None:
        seen = seen & (position >= lengths[:, None] - window)
    seen = seen[:, None, None]
    dtype = _args.compute_dtype(query.dtype)
    hidden = ~seen.transpose(-1, -2)
    k, v = (x.masked_fill(hidden, 0.0).to(dtype) for x in (keys, values))
    q = query.unflatten(1, (key_heads, -1)).to(dtype)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v) / total.masked_fill(total == 0, 1.0)
    return out.flatten(1, 2).to(query.dtype)
