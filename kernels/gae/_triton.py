"""Generalised advantage estimation in Triton: two scans per block of tokens, one program per row.

The scans are those of kernels/_common/scan.py; blocks are walked from the row's end with the
carried state, for any T. Rows of more than SPLIT_FROM tokens are split over programs, a block of
tokens each, in two launches (kernels/_common/chunks.py). Packed rows are not: how long they are is
known to the device alone, and the tokens of all of them would make a grid of mostly idle programs.

T is never specialised on, so loads and scans have one layout and one order of operations, and a
row's bits do not depend on its alignment or its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting
from rlhf_fast.kernels._common import chunks as _chunks
from rlhf_fast.kernels._common.chunks import behind_chunk, store_map
from rlhf_fast.kernels._common.launch import on_device_of
from rlhf_fast.kernels._common.moments import block_moments, store_part
from rlhf_fast.kernels._common.scan import (
    INTERPRETER_SHAPE,
    SHAPES,
    first,
    nearest_values,
    shape,
    traces,
)

# The length of a packed row is on the device, and a row must not depend on its batch: one shape.
PACKED_SHAPE = (10, 4)


@triton.jit(do_not_specialize=["T", "chunks"])
def gae_kernel(
    rewards_ptr, values_ptr, offsets_ptr, mask_ptr, dones_ptr, bootstrap_ptr, advantages_ptr,
    returns_ptr, maps_ptr, parts_ptr, T, chunks, bootstrap_value, gamma, decay, decay_returns,
    CARRY: tl.constexpr, TWO_LAMBDAS: tl.constexpr, LOG2_BLOCK: tl.constexpr,
    LOG2_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A row; with maps_ptr a chunk, and without advantages_ptr what it hands over.

    With parts_ptr [4, programs] also the moments of a chunk's advantages.
    """
    BLOCK_T: tl.constexpr = 2**LOG2_BLOCK
    SKIP: tl.constexpr = CARRY and mask_ptr is not None
    row = tl.program_id(0)
    if maps_ptr is not None:
        chunk = row % chunks
        row = row // chunks
        begin = row.to(tl.int64) * T + chunk * BLOCK_T
        length = tl.minimum(T - chunk * BLOCK_T, BLOCK_T)
    elif offsets_ptr is None:
        begin = row.to(tl.int64) * T
        length = T
    else:  # T is the number of packed tokens; offsets beyond it would reach foreign memory
        begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + row), 0), T)
        end = tl.minimum(tl.maximum(tl.load(offsets_ptr + row + 1), 0), T)
        length = (end - begin).to(tl.int32)
    if bootstrap_ptr is not None:
        bootstrap_value = tl.load(bootstrap_ptr + row)
    trace, trace_returns = 0.0, 0.0
    if maps_ptr is not None:
        if advantages_ptr is None:
            bootstrap_value = 0.0
        else:
            bootstrap_value, trace, trace_returns = behind_chunk(
                maps_ptr, row, chunk, chunks, bootstrap_value, gamma, decay, decay_returns,
                TWO_LAMBDAS, LOG2_BLOCK, LOG2_CHUNKS,
            )  # fmt: skip
    lane = tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(length, BLOCK_T)
    if maps_ptr is not None:
        blocks = 1
    next_value = bootstrap_value
    for step in range(blocks):
        t = (blocks - 1 - step) * BLOCK_T + lane
        inside = t < length
        live = inside
        behind = t + 1 < length
        if mask_ptr is not None:
            live = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
            behind = behind & (tl.load(mask_ptr + begin + (t + 1), mask=behind, other=0) != 0)
        reward = tl.load(rewards_ptr + begin + t, mask=live, other=0.0)
        value = tl.zeros([BLOCK_T], tl.float32)
        following = tl.zeros([BLOCK_T], tl.float32)
        if values_ptr is not None:
            value = tl.load(values_ptr + begin + t, mask=live, other=0.0)
            following = tl.load(values_ptr + begin + (t + 1), mask=behind, other=0.0)
        following = tl.where(t + 1 == length, bootstrap_value, following)
        seen = value  # from the left
        if SKIP:
            following = nearest_values(behind | (t + 1 == length), following, next_value)
            next_value = first(following, lane)
            seen = tl.where(live, value, following)
        cut = tl.zeros([BLOCK_T], tl.int1)
        if dones_ptr is not None:
            cut = tl.load(dones_ptr + begin + t, mask=live, other=0) != 0
        delta = reward + gamma * tl.where(cut, 0.0, following) - value
        walked = live if CARRY else inside
        advantage = traces(delta, cut, walked, decay, trace)
        trace = first(advantage, lane)
        of_returns = advantage
        if TWO_LAMBDAS:
            of_returns = traces(delta, cut, walked, decay_returns, trace_returns)
            trace_returns = first(of_returns, lane)
        advantage = tl.where(live, advantage, 0.0)
        if advantages_ptr is None:
            store_map(maps_ptr, walked, cut, seen, trace, trace_returns, lane)
        else:
            tl.store(advantages_ptr + begin + t, advantage, mask=inside)
        if returns_ptr is not None:
            returns = tl.where(live, of_returns + value, 0.0)
            tl.store(returns_ptr + begin + t, returns, mask=inside)
        if parts_ptr is not None:
            part = block_moments(advantage, live, LOG2_BLOCK)
            store_part(
                parts_ptr, tl.num_programs(0), tl.program_id(0), part[0], part[1], part[2], part[3]
            )


