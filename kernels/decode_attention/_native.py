"""Calls of the native decode attention, for tensors on the CPU.

Keys and values are addressed by their strides; only a last axis that is not dense is copied.
"""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.launch import dense_last
from rlhf_fast.kernels._common.native import dtype_number, kernel


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`[B, Hq, D]` in the query's dtype; 0 for a slot that sees no column."""
    dtype = dtype_number("query", query)
    slots, heads, size = query.shape
    key_heads, columns = keys.shape[1:3]
    query, keys, values = query.contiguous(), dense_last(keys), dense_last(values)
    lengths = lengths.to(torch.int64).contiguous()
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    if columns == 0:
        return out.zero_()
    kernel("decode_attention", query)(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), lengths.data_ptr(), out.data_ptr(),
        dtype, slots, key_heads, heads // key_heads, columns, size, keys.stride()[:3],
        values.stride()[:3], window or 0, scale, softcap or 0.0,
    )  # fmt: skip
    return out
