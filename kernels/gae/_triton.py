"""Generalised advantage estimation in Triton: two scans per block of tokens, one program per row.

The scans are those of kernels/_common/scan.py; blocks are walked from the row's end with the
carried state, for any T. A single long row is not yet split over several programs: 16 rows of 65536
tokens use 16 multiprocessors.

T is never specialised on, so loads and scans have one layout and one order of operations, and a
row's bits do not depend on its alignment or its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting
from rlhf_fast.kernels._common.launch import on_device_of
from rlhf_fast.kernels._common.scan import first, nearest_values, traces

# (longest row, tokens per block, warps): 8 tokens per thread from 256 tokens on, so that a block's
# loads hide their latency. From this reasoning and the register table alone: not tuned on a GPU.
SHAPES = ((64, 64, 1), (256, 256, 1), (1024, 1024, 4), (None, 2048, 8))
# The length of a packed row is on the device, and a row must not depend on its batch: one shape.
PACKED_SHAPE = (1024, 4)
# The interpreter takes 0.1 ms per element of a scan: small blocks waste less on short rows.
INTERPRETER_SHAPE = (64, 1)


@triton.jit(do_not_specialize=["T"])
def _gae_kernel(
    rewards_ptr, values_ptr, offsets_ptr, mask_ptr, dones_ptr, bootstrap_ptr, advantages_ptr,
    returns_ptr, T, bootstrap_value, gamma, decay, decay_returns,
    CARRY: tl.constexpr, TWO_LAMBDAS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if offsets_ptr is None:
        begin = row * T
        length = T
    else:  # T is the number of packed tokens; offsets beyond it would reach foreign memory
        begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + row), 0), T)
        end = tl.minimum(tl.maximum(tl.load(offsets_ptr + row + 1), 0), T)
        length = (end - begin).to(tl.int32)
    if bootstrap_ptr is not None:
        bootstrap_value = tl.load(bootstrap_ptr + row)
    SKIP: tl.constexpr = CARRY and mask_ptr is not None
    lane = tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(length, BLOCK_T)
    next_value, trace, trace_returns = bootstrap_value, 0.0, 0.0
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
        if SKIP:
            following = nearest_values(behind | (t + 1 == length), following, next_value)
            next_value = first(following, lane)
        cut = tl.zeros([BLOCK_T], tl.int1)
        if dones_ptr is not None:
            cut = tl.load(dones_ptr + begin + t, mask=live, other=0) != 0
        delta = reward + gamma * tl.where(cut, 0.0, following) - value
        walked = live if CARRY else inside
        advantage = traces(delta, cut, walked, decay, trace)
        trace = first(advantage, lane)
        tl.store(advantages_ptr + begin + t, tl.where(live, advantage, 0.0), mask=inside)
        if returns_ptr is not None:
            if TWO_LAMBDAS:
                advantage = traces(delta, cut, walked, decay_returns, trace_returns)
                trace_returns = first(advantage, lane)
            returns = tl.where(live, advantage + value, 0.0)
            tl.store(returns_ptr + begin + t, returns, mask=inside)


_POINTERS = dict.fromkeys(
    ("rewards_ptr", "values_ptr", "bootstrap_ptr", "advantages_ptr", "returns_ptr"), "*fp32:16"
) | {"mask_ptr": "*i1:16", "dones_ptr": "*i1:16", "offsets_ptr": "*i64:16"}


def _aot(block, warps, *, without=("offsets_ptr",), carry=True, two_lambdas=False):
    """One entry of AOT_SIGNATURES; arguments that are left out are None."""
    scalars = dict.fromkeys(("bootstrap_value", "gamma", "decay", "decay_returns"), "fp32")
    pointers = {name: kind for name, kind in _POINTERS.items() if name not in without}
    constants = {"CARRY": carry, "TWO_LAMBDAS": two_lambdas, "BLOCK_T": block}
    return _gae_kernel, pointers | scalars | {"T": "i32"}, constants, warps


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    *(_aot(block, warps) for _, block, warps in SHAPES),
    _aot(*SHAPES[-1][1:], carry=False),
    _aot(*SHAPES[-1][1:], two_lambdas=True),
    _aot(*PACKED_SHAPE, without=()),
    _aot(  # discounted returns
        *SHAPES[-1][1:],
        without=("offsets_ptr", "values_ptr", "dones_ptr", "bootstrap_ptr", "returns_ptr"),
    ),
]


def _shape(length: int, packed: bool) -> tuple[int, int]:
    """(tokens per block, warps)."""
    if interpreting():
        return INTERPRETER_SHAPE
    if packed:
        return PACKED_SHAPE
    for longest, block, warps in SHAPES:
        if longest is None or length <= longest:
            return block, warps
    raise AssertionError("SHAPES ends with None")


def _launch(
    rewards, values, offsets, mask, dones, bootstrap, bootstrap_value, gamma, lam, lam_value, carry,
    with_returns=True,
):  # fmt: skip
    advantages = torch.empty_like(rewards)
    returns = torch.empty_like(rewards) if with_returns else None
    length = rewards.shape[-1]
    rows = rewards.shape[0] if offsets is None else offsets.shape[0] - 1
    if rewards.numel():
        block, warps = _shape(length, offsets is not None)
        with on_device_of(rewards):
            _gae_kernel[(rows,)](
                rewards, values, offsets, None if mask is None else mask.contiguous(),
                None if dones is None else dones.contiguous(), bootstrap, advantages, returns,
                length, float(bootstrap_value), float(gamma), float(gamma * lam),
                float(gamma * (lam if lam_value is None else lam_value)),
                carry, lam_value is not None, block, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
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
