"""The decode loop: fill slots with prompts, sample a token for each, refill those that finish."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from rlhf_fast.kernels.sample import sample
from rlhf_fast.rollout.graphs import GraphedSteps
from rlhf_fast.rollout.slots import SlotCache, Step

# Prompt tokens per prefill forward. It bounds the activations: a longer prompt goes alone.
_PREFILL_TOKENS = 16384

# Decode steps between two looks of the host. On CUDA a look waits for the device, and a response
# that has ended takes part in the steps until the next one; on the CPU looking costs nothing.
LOOK_EVERY = {"cuda": 8}


class Loop:
    """One call of `generate`: rows p*n .. p*n+n-1 of the outputs continue `prompts[p]`.

    State of the slots, each a `[slots]` int64 tensor on the model's device:

        row      which row of the outputs the slot writes; the spare one, behind the last, where the
                 slot is free or its response has ended
        length   tokens whose keys are stored, that is the position of the next token to feed
        token    the next token to feed
        index    how many tokens of the response there are

    A decode step reads and writes this state and the outputs without the host. The host knows which
    slots it filled (the first `live` ones) and looks every few steps which of them have ended.
    """

    def __init__(
        self,
        model: Any,
        prompts: list[torch.Tensor],
        seeds: torch.Tensor,
        eos_ids: torch.Tensor,
        cache: SlotCache,
        *,
        n: int,
        max_new_tokens: int,
        sampling: dict[str, float],
        on_finish: Callable[[int], object],
    ):
        self.model, self.prompts, self.eos_ids, self.cache = model, prompts, eos_ids, cache
        self.rows = len(prompts) * n
        self.n, self.slots, self.max_new_tokens = n, min(cache.slots, self.rows), max_new_tokens
        self.sampling, self.on_finish = sampling, on_finish
        device = seeds.device
        # Renamed from past_key_values in transformers 5.24.
        names = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.waiting = deque(range(self.rows))
        self.live = 0
        self.look_every = LOOK_EVERY.get(device.type, 1)
        self.steps = 0  # decode steps so far
        self.ends_at = [0] * self.slots  # the step behind which a slot has ended for certain
        self.graphed = GraphedSteps(device, self.slots)
        self.every = torch.arange(self.slots, device=device)
        self.row, self.length, self.token, self.index = torch.zeros(
            4, self.slots, dtype=torch.int64, device=device
        )
        self.row += self.rows
        self.stuck = torch.zeros(1, dtype=torch.int64, device=device)
        # With the spare row.
        self.seeds = torch.cat((seeds, seeds.new_zeros(1)))
        shape = (self.rows + 1, max_new_tokens)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(self.rows + 1, dtype=torch.int64, device=device)
        self.logprob, self.log_mass, self.entropy = (
            torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(3)
        )

    def run(self) -> None:
        while self.waiting or self.live:
            if self._worth_filling():
                self._fill()
            else:
                left = max(self.ends_at[: self.live]) - self.steps
                for _ in range(min(self.look_every, left)):
                    self.graphed.run(self._step, self.live)
                    self.steps += 1
            self._collect()

    def _worth_filling(self) -> bool:
        """A prefill costs about one decode step however few its prompts: wait for several."""
        free = self.slots - self.live
        return bool(self.waiting) and (self.live == 0 or 8 * free >= self.slots)

    def _fill(self) -> None:
        """Prefill the next waiting prompts, packed, into free slots; sample their first tokens.

        Rows of one prompt that start together share its forward: the first of them computes the
        keys, the others get a copy.
        """
        first = self.live
        rows, owners, prompts = self._next_rows(self.slots - first)
        lengths = [len(p) for p in prompts]
        self.live = first + len(rows)
        self.ends_at[first : self.live] = [self.steps + self.max_new_tokens - 1] * len(rows)
        new = slice(first, self.live)
        device = self.row.device
        owner = torch.tensor(owners, device=device)  # which of the prompts each new slot has
        length = torch.tensor(lengths, device=device)
        leaders = [first + owners.index(p) for p in range(len(prompts))]
        self.row[new] = torch.tensor(rows, device=device)
        self.length[new] = length[owner]
        self.index[new] = 0
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        slots = torch.tensor(leaders, device=device).repeat_interleave(length)
        step = Step(slots, positions, prompts=lengths)
        ends = length.cumsum(0) - 1
        logits = self._forward(torch.cat(prompts)[None], positions[None], step, ends)
        for slot, p in enumerate(owners, first):
            if slot != leaders[p]:
                self.cache.move(leaders[p], slot)
        self._draw(logits[0][owner], new)

    def _next_rows(self, free: int) -> tuple[list[int], list[int], list[torch.Tensor]]:
        """(rows, which prompt of the third each continues, prompts) of the next prefill."""
        rows: list[int] = []
        owners: list[int] = []
        prompts: list[torch.Tensor] = []
        total, last = 0, -1
        while self.waiting and len(rows) < free:
            number = self.waiting[0] // self.n
            if number != last:
                total += len(self.prompts[number])
                if rows and total > _PREFILL_TOKENS:
                    break
                prompts.append(self.prompts[number])
                last = number
            owners.append(len(prompts) - 1)
            rows.append(self.waiting.popleft())
        return rows, owners, prompts

    def _step(self, width: int) -> None:
        """One more token for each of the first `width` slots; those that have ended write nothing.

        Nothing here waits for the device, and every tensor that outlives the call is changed in
        place: it can be captured in a CUDA graph.
        """
        first = slice(0, width)
        positions = self.length[first]
        step = Step(self.every[first], positions)
        logits = self._forward(self.token[first, None], positions[:, None], step, 1)
        positions += self.row[first] < self.rows  # a view of the state
        self._draw(logits[:, 0], first)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, step: Step, keep: int | torch.Tensor
    ) -> torch.Tensor:
        self.cache.step = step
        # What the config may ask for beside logits is turned off: nobody reads it here.
        off: dict[str, Any] = {"output_attentions": False, "output_hidden_states": False}
        return self.model(
            input_ids=ids, position_ids=positions, logits_to_keep=keep, slot_step=step,
            use_cache=True, return_dict=True, **{self.cache_name: self.cache}, **off,
        ).logits  # fmt: skip

    def _draw(self, logits: torch.Tensor, slots: slice) -> None:
        """Sample the next token of `slots`, write it down, and retire the slots that are done."""
        row, index = self.row[slots], self.index[slots]
        drawn = sample(logits, **self.sampling, seed=self.seeds[row], position=index)
        # On CUDA `sample` does not raise where no token can be drawn: it gives -1.
        stuck = drawn.ids < 0
        self.stuck += (stuck & (row < self.rows)).any()
        self.token[slots] = drawn.ids.clamp(min=0)
        self.ids[row, index] = drawn.ids
        self.logprob[row, index] = drawn.logprob.float()
        self.log_mass[row, index] = drawn.log_mass.float()
        self.entropy[row, index] = drawn.entropy.float()
        index += 1  # a view of the state, as row is
        self.lengths[row] = index
        ended = (drawn.ids[:, None] == self.eos_ids).any(1) | (index == self.max_new_tokens) | stuck
        row.masked_fill_(ended, self.rows)
        index *= row < self.rows

    def _collect(self) -> None:
        """Look which slots have ended, and let the last live ones take their places."""
        *rows, stuck = torch.cat((self.row[: self.live], self.stuck)).tolist()
        if stuck:
            row, index = (self.ids[: self.rows] < 0).nonzero()[0].tolist()
            raise ValueError(f"logits: no token of response {row} can be drawn at {index}")
        finished = [slot for slot, row in enumerate(rows) if row == self.rows]
        # From the back, so that the last live slot, which fills the hole, is not itself done.
        for slot in reversed(finished):
            self.live -= 1
            if slot != self.live:
                self.cache.move(self.live, slot)
                for state in (self.row, self.length, self.token, self.index):
                    state[slot] = state[self.live]
                self.row[self.live] = self.rows
                self.ends_at[slot] = self.ends_at[self.live]
        if finished:
            self.on_finish(len(finished))
