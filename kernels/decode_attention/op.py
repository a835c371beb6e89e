"""Attention of one query token per slot over the slot's KV cache: checks, schema, fake."""

from __future__ import annotations

import torch

from rlhf_fast import _args, _dispatch

_dispatch.implementations(
    "decode_attention",
    __package__,
    cuda="the Triton kernel serves CUDA tensors; it reads keys and values once, which is the floor",
)


def _fake(query, *_):
    return query.new_empty(query.shape)


def _check(query, keys, values, lengths, *_) -> None:
    # A list of a few numbers is looked through four times as fast as a tensor.
    found = lengths.tolist()
    if found and (min(found) < 0 or max(found) > keys.shape[2]):
        bad = min(found) if min(found) < 0 else max(found)
        raise ValueError(f"lengths: expected values in [0, {keys.shape[2]}], got {bad}")


_dispatch.define(
    "decode_attention",
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor lengths, float scale, "
    "int? window, float? softcap, str backend) -> Tensor",
    fake=_fake,
    check=_check,
)


def _check_cache(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    _args.check_float_tensor(name, x)
    _args.check_dtype(name, x, query.dtype, "query")
    _args.check_device(name, x, query.device, "query")
    if x.ndim != 4 or x.shape[0] != query.shape[0] or x.shape[3] != query.shape[2]:
        raise ValueError(
            f"{name}: expected shape [B, Hk, C, D] with B and D of query {tuple(query.shape)}, "
            f"got {tuple(x.shape)}"
        )


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of the newest token of each slot over the keys that the slot has stored.

        s_c         = scale query[b, h] . keys[b, h / (Hq / Hk), c]
        out[b, h]   = sum_c softmax(s)_c values[b, h / (Hq / Hk), c]
        c           from max(0, lengths[b] - window) to lengths[b] - 1

    with s_c replaced by softcap tanh(s_c / softcap) under a softcap. Each slot has a length of its
    own, so there is no padding and no mask; what is stored behind a slot's length or before its
    window is never looked at. The columns are cut at fixed places, and the pieces are merged by
    their log-sum-exp in a fixed order: a slot's bits depend on no other slot and on no batch size
    ("reference" leaves that to its library products). Source: Dao et al., "Flash-Decoding for
    long-context inference", 2023; the fixed cut as in He et al., "Defeating nondeterminism in LLM
    inference", 2025.

    For inference: the result is detached. A prompt or a training step goes through the model's own
    attention.

    Args:
        query: `[B, Hq, D]` float64, float32, float16 or bfloat16; Hq is a multiple of Hk.
        keys, values: `[B, Hk, C, D]` of the query's dtype; room for C tokens of each slot. A view
            of a larger cache is read in place.
        lengths: `[B]` int32 or int64, how many columns of each slot are in use, from 0 to C. The
            query's own key and value are among them.
        scale: 1 / sqrt(D) by default.
        window: a slot sees its last `window` columns; None: all of them.
        softcap: a positive number, or None.

    Returns:
        `[B, Hq, D]` in the query's dtype (computed in float32, float64 for float64); 0 where the
        length is 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; on CPU also a length outside
            [0, C] (on CUDA it is cut to C).

    >>> keys = torch.zeros(1, 1, 4, 2)
    >>> values = torch.tensor([1.0, 3.0, 9.0, 9.0]).view(1, 1, 4, 1).expand(1, 1, 4, 2)
    >>> rlhf_fast.decode_attention(torch.ones(1, 1, 2), keys, values, torch.tensor([2]))
    tensor([[[2., 2.]]])
    """
    _args.check_float_tensor("query", query)
    if query.ndim != 3:
        raise ValueError(f"query: expected shape [B, Hq, D], got {tuple(query.shape)}")
    _check_cache("keys", keys, query)
    _check_cache("values", values, query)
    _args.check_shape("values", values, keys.shape, "that of keys")
    slots, heads, size = query.shape
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(
            f"query: expected a multiple of the {keys.shape[1]} heads of keys, got {heads} heads"
        )
    _args.check_ids("lengths", lengths)
    _args.check_shape("lengths", lengths, (slots,), "one per slot")
    _args.check_device("lengths", lengths, query.device, "query")
    if window is not None and _args.integer("window", window) < 1:
        raise ValueError(f"window: expected an int of at least 1, got {window}")
    if softcap is not None:
        softcap = _args.number("softcap", softcap, low=0.0, exclusive_low=True)
    scale = max(size, 1) ** -0.5 if scale is None else _args.number("scale", scale)
    return torch.ops.rlhf_fast.decode_attention(
        query.detach(), keys.detach(), values.detach(), lengths, scale, window, softcap,
        _dispatch.requested("decode_attention"),
    )  # fmt: skip
