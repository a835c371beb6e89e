"""Does a model prefer the better completion? Helpful, honest, harmless, or any ranked data.

A reward model prefers by its score, a language model by the completion's log-probability, its
length counted (the mean per token) or not (the sum). Source of the evaluation by pairs: Askell et
al., "A General Language Assistant as a Laboratory for Alignment", 2021.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rlhf_fast.train import batches
from rlhf_fast.train.batches import Example
from rlhf_fast.train.config import Config, parse
from rlhf_fast.train.data import Record, load
from rlhf_fast.train.models import (
    at_last_token,
    check_fit,
    device_of,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
)
from rlhf_fast.train.sft import token_logprobs

Scorer = Callable[[Sequence[Example]], dict[str, torch.Tensor]]


def reward_scorer(config: Config) -> tuple[Any, Scorer]:
    """(tokenizer, function from examples to their scores) of the reward model."""
    tokenizer = load_tokenizer(config.reward_model)
    device = device_of(config)
    model = load_scalar_model(config.reward_model, trained=True).eval().to(device)
    filler = batches.pad_id(tokenizer)

    def score(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        check_fit(model, filler, *(example.ids for example in examples))
        batch = batches.pad(examples, filler, device)
        return {"reward model": at_last_token(model(batch.ids, batch.mask), batch.mask)}

    return tokenizer, score


def language_scorer(config: Config) -> tuple[Any, Scorer]:
    """(tokenizer, function from examples to the log-probs of their responses) of the model."""
    tokenizer = load_tokenizer(config.model)
    device = device_of(config)
    model = load_causal_lm(config.model).eval().to(device)
    filler = batches.pad_id(tokenizer)

    def score(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        check_fit(model, filler, *(example.ids for example in examples))
        batch = batches.pad(examples, filler, device)
        total = token_logprobs(model, batch).sum(1)
        tokens = batch.response[:, 1:].sum(1).clamp(min=1)
        return {"log-prob, sum": total, "log-prob, mean per token": total / tokens}

    return tokenizer, score


@torch.no_grad()
def preferences(
    config: Config, records: Sequence[Record], tokenizer: Any, score: Scorer
) -> Iterator[tuple[str, str, float]]:
    """(scorer, category, 1 if the better completion is preferred, 0.5 if neither) of each pair."""
    bar = tqdm(records, desc="eval", disable=not config.progress)
    for record in bar:
        examples = [batches.encode(tokenizer, config, record.prompt, c) for c in record.completions]
        found = [score(part) for part in batches.chunks(examples, config.micro_batch)]
        ranks = record.ranks or ()
        for name in found[0]:
            values = torch.cat([part[name] for part in found]).tolist()
            for i, better in enumerate(ranks):
                for j, worse in enumerate(ranks):
                    if better < worse:
                        right = (values[i] > values[j]) + 0.5 * (values[i] == values[j])
                        yield name, record.category or "all", right


def accuracies(config: Config, records: Sequence[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """scorer -> category -> {accuracy, pairs, standard_error}; "total" is over all pairs."""
    scorers = [reward_scorer(config)] if config.reward_model else []
    scorers += [language_scorer(config)] if config.model else []
    counts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for tokenizer, score in scorers:
        for name, category, right in preferences(config, records, tokenizer, score):
            for key in dict.fromkeys((category, "total")):
                counts[name][key].append(right)
    return {
        name: {
            key: {
                "accuracy": sum(values) / len(values),
                "pairs": len(values),
                "standard_error": _standard_error(values),
            }
            for key, values in sorted(by_category.items())
        }
        for name, by_category in counts.items()
    }


def _standard_error(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return (mean * (1 - mean) / len(values)) ** 0.5


def main(argv: Sequence[str]) -> int:
    """`rlhf-fast eval`."""
    config = parse("eval", argv)
    if config is None:
        return 0
    config.need("eval", "data")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if not (config.model or config.reward_model):
        raise ValueError("eval needs --reward_model or --model")
    records = [r for r in load(config.data, config.data_format) if r.has_pair]
    if not records:
        raise ValueError(f"data: expected ranked completions, found no pair in {config.data}")
    found = accuracies(config, records)
    path = Path(config.output) / "eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    for name, by_category in found.items():
        for category, row in by_category.items():
            print(
                f"{name:<26} {category:<12} {row['accuracy']:6.1%} +- {row['standard_error']:.1%}"
                f" of {row['pairs']} pairs"
            )
    print(f"eval: wrote {path}")
    return 0
