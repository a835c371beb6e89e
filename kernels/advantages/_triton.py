"""Rewards and advantages in Triton: one program per row, blocks of tokens from the row's end.

A row's rewards, its scans (kernels/_common/scan.py) and its moments are made while its tokens are
in registers: each array is read or written once. Rows of more than SPLIT_FROM tokens are split over
programs (kernels/_common/chunks.py): the first launch makes rewards and what chunks hand over, the
second one, `gae_kernel`, advantages and moments. Whitening needs the moments of all rows, and
programs of one launch cannot wait for each other: it is a launch more (`_triton_whiten.py`).

T is never specialised on, so loads, scans and sums have one layout and one order of operations, and
before whitening a row's bits do not depend on its alignment or its neighbours.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._common.chunks import chunks_of, empty_maps, store_map
from rlhf_fast.kernels._common.launch import on_device_of
from rlhf_fast.kernels._common.moments import block_moments, merge, store_part
from rlhf_fast.kernels._common.scan import SHAPES, first, nearest_values, shape, traces
from rlhf_fast.kernels.gae import _triton as _triton_gae
from rlhf_fast.kernels.kl._triton_estimate import ESTIMATORS, _clamped, _estimate

from . import _triton_group, _triton_whiten
from ._triton_group import group_advantages
from ._triton_whiten import whiten

__all__ = ["AOT_SIGNATURES", "group_advantages", "ppo_advantages", "shaped_rewards", "whiten"]


@triton.jit
def _reward(a, b, live, kl_coef, clamp_in, clamp_out, ESTIMATOR: tl.constexpr):
    """(penalty, kl); a coefficient of 0 ignores an infinite kl."""
    d = tl.where(a == b, 0.0, a - b)
    kl, _ = _estimate(_clamped(d, clamp_in), ESTIMATOR)
    kl = tl.where(live, _clamped(kl, clamp_out), 0.0)
    return tl.where(live & (kl_coef != 0.0), kl * -kl_coef, 0.0), kl


@triton.jit
def _last_of_row(mask_ptr, begin, start, end, T, BLOCK_T: tl.constexpr):
    """The row's last token that counts, if it is in the chunk from `start` to `end`, else -1."""
    if mask_ptr is None:
        return tl.where(end == T, T - 1, -1)
    t = start + tl.arange(0, BLOCK_T)
    live = tl.load(mask_ptr + begin + t, mask=t < end, other=0) != 0
    last = tl.max(tl.where(live, t, -1), axis=0)
    WINDOW: tl.constexpr = 2 * BLOCK_T
    while (last >= 0) & (end < T):  # nothing behind the chunk must count
        later = end + tl.arange(0, WINDOW)
        counts = tl.load(mask_ptr + begin + later, mask=later < T, other=0) != 0
        last = tl.where(tl.max(counts.to(tl.int32), axis=0) != 0, -1, last)
        end += WINDOW
    return last


@triton.jit(do_not_specialize=["T", "rows", "chunks"])
def _advantages_kernel(
    scores_ptr, logprob_ptr, ref_logprob_ptr, values_ptr, mask_ptr, at_ptr, rewards_ptr, kl_ptr,
    advantages_ptr, returns_ptr, maps_ptr, parts_ptr, rows, T, chunks, kl_coef, clamp_in, clamp_out,
    gamma, decay, ESTIMATOR: tl.constexpr, CARRY: tl.constexpr, SPLIT: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
):  # fmt: skip
    """Without values_ptr the rewards and kl alone; with parts_ptr [4, rows] the moments too.

    With SPLIT a chunk of a row, and in place of advantages what it hands over, to maps_ptr.
    """
    BLOCK_T: tl.constexpr = 2**LOG2_BLOCK
    row = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    start, end = 0, T
    if SPLIT:
        start = row % chunks * BLOCK_T
        end = tl.minimum(start + BLOCK_T, T)
        row = row // chunks
        blocks = 1
    begin = row.to(tl.int64) * T
    score = tl.load(scores_ptr + row)
    place = -1  # of the score; found in the first block with a token that counts
    if at_ptr is not None:
        place = tl.load(at_ptr + row)
    elif SPLIT:
        place = _last_of_row(mask_ptr, begin, start, end, T, BLOCK_T)
    lane = tl.arange(0, BLOCK_T)
    next_value, trace = 0.0, 0.0
    count, mean, rest, squares = 0.0, 0.0, 0.0, 0.0
    for step in range(blocks):
        t = start + (blocks - 1 - step) * BLOCK_T + lane
        inside = t < end
        live = inside
        if mask_ptr is not None:
            live = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
        a = tl.load(logprob_ptr + begin + t, mask=live, other=0.0)
        b = tl.load(ref_logprob_ptr + begin + t, mask=live, other=0.0)
        reward, kl = _reward(a, b, live, kl_coef, clamp_in, clamp_out, ESTIMATOR)
        if at_ptr is None and not SPLIT:
            place = tl.where(place >= 0, place, tl.max(tl.where(live, t, -1), axis=0))
        reward += tl.where(live & (t == place), score, 0.0)
        tl.store(kl_ptr + begin + t, kl, mask=inside)
        tl.store(rewards_ptr + begin + t, reward, mask=inside)
        if values_ptr is not None:
            behind = t + 1 < end
            if mask_ptr is not None:
                behind = behind & (tl.load(mask_ptr + begin + (t + 1), mask=behind, other=0) != 0)
            value = tl.load(values_ptr + begin + t, mask=live, other=0.0)
            following = tl.load(values_ptr + begin + (t + 1), mask=behind, other=0.0)
            seen = value  # from the left
            if CARRY and mask_ptr is not None:
                following = nearest_values(behind, following, next_value)
                next_value = first(following, lane)
                seen = tl.where(live, value, following)
            delta = reward + gamma * following - value
            walked = live if CARRY else inside
            never = tl.zeros([BLOCK_T], tl.int1)  # a trace ends with its row alone
            advantage = traces(delta, never, walked, decay, trace)
            trace = first(advantage, lane)
            if SPLIT:
                store_map(maps_ptr, walked, never, seen, trace, trace, lane)
            else:
                returns = tl.where(live, advantage + value, 0.0)
                advantage = tl.where(live, advantage, 0.0)
                tl.store(advantages_ptr + begin + t, advantage, mask=inside)
                tl.store(returns_ptr + begin + t, returns, mask=inside)
                if parts_ptr is not None:
                    new = block_moments(advantage, live, LOG2_BLOCK)
                    count, mean, rest, squares = merge(
                        count, mean, rest, squares, new[0], new[1], new[2], new[3]
                    )
    if parts_ptr is not None:
        store_part(parts_ptr, rows, row, count, mean, rest, squares)


