"""The public calls: `rollout`, `generate`, and what they return."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast import _args
from rlhf_fast.rollout import models
from rlhf_fast.rollout.plan import Plan, plan
from rlhf_fast.rollout.prompts import (
    Prompts,
    as_eos_ids,
    as_prompts,
    as_seed,
    integer,
    pad_left,
    row_seed,
)


@dataclass
class RolloutOutput:
    """Responses to B prompts, n to each. Row p*n + j is sample j of prompt p.

    All tensors are ordinary ones (no inference mode) on the model's device. T is the length of the
    longest response, S that of the longest prompt. Concatenating `prompt_ids` and `ids`, and the
    two masks, along time gives what a trainer feeds its model.
    """

    ids: torch.Tensor  # [B*n, T] int64, 0 behind the response
    mask: torch.Tensor  # [B*n, T] bool; the EOS token is inside
    lengths: torch.Tensor  # [B*n] int64, tokens of each response
    logprob: torch.Tensor  # [B*n, T] float32 of the distribution that was drawn from; 0 behind
    log_mass: torch.Tensor  # [B*n, T] float32; logprob + log_mass is that of the whole vocabulary
    entropy: torch.Tensor  # [B*n, T] float32 of the whole tempered distribution
    finish_reason: list[str]  # "eos" | "length"
    prompt_ids: torch.Tensor  # [B*n, S] int64, left-padded with 0
    prompt_mask: torch.Tensor  # [B*n, S] bool
    seconds: float  # wall time of the call
    tokens_per_second: float  # response tokens over seconds


class Rollout:
    """A model ready to be sampled from; made by `rollout`, whose arguments it keeps.

    The model is switched inside `generate` only, so that its weights may change between two calls
    and it may be trained in the block. The memory of the KV cache is kept from call to call, its
    contents never are: `release` gives it back, and so does the end of the block.
    """

    def __init__(self, model: Any, max_slots: int, max_len: int):
        self.model, self.max_slots, self.max_len = model, max_slots, max_len
        self._cache: Any = None  # a SlotCache, whose module imports transformers

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def plan(
        self, prompts: Prompts | None = None, *, n: int = 1, max_new_tokens: int | None = None
    ) -> Plan:
        """The bytes that `generate` will ask for, before it does.

        Args:
            prompts, n, max_new_tokens: those of the call. Without `prompts`, the most that any call
                may take: `max_slots` slots of `max_len` tokens.

        Returns:
            `Plan`.

        Raises:
            ValueError, TypeError: as `generate` does.
        """
        if prompts is None:
            slots, length = self.max_slots, self.max_len
            return plan(self.model, slots, length, prompts=slots, rows=0, max_new_tokens=0)
        if max_new_tokens is None:
            raise TypeError("max_new_tokens: expected an int beside prompts, got None")
        given, max_new_tokens = self._given(prompts, max_new_tokens)
        rows = len(given) * integer("n", n, 1)
        columns = max(map(len, given), default=0) + max_new_tokens
        slots = min(self.max_slots, rows)
        return plan(
            self.model, slots, columns, prompts=min(slots, len(given)), rows=rows,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip

    def release(self) -> int:
        """Give the memory of the KV cache back, to PyTorch's allocator; the next call allocates it
        anew.

        Returns:
            How many bytes that were: 0 where nothing was held.
        """
        held = 0 if self._cache is None else self._cache.bytes
        self._cache = None
        return held

    def _given(self, prompts: Prompts, max_new_tokens: int) -> tuple[list[torch.Tensor], int]:
        """`prompts` and `max_new_tokens`, checked."""
        embedding = self.model.get_input_embeddings().weight
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
        given = as_prompts(prompts, embedding.shape[0], embedding.device)
        self._check_lengths(given, max_new_tokens)
        return given, max_new_tokens

    def _slots(self, prompts: int, longest: int, rows: int, max_new_tokens: int) -> Any:
        """The cache of the last call where it has room for this one, or a new one."""
        from rlhf_fast.rollout.slots import Room, SlotCache

        slots = min(self.max_slots, rows)
        room = Room(slots, max_new_tokens, min(slots, prompts), longest)
        held = self._cache
        if held is None or not held.serves(self.model, room):
            self._cache = None  # the old one goes before the new one comes
            self._cache = SlotCache(self.model, room)
        return self._cache

    def generate(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        eos_ids: int | tuple[int, ...] = (),
        seed: int = 0,
        logprobs: str = "sampled",
        progress: bool = False,
    ) -> RolloutOutput:
        """Sample `n` responses to each prompt, with the log-prob of every token that was drawn.

        The tokens are those of the model in evaluation mode with its weights as they are now; the
        mode of the module, its attention setting and everything else are put back, after an error
        too. The model's `generation_config` is not read. Prompts are not padded: each response is
        computed in a slot of its own, and a finished slot is refilled with the next prompt. The
        samples of one prompt share its keys, and those that start together the forward over it.

        Row p*n + j draws with `rollout.prompts.row_seed(seed, p, j)` and the index of the token in
        its response, so that it depends neither on the other rows nor on the slot it ran in, beyond
        the last bits of the model's own matrix products and attention.

        Args:
            prompts: a list of 1-D id tensors or lists of ints, in which every id is a token like
                any other; or `(ids[B, S], mask[B, S])`, padded on either side, in which what stands
                where the mask is 0 is not looked at.
            n: responses to each prompt.
            max_new_tokens: tokens of the longest possible response.
            temperature, top_k, top_p, min_p: numbers, with the meaning that `rlhf_fast.sample`
                gives them; temperature 0 is greedy.
            eos_ids: ids that end a response: an int or a sequence of ints. The EOS token belongs to
                the response, its mask and its log-probs.
            seed: an int of 64 bits.
            logprobs: "sampled" keeps the numbers of the draw; "rescore" computes `logprob`,
                `log_mass` and `entropy` again by the model's own forward, in evaluation mode, on
                prompt and response, as a trainer does: the PPO ratio of its first step is then 1.
            progress: show a bar (tqdm).

        Returns:
            `RolloutOutput`.

        Raises:
            ValueError, TypeError: an empty prompt, an id out of range, a prompt that leaves no room
                for `max_new_tokens` in `max_len`, a bad sampling parameter; before anything is
                generated.
        """
        start = time.perf_counter()
        device = self.model.get_input_embeddings().weight.device
        sampling = _sampling(temperature, top_k, top_p, min_p)
        _args.choice("logprobs", logprobs, ("sampled", "rescore"))
        n, seed = integer("n", n, 1), as_seed(seed)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        eos = torch.tensor(as_eos_ids(eos_ids, vocabulary), dtype=torch.int64, device=device)
        given, max_new_tokens = self._given(prompts, max_new_tokens)
        seeds = [row_seed(seed, p, j) for p in range(len(given)) for j in range(n)]
        with models.evaluation(self.model):
            out = self._run(given, n, seeds, eos, max_new_tokens, sampling, logprobs, progress)
        out.seconds = time.perf_counter() - start
        out.tokens_per_second = int(out.lengths.sum()) / out.seconds
        return out

    def _check_lengths(self, prompts: list[torch.Tensor], max_new_tokens: int) -> None:
        positions = models.position_limit(self.model)
        limits = [("max_len", self.max_len)]
        if positions is not None:
            limits.append(("the model's max_position_embeddings", positions))
        for p, prompt in enumerate(prompts):
            for name, limit in limits:
                if len(prompt) + max_new_tokens > limit:
                    raise ValueError(
                        f"prompts[{p}]: {len(prompt)} tokens and max_new_tokens={max_new_tokens} "
                        f"do not fit into {name}={limit}"
                    )

    def _run(
        self,
        prompts: list[torch.Tensor],
        n: int,
        seeds: list[int],
        eos: torch.Tensor,
        max_new_tokens: int,
        sampling: dict[str, Any],
        logprobs: str,
        progress: bool,
    ) -> RolloutOutput:
        # Here, not at the top: importing rlhf_fast must not import transformers.
        from rlhf_fast.rollout.loop import Loop
        from rlhf_fast.rollout.rescore import rescore
        from rlhf_fast.rollout.slots import ATTENTION
        from rlhf_fast.rollout.weights import with_decode_weights

        prompt_ids, prompt_mask = (x.repeat_interleave(n, 0) for x in pad_left(prompts, eos.device))
        longest = max(map(len, prompts), default=0)
        cache = self._slots(len(prompts), longest, len(seeds), max_new_tokens)
        with models.attention(self.model, ATTENTION), _bar(len(seeds), progress) as advance:
            loop = Loop(
                self.model, prompts, torch.tensor(seeds, dtype=torch.int64, device=eos.device), eos,
                cache, n=n, max_new_tokens=max_new_tokens, sampling=sampling, on_finish=advance,
            )  # fmt: skip
            with_decode_weights(self.model, loop.run)
        # Behind the rows there is a spare one.
        lengths = loop.lengths[:-1].clone()
        longest = max(lengths.tolist(), default=0)
        ids, logprob, log_mass, entropy = (
            x[:-1, :longest].clone() for x in (loop.ids, loop.logprob, loop.log_mass, loop.entropy)
        )
        mask = torch.arange(longest, device=eos.device) < lengths[:, None]
        last = ids.gather(1, (lengths - 1)[:, None]) if prompts else ids
        ended = torch.isin(last, eos).flatten().tolist()
        finish = ["eos" if e else "length" for e in ended]
        # A greedy draw has log-prob 0 whatever the forward says.
        if logprobs == "rescore" and sampling["temperature"] > 0 and prompts:
            logprob, log_mass, entropy = rescore(
                self.model, prompt_ids, prompt_mask, ids, mask, log_mass, sampling
            )
        return RolloutOutput(
            ids, mask, lengths, logprob, log_mass, entropy, finish, prompt_ids, prompt_mask,
            seconds=0.0, tokens_per_second=0.0,
        )  # fmt: skip


def _sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> dict[str, Any]:
    """The four parameters, checked."""
    return {
        "temperature": _args.number("temperature", temperature, low=0.0),
        "top_k": integer("top_k", top_k, 0),
        "top_p": _args.number("top_p", top_p, low=0.0, high=1.0, exclusive_low=True),
        "min_p": _args.number("min_p", min_p, low=0.0, high=1.0),
    }


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], object]]:
    """A function that advances a progress bar, which is closed at the end."""
    if not show:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="response", desc="rollout") as bar:
        yield bar.update


def rollout(model: Any, *, max_slots: int = 64, max_len: int = 2048) -> Rollout:
    """Sample from a live transformers causal LM, in this process and on its own weights.

    >>> with rlhf_fast.rollout(model, max_slots=32) as r:
    ...     out = r.generate(prompts, n=4, max_new_tokens=256, eos_ids=tokenizer.eos_token_id)

    Args:
        model: a transformers causal LM of one of the families in `rollout.models.FAMILIES`,
            unwrapped. Its weights are read at each `generate` and never copied.
        max_slots: responses computed at the same time.
        max_len: tokens of a prompt and its response together. Keys and values take
            `slots * max_new_tokens + min(slots, prompts) * longest prompt` tokens of memory, at
            most `max_slots * max_len`, from the first call until `Rollout.release` or the end of
            the block; `Rollout.plan` says how many bytes that is.

    Raises:
        TypeError: `model` is no transformers causal LM.
        NotImplementedError: it is one that cannot be driven exactly; the message says why.
    """
    models.check_model(model)
    return Rollout(model, integer("max_slots", max_slots, 1), integer("max_len", max_len, 1))


def generate(
    model: Any, prompts: Prompts, *, max_slots: int = 64, max_len: int = 2048, **options: Any
) -> RolloutOutput:
    """`rollout(model, max_slots=..., max_len=...)` for one call of `Rollout.generate`.

    >>> out = rlhf_fast.generate(model, [[1, 2, 3]], max_new_tokens=8, temperature=0.0)
    """
    with rollout(model, max_slots=max_slots, max_len=max_len) as r:
        return r.generate(prompts, **options)