_POINTERS = dict.fromkeys(
    (
        "rewards_ptr", "values_ptr", "bootstrap_ptr", "advantages_ptr", "returns_ptr", "maps_ptr",
        "parts_ptr",
    ),
    "*fp32:16",
) | {"mask_ptr": "*i1:16", "dones_ptr": "*i1:16", "offsets_ptr": "*i64:16"}  # fmt: skip
_WHOLE = ("offsets_ptr", "maps_ptr", "parts_ptr")


def _aot(log2_block, warps, *, without=_WHOLE, carry=True, two_lambdas=False):
    """One entry of AOT_SIGNATURES; arguments that are left out are None."""
    scalars = dict.fromkeys(("bootstrap_value", "gamma", "decay", "decay_returns"), "fp32")
    sizes = {"T": "i32", "chunks": "i32"}
    pointers = {name: kind for name, kind in _POINTERS.items() if name not in without}
    constants = {
        "CARRY": carry, "TWO_LAMBDAS": two_lambdas, "LOG2_BLOCK": log2_block,
        "LOG2_CHUNKS": _chunks.LOG2_CHUNKS,
    }  # fmt: skip
    return gae_kernel, pointers | scalars | sizes, constants, warps


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    *(_aot(block, warps) for _, block, warps in SHAPES),
    _aot(*SHAPES[-1][1:], carry=False),
    _aot(*SHAPES[-1][1:], two_lambdas=True),
    _aot(*PACKED_SHAPE, without=("maps_ptr", "parts_ptr")),
    _aot(  # discounted returns
        *SHAPES[-1][1:],
        without=(*_WHOLE, "values_ptr", "dones_ptr", "bootstrap_ptr", "returns_ptr"),
    ),
    # Long rows: both launches, with two lambdas, and the second one of `ppo_advantages`.
    *(
        _aot(*SHAPES[-1][1:], without=("offsets_ptr", "parts_ptr", *more), two_lambdas=two)
        for more in (("advantages_ptr", "returns_ptr"), ())
        for two in (False, True)
    ),
    _aot(*SHAPES[-1][1:], without=("offsets_ptr", "dones_ptr", "bootstrap_ptr")),
]


def launch(
    rewards, values, offsets, mask, dones, bootstrap, advantages, returns, maps, parts, numbers,
    carry, two_lambdas,
):  # fmt: skip
    """One launch of `gae_kernel`; `numbers` are (bootstrap_value, gamma, decay, decay_returns)."""
    length = rewards.shape[-1]
    if offsets is not None:
        (log2_block, warps), rows = PACKED_SHAPE, offsets.shape[0] - 1
        if interpreting():
            log2_block, warps = INTERPRETER_SHAPE
    else:
        (log2_block, warps), rows = shape(length), rewards.shape[0]
    chunks = 0 if maps is None else maps.shape[1] // rows
    with on_device_of(rewards):
        gae_kernel[(rows * max(chunks, 1),)](
            rewards, values, offsets, mask, dones, bootstrap, advantages, returns, maps, parts,
            length, chunks, *map(float, numbers), carry, two_lambdas, log2_block,
            _chunks.log2_chunks(), num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _launch(
    rewards, values, offsets, mask, dones, bootstrap, bootstrap_value, gamma, lam, lam_value, carry,
    with_returns=True,
):  # fmt: skip
    advantages = torch.empty_like(rewards)
    returns = torch.empty_like(rewards) if with_returns else None
    if rewards.numel():
        mask, dones = (x if x is None else x.contiguous() for x in (mask, dones))
        of_returns = lam if lam_value is None else lam_value
        options = (
            (bootstrap_value, gamma, gamma * lam, gamma * of_returns), carry, lam_value is not None
        )  # fmt: skip
        maps = None if offsets is not None else _chunks.empty_maps(rewards)
        inputs = (rewards, values, offsets, mask, dones, bootstrap)
        if maps is not None:
            launch(*inputs, None, None, maps, None, *options)
        launch(*inputs, advantages, returns, maps, None, *options)
    return advantages, returns


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    dones: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
    bootstrap_value: float,
    gamma: float,
    lam: float,
    lam_value: float | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages[B, T], returns[B, T]); `carry` skips masked tokens, else they count as zeros."""
    return _launch(
        rewards, values, None, mask, dones, bootstrap, bootstrap_value, gamma, lam, lam_value, carry
    )


def gae_packed(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    dones: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
    bootstrap_value: float,
    gamma: float,
    lam: float,
    lam_value: float | None,
    carry: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages[N], returns[N]); sequence b is `cu_seqlens[b] : cu_seqlens[b + 1]`."""
    return _launch(
        rewards, values, cu_seqlens, mask, dones, bootstrap, bootstrap_value, gamma, lam, lam_value,
        carry,
    )  # fmt: skip


def discounted_returns(
    rewards: torch.Tensor, mask: torch.Tensor | None, gamma: float
) -> torch.Tensor:
    """R_t = r_t + gamma R_{t+1} over the unmasked tokens: GAE with lambda 1 and no values."""
    return _launch(rewards, None, None, mask, None, None, 0.0, gamma, 1.0, None, True, False)[0]
