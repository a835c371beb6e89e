"""The reward model, from K ranked completions of each prompt.

A prompt and its K completions are one batch element: K forward passes score them, and the loss is
over all K-choose-2 pairs of these K scores. Pairs as rows of their own would cost K (K - 1) passes
and overfit, since a completion would be seen K - 1 times in an epoch. Behind training the head's
bias is moved so that the best completions have a mean score of 0. Source: Ouyang et al., "Training
language models to follow instructions with human feedback", 2022, section 3.5.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import rlhf_fast
from rlhf_fast.train import batches
from rlhf_fast.train.batches import Example
from rlhf_fast.train.config import Config, parse
from rlhf_fast.train.data import Record
from rlhf_fast.train.models import at_last_token, check_fit, load_scalar_model, load_tokenizer
from rlhf_fast.train.run import Run, epochs_to_steps


class Ranked(NamedTuple):
    """The completions of one prompt; lower ranks are better."""

    completions: list[Example]
    ranks: tuple[float, ...]


def encode_ranked(tokenizer: Any, config: Config, records: Sequence[Record]) -> list[Ranked]:
    """The records in which at least two completions differ in rank."""
    return [
        Ranked(
            [batches.encode(tokenizer, config, record.prompt, text) for text in record.completions],
            record.ranks or (),
        )
        for record in records
        if record.has_pair
    ]


def scores_and_ranks(
    model: Any, prompts: Sequence[Ranked], filler: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores, ranks, mask), each [P, K]: every completion of every prompt is scored once."""
    rows = [example for prompt in prompts for example in prompt.completions]
    batch = batches.pad(rows, filler, device)
    flat = at_last_token(model(batch.ids, batch.mask), batch.mask)
    width = max(len(prompt.completions) for prompt in prompts)
    counts = torch.tensor([len(prompt.completions) for prompt in prompts], device=device)
    mask = torch.arange(width, device=device) < counts.unsqueeze(1)
    scores = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    ranks = torch.zeros(mask.shape, dtype=torch.float64, device=device)
    ranks[mask] = torch.tensor(
        [r for prompt in prompts for r in prompt.ranks], dtype=torch.float64, device=device
    )
    return scores, ranks, mask


def ordered_pairs(
    scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs that the scores order as the ranks do, pairs); equal scores count as a half."""
    pairs = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    return (right * pairs).sum(), pairs.sum().double()


@torch.no_grad()
def held_out(run: Run, model: Any, prompts: Sequence[Ranked], filler: int) -> tuple[float, float]:
    """(loss, accuracy on pairs) of held-out prompts."""
    config, total = run.config, torch.zeros(4, dtype=torch.float64, device=run.device)
    model.eval()
    chosen = prompts[: config.eval_batches * config.batch_size][run.rank :: run.ranks]
    for part in batches.chunks(chosen, config.micro_batch):
        scored = scores_and_ranks(model, part, filler, run.device)
        loss = rlhf_fast.ranking_loss(*scored, margin=config.margin).double()
        right, pairs = ordered_pairs(*scored)
        total += torch.stack((loss * len(part), loss.new_tensor(len(part)), right, pairs))
    model.train()
    loss, count, right, pairs = run.sum(total).tolist()
    return loss / max(count, 1), right / max(pairs, 1)


@torch.no_grad()
def mean_best_score(run: Run, model: Any, prompts: Sequence[Ranked], filler: int) -> float:
    """The mean score of the best completion of (at most 512) prompts."""
    model.eval()
    best = [p.completions[min(range(len(p.ranks)), key=p.ranks.__getitem__)] for p in prompts[:512]]
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    for part in batches.chunks(best[run.rank :: run.ranks], run.config.micro_batch):
        batch = batches.pad(part, filler, run.device)
        scores = at_last_token(model(batch.ids, batch.mask), batch.mask)
        total += torch.stack((scores.sum().double(), scores.new_tensor(len(part)).double()))
    score, count = run.sum(total).tolist()
    return score / max(count, 1)


def train(config: Config) -> dict[str, float]:
    """Run the stage; the held-out accuracy before and behind it."""
    config.need("reward", "model", "data")
    run = Run("reward", config)
    tokenizer, scorer = load_tokenizer(config.model), load_scalar_model(config.model)
    filler = batches.pad_id(tokenizer)
    records, rest = batches.split(config, "reward")
    prompts, eval_prompts = (encode_ranked(tokenizer, config, part) for part in (records, rest))
    if not prompts:
        raise ValueError(f"data: expected ranked completions, found no pair in {config.data}")
    texts = (text.ids for p in (*prompts, *eval_prompts) for text in p.completions)
    check_fit(scorer, filler, *texts)
    steps = epochs_to_steps(config, len(prompts))
    order = batches.Order(len(prompts), config.seed)
    (model,), optimizer = run.prepare(scorer)
    model.train()
    done = run.resume()
    if done == 0 and eval_prompts:
        _, accuracy = held_out(run, model, eval_prompts, filler)
        run.results["accuracy_before"] = accuracy
        run.say(f"held-out pairs: {accuracy:.1%} right before training")

    for step in run.steps(done, steps):
        start = time.perf_counter()
        rate = run.set_learning_rate(optimizer, step, steps)
        rows = [prompts[i] for i in order.batch(step, config.batch_size, run.rank, run.ranks)]
        parts = list(batches.chunks(rows, config.micro_batch))
        total = torch.zeros(3, dtype=torch.float64, device=run.device)
        for number, part in enumerate(parts, 1):
            with run.accumulating(number < len(parts), model):
                scored = scores_and_ranks(model, part, filler, run.device)
                # The mean over this part's prompts, as its share of this rank's; ranks average.
                loss = rlhf_fast.ranking_loss(*scored, margin=config.margin)
                loss = loss * (len(part) / len(rows))
                run.accelerator.backward(loss)
            right, pairs = ordered_pairs(*scored)
            total += torch.stack((loss.detach().double() / run.ranks, right, pairs))
        norm = run.update(optimizer, model)
        loss, right, pairs = run.sum(total).tolist()
        metrics = {
            "loss": loss,
            "accuracy": right / max(pairs, 1),
            "learning_rate": rate,
            "grad_norm": norm,
            "completions_per_second": run.ranks
            * sum(len(p.completions) for p in rows)
            / (time.perf_counter() - start),
        }
        if eval_prompts and run.evaluates_after(step, steps):
            eval_loss, accuracy = held_out(run, model, eval_prompts, filler)
            metrics |= {"eval_loss": eval_loss, "eval_accuracy": accuracy}
            run.results["accuracy"] = accuracy
        run.log(step + 1, metrics)

    if "accuracy" in run.results:
        run.say(f"held-out pairs: {run.results['accuracy']:.1%} right")
    shift = mean_best_score(run, model, prompts, filler)

    def write_model(folder) -> None:
        result = run.accelerator.unwrap_model(model)
        with torch.no_grad():
            result.head.bias -= shift
        result.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    run.finish(write_model)
    return dict(run.results)


def main(argv: Sequence[str]) -> int:
    """`rlhf-fast reward`."""
    config = parse("reward", argv)
    if config is not None:
        train(config)
    return 0
