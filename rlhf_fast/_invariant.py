"""The switch that makes the rows of `linear_*` bitwise independent of each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_open: list[bool] = []


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Make each row of the `linear_*` ops bitwise independent of the other rows inside the block.

    A library matrix product picks its algorithm by the number of rows, so that a row's last bits
    depend on how many others stand beside it. Inside this block (or under
    `RLHF_FAST_BATCH_INVARIANT=1`) rows go through products of one fixed shape, padded with zeros:
    a token has the same log-prob, entropy, KL and gradient of its hidden state alone, permuted and
    inside a larger batch. Cost: products of 64 rows instead of up to 2048. The choice is
    process-wide and holds for the backward pass of what was computed inside the block. The
    gradients of `weight`, `bias` and the LoRA matrices are sums over rows and depend on all.

    >>> with rlhf_fast.batch_invariant():
    ...     lp = rlhf_fast.linear_logprob(hidden, weight, ids)
    """
    _open.append(True)
    try:
        yield
    finally:
        _open.pop()


def requested() -> bool:
    """True inside `batch_invariant()`; public functions pass it on to their torch op."""
    return len(_open) > 0


def enabled(invariant: bool) -> bool:
    """Whether an op that was called with `invariant` keeps its rows independent."""
    return invariant or os.environ.get("RLHF_FAST_BATCH_INVARIANT", "0") == "1"
