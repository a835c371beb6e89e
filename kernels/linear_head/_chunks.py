"""The ops of this room for backends with row kernels of their own.

Forward, rows are taken in chunks. One library product gives a chunk's logits over the whole
vocabulary, and the row kernels of the rooms logprob and kl read them once. A chunk has
`chunk_bytes()` of logits, the only ones that exist; where a backward pass will follow, the last
chunk is kept for it. The backward pass (`_walk.py`) has the statistics of each row and walks the
vocabulary in slices instead.

With the loss known (`linear_ppo_loss`) there is no backward pass: a chunk's gradient follows its
logits at once. The gradient of the head is then summed over the chunks in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from rlhf_fast import _invariant
from rlhf_fast.kernels._common.launch import ELSEWHERE
from rlhf_fast.kernels._common.precision import full_precision
from rlhf_fast.kernels.logprob.reference import live_tokens

from . import _shards
from ._collect import collector
from ._gradients import Gradients
from ._logits import Logits, chunks, merge_shards, passed_on, rows_that_fit
from ._tiles import Head, Rows
from ._walk import Kept, backward_walk
from .reference_kl import kl_setup
from .reference_logprob import as_outputs, local_ids
from .reference_ppo import Sweeps, policy_loss_of_head


def _setup(
    hidden, weight, ids, bias, lora_a, lora_b, mask, temperature, temperatures, softcap,
    logit_scale, scaling, ignore_index, group, invariant, wanted=None,
) -> Logits:  # fmt: skip
    """The head over the tokens that count, or over the `wanted` ones of them."""
    live = live_tokens(ids, mask, ignore_index)
    size = weight.shape[0]
    if group:
        local = local_ids(ids, live, size, group).to(torch.int64)
        local = torch.where((local >= 0) & (local < size), local, ELSEWHERE)
    else:
        local = torch.where(live, ids, 0).to(torch.int64)
    if wanted is not None:
        live = live & wanted
    rows = Rows.of(
        hidden, live, temperature, temperatures, _invariant.enabled(invariant), torch.float32, True
    )
    head = Head(weight, bias, lora_a, lora_b, scaling, logit_scale, softcap)
    return Logits(rows, head, rows.pad(local))


def _store(targets: list[torch.Tensor], block: slice, values: tuple) -> None:
    for target, value in zip(targets, values, strict=True):
        target[block] = value


class LinearHead:
    """The torch ops of this room on the row kernels of two modules.

    `logprob`, `kl` and `ppo_loss` are the modules of one backend in the rooms of that name.
    """

    def __init__(self, logprob: ModuleType, kl: ModuleType, ppo_loss: ModuleType) -> None:
        self.logprob, self.kl = logprob, kl
        self.sweeps = Sweeps(
            self.linear_logprob, self.linear_logprob_entropy, self._backward, self._one_sweep,
            self.kept_rows, ppo_loss.policy_loss, kl.kl_estimate_backward, True,
        )  # fmt: skip

    @staticmethod
    def kept_rows(vocabulary: int, live: torch.Tensor, invariant: bool, heads: int = 1) -> int:
        """How many rows' logits the forward pass keeps for the backward pass: a chunk."""
        if _invariant.enabled(invariant):
            return 0
        # On CUDA masked rows stay: their number is not known without a synchronisation.
        count = len(live) if live.is_cuda else int(live.sum())
        return min(count, rows_that_fit(live.device.type, vocabulary, heads))

    def _forward(self, kernel: Callable[..., tuple], with_entropy: bool, arguments: tuple) -> tuple:
        """(logprob, entropy if asked for, row_max, log_sum) of every row, and the kept logits."""
        *arguments, keep = arguments
        group, vocabulary = arguments[-2], arguments[1].shape[0]
        logits = _setup(*arguments)
        rows = logits.rows
        kept = rows.hidden.new_empty(keep, vocabulary)
        out = [rows.new() for _ in range(3 + with_entropy)]
        chosen = torch.full_like(out[0], -torch.inf)
        for block in chunks(rows, vocabulary, kept=keep) if vocabulary else ():
            z = logits.chunk(block, kept if keep else None)
            _store(out, block, kernel(z, logits.ids[block], *logits.options(block)))
            if group:
                chosen[block] = logits.chosen(z, block)
        if group:
            out = self._over_ranks(logits, out, chosen, group)
        return *(rows.whole(x) for x in out), kept

    @staticmethod
    def _over_ranks(logits: Logits, out: list, chosen: torch.Tensor, group: str) -> list:
        """The values `out` of this rank's slice and everybody else's together."""
        _, *entropy, row_max, log_sum = out
        if not len(logits.head.weight):
            row_max.fill_(-torch.inf)
        stats = [row_max, log_sum, *(entropy or [torch.zeros_like(log_sum)]), chosen]
        logprob, mixed, row_max, log_sum = merge_shards(
            _shards.gather_stats(stats, group), logits.rows.temperature
        )
        return [logprob, *([mixed] if entropy else []), row_max, log_sum]

    @full_precision
    def linear_logprob(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(logprob, row_max, log_sum), each [N], and the kept logits.

        row_max is the one before the temperature.
        """
        return self._forward(self.logprob.logprob, False, arguments)

    @full_precision
    def linear_logprob_entropy(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(logprob, entropy, row_max, log_sum), each [N], and the kept logits."""
        return self._forward(self.logprob.logprob_entropy, True, arguments)

    def _backward(self, grad_logprob, grad_entropy, *others) -> list[torch.Tensor | None]:
        """Gradients of hidden, weight, bias, A and B, None where not needed."""
        *arguments, logprob, row_max, log_sum, entropy, kept, needs, slicewise = others
        ids, mask, ignore_index, group = arguments[2], arguments[6], arguments[12], arguments[13]
        # A token whose upstream gradient is 0 (no advantage, clipped) takes part in nothing below.
        wanted = grad_logprob != 0
        if grad_entropy is not None:
            wanted = wanted | (grad_entropy != 0)
        logits = _setup(*arguments, wanted)
        rows = logits.rows
        vectors = [
            None if x is None else rows.pad(x)
            for x in (passed_on(grad_logprob, logprob), grad_entropy, row_max, log_sum, entropy)
        ]

        def gradient(tiles, block, columns, out):
            g, h, *saved = (None if x is None else x[block] for x in vectors)
            ids = logits.ids_among(columns, block)
            self.logprob.logprob_backward(
                g, h, *tiles, ids, *logits.options(block), *saved, out=out
            )

        return backward_walk(
            [logits], Kept.of((kept,), rows, live_tokens(ids, mask, ignore_index), wanted), needs,
            slicewise, gradient, lambda x: _shards.sum_over_ranks(x, group),
        )  # fmt: skip

    @full_precision
    def linear_logprob_backward(self, *arguments) -> tuple[torch.Tensor, ...]:
        """Gradients of hidden, weight, bias, A and B; an empty tensor where not needed."""
        return as_outputs(self._backward(*arguments, True), arguments[2])

    def _one_sweep(self, rows: Rows, head: Head, local, needs, with_entropy, token_gradient):
        """(logprob [N], entropy [N], gradients of the head), each chunk's logits computed once."""
        logits = Logits(rows, head, local.clamp(min=0))
        gradients = Gradients(head, rows, logits.down, needs, slicewise=False)
        logprob, entropy = rows.new(), rows.new()
        blocks = chunks(rows, head.weight.shape[0])
        collect = collector(logits, gradients, needs)
        for block in blocks:
            z = logits.chunk(block)
            options = logits.ids[block], *logits.options(block)
            if with_entropy:
                lp, entropy[block], *saved = self.logprob.logprob_entropy(z, *options)
                saved.append(entropy[block])
            else:
                lp, *saved = self.logprob.logprob(z, *options)
                saved.append(None)
            logprob[block] = lp
            g, h = token_gradient(lp, block)
            out, places = collect.target(z, block, g, h)
            self.logprob.logprob_backward(g, h, z, *options, *saved, out=out, places=places)
            collect.written(block)
        collect.finish()
        return rows.whole(logprob), rows.whole(entropy), gradients.finish(lambda x: x)

    @full_precision
    def linear_ppo_loss(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(loss, stats, unit gradients of hidden, weight, bias, A, B and advantages)."""
        return policy_loss_of_head(self.sweeps, *arguments)

    @full_precision
    def linear_kl(self, *arguments) -> tuple[torch.Tensor, ...]:
        """(kl, logprob, ref_logprob, entropy, row_max, log_sum, ref_row_max, ref_log_sum), and the
        kept logits of policy and reference."""
        *arguments, keep = arguments
        vocabulary = arguments[1].shape[0]
        _, policy, ref = _pair(*arguments)
        kept = [head.rows.hidden.new_empty(keep, vocabulary) for head in (policy, ref)]
        out = [policy.rows.new() for _ in range(8)]
        blocks = chunks(policy.rows, vocabulary, 2, keep)
        ref.rows.block = policy.rows.block
        for block in blocks:
            z, r = (
                head.chunk(block, memory if keep else None)
                for head, memory in zip((policy, ref), kept, strict=True)
            )
            ids = policy.ids[block]
            _store(out, block, self.kl.kl_divergence_full(z, r, ids, *policy.tokens(block)))
        return *(policy.rows.whole(x) for x in out), *kept

    @full_precision
    def linear_kl_backward(self, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden and weight."""
        grad_kl, grad_logprob, grad_entropy = arguments[:3]
        kl, logprob, entropy, *stats, kept, ref_kept, needs = arguments[12:]
        live, policy, ref = _pair(*arguments[3:12])
        rows = policy.rows
        grads = grad_kl, passed_on(grad_logprob, logprob), grad_entropy
        vectors = [rows.pad(x) for x in (*grads, *stats, kl, entropy)]
        policy.gradient_dtype = rows.hidden.dtype  # the only one of its kernel

        def gradient(tiles, block, columns, out):
            parts = [x[block] for x in vectors]
            ids = policy.ids_among(columns, block)
            self.kl.kl_divergence_backward(
                *parts[:3], *tiles, ids, *policy.tokens(block), *parts[3:], out=out
            )

        parts = backward_walk(
            [policy, ref], Kept.of((kept, ref_kept), rows, live, torch.ones_like(live)),
            [*needs, False, False, False], True, gradient,
        )  # fmt: skip
        return as_outputs(parts[:2], arguments[3])


def _pair(*arguments) -> tuple[torch.Tensor, Logits, Logits]:
    """(tokens that count, policy, reference) of the arguments of `linear_kl`."""
    live, local, rows, head, ref_rows, ref_head, _ = kl_setup(*arguments, True)
    local = local.clamp(min=0).to(torch.int64)
    return live, Logits(rows, head, local), Logits(ref_rows, ref_head, local)
