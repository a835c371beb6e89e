"""The sweeps of `linear_*` for backends with row kernels of their own.

Rows are taken in chunks. One library product gives a chunk's logits over the whole vocabulary; the
row kernels of the rooms logprob and kl read them once, and in a backward pass write the gradient
over them; library products carry it on. A chunk has `chunk_bytes()` of logits, the only ones that
exist. The gradient of the head is summed over the chunks in float32 and rounded once: besides the
chunk a backward pass needs 4 V H bytes for it.

A vocabulary that is spread over a `group` is walked by the reference's sweeps: a row kernel reads a
row together with its id, and only one rank has that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from rlhf_fast import _invariant
from rlhf_fast.kernels.logprob.reference import live_tokens

from . import reference_logprob as reference
from ._gradients import Gradients
from ._tiles import Head, Rows, full_precision
from .reference_kl import kl_setup
from .reference_ppo import Sweeps, policy_loss_of_head

# On the CPU: 64 MiB are 524 rows of 32000 logits, enough for products at their full rate.
# On CUDA: 1 GiB, 2048 rows of 131072 logits, because each chunk moves the gradient of the head.
_DEFAULT = {"cpu": 2**26, "cuda": 2**30}
# Fewer rows than this make slow products, however large the vocabulary.
MIN_ROWS = 64
# Gathering a logit's gradient takes 0.46 ns, its two products with 512 columns 4.9 ns: rows are
# left out where they are more than an eighth.
_WORTH_GATHERING = 7 / 8
# Ids that count are never negative, and those that do not are under the mask.
_NO_INDEX = -1
# Where `group` stands among the arguments of the log-prob ops.
_GROUP = 13


def chunk_bytes(device: str) -> int:
    """Bytes of float32 logits in a chunk, `RLHF_FAST_CHUNK_BYTES` if it is set."""
    text = os.environ.get("RLHF_FAST_CHUNK_BYTES", "")
    if not text:
        return _DEFAULT.get(device, _DEFAULT["cuda"])
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"RLHF_FAST_CHUNK_BYTES: expected a positive number, got {text!r}")
    return int(text)


def _divide(rows: Rows, vocabulary: int, heads: int = 1) -> None:
    """Set the rows of a chunk: as many as fit, in chunks of nearly equal size."""
    if rows.invariant:
        return
    fit = chunk_bytes(rows.hidden.device.type) // (4 * heads * vocabulary)
    chunks = -(-rows.count // max(fit, MIN_ROWS)) or 1
    rows.block = max(-(-rows.count // chunks), 1)


class _Logits:
    """A head over the rows of a call: the logits of a chunk and what belongs to each row."""

    def __init__(self, rows: Rows, head: Head, ids: torch.Tensor) -> None:
        self.rows, self.head, self.ids = rows, head, ids
        self.down = head.down(rows)
        self.dtype = rows.operand.dtype
        # On the CPU half-precision slices are upcast one by one; a GPU takes the whole head.
        self.width = head.weight.shape[0] if rows.hidden.is_cuda else None

    def slices(self) -> Iterator[tuple]:
        """(columns, slice of the head, slice of scaling * B) as the products take them."""
        for columns in self.head.slices(self.width):
            up = self.head.up(columns, self.rows.hidden.dtype)
            yield columns, self.head.weight[columns].to(self.dtype), up

    def chunk(self, block: slice) -> torch.Tensor:
        """The [n, V] logits of a chunk before softcap and temperature, in memory that is reused."""
        z = self.rows.scratch("logits", block, slice(0, self.head.weight.shape[0]))
        for columns, weight, up in self.slices():
            self.head.product(self.rows, block, columns, weight, self.down, up, z[:, columns])
        return z

    def tokens(self, block: slice) -> tuple:
        """(ids, mask, temperature, temperatures) of the rows of a chunk."""
        t = self.rows.temperature
        many = isinstance(t, torch.Tensor)
        number, tensor = (1.0, t[block].squeeze(-1)) if many else (t, None)
        return self.ids[block], self.rows.live[block], number, tensor

    def options(self, block: slice) -> tuple:
        """The arguments of the log-prob kernels behind the logits."""
        return *self.tokens(block), self.head.softcap, _NO_INDEX

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


def _setup(
    hidden, weight, ids, bias, lora_a, lora_b, mask, temperature, temperatures, softcap,
    logit_scale, scaling, ignore_index, invariant, wanted=None,
) -> _Logits:  # fmt: skip
    live = live_tokens(ids, mask, ignore_index)
    local = torch.where(live, ids, 0).to(torch.int64)
    if wanted is not None:
        live = live & wanted
    rows = Rows.of(
        hidden, live, temperature, temperatures, _invariant.enabled(invariant), torch.float32, True
    )
    _divide(rows, weight.shape[0])
    head = Head(weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
    return _Logits(rows, head, rows.pad(local))


def _store(targets: list[torch.Tensor], block: slice, values: tuple) -> None:
    for target, value in zip(targets, values, strict=True):
        target[block] = value


def _rounded(parts: list, sources: tuple, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients in the dtype of what they belong to; an empty tensor where not needed."""
    return tuple(
        hidden.new_empty(0) if x is None else x.to(source.dtype).contiguous()
        for x, source in zip(parts, sources, strict=True)
    )


