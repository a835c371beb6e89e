"""From records to padded tensors, and which records a step sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rlhf_fast.train.config import Config
from rlhf_fast.train.data import Record, load


class Example(NamedTuple):
    """Token ids of one text, of which the first `prompt` are its prompt."""

    ids: list[int]
    prompt: int


class Batch(NamedTuple):
    """Right-padded token ids [B, S]; `mask` marks tokens, `response` those behind the prompt."""

    ids: torch.Tensor
    mask: torch.Tensor
    response: torch.Tensor


def encode_prompt(tokenizer: Any, config: Config, prompt: str) -> list[int]:
    """The prompt in its template, without its beginning where it is too long."""
    ids = tokenizer(config.template.replace("{prompt}", prompt)).input_ids
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; a prompt goes on
    return ids[-config.max_prompt_tokens :]


def encode(tokenizer: Any, config: Config, prompt: str, response: str) -> Example:
    """Prompt, response and EOS; a response that is too long loses its end, and the EOS with it."""
    head = encode_prompt(tokenizer, config, prompt) if prompt else []
    tail = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return Example(head + tail[: config.max_response_tokens], len(head))


def text_blocks(tokenizer: Any, config: Config, records: Sequence[Record]) -> list[Example]:
    """Whole texts as consecutive blocks of max_prompt_tokens + max_response_tokens tokens."""
    size = config.max_prompt_tokens + config.max_response_tokens
    blocks = []
    for record in records:
        text = config.template.replace("{prompt}", record.prompt) if record.prompt else ""
        ids = tokenizer(text + record.best, add_special_tokens=False).input_ids
        ids.append(tokenizer.eos_token_id)
        blocks += [Example(ids[i : i + size], 0) for i in range(0, len(ids) - 1, size)]
    return blocks


def examples(tokenizer: Any, config: Config, records: Sequence[Record]) -> list[Example]:
    """What supervised fine-tuning learns from: best responses, or blocks of plain text."""
    plain = [record for record in records if not record.prompt]
    answered = [record for record in records if record.prompt and record.completions]
    return text_blocks(tokenizer, config, plain) + [
        encode(tokenizer, config, record.prompt, record.best) for record in answered
    ]


def pad(sequences: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Sequences side by side, padded on the right."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    response = torch.zeros_like(mask)
    for row, (tokens, prompt) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
        response[row, prompt : len(tokens)] = True
    return Batch(*(x.to(device) for x in (ids, mask, response)))


def pad_id(tokenizer: Any) -> int:
    """What fills a row; masks say what counts, so EOS does where there is no padding token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def split(config: Config, stage: str) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records): `eval_data`, or a fixed part of `data`."""
    records = load(config.need(stage, "data").data, config.data_format)
    if config.eval_data:
        return records, load(config.eval_data, config.data_format)
    held_out = min(math.ceil(config.eval_fraction * len(records)), len(records) - 1)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [records[i] for i in order]
    return chosen[held_out:], chosen[:held_out]


class Order:
    """An endless sequence of shuffled passes over `size` items, as a function of seed and place.

    Nothing is remembered between steps, so a resumed run sees what an uninterrupted one sees.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch, self.permutation = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, place: int) -> int:
        epoch, index = divmod(place, self.size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.permutation = epoch, torch.randperm(self.size, generator=generator)
        return int(self.permutation[index])

    def batch(self, step: int, size: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """The items of batch number `step`, those of this rank."""
        return [self[step * size + k] for k in range(rank, size, ranks)]


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of `size` items, the last one shorter."""
    for first in range(0, len(items), size):
        yield items[first : first + size]
