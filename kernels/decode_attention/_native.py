"""Calls of the native decode attention, for tensors on the CPU.

Keys and values are addressed by their strides; only a last axis that is not dense is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_fast.kernels._common.launch import dense_last
from rlhf_fast.kernels._common.native import address, dtype_number, kernel

_NO_STRIDES = (0, 0, 0)
_NOTHING = (0, 0, 0, 0, _NO_STRIDES, _NO_STRIDES)


def _key_values(keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> tuple:
    return (
        keys.data_ptr(), values.data_ptr(), lengths.data_ptr(), keys.shape[2], keys.stride()[:3],
        values.stride()[:3],
    )  # fmt: skip


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
    dtype = dtype_number("query", query)
    slots, heads, size = query.shape
    key_heads = keys.shape[1]
    query, keys, values = query.contiguous(), dense_last(keys), dense_last(values)
    lengths = lengths.to(torch.int64).contiguous()
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    before, rows = _NOTHING, None
    if prefix:
        before_keys, before_values = (dense_last(x) for x in prefix[:2])
        rows, before_lengths = (x.to(torch.int64).contiguous() for x in prefix[2:])
        before = _key_values(before_keys, before_values, before_lengths)
    kernel("decode_attention", query)(
        query.data_ptr(), out.data_ptr(), dtype, _key_values(keys, values, lengths), before,
        address(rows), slots, key_heads, heads // key_heads, size, window or 0, scale,
        softcap or 0.0,
    )  # fmt: skip
    return out