class LinearHead:
    """The torch ops of this room on the row kernels of two modules.

    `logprob` and `kl` are the modules of one backend in the rooms of that name.
    """

    def __init__(self, logprob: ModuleType, kl: ModuleType) -> None:
        self.logprob, self.kl = logprob, kl
        self.sweeps = Sweeps(
            self.linear_logprob, self.linear_logprob_entropy, self._backward, self._one_sweep, True
        )

    def _forward(self, kernel: Callable[..., tuple], count: int, arguments: tuple) -> tuple:
        """The `count` results of a log-prob kernel for every row."""
        *arguments, _, invariant = arguments
        logits = _setup(*arguments, invariant)
        out = [logits.rows.new() for _ in range(count)]
        for block in logits.rows.blocks():
            _store(out, block, kernel(logits.chunk(block), *logits.options(block)))
        return tuple(logits.rows.whole(x) for x in out)

    @full_precision
    def linear_logprob(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(logprob, row_max, log_sum), each [N]; row_max is the one before the temperature."""
        if arguments[_GROUP]:
            return reference.linear_logprob(*arguments)
        return self._forward(self.logprob.logprob, 3, arguments)

    @full_precision
    def linear_logprob_entropy(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(logprob, entropy, row_max, log_sum), each [N]."""
        if arguments[_GROUP]:
            return reference.linear_logprob_entropy(*arguments)
        return self._forward(self.logprob.logprob_entropy, 4, arguments)

    def _backward(self, grad_logprob, grad_entropy, *others) -> list[torch.Tensor | None]:
        """Gradients of hidden, weight, bias, A and B in float32, None where not needed."""
        *arguments, group, invariant, _, row_max, log_sum, entropy, needs, _ = others
        if group:
            return reference.backward_sweep(grad_logprob, grad_entropy, *others)
        # A token whose upstream gradient is 0 (no advantage, clipped) takes part in nothing below.
        wanted = grad_logprob != 0
        if grad_entropy is not None:
            wanted = wanted | (grad_entropy != 0)
        logits = _setup(*arguments, invariant, wanted)
        rows = logits.rows
        vectors = [
            None if x is None else rows.pad(x)
            for x in (grad_logprob, grad_entropy, row_max, log_sum, entropy)
        ]
        gradients = Gradients(logits.head, rows, logits.down, needs, slicewise=False)
        for block in rows.blocks():
            g, h, *saved = (None if x is None else x[block] for x in vectors)
            z = logits.chunk(block)
            self.logprob.logprob_backward(g, h, z, *logits.options(block), *saved, out=z)
            logits.carry(gradients, z, block)
        return gradients.finish(lambda x: x)

    @full_precision
    def linear_logprob_backward(self, *arguments) -> tuple[torch.Tensor, ...]:
        """Gradients of hidden, weight, bias, A and B; an empty tensor where not needed."""
        hidden, weight, _, bias, lora_a, lora_b = arguments[2:8]
        parts = self._backward(*arguments, False)
        return _rounded(parts, (hidden, weight, bias, lora_a, lora_b), hidden)

    def _one_sweep(self, rows: Rows, head: Head, local, needs, with_entropy, token_gradient):
        """(logprob [N], entropy [N], gradients of the head), each chunk's logits computed once.

        On the CPU, rows whose gradient turns out to be 0 (clipped, or without an advantage) take
        no part in the products of the gradient where they are more than an eighth.
        """
        _divide(rows, head.weight.shape[0])
        logits = _Logits(rows, head, local.clamp(min=0))
        gradients = Gradients(head, rows, logits.down, needs, slicewise=False)
        logprob, entropy = rows.new(), rows.new()
        for block in rows.blocks():
            z = logits.chunk(block)
            if with_entropy:
                lp, entropy[block], *saved = self.logprob.logprob_entropy(z, *logits.options(block))
                saved.append(entropy[block])
            else:
                lp, *saved = self.logprob.logprob(z, *logits.options(block))
                saved.append(None)
            logprob[block] = lp
            g, h = token_gradient(lp, block)
            self.logprob.logprob_backward(g, h, z, *logits.options(block), *saved, out=z)
            kept = None
            # With an entropy term every token that counts has a gradient.
            if h is None and not rows.invariant and g.device.type == "cpu" and not g.all():
                kept = g.nonzero().squeeze(-1)
                if len(kept) > _WORTH_GATHERING * len(g):
                    kept = None
            logits.carry(gradients, z, block, kept)
        return rows.whole(logprob), rows.whole(entropy), gradients.finish(lambda x: x)

    @full_precision
    def linear_ppo_loss(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(loss, stats, unit gradients of hidden, weight, bias, A, B and advantages)."""
        return policy_loss_of_head(self.sweeps, *arguments)

    def _pair(self, *arguments) -> tuple[_Logits, _Logits]:
        """Policy and reference over the same chunks."""
        _, local, rows, head, ref_rows, ref_head, _ = kl_setup(*arguments, True)
        local = local.clamp(min=0)
        _divide(rows, head.weight.shape[0], heads=2)
        ref_rows.block = rows.block
        return _Logits(rows, head, local), _Logits(ref_rows, ref_head, local)

    @full_precision
    def linear_kl(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum)."""
        policy, ref = self._pair(*arguments)
        out = [policy.rows.new() for _ in range(8)]
        for block in policy.rows.blocks():
            both = policy.chunk(block), ref.chunk(block)
            _store(out, block, self.kl.kl_divergence_full(*both, *policy.tokens(block)))
        return tuple(policy.rows.whole(x) for x in out)

    @full_precision
    def linear_kl_backward(self, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden and weight."""
        grads, (kl, _, entropy, *stats, needs) = arguments[:3], arguments[12:]
        arguments = arguments[3:12]
        policy, ref = self._pair(*arguments)
        rows = policy.rows
        vectors = [rows.pad(x) for x in (*grads, *stats, kl, entropy)]
        gradients = Gradients(policy.head, rows, None, [*needs, False, False, False], False)
        for block in rows.blocks():
            parts = [x[block] for x in vectors]
            z, r = policy.chunk(block), ref.chunk(block)
            self.kl.kl_divergence_backward(
                *parts[:3], z, r, *policy.tokens(block), *parts[3:], out=z
            )
            policy.carry(gradients, z, block)
        return _rounded(gradients.finish(lambda x: x)[:2], arguments[:2], arguments[0])
