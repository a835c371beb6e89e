"""Logits of a head as the kernels of the rooms logprob and kl take them, and how many at once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from rlhf_fast.kernels._common.launch import ELSEWHERE

from ._gradients import Gradients
from ._tiles import Head, Rows, finite, split

# On the CPU: 64 MiB are 524 rows of 32000 logits, enough for products at their full rate. On CUDA:
# 512 MiB, 1024 rows of 131072 logits.
_DEFAULT = {"cpu": 2**26, "cuda": 2**29}
# Fewer rows than this make slow products, however large the vocabulary.
MIN_ROWS = 64
# Ids that count are never negative, and those that do not are under the mask.
_NO_INDEX = -1


def chunk_bytes(device: str) -> int:
    """Bytes of float32 logits in a chunk, `RLHF_FAST_CHUNK_BYTES` if it is set."""
    text = os.environ.get("RLHF_FAST_CHUNK_BYTES", "")
    if not text:
        return _DEFAULT.get(device, _DEFAULT["cuda"])
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"RLHF_FAST_CHUNK_BYTES: expected a positive number, got {text!r}")
    return int(text)


def rows_that_fit(device: str, vocabulary: int, heads: int = 1) -> int:
    """Rows of a chunk that has the logits of so many heads."""
    return max(chunk_bytes(device) // (4 * heads * max(vocabulary, 1)), MIN_ROWS)


def chunks(rows: Rows, vocabulary: int, heads: int = 1, kept: int = 0) -> list[slice]:
    """The rows in chunks: as many rows as fit, in chunks of nearly equal size.

    The last `kept` rows, no more than fit, are a chunk of their own.
    """
    if rows.invariant:
        return list(rows.blocks())
    count = rows.count - kept
    number = -(-count // rows_that_fit(rows.hidden.device.type, vocabulary, heads)) or 1
    rows.block = max(-(-count // number), 1)
    return [*split(0, count, rows.block), *split(count, rows.count, max(kept, 1))]


class Logits:
    """A head over the rows of a call: the logits of a chunk and what belongs to each row."""

    def __init__(self, rows: Rows, head: Head, ids: torch.Tensor) -> None:
        """`ids` count from the head's first row; `ELSEWHERE` where a token has none there."""
        self.rows, self.head, self.ids = rows, head, ids
        self.down = head.down(rows)
        self.dtype = rows.operand.dtype
        # The gradient of the logits is born in the dtype in which it is multiplied; the products
        # with LoRA's matrices are float32.
        self.gradient_dtype = self.dtype if self.down is None else rows.hidden.dtype

    def operands(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(slice of the head, slice of scaling * B) as the products take them."""
        up = self.head.up(columns, self.rows.hidden.dtype)
        return self.head.weight[columns].to(self.dtype), up

    def slices(self) -> Iterator[tuple]:
        """(columns, operands) of the whole head.

        On the CPU half-precision slices are upcast one by one; a GPU takes the whole head.
        """
        width = self.head.weight.shape[0] if self.rows.hidden.is_cuda else None
        for columns in self.head.slices(width):
            yield columns, *self.operands(columns)

    def tile(self, block: slice, columns: slice, weight, up) -> torch.Tensor:
        """The logits of a block and slice as those of `chunk`, in memory that is reused."""
        out = self.rows.scratch("logits", block, columns)
        return self.head.product(self.rows, block, columns, weight, self.down, up, out)

    def chunk(self, block: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """The [n, V] logits of a chunk before softcap and temperature.

        They are written to the first rows of `out`, or to memory that is reused.
        """
        whole = slice(0, self.head.weight.shape[0])
        rows = block.stop - block.start
        z = out[:rows] if out is not None else self.rows.scratch("logits", block, whole)
        for columns, weight, up in self.slices():
            self.head.product(self.rows, block, columns, weight, self.down, up, z[:, columns])
        return z

    def tokens(self, block: slice) -> tuple:
        """(mask, temperature, temperatures) of the rows of a chunk."""
        t = self.rows.temperature
        many = isinstance(t, torch.Tensor)
        number, tensor = (1.0, t[block].squeeze(-1)) if many else (t, None)
        return self.rows.live[block], number, tensor

    def options(self, block: slice) -> tuple:
        """The arguments of the log-prob kernels behind the ids."""
        return *self.tokens(block), self.head.softcap, _NO_INDEX

    def ids_among(self, columns: slice, block: slice) -> torch.Tensor:
        """Each row's id counted from the first of some columns; `ELSEWHERE` if not among them."""
        ids = self.ids[block]
        among = (ids >= columns.start) & (ids < columns.stop)
        return torch.where(among, ids - columns.start, ELSEWHERE)

    def chosen(self, z: torch.Tensor, block: slice) -> torch.Tensor:
        """The logit of each row's id behind the softcap, -inf where the id is elsewhere."""
        ids = self.ids[block]
        picked = z.gather(-1, ids.clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        picked = torch.where(ids == ELSEWHERE, -torch.inf, picked)
        cap = self.head.softcap
        if cap is None:
            return picked
        return torch.where(picked == -torch.inf, picked, cap * torch.tanh(picked / cap))

    def carry(
        self,
        gradients: Gradients,
        dz: torch.Tensor,
        block: slice,
        kept: torch.Tensor | None = None,
    ) -> None:
        """Carry the gradient of a chunk's logits on to the head and the hidden states.

        `kept` are the rows of the chunk that have one, None for all. They are gathered slice by
        slice: a copy of the whole chunk would double the memory.
        """
        chosen = block if kept is None else kept + block.start
        for columns, weight, up in self.slices():
            part = dz[:, columns] if kept is None else dz[:, columns].index_select(0, kept)
            gradients.enter(columns)
            gradients.add(part, chosen, weight, up)


def passed_on(grad: torch.Tensor, logprob: torch.Tensor) -> torch.Tensor:
    """What of a log-prob's gradient reaches the logits: 0 if it is -inf, NaN if it is NaN.

    A row kernel sees to that by itself where it sees the token's logit.
    """
    grad = torch.where(logprob == -torch.inf, 0.0, grad)
    return torch.where(logprob.isnan(), torch.nan, grad)


def merge_shards(shards: list[list[torch.Tensor]], temperature) -> tuple[torch.Tensor, ...]:
    """(logprob, entropy, row_max, log_sum) from those of disjoint parts of the vocabulary.

    Each of `shards` is [row_max, log_sum, entropy, chosen logit] of a part. With p the mass of the
    parts, the entropy is that of p plus the mean of the parts' own: sum p (entropy - log p).
    """
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.squeeze(-1)
    row_max = torch.stack([shard[0] for shard in shards]).amax(0)
    logs = torch.stack(
        [
            torch.where(top == -torch.inf, -torch.inf, (top - finite(row_max)) / temperature) + log
            for top, log, _, _ in shards
        ]
    )
    log_sum = logs.logsumexp(0)
    log_sum = torch.where(log_sum == -torch.inf, 0.0, log_sum)
    mass = logs - log_sum
    terms = mass.exp() * (torch.stack([shard[2] for shard in shards]) - mass)
    entropy = torch.where(mass == -torch.inf, 0.0, terms).sum(0)
    chosen = torch.stack([shard[3] for shard in shards]).amax(0)
    return (chosen - finite(row_max)) / temperature - log_sum, entropy, row_max, log_sum
