"""What PPO learns from: prompts, sampled responses, their scores, log-probs and values."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.train import batches
from rlhf_fast.train.config import Config
from rlhf_fast.train.models import at_last_token, positions

Gold = Callable[[str, str, bool], float]


@dataclass
class Experience:
    """A rollout of N responses of at most T tokens behind prompts of at most S.

    `sequence` is prompts (padded on the left) and responses (padded on the right); the [N, T]
    tensors belong to the responses, and are 0 where `mask` is.
    """

    sequence: torch.Tensor  # [N, S + T] ids
    sequence_mask: torch.Tensor  # [N, S + T] bool
    ids: torch.Tensor  # [N, T]
    mask: torch.Tensor  # [N, T] bool
    finished: torch.Tensor  # [N] bool: ended with EOS
    scores: torch.Tensor  # [N] of the reward model, less the penalty of an unfinished response
    logprob: torch.Tensor  # [N, T] under the policy that sampled
    entropy: torch.Tensor  # [N, T]
    ref_logprob: torch.Tensor  # [N, T] under the reference
    values: torch.Tensor  # [N, T]; 0 without a value model
    sampled_logprob: torch.Tensor  # [N, T] as the sampler saw it
    advantages: torch.Tensor | None = None  # [N, T]
    returns: torch.Tensor | None = None  # [N, T]
    kl: torch.Tensor | None = None  # [N, T]

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def take(self, rows: torch.Tensor) -> Experience:
        """Some of the rows."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {k: None if x is None else x[rows] for k, x in values.items()}
        return Experience(**taken)

    def chunks(self, size: int) -> Iterator[Experience]:
        """Consecutive pieces of `size` rows."""
        for first in range(0, len(self), size):
            yield self.take(torch.arange(first, min(first + size, len(self))))


def gold_function(config: Config) -> Gold | None:
    """The function that `gold` names: module:function(prompt, response, finished)."""
    if not config.gold:
        return None
    module, _, name = config.gold.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None) if name else None
    except ModuleNotFoundError as error:
        raise ValueError(
            f"gold: expected module:function, got {config.gold!r}: {error} (set PYTHONPATH where "
            "it is a file of yours)"
        ) from error
    if not callable(function):
        raise ValueError(f"gold: expected module:function, got {config.gold!r}")
    return function


def response_logprobs(
    model: Any, part: Experience, temperature: float, *, entropy: bool = False
) -> tuple[torch.Tensor, ...]:
    """(log-probs [N, T],) of the responses, in nats; with `entropy` also entropies [N, T].

    The logits [N, S + T, V] never exist: see `rlhf_fast.model_logprob`.
    """
    found = rlhf_fast.model_logprob(
        model,
        part.sequence,
        part.sequence_mask,
        last=part.ids.shape[1],
        mask=part.mask,
        temperature=temperature,
        entropy=entropy,
        position_ids=positions(part.sequence_mask),
    )
    return (found,) if isinstance(found, torch.Tensor) else found


def response_values(model: Any, part: Experience) -> torch.Tensor:
    """Values [N, T] of the states in which the response tokens are chosen."""
    length = part.ids.shape[1]
    values = model(part.sequence, part.sequence_mask)[:, -length - 1 : -1]
    return torch.where(part.mask, values, 0.0)


class Actors:
    """The four models of PPO; each sees the tokens of one tokenizer. `value` may be None."""

    def __init__(
        self, config: Config, tokenizer: Any, policy: Any, reference: Any, reward: Any, value: Any
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.policy, self.reference, self.reward, self.value = policy, reference, reward, value
        self.gold = gold_function(config)

    @torch.no_grad()
    def collect(self, prompts: list[str], seed: int, device: torch.device) -> Experience:
        """Sample one or more responses to each prompt and look at them with every model."""
        config = self.config
        encoded = [batches.encode_prompt(self.tokenizer, config, p) for p in prompts]
        out = rlhf_fast.generate(
            self.policy,
            [torch.tensor(ids, device=device) for ids in encoded],
            n=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            eos_ids=(self.tokenizer.eos_token_id,),
            seed=seed,
            max_slots=config.max_slots,
            max_len=config.max_prompt_tokens + config.max_new_tokens,
        )
        mask = out.mask.bool()
        zeros = torch.zeros_like(out.logprob)
        finished = [reason == "eos" for reason in out.finish_reason]
        whole = Experience(
            sequence=torch.cat((out.prompt_ids, out.ids), 1),
            sequence_mask=torch.cat((out.prompt_mask.bool(), mask), 1),
            ids=out.ids,
            mask=mask,
            finished=torch.tensor(finished, device=device),
            scores=zeros[:, 0],
            logprob=zeros,
            entropy=zeros,
            ref_logprob=zeros,
            values=zeros,
            sampled_logprob=out.logprob,
        )
        seen = [self._look(part) for part in whole.chunks(config.micro_batch)]
        scores, *tokens = (torch.cat(columns) for columns in zip(*seen, strict=True))
        whole.scores = scores - config.missing_eos_penalty * (~whole.finished)
        whole.logprob, whole.entropy, whole.ref_logprob, whole.values = tokens
        return whole

    def _look(self, part: Experience) -> tuple[torch.Tensor, ...]:
        """(scores, logprob, entropy, ref_logprob, values) of some rows."""
        t = self.config.temperature
        scores = at_last_token(self.reward(part.sequence, part.sequence_mask), part.sequence_mask)
        logprob, entropy = response_logprobs(self.policy, part, t, entropy=True)
        (ref_logprob,) = response_logprobs(self.reference, part, t)
        values = torch.zeros_like(logprob)
        if self.value is not None:
            values = response_values(self.value, part)
        return scores, logprob, entropy, ref_logprob, values

    def texts(self, experience: Experience) -> list[str]:
        """The responses as text."""
        return [
            self.tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(experience.ids, experience.mask, strict=True)
        ]

    def gold_scores(self, prompts: list[str], experience: Experience) -> torch.Tensor | None:
        """The gold rewards [N] of the responses, None where there is no gold reward."""
        if self.gold is None:
            return None
        repeated = [p for p in prompts for _ in range(self.config.samples_per_prompt)]
        values = [
            float(self.gold(prompt, text, done))
            for prompt, text, done in zip(
                repeated, self.texts(experience), experience.finished.tolist(), strict=True
            )
        ]
        return torch.tensor(values, dtype=torch.float64, device=experience.scores.device)
