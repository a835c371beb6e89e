"""Decode attention in Triton, in two launches: the pieces of each slot, then their sum.

A program of the first launch has SPLIT columns of one slot and key head, with all the query heads
that share the key head, so that keys and values are read once. Programs whose columns the slot does
not see end at once: the grid follows the room in the cache, not the lengths, which the host does
not know. The second launch merges the pieces in their order. SPLIT and the blocks inside it are the
same at every batch size, and no size is specialised on: a row's bits depend on nothing else.

The products run on tensor cores where the cache is of half precision. Those with the keys are exact
there; the weights of the values are handed over as the sum of two numbers of half precision, so
that no digit of float32 is lost but the last few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting
from rlhf_fast.kernels._common.device_math import LOG2_E, softcapped
from rlhf_fast.kernels._common.launch import dense_last, on_device_of

SPLIT = 256
# Bytes of a block of keys: three stages of keys and values fit into 96 KiB of shared memory. From
# this reasoning alone: not tuned on a GPU.
BLOCK_BYTES = 8192
# Warps for half precision, and for float32, whose products need more registers.
WARPS, WARPS_FLOAT = 4, 8


@triton.jit
def _weighted(weights, v, TENSOR_CORES: tl.constexpr):
    """weights @ v in float32."""
    if not TENSOR_CORES:
        return tl.dot(weights, v, input_precision="ieee")
    high = weights.to(v.dtype)
    low = (weights - high.to(tl.float32)).to(v.dtype)
    return tl.dot(low, v) + tl.dot(high, v)


@triton.jit
def _visible(lengths_ptr, slot, C, window):
    """The first column that the slot sees, and the one behind the last."""
    last = tl.minimum(tl.maximum(tl.load(lengths_ptr + slot).to(tl.int32), 0), C)
    return tl.maximum(last - window, 0), last


@triton.jit(do_not_specialize=["C", "window", "key_heads", "splits"])
def _split_kernel(
    query_ptr, keys_ptr, values_ptr, lengths_ptr, top_ptr, total_ptr, sum_ptr,
    key_slot, key_head, key_column, value_slot, value_head, value_column,
    C, window, key_heads, splits, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TENSOR_CORES: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(largest score, sum of exponentials, their sum over the values) of one split.

    A split without a column that the slot sees writes nothing.
    """
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    slot = pair // key_heads
    head = pair % key_heads
    first, last = _visible(lengths_ptr, slot, C, window)
    begin = split * SPLIT
    if (begin < last) & (begin + SPLIT > first):
        g = tl.arange(0, GROUP_BLOCK)
        d = tl.arange(0, D_BLOCK)
        row = pair * GROUP + g
        inside = (g < GROUP)[:, None] & (d < D)[None, :]
        q = tl.load(query_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        if not TENSOR_CORES:
            q = q.to(tl.float32)
        keys_ptr += slot * key_slot + head * key_head
        values_ptr += slot * value_slot + head * value_head
        top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_BLOCK], tl.float32)
        sums = tl.zeros([GROUP_BLOCK, D_BLOCK], tl.float32)
        for block in range(SPLIT // BLOCK):
            c = begin + block * BLOCK + tl.arange(0, BLOCK)
            seen = (c >= first) & (c < last)
            there = seen[:, None] & (d < D)[None, :]
            at = c.to(tl.int64)[:, None]
            k = tl.load(keys_ptr + at * key_column + d[None, :], mask=there, other=0.0)
            v = tl.load(values_ptr + at * value_column + d[None, :], mask=there, other=0.0)
            if not TENSOR_CORES:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                s, _ = softcapped(s, softcap)
            s = tl.where(seen[None, :], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, axis=1))
            # Nothing but -inf so far: subtract 0, for -inf - -inf is NaN.
            base = tl.where(new == float("-inf"), 0.0, new)
            shrink = tl.exp2((top - base) * LOG2_E)
            weights = tl.exp2((s - base[:, None]) * LOG2_E)
            total = total * shrink + tl.sum(weights, axis=1)
            sums = sums * shrink[:, None] + _weighted(weights, v, TENSOR_CORES)
            top = new
        part = row * splits + split
        tl.store(top_ptr + part, top, mask=g < GROUP)
        tl.store(total_ptr + part, total, mask=g < GROUP)
        tl.store(sum_ptr + part[:, None] * D + d[None, :], sums, mask=inside)


