"""Benchmark cases of decode attention: a step of many slots with lengths of their own."""

import torch
from torch.nn.functional import scaled_dot_product_attention

import rlhf_fast
from rlhf_fast.bench import inputs, shapes
from rlhf_fast.bench.case import Case
from rlhf_fast.kernels.decode_attention import Prefix


def _lengths(B, C):
    """From half of the columns to all of them, the same ones on every device."""
    with torch.device("cpu"):
        return torch.randint(C // 2, C + 1, (B,), generator=inputs.generator(9))


def _make(dtype, B, Hq, Hk, C, D):
    return {
        "query": inputs.normal(B, Hq, D).to(dtype),
        "keys": inputs.normal(B, Hk, C, D, seed=1).to(dtype),
        "values": inputs.normal(B, Hk, C, D, seed=2).to(dtype),
        "lengths": _lengths(B, C).to(torch.get_default_device()),
    }


def _eager(query, keys, values, lengths):
    """PyTorch's attention over the padded cache, under a mask."""
    seen = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None, None, None]
    out = scaled_dot_product_attention(query.unflatten(1, (keys.shape[1], -1)), keys, values, seen)
    return (out.flatten(1, 2),)


def _decode(sizes, dtype=torch.float32, **options) -> Case:
    width = torch.finfo(dtype).bits // 8
    B, heads, key_heads, columns, size = sizes.values()
    tokens = int(_lengths(B, columns).sum())
    return Case(
        op="decode_attention",
        sizes=sizes,
        make=_make,
        ours=lambda query, keys, values, lengths: (
            rlhf_fast.decode_attention(query, keys, values, lengths),
        ),
        eager=_eager,
        dtype=dtype,
        bytes=width * size * (2 * tokens * key_heads + 2 * B * heads),
        flops=4 * tokens * heads * size,
        **options,
    )


def _make_shared(dtype, B, P, Hq, Hk, Cp, C, D):
    """Slots that share prompts, as neighbours; `whole_*` is what a cache without sharing holds."""
    keys, values = (inputs.normal(B, Hk, C, D, seed=s).to(dtype) for s in (1, 2))
    prefix_keys, prefix_values = (inputs.normal(P, Hk, Cp, D, seed=s).to(dtype) for s in (3, 4))
    rows = torch.arange(B) * P // B
    return {
        "query": inputs.normal(B, Hq, D).to(dtype),
        "keys": keys,
        "values": values,
        "lengths": torch.full((B,), C),
        "prefix": Prefix(prefix_keys, prefix_values, rows, torch.full((B,), Cp)),
        "whole_keys": torch.cat((prefix_keys[rows], keys), 2),
        "whole_values": torch.cat((prefix_values[rows], values), 2),
    }


def _eager_shared(query, whole_keys, whole_values, **_):
    query = query.unflatten(1, (whole_keys.shape[1], -1))
    return (scaled_dot_product_attention(query, whole_keys, whole_values).flatten(1, 2),)


def _shared(sizes, **options) -> Case:
    B, P, heads, key_heads, before, own, size = sizes.values()
    return Case(
        op="decode_attention",
        label="shared",
        sizes=sizes,
        make=_make_shared,
        ours=lambda query, keys, values, lengths, prefix, **_: (
            rlhf_fast.decode_attention(query, keys, values, lengths, prefix=prefix),
        ),
        eager=_eager_shared,
        dtype=torch.float32,
        bytes=4 * size * (2 * key_heads * (P * before + B * own) + 2 * B * heads),
        flops=4 * B * (before + own) * heads * size,
        **options,
    )


CASES = [
    _decode(shapes.ATTENTION, devices=("cpu",)),
    _shared(shapes.ATTENTION_SHARED),
    _decode(shapes.ATTENTION, torch.bfloat16, devices=("cpu",)),
    _decode(shapes.ATTENTION_GPU, torch.bfloat16, devices=("cuda",)),
    _decode(shapes.ATTENTION_QUICK, quick=True),
    _decode(shapes.ATTENTION_QUICK, torch.bfloat16, quick=True),
]
