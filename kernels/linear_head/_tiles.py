"""What every `linear_*` op shares: tiles of logits, their row statistics, their gradients.

The vocabulary is walked in slices and the rows in blocks; the logits of one (block, slice) are the
only ones that exist. A slice of a half-precision head is upcast once per pass, and its gradient is
complete, in float32, when the slice is left: it needs no accumulator of the size of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

# 512 x 2048 float32 logits are 4 MiB: large enough for a matrix product at full rate, small enough
# that its row statistics still find it in the last-level cache.
SLICE = 2048
ROWS = 512
# Rows per product where rows must not depend on each other; see `product`.
INVARIANT_ROWS = 64
_PAD = 64


def _padded(x: torch.Tensor) -> torch.Tensor:
    rows, columns = (-n % _PAD for n in x.shape)
    return torch.nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x


def fits_tensor_cores(x: torch.Tensor) -> bool:
    """Whether products of `x` run in half precision with sums in float32."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def product(
    a: torch.Tensor, b: torch.Tensor, invariant: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """a @ b; with `invariant`, a row of the result depends on that row of `a` and on `b` alone.

    BLAS picks kernels by shape and treats the edge of a matrix differently from its inside: with
    operands of fixed shape whose sizes are multiples of 64 there is no edge. `out` may be used.
    """
    if invariant:
        whole = (_padded(a) @ _padded(b))[: a.shape[0], : b.shape[1]]
        return whole.contiguous() if out is None else out.copy_(whole)
    if a.dtype in (torch.float16, torch.bfloat16):  # `fits_tensor_cores`
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


def split(first: int, last: int, size: int) -> Iterator[slice]:
    """The numbers from `first` to below `last` in slices of `size`."""
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


