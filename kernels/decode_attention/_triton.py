"""Decode attention in Triton, in two launches: the pieces of each slot, then their sum. The pieces
of a prefix are a launch of their own.

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

from collections.abc import Sequence

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
def _length(lengths_ptr, slot, C):
    """How many of the C columns the slot has."""
    return tl.minimum(tl.maximum(tl.load(lengths_ptr + slot).to(tl.int32), 0), C)


@triton.jit
def _visible(
    lengths_ptr, prefix_lengths_ptr, slot, C, prefix_C, window,
    IS_PREFIX: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """Of the slot's own columns, or of its prefix's: the first that it sees, and the one behind
    the last."""
    own = _length(lengths_ptr, slot, C)
    before = 0
    if HAS_PREFIX:
        before = _length(prefix_lengths_ptr, slot, prefix_C)
    first = tl.maximum(before + own - window, 0)
    if IS_PREFIX:
        return tl.minimum(first, before), before
    return tl.maximum(first - before, 0), own


@triton.jit(
    do_not_specialize=[
        "C", "prefix_C", "window", "prefix_count", "key_heads", "splits", "prefix_splits"
    ]
)  # fmt: skip
def _split_kernel(
    query_ptr, keys_ptr, values_ptr, rows_ptr, lengths_ptr, prefix_lengths_ptr,
    top_ptr, total_ptr, sum_ptr,
    key_slot, key_head, key_column, value_slot, value_head, value_column,
    C, prefix_C, window, prefix_count, key_heads, splits, prefix_splits, scale, softcap,
    IS_PREFIX: tl.constexpr, HAS_PREFIX: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TENSOR_CORES: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(largest score, sum of exponentials, their sum over the values) of one split.

    A slot's pieces are those of the prefix, `prefix_splits` of `splits`, and behind them its own. A
    split without a column that the slot sees writes nothing.
    """
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    slot = pair // key_heads
    head = pair % key_heads
    first, last = _visible(
        lengths_ptr, prefix_lengths_ptr, slot, C, prefix_C, window, IS_PREFIX, HAS_PREFIX
    )
    begin = split * SPLIT
    if (begin < last) & (begin + SPLIT > first):
        g = tl.arange(0, GROUP_BLOCK)
        d = tl.arange(0, D_BLOCK)
        row = pair * GROUP + g
        inside = (g < GROUP)[:, None] & (d < D)[None, :]
        q = tl.load(query_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        if not TENSOR_CORES:
            q = q.to(tl.float32)
        at_row = slot
        if IS_PREFIX:
            at_row = tl.load(rows_ptr + slot).to(tl.int64)
            at_row = tl.minimum(tl.maximum(at_row, 0), prefix_count - 1)
        keys_ptr += at_row * key_slot + head * key_head
        values_ptr += at_row * value_slot + head * value_head
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
        if not IS_PREFIX:
            part += prefix_splits
        tl.store(top_ptr + part, top, mask=g < GROUP)
        tl.store(total_ptr + part, total, mask=g < GROUP)
        tl.store(sum_ptr + part[:, None] * D + d[None, :], sums, mask=inside)


@triton.jit
def _merged(
    parts, first, last, top, total, sums, top_ptr, total_ptr, sum_ptr, d,
    D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(top, total, sums) and the pieces of the columns [first, last); piece 0 is at `parts`."""
    begin = first // SPLIT
    for split in range(begin, tl.where(first < last, tl.cdiv(last, SPLIT), begin)):
        part = parts + split
        piece_top = tl.load(top_ptr + part)
        new = tl.maximum(top, piece_top)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2((top - base) * LOG2_E)
        grow = tl.exp2((piece_top - base) * LOG2_E)
        total = total * shrink + tl.load(total_ptr + part) * grow
        piece = tl.load(sum_ptr + part * D + d, mask=d < D, other=0.0)
        sums = sums * shrink + piece * grow
        top = new
    return top, total, sums


@triton.jit(do_not_specialize=["C", "prefix_C", "window", "heads", "splits", "prefix_splits"])
def _merge_kernel(
    lengths_ptr, prefix_lengths_ptr, top_ptr, total_ptr, sum_ptr, out_ptr,
    C, prefix_C, window, heads, splits, prefix_splits,
    HAS_PREFIX: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The pieces of one slot and query head; 0 where there is none."""
    row = tl.program_id(0).to(tl.int64)
    slot = row // heads
    d = tl.arange(0, D_BLOCK)
    top = float("-inf")
    total = 0.0
    sums = tl.zeros([D_BLOCK], tl.float32)
    if HAS_PREFIX:
        first, last = _visible(
            lengths_ptr, prefix_lengths_ptr, slot, C, prefix_C, window, True, True
        )
        top, total, sums = _merged(
            row * splits, first, last, top, total, sums, top_ptr, total_ptr, sum_ptr, d, D, SPLIT
        )  # fmt: skip
    first, last = _visible(
        lengths_ptr, prefix_lengths_ptr, slot, C, prefix_C, window, False, HAS_PREFIX
    )
    top, total, sums = _merged(
        row * splits + prefix_splits, first, last, top, total, sums, top_ptr, total_ptr, sum_ptr, d,
        D, SPLIT,
    )  # fmt: skip
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


def _aot(dtype: str, itemsize: int, group: int, size: int, softcap=False, prefix=""):
    """`prefix`: "" without one, "own" and "prefix" for the two launches with one."""
    half = f"*{dtype}:16"
    pointers = dict.fromkeys(("query_ptr", "keys_ptr", "values_ptr"), half)
    pointers |= dict.fromkeys(("top_ptr", "total_ptr", "sum_ptr"), "*fp32:16")
    numbered = ("lengths_ptr", *(("rows_ptr", "prefix_lengths_ptr") if prefix else ()))
    pointers |= dict.fromkeys(numbered, "*i64:16")
    strides = ("key_slot", "key_head", "key_column", "value_slot", "value_head", "value_column")
    numbers = dict.fromkeys(strides, "i32:16")
    numbers |= dict.fromkeys(("C", "prefix_C", "window", "prefix_count"), "i32")
    numbers |= dict.fromkeys(("key_heads", "splits", "prefix_splits"), "i32")
    numbers |= {"scale": "fp32", "softcap": "fp32"}
    constants = {"GROUP": group, "D": size, "HAS_SOFTCAP": softcap, "TENSOR_CORES": itemsize == 2}
    constants |= {"IS_PREFIX": prefix == "prefix", "HAS_PREFIX": bool(prefix)}
    return (
        _split_kernel,
        pointers | numbers,
        constants | _shape(group, size, itemsize),
        _warps(itemsize),
    )


def _aot_merge(prefix: bool):
    return (
        _merge_kernel,
        {"lengths_ptr": "*i64:16", "out_ptr": "*bf16:16"}
        | ({"prefix_lengths_ptr": "*i64:16"} if prefix else {})
        | dict.fromkeys(("top_ptr", "total_ptr", "sum_ptr"), "*fp32:16")
        | dict.fromkeys(("C", "prefix_C", "window", "heads", "splits", "prefix_splits"), "i32"),
        {"HAS_PREFIX": prefix, "D": 128, "D_BLOCK": 128, "SPLIT": SPLIT},
        WARPS,
    )


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    _aot("bf16", 2, group=4, size=128),
    _aot("bf16", 2, group=4, size=128, prefix="own"),
    _aot("bf16", 2, group=4, size=128, prefix="prefix"),
    _aot("bf16", 2, group=8, size=64),
    _aot("bf16", 2, group=2, size=256, softcap=True),
    _aot("fp16", 2, group=1, size=96),
    _aot("fp32", 4, group=4, size=128),
    _aot("fp32", 4, group=2, size=64),
    _aot("fp32", 4, group=2, size=256, softcap=True, prefix="prefix"),
    _aot_merge(prefix=False),
    _aot_merge(prefix=True),
]


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
    slots, heads, size = query.shape
    key_heads, columns = keys.shape[1:3]
    query, keys, values = query.contiguous(), dense_last(keys), dense_last(values)
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    lengths = lengths.contiguous()
    before_keys = before_values = rows = before_lengths = None
    before_columns = before_rows = 0
    if prefix:
        before_keys, before_values = (dense_last(x) for x in prefix[:2])
        rows, before_lengths = (x.contiguous() for x in prefix[2:])
        before_rows, _, before_columns, _ = before_keys.shape
    before_splits = triton.cdiv(before_columns, SPLIT)
    splits = before_splits + triton.cdiv(columns, SPLIT)
    top, total = (query.new_empty((slots * heads, splits), dtype=torch.float32) for _ in range(2))
    sums = query.new_empty((slots * heads, splits, size), dtype=torch.float32)
    shape = _shape(heads // key_heads, size, query.itemsize)
    everything = columns + before_columns
    window = everything if window is None else min(window, everything)
    # Triton's interpreter keeps bfloat16 as integers and multiplies those.
    plain = torch.float32, *((torch.bfloat16,) if interpreting() else ())
    parts = [(keys, values, splits - before_splits, False)]
    if prefix:
        parts.append((before_keys, before_values, before_splits, True))
    with on_device_of(query):
        for part_keys, part_values, count, is_prefix in parts:
            if count == 0:
                continue
            _split_kernel[(slots * key_heads, count)](
                query, part_keys, part_values, rows, lengths, before_lengths, top, total, sums,
                *part_keys.stride()[:3], *part_values.stride()[:3], columns, before_columns, window,
                before_rows, key_heads, splits, before_splits, scale, softcap or 0.0,
                IS_PREFIX=is_prefix, HAS_PREFIX=bool(prefix),
                GROUP=heads // key_heads, D=size, HAS_SOFTCAP=softcap is not None,
                TENSOR_CORES=query.dtype not in plain, **shape,
                num_warps=_warps(query.itemsize), enable_fp_fusion=False,
            )  # fmt: skip
        _merge_kernel[(slots * heads,)](
            lengths, before_lengths, top, total, sums, out, columns, before_columns, window, heads,
            splits, before_splits, HAS_PREFIX=bool(prefix), D=size, D_BLOCK=shape["D_BLOCK"],
            SPLIT=SPLIT, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out
