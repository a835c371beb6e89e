"""Rows that several Triton programs share, a chunk each, and what their two launches hand over.

One program per row would leave most of a GPU idle where rows are few and long. A chunk turns what
stands behind it, the value x and the trace A, into the trace at its first token:

    A' = offset + reach (gamma x + decay A),   reach = decay^(n - 1)

for the n tokens that the recursion walks through; reach is 0 where one of them ends the trace, and
`offset` is A' if nothing stands behind. The first launch makes n, `offset` and the value that the
chunk to the left sees. In the second one every program folds the chunks behind its own, which is
one more scan, and walks its chunk from there. A chunk is a block of tokens.

The price is a second reading of rewards, values and mask: a batch of so many long rows that each
program had one of them gets nothing for it, but a row's bits must not depend on how many there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlhf_fast._dispatch import interpreting

from .scan import first, nearest_values, passed_on, shape

# Rows beyond so many tokens are split, as those of the CUDA kernels: by the length of the batch's
# rows alone, so that a row has the same bits in every batch.
SPLIT_FROM = 16384
# log2 of the chunks that are folded at once: one per thread of a program of 8 warps.
LOG2_CHUNKS, INTERPRETER_LOG2_CHUNKS = 8, 1


def log2_chunks() -> int:
    return INTERPRETER_LOG2_CHUNKS if interpreting() else LOG2_CHUNKS


def chunks_of(length: int) -> int:
    """How many programs share a row of `length` tokens; 0 where one walks it alone."""
    return triton.cdiv(length, 1 << shape(length)[0]) if length > SPLIT_FROM else 0


def empty_maps(like: torch.Tensor) -> torch.Tensor | None:
    """Room for what the chunks of rows `like` [B, T] hand over; None where none is split.

    It is n, the value that is seen from the left, `offset` and that of a second lambda.
    """
    rows, length = like.shape
    chunks = chunks_of(length)
    return like.new_empty(4, rows * chunks) if chunks else None


@triton.jit
def store_map(maps_ptr, walked, ended, value, trace, trace_returns, lane):
    """Called by the program of a chunk, whose traces start from 0; n is negative where one ended.

    `value` of the first lane is what the chunk to the left sees.
    """
    place = maps_ptr + tl.program_id(0)
    chunks = tl.num_programs(0)
    count = tl.sum(walked.to(tl.int32), axis=0)
    some = tl.max((walked & ended).to(tl.int32), axis=0)
    tl.store(place, tl.where(some != 0, -count, count).to(tl.float32))
    tl.store(place + chunks, first(value, lane))
    tl.store(place + 2 * chunks, trace)
    tl.store(place + 3 * chunks, trace_returns)


@triton.jit
def _power(base, exponent, BITS: tl.constexpr):
    """base^exponent; squares in float32 would double their rounding with every bit."""
    power = tl.full(exponent.shape, 1.0, tl.float64)
    square = tl.full(exponent.shape, base, tl.float64)
    for bit in tl.static_range(BITS):
        power = tl.where((exponent >> bit) & 1 != 0, power * square, power)
        square = square * square
    return power.to(tl.float32)


@triton.jit
def _folded(walked, offset, following, gamma, decay, trace, lane, LOG2_BLOCK: tl.constexpr):
    """The trace that leaves the first of some chunks when `trace` enters the last one."""
    reach = tl.where(walked > 0.0, _power(decay, walked.to(tl.int32) - 1, LOG2_BLOCK), 0.0)
    offset = tl.where(reach == 0.0, offset, tl.fma(reach, gamma * following, offset))
    return first(passed_on(tl.where(walked == 0.0, 1.0, reach * decay), offset, trace), lane)


@triton.jit
def behind_chunk(
    maps_ptr, row, chunk, chunks, bootstrap, gamma, decay, decay_returns,
    TWO_LAMBDAS: tl.constexpr, LOG2_BLOCK: tl.constexpr, LOG2_CHUNKS: tl.constexpr,
):  # fmt: skip
    """(value, trace, trace of the returns) behind a chunk; `bootstrap` stands behind the row."""
    LANES: tl.constexpr = 2**LOG2_CHUNKS
    lane = tl.arange(0, LANES)
    stride = tl.num_programs(0)
    row_ptr = maps_ptr + row * chunks
    groups = tl.cdiv(chunks, LANES)
    value, ahead, trace, trace_returns = bootstrap, bootstrap, 0.0, 0.0
    for step in range(groups - chunk // LANES):
        k = (groups - 1 - step) * LANES + lane
        # The value behind chunk k is that of the nearest one to its right with a token.
        behind = (k >= chunk) & (k + 1 < chunks)
        found = tl.load(row_ptr + k + 1, mask=behind, other=0.0) != 0.0
        following = tl.load(row_ptr + stride + k + 1, mask=found, other=0.0)
        following = tl.where(k + 1 == chunks, bootstrap, following)
        following = nearest_values(found | (k + 1 == chunks), following, ahead)
        ahead = first(following, lane)
        value = first(following, k - chunk)
        inside = (k > chunk) & (k < chunks)  # the others pass on what they get
        walked = tl.load(row_ptr + k, mask=inside, other=0.0)
        offset = tl.load(row_ptr + 2 * stride + k, mask=inside, other=0.0)
        trace = _folded(walked, offset, following, gamma, decay, trace, lane, LOG2_BLOCK)
        if TWO_LAMBDAS:
            offset = tl.load(row_ptr + 3 * stride + k, mask=inside, other=0.0)
            trace_returns = _folded(
                walked, offset, following, gamma, decay_returns, trace_returns, lane, LOG2_BLOCK
            )
    return value, trace, trace_returns