@dataclass
class Rows:
    """The tokens of one call, in the arithmetic's dtype, padded to whole blocks.

    On the CPU only the tokens that count are kept: prompts and padding cost no matrix product. On
    CUDA their number is not known to the host without a synchronisation, and all rows stay.
    """

    hidden: torch.Tensor  # [rows, H], 0 where masked
    operand: torch.Tensor  # hidden as it enters the products: in half precision on tensor cores
    live: torch.Tensor  # [rows] bool
    temperature: float | torch.Tensor  # a number, or [rows, 1]
    index: torch.Tensor | None  # which rows of the call are kept, None for all
    size: int  # rows of the call
    count: int  # rows that are kept, before padding
    block: int
    invariant: bool
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, hidden, live, temperature, temperatures, invariant, dtype, tensor_cores=False
    ) -> Rows:
        index = None
        size = hidden.shape[0]
        if live.device.type == "cpu" and not live.all():
            index = live.nonzero().squeeze(-1)
            hidden, live = hidden[index], live[index]
            temperatures = temperatures if temperatures is None else temperatures[index]
        count = hidden.shape[0]
        x = hidden if index is not None else torch.where(live.unsqueeze(-1), hidden, 0.0)
        operand = x
        x = x.to(dtype)
        if temperatures is not None:
            temperature = torch.where(live, temperatures, 1.0).to(dtype).unsqueeze(-1)
        extra = -count % INVARIANT_ROWS if invariant else 0
        if extra:
            x = torch.nn.functional.pad(x, (0, 0, 0, extra))
            live = torch.nn.functional.pad(live, (0, extra))
            if temperatures is not None:
                temperature = torch.nn.functional.pad(temperature, (0, 0, 0, extra), value=1.0)
        block = INVARIANT_ROWS if invariant else ROWS
        if invariant or not (tensor_cores and fits_tensor_cores(operand)):
            operand = x
        return cls(x, operand, live, temperature, index, size, count, block, invariant)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """A per-row tensor of the call at the rows that are kept, with zeros behind it."""
        x = x if self.index is None else x[self.index]
        return torch.nn.functional.pad(x, (0, self.hidden.shape[0] - self.count))

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """A per-row result for every row of the call; 0 where a row is not kept or masked."""
        live = self.live[: self.count]
        x = x[: self.count]
        if self.index is not None:
            return x.new_zeros(self.size, *x.shape[1:]).index_copy_(0, self.index, x)
        return torch.where(live if x.ndim == 1 else live.unsqueeze(-1), x, 0.0)

    def blocks(self) -> Iterator[slice]:
        return split(0, self.hidden.shape[0], self.block)

    def temper(self, x: torch.Tensor, block: slice) -> torch.Tensor:
        """`x` over the temperature of its rows, in place."""
        t = self.temperature
        if isinstance(t, torch.Tensor):
            return x.div_(t[block])
        return x if t == 1.0 else x.div_(t)

    def scratch(
        self, name: str, block: slice, columns: slice, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A buffer of a tile's shape, the same memory at each tile; the first is the largest.

        A fresh tile of 4 MiB costs more in page faults than most of what is done to it.
        """
        size = columns.stop - columns.start
        if name not in self.buffers:
            self.buffers[name] = self.hidden.new_empty(self.block * size, dtype=dtype)
        rows = block.stop - block.start
        return self.buffers[name][: rows * size].view(rows, size)

    def new(self, *columns: int) -> torch.Tensor:
        return self.hidden.new_zeros(self.hidden.shape[0], *columns)


@dataclass
class Head:
    """A language-model head: logit_scale * x (W + scaling B A)^T + bias, then the softcap."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    lora_a: torch.Tensor | None = None  # [r, H]
    lora_b: torch.Tensor | None = None  # [V, r]
    scaling: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def slices(self, width: int | None = None) -> Iterator[slice]:
        """The vocabulary in slices of `width`, SLICE unless told."""
        return split(0, self.weight.shape[0], width or SLICE)

    def down(self, rows: Rows) -> torch.Tensor | None:
        """x A^T [N, r], block by block so that rows stay independent."""
        if self.lora_a is None:
            return None
        a = self.lora_a.to(rows.hidden.dtype).t()
        parts = [product(rows.hidden[block], a, rows.invariant) for block in rows.blocks()]
        return torch.cat(parts) if parts else rows.new(a.shape[1])

    def up(self, columns: slice, dtype: torch.dtype) -> torch.Tensor | None:
        """This slice of scaling * B, in the arithmetic's dtype."""
        return None if self.lora_b is None else self.scaling * self.lora_b[columns].to(dtype)

    def product(
        self,
        rows: Rows,
        block: slice,
        columns: slice,
        weight: torch.Tensor,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The logits of one block and slice before softcap and temperature, written to `out`."""
        z = product(rows.operand[block], weight.t(), rows.invariant, out)
        if down is not None:
            z += product(down[block], up.t(), rows.invariant)
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if self.bias is not None:
            z += self.bias[columns].to(z.dtype)
        return z

    def tile(
        self,
        rows: Rows,
        block: slice,
        columns: slice,
        weight: torch.Tensor,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        buffer: str = "logits",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tempered logits u, slope of the softcap or None) of one block and slice."""
        out = rows.scratch(buffer, block, columns)
        z = self.product(rows, block, columns, weight, down, up, out)
        slope = None
        if self.softcap is not None:
            tanh = torch.tanh(z / self.softcap)
            z = torch.where(z == -torch.inf, z, self.softcap * tanh)
            slope = tanh.square_().neg_().add_(1)
        return rows.temper(z, block), slope


def finite(row_max: torch.Tensor) -> torch.Tensor:
    """`row_max` with 0 for rows that are all -inf, so that -inf - max stays -inf."""
    return torch.where(row_max == -torch.inf, 0.0, row_max)


def statistics(u: torch.Tensor, buffer: torch.Tensor | None) -> list[torch.Tensor]:
    """[m, s, w] of each row of a tile: max u, sum e, sum e (u - m), with e = exp(u - m).

    Overwrites `u` and `buffer`; without a buffer w, which only the entropy needs, is 0.
    """
    row_max = u.amax(-1)
    u.sub_(finite(row_max).unsqueeze(-1))
    if buffer is None:
        return [row_max, u.exp_().sum(-1), torch.zeros_like(row_max)]
    e = torch.exp(u, out=buffer)
    # Below -1e4 e is exactly 0, in float64 too: 0 times a finite number instead of -inf.
    return [row_max, e.sum(-1), e.mul_(u.clamp_(min=-1e4)).sum(-1)]


def merge(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    """[m, s, w] of two disjoint parts of a vocabulary together.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    row_max = torch.maximum(a[0], b[0])
    total, weighted = 0.0, 0.0
    for part_max, part_sum, part_weighted in (a[:3], b[:3]):
        # A part without any possible token has sum 0 and moves nothing.
        down = torch.where(part_max == -torch.inf, 0.0, part_max - finite(row_max))
        factor = down.exp()
        moved = torch.where(part_sum == 0, 0.0, part_weighted + part_sum * down)
        total = total + factor * part_sum
        weighted = weighted + torch.where(factor == 0, 0.0, factor * moved)
    return [row_max, total, weighted]


def pick(u: torch.Tensor, ids: torch.Tensor, columns: slice, so_far: torch.Tensor) -> torch.Tensor:
    """The logit of each row's id where the id lies in this slice, else `so_far`."""
    owned = (ids >= columns.start) & (ids < columns.stop)
    index = torch.where(owned, ids - columns.start, 0).to(torch.int64)
    return torch.where(owned, u.gather(-1, index.unsqueeze(-1)).squeeze(-1), so_far)
