"""Attention of one query token per slot over the slot's KV cache: checks, schema, fake."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf_fast import _args, _dispatch

_dispatch.implementations(
    "decode_attention",
    __package__,
    cuda="the Triton kernel serves CUDA tensors; it reads keys and values once, which is the floor",
)


class Prefix(NamedTuple):
    """Keys and values of tokens that come before a slot's own, and may serve several slots: what
    `decode_attention` takes as `prefix`."""

    keys: torch.Tensor  # [P, Hk, Cp, D]
    values: torch.Tensor  # [P, Hk, Cp, D]
    rows: torch.Tensor  # [B] int32 or int64: which of the P rows each slot continues
    lengths: torch.Tensor  # [B] int32 or int64: how many columns of it, from 0 to Cp


def _fake(query, *_):
    return query.new_empty(query.shape)


def _check_range(name: str, x: torch.Tensor, last: int) -> None:
    # A list of a few numbers is looked through four times as fast as a tensor.
    found = x.tolist()
    if found and (min(found) < 0 or max(found) > last):
        bad = min(found) if min(found) < 0 else max(found)
        raise ValueError(f"{name}: expected values in [0, {last}], got {bad}")


def _check(query, keys, values, lengths, prefix, *_) -> None:
    _check_range("lengths", lengths, keys.shape[2])
    if prefix:
        count, _, columns, _ = prefix[0].shape
        _check_range("prefix.rows", prefix[2], count - 1)
        _check_range("prefix.lengths", prefix[3], columns)


_dispatch.define(
    "decode_attention",
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor lengths, Tensor[] prefix, "
    "float scale, int? window, float? softcap, str backend) -> Tensor",
    fake=_fake,
    check=_check,
)


def _check_numbers(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    _args.check_ids(name, x)
    _args.check_shape(name, x, query.shape[:1], "one per slot")
    _args.check_device(name, x, query.device, "query")


def _check_cache(prefix: str, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor):
    for name, x in (("keys", keys), ("values", values)):
        _args.check_float_tensor(prefix + name, x)
        _args.check_dtype(prefix + name, x, query.dtype, "query")
        _args.check_device(prefix + name, x, query.device, "query")
        rows, expected = ("P", "P > 0, D") if prefix else ("B", "B and D")
        right = x.ndim == 4 and x.shape[3] == query.shape[2]
        if not right or (x.shape[0] == 0 if prefix else x.shape[0] != query.shape[0]):
            raise ValueError(
                f"{prefix}{name}: expected shape [{rows}, Hk, C, D] with {expected} of query "
                f"{tuple(query.shape)}, got {tuple(x.shape)}"
            )
    _args.check_shape(f"{prefix}values", values, keys.shape, f"that of {prefix}keys")


def _check_prefix(prefix: Prefix, keys: torch.Tensor, query: torch.Tensor) -> None:
    _check_cache("prefix.", prefix.keys, prefix.values, query)
    if prefix.keys.shape[1] != keys.shape[1]:
        raise ValueError(
            f"prefix.keys: expected the {keys.shape[1]} heads of keys, got {prefix.keys.shape[1]}"
        )
    _check_numbers("prefix.rows", prefix.rows, query)
    _check_numbers("prefix.lengths", prefix.lengths, query)


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    *,
    prefix: Prefix | None = None,
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
    window is never looked at. With a `prefix`, such as a prompt that several slots continue, a slot
    sees the columns of its prefix and behind them its own; the window counts over both.

    The columns are cut at fixed places, and the pieces, those of the prefix first, are merged by
    their log-sum-exp in a fixed order: a slot's bits depend on no other slot and on no batch size
    ("reference" leaves that to its library products). Source: Dao et al., "Flash-Decoding for
    long-context inference", 2023; a shared prefix as in Ye et al., "Cascade inference", 2024; the
    fixed cut as in He et al., "Defeating nondeterminism in LLM inference", 2025.

    For inference: the result is detached. A prompt or a training step goes through the model's own
    attention.

    Args:
        query: `[B, Hq, D]` float64, float32, float16 or bfloat16; Hq is a multiple of Hk.
        keys, values: `[B, Hk, C, D]` of the query's dtype; room for C tokens of each slot. A view
            of a larger cache is read in place.
        lengths: `[B]` int32 or int64, how many columns of each slot are in use, from 0 to C. The
            query's own key and value are among them.
        prefix: `Prefix(keys, values, rows, lengths)`, or None; the query's dtype.
        scale: 1 / sqrt(D) by default.
        window: a slot sees its last `window` columns; None: all of them.
        softcap: a positive number, or None.

    Returns:
        `[B, Hq, D]` in the query's dtype (computed in float32, float64 for float64); 0 where the
        length is 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; on CPU also a length outside
            [0, C] or a row outside [0, P) (on CUDA they are cut).

    >>> keys = torch.zeros(1, 1, 4, 2)
    >>> values = torch.tensor([1.0, 3.0, 9.0, 9.0]).view(1, 1, 4, 1).expand(1, 1, 4, 2)
    >>> rlhf_fast.decode_attention(torch.ones(1, 1, 2), keys, values, torch.tensor([2]))
    tensor([[[2., 2.]]])
    """
    _args.check_float_tensor("query", query)
    if query.ndim != 3:
        raise ValueError(f"query: expected shape [B, Hq, D], got {tuple(query.shape)}")
    _check_cache("", keys, values, query)
    _, heads, size = query.shape
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(
            f"query: expected a multiple of the {keys.shape[1]} heads of keys, got {heads} heads"
        )
    _check_numbers("lengths", lengths, query)
    if prefix is not None:
        if not isinstance(prefix, Prefix):
            raise TypeError(f"prefix: expected a Prefix or None, got {type(prefix).__name__}")
        _check_prefix(prefix, keys, query)
    if window is not None and _args.integer("window", window) < 1:
        raise ValueError(f"window: expected an int of at least 1, got {window}")
    if softcap is not None:
        softcap = _args.number("softcap", softcap, low=0.0, exclusive_low=True)
    scale = max(size, 1) ** -0.5 if scale is None else _args.number("scale", scale)
    return torch.ops.rlhf_fast.decode_attention(
        query.detach(), keys.detach(), values.detach(), lengths,
        [] if prefix is None else [x.detach() for x in prefix], scale, window, softcap,
        _dispatch.requested("decode_attention"),
    )  # fmt: skip
