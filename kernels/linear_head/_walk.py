"""The backward pass of `linear_*`, once the statistics of each row are known.

The vocabulary is walked in slices, as the reference does, and each slice with blocks of rows: a
slice of the head has its whole gradient when it is left, and no accumulator of the head's size is
needed. Tiles of logits are computed again, but for the rows whose logits the forward pass kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _logits, _tiles
from ._gradients import Gradients
from ._tiles import Rows

# On the CPU a tile beside the kept chunk has a quarter of its bytes.
_TILE = {"cpu": 4, "cuda": 1}
# On the CPU a call with 512 rows is 8 % faster by 8192 columns than by 2048.
_WIDEST = 4


@dataclass
class Kept:
    """The logits of the last rows of a call, as its forward pass left them."""

    logits: tuple[torch.Tensor, ...]  # [kept, V] of each head
    first: int  # the row of the backward pass from which on they are here
    chosen: torch.Tensor | None  # at which place each of those rows is, None for all in order

    @classmethod
    def of(cls, logits, rows: Rows, live: torch.Tensor, wanted: torch.Tensor) -> Kept:
        """`live` are the tokens that count, of which the backward pass takes `wanted` alone."""
        kept = logits[0].shape[0]
        if kept == 0 or rows.hidden.is_cuda:  # where every row stays
            return cls(logits, rows.hidden.shape[0] - kept, None)
        wanted = wanted[live]
        places = wanted.nonzero().squeeze(-1) - (len(wanted) - kept)
        first = int((places < 0).sum())
        chosen = None if len(places) - first == kept else places[first:]
        return cls(logits, first, chosen)

    def tile(self, head: int, block: slice, columns: slice) -> torch.Tensor:
        """The logits of a block that lies behind `first`."""
        z = self.logits[head][:, columns]
        part = slice(block.start - self.first, block.stop - self.first)
        return z[part] if self.chosen is None else z.index_select(0, self.chosen[part])


def _tile_sizes(policy: _logits.Logits) -> int:
    """The columns of a slice; sets the rows of a block."""
    rows = policy.rows
    device = rows.hidden.device.type
    tile = _logits.chunk_bytes(device) // (4 * _TILE.get(device, 1))
    if not rows.invariant:
        # Long sides make few passes over the gradients of hidden states and head.
        rows.block = max(min(rows.count, math.isqrt(tile)), _logits.MIN_ROWS)
    width = max(tile // rows.block, _logits.MIN_ROWS)
    if rows.hidden.is_cuda:
        return width
    # Half precision is upcast slice by slice.
    upcast = policy.head.weight.dtype != rows.hidden.dtype
    return min(width, _tiles.SLICE if upcast else _WIDEST * _tiles.SLICE)


def backward_walk(
    heads: list[_logits.Logits],
    kept: Kept,
    needs: list[bool],
    slicewise: bool,
    gradient: Callable[[list[torch.Tensor], slice, slice, torch.Tensor], object],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weight, bias, A and B of the first head, None where not needed.

    `gradient(tiles of logits, block, columns, out)` writes that of the first head's to `out`, which
    may be the tile itself.
    """
    policy, rows = heads[0], heads[0].rows
    width = _tile_sizes(policy)
    for other in heads[1:]:
        other.rows.block = rows.block
    gradients = Gradients(policy.head, rows, policy.down, needs, slicewise)
    # In the arithmetic's dtype a tile's gradient takes the place of the tile.
    name = "logits" if policy.gradient_dtype == rows.hidden.dtype else "gradient"
    for columns in policy.head.slices(width):
        gradients.enter(columns)
        operands = [head.operands(columns) for head in heads]
        for block in rows.blocks():
            out = rows.scratch(name, block, columns, policy.gradient_dtype)
            cut = min(max(kept.first, block.start), block.stop)
            if block.start < cut:
                part = slice(block.start, cut)
                tiles = [h.tile(part, columns, *o) for h, o in zip(heads, operands, strict=True)]
                gradient(tiles, part, columns, out[: cut - block.start])
            if cut < block.stop:
                part = slice(cut, block.stop)
                tiles = [kept.tile(i, part, columns) for i in range(len(heads))]
                gradient(tiles, part, columns, out[cut - block.start :])
            gradients.add(out, block, *operands[0])
        gradients.leave(columns)
    return gradients.finish(reduce)
