"""Supervised fine-tuning: the model learns the best response of each prompt, or plain text.

The loss is the mean cross-entropy of the response tokens of a step, over all ranks and
micro-batches. Source: Ouyang et al., "Training language models to follow instructions with human
feedback", 2022, section 3.5.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.train import batches
from rlhf_fast.train.batches import Batch, Example
from rlhf_fast.train.config import Config, parse
from rlhf_fast.train.models import check_fit, load_causal_lm, load_tokenizer, positions
from rlhf_fast.train.run import Run, epochs_to_steps


def token_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """Log-probs [B, S - 1] of each response token under the model, 0 elsewhere."""
    return rlhf_fast.model_logprob(
        model,
        batch.ids,
        batch.mask,
        mask=batch.response[:, 1:],
        position_ids=positions(batch.mask),
    )


def cross_entropy(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of -log p over the response tokens, in nats."""
    return -token_logprobs(model, batch).sum()


@torch.no_grad()
def held_out_loss(run: Run, model: Any, examples: Sequence[Example], filler: int) -> float:
    """Mean cross-entropy of held-out response tokens, in nats per token."""
    config, total = run.config, torch.zeros(2, dtype=torch.float64, device=run.device)
    model.eval()
    chosen = examples[: config.eval_batches * config.batch_size][run.rank :: run.ranks]
    for part in batches.chunks(chosen, config.micro_batch):
        batch = batches.pad(part, filler, run.device)
        total += torch.stack((cross_entropy(model, batch), batch.response[:, 1:].sum())).double()
    model.train()
    loss, tokens = run.sum(total).tolist()
    return loss / max(tokens, 1)


def train(config: Config) -> dict[str, float]:
    """Run the stage; the held-out losses before and behind it."""
    config.need("sft", "model", "data")
    run = Run("sft", config)
    tokenizer, model = load_tokenizer(config.model), load_causal_lm(config.model)
    filler = batches.pad_id(tokenizer)
    records, held_out = batches.split(config, "sft")
    examples = batches.examples(tokenizer, config, records)
    eval_examples = batches.examples(tokenizer, config, held_out)
    if not examples:
        raise ValueError(f"data: expected records with a response, got none in {config.data}")
    if not eval_examples:  # a text is one record: its last blocks are held out
        kept = len(examples) - int(config.eval_fraction * len(examples))
        examples, eval_examples = examples[:kept], examples[kept:]
    check_fit(model, filler, *(example.ids for example in (*examples, *eval_examples)))
    steps = epochs_to_steps(config, len(examples))
    order = batches.Order(len(examples), config.seed)
    (model,), optimizer = run.prepare(model)
    model.train()
    done = run.resume()
    if done == 0 and eval_examples:
        loss = run.results["loss_before"] = held_out_loss(run, model, eval_examples, filler)
        run.say(f"held-out loss {loss:.4f} nats per token before training")

    for step in run.steps(done, steps):
        start = time.perf_counter()
        rate = run.set_learning_rate(optimizer, step, steps)
        rows = [examples[i] for i in order.batch(step, config.batch_size, run.rank, run.ranks)]
        parts = [
            batches.pad(part, filler, run.device)
            for part in batches.chunks(rows, config.micro_batch)
        ]
        tokens = run.sum(torch.stack([part.response[:, 1:].sum() for part in parts]).sum())
        total = torch.zeros((), device=run.device)
        for number, part in enumerate(parts, 1):
            with run.accumulating(number < len(parts), model):
                # Ranks' gradients are averaged: each counts its part of all ranks' tokens.
                loss = cross_entropy(model, part) * run.ranks / tokens.clamp(min=1)
                run.accelerator.backward(loss)
            total += loss.detach() / run.ranks
        norm = run.update(optimizer, model)
        metrics = {
            "loss": run.sum(total).item(),
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens.item() / (time.perf_counter() - start),
        }
        if eval_examples and run.evaluates_after(step, steps):
            metrics["eval_loss"] = held_out_loss(run, model, eval_examples, filler)
            run.results["loss"] = metrics["eval_loss"]
        run.log(step + 1, metrics)

    if "loss" in run.results:
        run.say(f"held-out loss {run.results['loss']:.4f} nats per token")

    def write_model(folder) -> None:
        run.accelerator.unwrap_model(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    run.finish(write_model)
    return dict(run.results)


def main(argv: Sequence[str]) -> int:
    """`rlhf-fast sft`."""
    config = parse("sft", argv)
    if config is not None:
        train(config)
    return 0