_POINTERS = dict.fromkeys(
    (
        "scores_ptr", "logprob_ptr", "ref_logprob_ptr", "values_ptr", "rewards_ptr", "kl_ptr",
        "advantages_ptr", "returns_ptr", "maps_ptr", "parts_ptr",
    ),
    "*fp32:16",
) | {"mask_ptr": "*i1:16", "at_ptr": "*i64:16"}  # fmt: skip
_OF_WHOLE_ROWS = ("advantages_ptr", "returns_ptr", "parts_ptr")


def _aot(log2_block, warps, *, without=("at_ptr",), estimator=0, carry=True, split=False):
    """One entry of AOT_SIGNATURES; arguments that are left out are None."""
    without += _OF_WHOLE_ROWS if split else ("maps_ptr",)
    scalars = dict.fromkeys(("kl_coef", "clamp_in", "clamp_out", "gamma", "decay"), "fp32")
    sizes = {"rows": "i32", "T": "i32", "chunks": "i32"}
    pointers = {name: kind for name, kind in _POINTERS.items() if name not in without}
    constants = {"ESTIMATOR": estimator, "CARRY": carry, "SPLIT": split, "LOG2_BLOCK": log2_block}
    return _advantages_kernel, pointers | scalars | sizes, constants, warps


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    *(_aot(block, warps) for _, block, warps in SHAPES),
    _aot(*SHAPES[-1][1:], without=(), estimator=3, carry=False),
    _aot(*SHAPES[-1][1:], without=("mask_ptr", "at_ptr")),
    _aot(*SHAPES[-1][1:], without=("at_ptr", "values_ptr", *_OF_WHOLE_ROWS)),
    _aot(*SHAPES[-1][1:], split=True),
    _aot(*SHAPES[-1][1:], without=(), estimator=3, carry=False, split=True),
    _aot(*SHAPES[-1][1:], without=("at_ptr", "values_ptr", "maps_ptr"), split=True),
    *_triton_whiten.AOT_SIGNATURES,
    *_triton_group.AOT_SIGNATURES,
]


def _launch(inputs, penalty, gae, outputs, maps=None, parts=None) -> None:
    """`inputs` are (scores, logprob, ref_logprob, values, mask, at), `gae` (gamma, lam, carry)."""
    (kl_coef, estimator, *clamp), (gamma, lam, carry) = penalty, gae
    rows, length = inputs[1].shape
    if rows * length:
        log2_block, warps = shape(length)
        chunks = chunks_of(length)
        bounds = (math.inf if bound is None else bound for bound in clamp)
        with on_device_of(inputs[1]):
            _advantages_kernel[(rows * max(chunks, 1),)](
                *inputs, *outputs, maps, parts, rows, length, chunks, float(kl_coef),
                *map(float, bounds), float(gamma), float(gamma * lam), ESTIMATORS[estimator], carry,
                chunks > 0, log2_block, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip


def shaped_rewards(
    scores: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    at: torch.Tensor | None,
    kl_coef: float,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards, kl): -kl_coef kl, plus the score at its place; a coefficient of 0 ignores kl."""
    rewards, kl = torch.empty_like(logprob), torch.empty_like(logprob)
    _launch(
        (scores, logprob, ref_logprob, None, mask, at), (kl_coef, estimator, clamp_in, clamp_out),
        (1.0, 1.0, True), (rewards, kl, None, None),
    )  # fmt: skip
    return rewards, kl


def ppo_advantages(
    scores: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    at: torch.Tensor | None,
    kl_coef: float,
    estimator: str,
    clamp_in: float | None,
    clamp_out: float | None,
    gamma: float,
    lam: float,
    carry: bool,
    whitened: bool,
    unbiased: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(advantages, returns, rewards, kl), each [B, T]."""
    rewards, kl, advantages, returns = (torch.empty_like(logprob) for _ in range(4))
    rows, length = logprob.shape
    chunks = chunks_of(length)
    parts = logprob.new_empty(4, rows * max(chunks, 1)) if whitened else None
    inputs = (scores, logprob, ref_logprob, values, mask, at)
    penalty, of_gae = (kl_coef, estimator, clamp_in, clamp_out), (gamma, lam, carry)
    if not chunks:
        _launch(inputs, penalty, of_gae, (rewards, kl, advantages, returns), parts=parts)
    elif rows:
        maps = empty_maps(logprob)
        _launch(inputs, penalty, of_gae, (rewards, kl, None, None), maps)
        _triton_gae.launch(
            rewards, values, None, mask, None, None, advantages, returns, maps, parts,
            (0.0, gamma, gamma * lam, gamma * lam), carry, False,
        )  # fmt: skip
    if whitened and advantages.numel():
        _triton_whiten.scale(advantages, mask, advantages, parts, True, unbiased, eps)
    return advantages, returns, rewards, kl
