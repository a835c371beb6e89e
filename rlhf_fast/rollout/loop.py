"""The decode loop: fill slots with prompts, sample a token for each, refill those that finish."""

from __future__ import annotations

import inspect
from collections import Counter, deque
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
        prompt   which row of the prompt store it continues
        before   how many tokens of that
        length   tokens whose keys the slot itself stores
        token    the next token to feed, whose position is before + length
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
        self.n, self.slots = n, min(cache.room.slots, self.rows)
        self.max_new_tokens = max_new_tokens
        self.sampling, self.on_finish = sampling, on_finish
        device = seeds.device
        # Renamed from past_key_values in transformers 5.24.
        names = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.waiting = deque(range(self.rows))
        self.live = 0
        self.held = [0] * self.slots  # the prompt of each live slot
        self.users: Counter[int] = Counter()  # live slots of each prompt
        self.place: dict[int, int] = {}  # row of the prompt store, of each prompt that has one
        self.free = list(range(cache.room.prompts))
        self.look_every = LOOK_EVERY.get(device.type, 1)
        self.steps = 0  # decode steps so far
        self.ends_at = [0] * self.slots  # the step behind which a slot has ended for certain
        self.graphed = GraphedSteps(device, self.slots)
        self.every = torch.arange(self.slots, device=device)
        self.state = torch.zeros(6, self.slots, dtype=torch.int64, device=device)
        self.row, self.prompt, self.before, self.length, self.token, self.index = self.state
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
        """Give free slots to the next waiting rows.

        The keys of a prompt are computed once. Rows of it that start together sample their first
        tokens from that forward; a row that comes later, while others go on, starts a token back:
        its first decode step feeds the prompt's last token anew.
        """
        first = self.live
        rows, leaders = self._next_rows(self.slots - first)
        numbers = [row // self.n for row in rows]
        starts: list[tuple[int, ...]] = []
        for slot, (row, number) in enumerate(zip(rows, numbers, strict=True), first):
            late = number not in leaders
            if number not in self.place:
                self.place[number] = self.free.pop()
            self.held[slot] = number
            self.ends_at[slot] = self.steps + self.max_new_tokens - (not late)
            # row, prompt, before, length, token, index; the token follows.
            starts.append((row, self.place[number], len(self.prompts[number]) - late, 0, 0, 0))
        self.users.update(numbers)
        self.live = first + len(rows)
        new = slice(first, self.live)
        self.state[:, new] = torch.tensor(starts, device=self.state.device).T
        self.token[new] = torch.stack([self.prompts[number][-1] for number in numbers])
        if leaders:
            # Rows are in the order of their prompts: late ones come first.
            behind = sum(number not in leaders for number in numbers)
            self._prefill(leaders, numbers[behind:], slice(first + behind, self.live))

    def _prefill(self, leaders: list[int], numbers: list[int], new: slice) -> None:
        """Store the keys of the prompts `leaders`, packed, and sample the first tokens of the slots
        `new`, which continue `numbers`."""
        device = self.row.device
        prompts = [self.prompts[p] for p in leaders]
        lengths = [len(p) for p in prompts]
        length = torch.tensor(lengths, device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        places = torch.tensor([self.place[p] for p in leaders], device=device)
        step = Step(places.repeat_interleave(length), positions, packed=lengths)
        ends = length.cumsum(0) - 1
        logits = self._forward(torch.cat(prompts)[None], positions[None], step, ends)
        owner = torch.tensor([leaders.index(p) for p in numbers], device=device)
        self._draw(logits[0][owner], new)

    def _next_rows(self, free: int) -> tuple[list[int], list[int]]:
        """(rows, those of their prompts whose keys are not stored) of the next filling."""
        rows: list[int] = []
        leaders: list[int] = []
        total = 0
        while self.waiting and len(rows) < free:
            number = self.waiting[0] // self.n
            if number not in self.place and number not in leaders:
                total += len(self.prompts[number])
                if leaders and total > _PREFILL_TOKENS:
                    break
                leaders.append(number)
            rows.append(self.waiting.popleft())
        return rows, leaders

    def _step(self, width: int) -> None:
        """One more token for each of the first `width` slots; those that have ended write nothing.

        Nothing here waits for the device, and every tensor that outlives the call is changed in
        place: it can be captured in a CUDA graph.
        """
        first = slice(0, width)
        length, before = self.length[first], self.before[first]
        step = Step(self.every[first], length, prompt=self.prompt[first], before=before)
        logits = self._forward(self.token[first, None], (before + length)[:, None], step, 1)
        length += self.row[first] < self.rows  # a view of the state
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
        # A slot that has ended may take part in further steps: it stays where there is room.
        goes_on = row < self.rows
        index *= goes_on
        self.length[slots] *= goes_on

    def _collect(self) -> None:
        """Look which slots have ended, and let the last live ones take their places."""
        *rows, stuck = torch.cat((self.row[: self.live], self.stuck)).tolist()
        if stuck:
            row, index = (self.ids[: self.rows] < 0).nonzero()[0].tolist()
            raise ValueError(f"logits: no token of response {row} can be drawn at {index}")
        finished = [slot for slot, row in enumerate(rows) if row == self.rows]
        # From the back, so that the last live slot, which fills the hole, is not itself done.
        for slot in reversed(finished):
            self._release(self.held[slot])
            self.live -= 1
            if slot != self.live:
                self.cache.move(self.live, slot)
                self.state[:, slot] = self.state[:, self.live]
                self.row[self.live] = self.rows
                self.ends_at[slot] = self.ends_at[self.live]
                self.held[slot] = self.held[self.live]
        if finished:
            self.on_finish(len(finished))

    def _release(self, number: int) -> None:
        """A slot of prompt `number` has ended: forget the keys that no other row will look at."""
        self.users[number] -= 1
        awaited = bool(self.waiting) and self.waiting[0] // self.n == number
        if self.users[number] == 0 and not awaited:
            self.free.append(self.place.pop(number))
