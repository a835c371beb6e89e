"""Ranking loss in Triton, in two launches.

A program of the first one has a prompt: it walks through the completions, each of which meets all
others at once. A lane has one completion and sums over the ones that it meets in their order, so
that no sum depends on a layout; only the prompt's loss crosses lanes. The weight of a prompt needs
the number of prompts with a pair, and programs of one launch cannot wait for each other: in the
second launch each counts them for itself and scales its share of the gradient.

K is never specialised on: a prompt's bits depend on nothing else in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting
from rlhf_fast.kernels._common.device_math import LOG2_E, accurate_exp2, tree_sum
from rlhf_fast.kernels._common.launch import on_device_of

# (log2 of the lanes, warps) for at most 32 completions and for more. From reasoning alone: not
# tuned on a GPU.
NARROW, WIDE = (5, 1), (7, 4)
# Gradients that a program scales, prompts that it counts at a time, programs, warps.
LOG2_BLOCK, PROGRAMS, WARPS = 10, 512, 4


@triton.jit
def _pair(x):
    """(-log sigmoid(x), sigmoid(-x)), as in csrc/ranking_loss/ranking_loss.h."""
    e = accurate_exp2(tl.abs(x) * -LOG2_E)
    # log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3; the first term left out is 1e-9 of the sum.
    s = tl.div_rn(e, e + 2.0)
    square = s * s
    series = tl.fma(square, 1.0 / 15.0, 1.0 / 13.0)
    series = tl.fma(square, series, 1.0 / 11.0)
    series = tl.fma(square, series, 1.0 / 9.0)
    series = tl.fma(square, series, 1.0 / 7.0)
    series = tl.fma(square, series, 1.0 / 5.0)
    series = tl.fma(square, series, 1.0 / 3.0)
    series = tl.fma(square, series, 1.0)
    tail = s * 2.0 * series
    return tl.where(x < 0.0, tail - x, tail), tl.div_rn(tl.where(x < 0.0, 1.0, e), 1.0 + e)


@triton.jit(do_not_specialize=["K"])
def _pairs_kernel(
    scores_ptr, ranks_ptr, mask_ptr, grad_ptr, losses_ptr, pairs_ptr, K, margin,
    LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """The prompt's mean loss, its number of pairs, and its gradient before the division by it."""
    LANES: tl.constexpr = 2**LOG2_LANES
    prompt = tl.program_id(0)
    begin = prompt.to(tl.int64) * K
    pairs = 0
    loss = 0.0
    for block in range(tl.cdiv(K, LANES)):
        i = block * LANES + tl.arange(0, LANES)
        inside = i < K
        there = inside
        if mask_ptr is not None:
            there = inside & (tl.load(mask_ptr + begin + i, mask=inside, other=0) != 0)
        score = tl.load(scores_ptr + begin + i, mask=there, other=0.0)
        rank = tl.load(ranks_ptr + begin + i, mask=there, other=0)
        losses = tl.zeros([LANES], tl.float32)
        slopes = tl.zeros([LANES], tl.float32)
        won = tl.zeros([LANES], tl.int32)
        for j in range(K):
            other_rank = tl.load(ranks_ptr + begin + j)
            wins = there & (rank < other_rank)
            loses = there & (other_rank < rank)
            if mask_ptr is not None:
                met = tl.load(mask_ptr + begin + j) != 0
                wins = wins & met
                loses = loses & met
            gap = score - tl.load(scores_ptr + begin + j)
            loss_of_pair, slope = _pair(tl.where(loses, -gap, gap) - margin)
            losses += tl.where(wins, loss_of_pair, 0.0)
            slopes += tl.where(wins, -slope, tl.where(loses, slope, 0.0))
            won += wins.to(tl.int32)
        tl.store(grad_ptr + begin + i, slopes, mask=inside)
        loss += tree_sum(losses, LOG2_LANES)
        pairs += tl.sum(won, axis=0)
    tl.store(losses_ptr + prompt, tl.div_rn(loss, tl.maximum(pairs, 1).to(tl.float32)))
    tl.store(pairs_ptr + prompt, pairs)


