"""Whitening in Triton, in two launches: `_triton.py` serves it.

The scale of the first number depends on the last one, and programs of one launch cannot wait for
each other. So the first launch writes the moments of parts; in the second one every program merges
all parts, in the same order, and scales its share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting
from rlhf_fast.kernels._common.launch import on_device_of
from rlhf_fast.kernels._common.moments import block_moments, merge, merged_parts, store_part

from .reference import merge_moments, moments_of_group

# Of a program's turn: 16 numbers per thread. From this reasoning alone: not tuned on a GPU.
LOG2_BLOCK, WARPS = 12, 8
# Programs of a launch at most, each of which takes every so many-th block. It bounds the parts of
# `whiten` and how often they are read again: four programs per multiprocessor of a large GPU.
PROGRAMS = 512
LOG2_LANES = 10  # parts that are merged at a time


@triton.jit(do_not_specialize=["size", "programs"])
def moments_kernel(x_ptr, mask_ptr, parts_ptr, size, programs, LOG2_BLOCK: tl.constexpr):
    """A program's count, mean (two floats) and squared deviations; parts_ptr is [4, programs]."""
    BLOCK: tl.constexpr = 2**LOG2_BLOCK
    program = tl.program_id(0)
    count, mean, rest, squares = 0.0, 0.0, 0.0, 0.0
    for step in range(tl.cdiv(tl.cdiv(size, BLOCK) - program, programs)):
        i = (program + step * programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = i < size
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + i, mask=live, other=0) != 0)
        x = tl.load(x_ptr + i, mask=live, other=0.0)
        new = block_moments(x, live, LOG2_BLOCK)
        count, mean, rest, squares = merge(
            count, mean, rest, squares, new[0], new[1], new[2], new[3]
        )
    store_part(parts_ptr, programs, program, count, mean, rest, squares)


@triton.jit(do_not_specialize=["size", "parts", "programs"])
def whiten_kernel(
    x_ptr, mask_ptr, out_ptr, parts_ptr, size, parts, programs, eps, SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr, LOG2_BLOCK: tl.constexpr, LOG2_LANES: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) / sqrt(variance + eps), or the mean plus it; may be in place."""
    BLOCK: tl.constexpr = 2**LOG2_BLOCK
    count, mean, rest, squares = merged_parts(parts_ptr, parts, LOG2_LANES)
    degrees = count - 1.0 if UNBIASED else count
    variance = tl.div_rn(squares, tl.maximum(degrees, 1.0))
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    # Infinite without spread and eps: every deviation is 0, and stays it.
    scale = tl.where(scale == float("inf"), 0.0, scale)
    some = count > 1.0
    program = tl.program_id(0)
    for step in range(tl.cdiv(tl.cdiv(size, BLOCK) - program, programs)):
        i = (program + step * programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        live = inside
        if mask_ptr is not None:
            live = inside & (tl.load(mask_ptr + i, mask=inside, other=0) != 0)
        x = tl.load(x_ptr + i, mask=live, other=0.0)
        out = tl.where(some, ((x - mean) - rest) * scale, 0.0)
        if not SHIFT_MEAN:
            out = mean + (out + rest)
        tl.store(out_ptr + i, tl.where(live, out, 0.0), mask=inside)


_ARRAYS = {"x_ptr": "*fp32:16", "mask_ptr": "*i1:16", "parts_ptr": "*fp32:16"}
_SIZES = {"size": "i32", "programs": "i32"}
_SCALED = _ARRAYS | {"out_ptr": "*fp32:16", "eps": "fp32", "parts": "i32"} | _SIZES
AOT_SIGNATURES = [
    (moments_kernel, _ARRAYS | _SIZES, {"LOG2_BLOCK": LOG2_BLOCK}, WARPS),
    (
        whiten_kernel,
        _SCALED,
        {
            "SHIFT_MEAN": True, "UNBIASED": True, "LOG2_BLOCK": LOG2_BLOCK,
            "LOG2_LANES": LOG2_LANES,
        },
        WARPS,
    ),
]  # fmt: skip


def _programs(size: int) -> int:
    return min(triton.cdiv(size, 1 << LOG2_BLOCK), 4 if interpreting() else PROGRAMS)


def scale(x, mask, out, parts, shift_mean: bool, unbiased: bool, eps: float) -> None:
    """Whiten `x` into `out` (or itself), with the moments that `parts` [4, parts] have together."""
    programs = _programs(x.numel())
    with on_device_of(x):
        whiten_kernel[(programs,)](
            x, mask, out, parts, x.numel(), parts.shape[1], programs, float(eps), shift_mean,
            unbiased, LOG2_BLOCK, LOG2_LANES, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _parts_of_group(parts: torch.Tensor, group: str) -> torch.Tensor:
    """The moments of all ranks as the one part; they travel in float64, 24 bytes per rank."""
    count, mean, rest, squares = parts.double()
    local = merge_moments(torch.stack((count, mean + rest, squares), 1))
    count, mean, squares = moments_of_group(local, group)
    rounded = mean.to(torch.float32)
    return torch.stack((count, rounded, mean - rounded, squares)).to(torch.float32).unsqueeze(1)


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    group: str,
) -> torch.Tensor:
    """(x - mean) rsqrt(var + eps), plus the mean without `shift_mean`; 0 where masked."""
    out = torch.empty_like(x)
    size = x.numel()
    parts = torch.empty((4, _programs(size)), dtype=torch.float32, device=x.device)
    if size:
        with on_device_of(x):
            moments_kernel[(parts.shape[1],)](
                x, mask, parts, size, parts.shape[1], LOG2_BLOCK, num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
    if group:  # every rank calls, one without a number too
        parts = _parts_of_group(parts, group)
    if size:
        scale(x, mask, out, parts, shift_mean, unbiased, eps)
    return out
