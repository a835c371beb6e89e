"""Which logits can be sampled from: looked at where `sample` runs on the CPU."""

from __future__ import annotations

import math

import torch


def _first(rows: torch.Tensor) -> int:
    return int(rows.nonzero()[0])


def check_logits(logits: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise if a row has NaN, +inf or no token that can be drawn."""
    top = (logits if mask is None else torch.where(mask, logits, -math.inf)).amax(-1)
    for bad, what in ((top.isnan(), "NaN"), (top == math.inf, "+inf")):
        if bad.any():
            raise ValueError(
                f"logits: expected no NaN and no +inf, got {what} in row {_first(bad)}"
            )
    if (bad := top == -math.inf).any():
        raise ValueError(
            "logits: expected a token that can be drawn in each row, got only -inf or forbidden "
            f"ones in row {_first(bad)}"
        )