@triton.jit(do_not_specialize=["P", "K", "programs"])
def _mean_kernel(
    grad_ptr, losses_ptr, pairs_ptr, loss_ptr, P, K, programs, LOG2_BLOCK: tl.constexpr
):
    """The mean over the prompts with a pair, and the weight of each one's gradient."""
    BLOCK: tl.constexpr = 2**LOG2_BLOCK
    lane = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], tl.float32)
    some = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.cdiv(P, BLOCK)):
        prompt = block * BLOCK + lane
        losses += tl.load(losses_ptr + prompt, mask=prompt < P, other=0.0)
        some += (tl.load(pairs_ptr + prompt, mask=prompt < P, other=0) > 0).to(tl.int32)
    prompts = tl.maximum(tl.sum(some, axis=0), 1).to(tl.float32)
    program = tl.program_id(0)
    tl.store(loss_ptr, tl.div_rn(tree_sum(losses, LOG2_BLOCK), prompts), mask=program == 0)
    size = P.to(tl.int64) * K
    for step in range(tl.cdiv(tl.cdiv(size, BLOCK) - program, programs)):
        i = (program + step * programs).to(tl.int64) * BLOCK + lane
        pairs = tl.load(pairs_ptr + i // K, mask=i < size, other=0)
        grad = tl.load(grad_ptr + i, mask=i < size, other=0.0)
        weight = tl.div_rn(1.0, tl.maximum(pairs, 1).to(tl.float32) * prompts)
        tl.store(grad_ptr + i, grad * weight, mask=i < size)


def _aot(log2_lanes, warps, ranks="*i64:16"):
    pointers = dict.fromkeys(("scores_ptr", "grad_ptr", "losses_ptr"), "*fp32:16")
    pointers |= {"ranks_ptr": ranks, "mask_ptr": "*i1:16", "pairs_ptr": "*i32:16"}
    types = pointers | {"K": "i32", "margin": "fp32"}
    return _pairs_kernel, types, {"LOG2_LANES": log2_lanes}, warps


# What tests/test_triton_aot.py compiles without a GPU: (kernel, types, constants, warps).
AOT_SIGNATURES = [
    _aot(*NARROW),
    _aot(*WIDE),
    _aot(*WIDE, ranks="*fp64:16"),
    (
        _mean_kernel,
        dict.fromkeys(("grad_ptr", "losses_ptr", "loss_ptr"), "*fp32:16")
        | {"pairs_ptr": "*i32:16"}
        | dict.fromkeys(("P", "K", "programs"), "i32"),
        {"LOG2_BLOCK": LOG2_BLOCK},
        WARPS,
    ),
]


def _comparable(ranks: torch.Tensor) -> torch.Tensor:
    """Ranks of a type that Triton compares; no two of them become equal."""
    if ranks.dtype == torch.bool:
        return ranks.to(torch.uint8)
    return ranks.float() if ranks.is_floating_point() and ranks.itemsize < 4 else ranks


def ranking_loss(
    scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, unit gradient of scores); 0 without any pair."""
    if scores.numel() == 0:
        return scores.new_zeros(()), torch.empty_like(scores)
    P, K = scores.shape
    loss, grad = scores.new_empty(()), torch.empty_like(scores)
    losses, pairs = scores.new_empty(P), torch.empty(P, dtype=torch.int32, device=scores.device)
    log2_lanes, warps = NARROW if K <= 32 else WIDE
    programs = min(triton.cdiv(P * K, 1 << LOG2_BLOCK), 2 if interpreting() else PROGRAMS)
    with on_device_of(scores):
        _pairs_kernel[(P,)](
            scores, _comparable(ranks), mask, grad, losses, pairs, K, float(margin), log2_lanes,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
        _mean_kernel[(programs,)](
            grad, losses, pairs, loss, P, K, programs, LOG2_BLOCK, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return loss, grad