@triton.jit(do_not_specialize=["C", "window", "heads", "splits"])
def _merge_kernel(
    lengths_ptr, top_ptr, total_ptr, sum_ptr, out_ptr, C, window, heads, splits,
    D: tl.constexpr, D_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The pieces of one slot and query head; 0 where there is none."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    first, last = _visible(lengths_ptr, row // heads, C, window)
    top = float("-inf")
    total = 0.0
    sums = tl.zeros([D_BLOCK], tl.float32)
    for split in range(first // SPLIT, tl.cdiv(last, SPLIT)):
        part = row * splits + split
        piece_top = tl.load(top_ptr + part)
        new = tl.maximum(top, piece_top)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2((top - base) * LOG2_E)
        grow = tl.exp2((piece_top - base) * LOG2_E)
        total = total * shrink + tl.load(total_ptr + part) * grow
        piece = tl.load(sum_ptr + part * D + d, mask=d < D, other=0.0)
        sums = sums * shrink + piece * grow
        top = new
    out = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def _shape(group: int, size: int, itemsize: int) -> dict[str, int]:
    """The blocks of `_split_kernel` that follow from group, head size and dtype."""
    d_block = max(16, triton.next_power_of_2(size))
    block = min(max(BLOCK_BYTES // (d_block * itemsize), 16), 64)
    return {
        "GROUP_BLOCK": max(16, triton.next_power_of_2(group)),
        "D_BLOCK": d_block,
        "BLOCK": block,
        "SPLIT": SPLIT,
    }


def _warps(itemsize: int) -> int:
    return WARPS if itemsize == 2 else WARPS_FLOAT


def _aot(dtype: str, itemsize: int, group: int, size: int, softcap: bool = False):
    half = f"*{dtype}:16"
    pointers = dict.fromkeys(("query_ptr", "keys_ptr", "values_ptr"), half)
    pointers |= dict.fromkeys(("top_ptr", "total_ptr", "sum_ptr"), "*fp32:16")
    pointers["lengths_ptr"] = "*i64:16"
    strides = ("key_slot", "key_head", "key_column", "value_slot", "value_head", "value_column")
    numbers = dict.fromkeys(strides, "i32:16")
    numbers |= dict.fromkeys(("C", "window", "key_heads", "splits"), "i32")
    numbers |= {"scale": "fp32", "softcap": "fp32"}
    constants = {"GROUP": group, "D": size, "HAS_SOFTCAP": softcap, "TENSOR_CORES": itemsize == 2}
    return (
        _split_kernel,
        pointers | numbers,
        constants | _shape(group, size, itemsize),
        _warps(itemsize),
    )


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    _aot("bf16", 2, group=4, size=128),
    _aot("bf16", 2, group=8, size=64),
    _aot("bf16", 2, group=2, size=256, softcap=True),
    _aot("fp16", 2, group=1, size=96),
    _aot("fp32", 4, group=4, size=128),
    _aot("fp32", 4, group=2, size=64),
    _aot("fp32", 4, group=2, size=256, softcap=True),
    (
        _merge_kernel,
        {"lengths_ptr": "*i64:16", "out_ptr": "*bf16:16"}
        | dict.fromkeys(("top_ptr", "total_ptr", "sum_ptr"), "*fp32:16")
        | dict.fromkeys(("C", "window", "heads", "splits"), "i32"),
        {"D": 128, "D_BLOCK": 128, "SPLIT": SPLIT},
        WARPS,
    ),
]


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
    slots, heads, size = query.shape
    key_heads, columns = keys.shape[1:3]
    query, keys, values = query.contiguous(), dense_last(keys), dense_last(values)
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    splits = triton.cdiv(columns, SPLIT)
    top, total = (query.new_empty((slots * heads, splits), dtype=torch.float32) for _ in range(2))
    sums = query.new_empty((slots * heads, splits, size), dtype=torch.float32)
    lengths = lengths.contiguous()
    shape = _shape(heads // key_heads, size, query.itemsize)
    window = columns if window is None else min(window, columns)
    # Triton's interpreter keeps bfloat16 as integers and multiplies those.
    plain = torch.float32, *((torch.bfloat16,) if interpreting() else ())
    with on_device_of(query):
        if splits:
            _split_kernel[(slots * key_heads, splits)](
                query, keys, values, lengths, top, total, sums, *keys.stride()[:3],
                *values.stride()[:3], columns, window, key_heads, splits, scale, softcap or 0.0,
                GROUP=heads // key_heads, D=size, HAS_SOFTCAP=softcap is not None,
                TENSOR_CORES=query.dtype not in plain, **shape,
                num_warps=_warps(query.itemsize), enable_fp_fusion=False,
            )  # fmt: skip
        _merge_kernel[(slots * heads,)](
            lengths, top, total, sums, out, columns, window, heads, splits, D=size,
            D_BLOCK=shape["D_BLOCK"], SPLIT=SPLIT, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out
