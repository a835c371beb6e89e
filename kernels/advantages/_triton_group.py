"""Advantages of groups in Triton, in one launch: `_triton.py` serves it.

A program takes a few responses and looks at all B of them, three times, for those of the same
group: B^2 comparisons of numbers in the cache, which at some thousand responses is less than the
launches of a sort. A group's bits must not depend on its order or on who stands between its
members, and float sums would: numbers are added as integers, in units of 2^-40 of the group's
largest deviation, which is exact in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting
from rlhf_fast.kernels._common.launch import on_device_of

GROUP_KINDS = {"grpo": 0, "dr_grpo": 1, "rloo": 2}
# Responses of a program, others that it looks at in one go (32 pairs per thread of 4 warps), warps.
SHAPE = (16, 256, 4)
INTERPRETER_SHAPE = (64, 64, 1)

# 2^23 numbers of at most 2^40 fit into an int64.
_ONE = tl.constexpr(float(2**40))


@triton.jit
def _units(ratio, same):
    """The sum along axis 1 of ratios in [0, 1] in units of 2^-40; NaN and infinities count as 0."""
    kept = same & (tl.abs(ratio) <= 1.0)
    return tl.sum((tl.where(kept, ratio, 0.0) * _ONE).to(tl.int64), axis=1)


@triton.jit
def _others(scores_ptr, ids_ptr, group, first, rows, BLOCK: tl.constexpr):
    """(score, of the same group) of BLOCK responses from `first` on against those of a program."""
    j = first + tl.arange(0, BLOCK)
    inside = j < rows
    score = tl.load(scores_ptr + j, mask=inside, other=0.0)
    same = tl.load(ids_ptr + j, mask=inside, other=0)[None, :] == group[:, None]
    return score[None, :], same & inside[None, :]


@triton.jit(do_not_specialize=["rows"])
def group_kernel(
    scores_ptr, ids_ptr, out_ptr, rows, eps, KIND: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mine = i < rows
    group = tl.load(ids_ptr + i, mask=mine, other=0)
    blocks = tl.cdiv(rows, BLOCK_J)
    count = tl.zeros([BLOCK_I], tl.int32)
    broken = tl.zeros([BLOCK_I], tl.int32)
    top = tl.full([BLOCK_I], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK_I], float("inf"), tl.float32)
    for block in range(blocks):
        score, same = _others(scores_ptr, ids_ptr, group, block * BLOCK_J, rows, BLOCK_J)
        count += tl.sum(same.to(tl.int32), axis=1)
        broken += tl.sum((same & (score != score)).to(tl.int32), axis=1)
        kept = same & (score == score)
        top = tl.maximum(top, tl.max(tl.where(kept, score, float("-inf")), axis=1))
        bottom = tl.minimum(bottom, tl.min(tl.where(kept, score, float("inf")), axis=1))
    n = count.to(tl.float32)
    others = tl.maximum(n - 1.0, 1.0)
    spread = top - bottom
    reach = tl.where(spread > 0.0, spread, 1.0)[:, None]
    total = tl.zeros([BLOCK_I], tl.int64)
    for block in range(blocks):
        score, same = _others(scores_ptr, ids_ptr, group, block * BLOCK_J, rows, BLOCK_J)
        total += _units(tl.div_rn(score - bottom[:, None], reach), same)
    # The mean is bottom + rest: a common offset of the scores costs no digits.
    rest = tl.div_rn((total.to(tl.float32) * (1.0 / _ONE)) * spread, n)
    rest = tl.where((broken > 0) | (spread == float("inf")), float("nan"), rest)
    deviation = (tl.load(scores_ptr + i, mask=mine, other=0.0) - bottom) - rest
    if KIND == 0:
        total = tl.zeros([BLOCK_I], tl.int64)
        for block in range(blocks):
            score, same = _others(scores_ptr, ids_ptr, group, block * BLOCK_J, rows, BLOCK_J)
            ratio = tl.div_rn((score - bottom[:, None]) - rest[:, None], reach)
            total += _units(ratio * ratio, same)
        variance = tl.div_rn(total.to(tl.float32) * (1.0 / _ONE), others)
        out = tl.div_rn(deviation, spread * tl.sqrt_rn(variance) + eps)
    elif KIND == 1:
        out = deviation
    else:
        out = deviation * tl.div_rn(n, others)
    # Equal scores with eps = 0 would give 0 / 0.
    out = tl.where((count > 1) & (deviation != 0.0), out, 0.0)
    tl.store(out_ptr + i, out, mask=mine)


AOT_SIGNATURES = [
    (
        group_kernel,
        {
            "scores_ptr": "*fp32:16", "ids_ptr": "*i64:16", "out_ptr": "*fp32:16", "rows": "i32",
            "eps": "fp32",
        },
        {"KIND": 0, "BLOCK_I": SHAPE[0], "BLOCK_J": SHAPE[1]},
        SHAPE[2],
    )
]  # fmt: skip


def group_advantages(
    scores: torch.Tensor, group_ids: torch.Tensor, kind: str, eps: float
) -> torch.Tensor:
    """Advantages [B]; 0 in a group of one. A NaN or an infinity makes its whole group NaN."""
    out = torch.empty_like(scores)
    if rows := scores.numel():
        block_i, block_j, warps = INTERPRETER_SHAPE if interpreting() else SHAPE
        with on_device_of(scores):
            group_kernel[(triton.cdiv(rows, block_i),)](
                scores, group_ids, out, rows, float(eps), GROUP_KINDS[kind], block_i, block_j,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out
