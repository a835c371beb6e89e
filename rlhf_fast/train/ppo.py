"""Reinforcement learning against a reward model: PPO, A2C or REINFORCE, with PPO-ptx.

One step: sample responses; score them; pay -kl_coef * KL to the reference per token; turn rewards
into advantages; improve the policy (and the value model) on them.

    algorithm   advantages                      loss                         passes over a rollout
    ppo         GAE                             clipped ratio + value        ppo_epochs
    a2c         GAE                             -A log pi + value            1
    reinforce   discounted returns              -A log pi                    1

With `ptx_coef` each optimiser step also descends ptx_coef times the cross-entropy of pretraining
text: one step on the sum of both gradients, not a second step. Sources: Ouyang et al., "Training
language models to follow instructions with human feedback", 2022, eq. 2; Ziegler et al.,
"Fine-Tuning Language Models from Human Preferences", 2019 (adaptive KL coefficient).

The policy is always in evaluation mode: with dropout, the ratio of the first pass would not be 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.train import batches, mismatch
from rlhf_fast.train.batches import Batch
from rlhf_fast.train.config import Config, parse
from rlhf_fast.train.data import load
from rlhf_fast.train.experience import Actors, Experience, response_values
from rlhf_fast.train.models import (
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    positions,
)
from rlhf_fast.train.run import Run, epochs_to_steps
from rlhf_fast.train.sft import cross_entropy

# Statistics of a loss that go into the metrics.
LOGGED = ("clip_fraction", "value_clip_fraction", "approx_kl_k3", "ratio_mean")


class KLController:
    """The KL coefficient: fixed, or driven to a target KL per sequence.

    error = clip(kl / target - 1, -0.2, 0.2),   coef *= 1 + error * sequences / horizon
    """

    def __init__(self, config: Config) -> None:
        self.coef, self.target, self.horizon = config.kl_coef, config.kl_target, config.kl_horizon

    def update(self, kl: float, sequences: int) -> None:
        """Adapt to the mean KL per sequence of so many sequences."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * sequences / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def add_advantages(run: Run, rollout: Experience, kl_coef: float) -> torch.Tensor:
    """Fill in kl, advantages and returns; the rewards [N, T]."""
    config = run.config
    rewards, rollout.kl = rlhf_fast.shaped_rewards(
        rollout.scores, rollout.logprob, rollout.ref_logprob, rollout.mask,
        kl_coef=kl_coef, estimator=config.kl_estimator,
    )  # fmt: skip
    if config.algorithm == "reinforce":
        returns = rlhf_fast.discounted_returns(rewards, gamma=config.gamma, mask=rollout.mask)
        rollout.advantages = rollout.returns = returns
    else:
        rollout.advantages, rollout.returns = rlhf_fast.gae(
            rewards, rollout.values, gamma=config.gamma, lam=config.lam, mask=rollout.mask
        )
    if config.whiten:
        group = torch.distributed.group.WORLD if run.ranks > 1 else None
        rollout.advantages = rlhf_fast.whiten(rollout.advantages, rollout.mask, group=group)
    return rewards


def policy_gradient_loss(
    config: Config, policy: Any, value: Any, part: Experience, normalizer: torch.Tensor
) -> rlhf_fast.Loss:
    """The loss of some rows of a rollout; token sums are divided by `normalizer`."""
    assert part.advantages is not None  # see add_advantages
    options: dict[str, Any] = {}
    if config.algorithm == "ppo":
        names = ("clip_low", "clip_high", "dual_clip", "entropy_coef")
        options = {name: getattr(config, name) for name in names}
    policy_part = rlhf_fast.model_policy_loss(
        policy, part.sequence, part.sequence_mask, part.logprob, part.advantages, part.mask,
        temperature=config.temperature, kind=config.algorithm, normalizer=normalizer,
        position_ids=positions(part.sequence_mask), **options,
    )  # fmt: skip
    if config.algorithm == "reinforce":
        return policy_part
    value_part = rlhf_fast.value_loss(
        response_values(value, part), part.values, part.returns, part.mask,
        clip=config.value_clip, normalizer=normalizer,
    )  # fmt: skip
    # Each function leaves the other's statistics at 0; both count the tokens.
    stats = torch.where(policy_part.stats != 0, policy_part.stats, value_part.stats)
    return rlhf_fast.Loss(policy_part.loss + config.value_coef * value_part.loss, stats)


def load_models(run: Run) -> tuple[Any, Any, Any, Any, Any]:
    """(tokenizer, policy, reference, reward model, value model or None) that the options name."""
    config = run.config
    tokenizer = load_tokenizer(config.model)
    if load_tokenizer(config.reward_model).get_vocab() != tokenizer.get_vocab():
        raise ValueError("reward_model: expected the tokenizer of model, got another vocabulary")
    policy, reference = load_causal_lm(config.model), load_causal_lm(config.model)
    reward, value = load_scalar_model(config.reward_model, trained=True), None
    if config.algorithm != "reinforce":
        start = config.reward_model if config.value_from == "reward" else config.model
        value = load_scalar_model(start)
    for frozen in (reference, reward):
        frozen.requires_grad_(False).to(run.device)
    for model in (policy, reference, reward, value):
        if model is not None:
            model.eval()
    return tokenizer, policy, reference, reward, value


def train(config: Config) -> dict[str, float]:
    """Run the stage; the held-out score, gold reward and KL before and behind it."""
    config.need("ppo", "model", "reward_model", "data")
    if config.ptx_coef:
        config.need("ppo with ptx_coef", "pretraining_data")
    if not config.temperature:
        raise ValueError("temperature: expected a number > 0 to learn from samples, got 0")
    run = Run("ppo", config)
    responses = config.batch_size // run.ranks * config.samples_per_prompt
    if config.algorithm == "ppo" and config.minibatches > responses:
        raise ValueError(
            f"minibatches: expected at most {responses}, the responses of a step and rank, got "
            f"{config.minibatches}"
        )
    tokenizer, *models = load_models(run)
    actors = Actors(config, tokenizer, *models)
    # The same modules as the actors', wrapped where there are several ranks.
    (policy, *rest), optimizer = run.prepare(*(m for m in (models[0], models[3]) if m is not None))
    value = rest[0] if rest else None
    kl_controller = KLController(config)
    run.accelerator.register_for_checkpointing(kl_controller)
    records, held_out = batches.split(config, "ppo")
    prompts, eval_prompts = (
        [record.prompt for record in part if record.prompt] for part in (records, held_out)
    )
    if not prompts:
        raise ValueError(f"data: expected prompts, got none in {config.data}")
    if len(eval_prompts) < run.ranks:
        eval_prompts = []  # each rank needs one, or it would miss the sums over ranks
    pretraining = Pretraining(run, tokenizer) if config.ptx_coef else None
    order = batches.Order(len(prompts), config.seed)
    steps = epochs_to_steps(config, len(prompts))
    done = run.resume()
    if done == 0 and eval_prompts:
        found = evaluate(run, actors, eval_prompts, 0)
        run.results |= {f"{name}_before": number for name, number in found.items()}
        run.log(0, {f"eval_{name}": number for name, number in found.items()})

    for step in run.steps(done, steps):
        clock = time.perf_counter()
        rate = run.set_learning_rate(optimizer, step, steps)
        chosen = order.batch(step, config.batch_size, run.rank, run.ranks)
        batch = [prompts[i] for i in chosen]
        # 2^20 rollouts, each with its own seed on each rank.
        seed = ((config.seed << 20) + step) * run.ranks + run.rank
        rollout = collect(run, actors, batch, seed)
        sampled = time.perf_counter()
        rewards = add_advantages(run, rollout, kl_controller.coef)
        metrics = describe(run, rollout, rewards, actors.gold_scores(batch, rollout))
        metrics |= {"kl_coef": kl_controller.coef, "learning_rate": rate}
        metrics |= improve(run, policy, value, optimizer, rollout, step, pretraining)
        kl_controller.update(metrics["kl"], int(metrics.pop("sequences")))
        now = time.perf_counter()
        metrics |= {"seconds_sampling": sampled - clock, "seconds_learning": now - sampled}
        metrics["tokens_per_second"] = metrics.pop("tokens") / (now - clock)
        if eval_prompts and run.evaluates_after(step, steps):
            found = evaluate(run, actors, eval_prompts, step + 1)
            metrics |= {f"eval_{name}": number for name, number in found.items()}
            run.results |= found
        run.log(step + 1, metrics)

    def write_model(folder) -> None:
        actors.policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    run.finish(write_model)
    return dict(run.results)


def collect(run: Run, actors: Actors, prompts: list[str], seed: int) -> Experience:
    """A rollout in which reference and reward model have the precision of the policy: accelerate
    switches mixed precision on in the models that it has prepared only."""
    with run.accelerator.autocast():
        return actors.collect(prompts, seed, run.device)


def improve(
    run: Run,
    policy: Any,
    value: Any,
    optimizer: Any,
    rollout: Experience,
    step: int,
    pretraining: Pretraining | None,
) -> dict[str, float]:
    """The optimiser steps on one rollout; means of their metrics."""
    config = run.config
    passes, pieces = 1, 1
    if config.algorithm == "ppo":
        passes, pieces = config.ppo_epochs, config.minibatches
    history: list[dict[str, float]] = []
    for number in range(passes):
        generator = torch.Generator().manual_seed((config.seed << 32) + (step << 8) + number)
        for chosen in torch.randperm(len(rollout), generator=generator).tensor_split(pieces):
            ptx: list[Batch] = []
            if pretraining is not None:
                ptx = pretraining.batch(step * passes * pieces + len(history), pieces)
            minibatch = rollout.take(chosen)
            history.append(update(run, policy, value, optimizer, minibatch, ptx))
    return {name: sum(entry[name] for entry in history) / len(history) for name in history[0]}


def update(
    run: Run, policy: Any, value: Any, optimizer: Any, minibatch: Experience, ptx: list[Batch]
) -> dict[str, float]:
    """One optimiser step on a minibatch, and on the pretraining text beside it."""
    config, names = run.config, rlhf_fast.Loss.stats_names
    modules = [policy] if value is None else [policy, value]
    tokens = run.sum(minibatch.mask.sum()).clamp(min=1)
    totals = torch.zeros(2, len(names), device=run.device)
    parts = list(minibatch.chunks(config.micro_batch))
    for number, part in enumerate(parts, 1):
        more = number < len(parts)
        with run.accumulating(more or bool(ptx), policy), run.accumulating(more, *modules[1:]):
            # Ranks' gradients are averaged, so each divides by its share of all tokens.
            out = policy_gradient_loss(config, policy, value, part, tokens / run.ranks)
            run.accelerator.backward(out.loss)
        # Losses are sums over `normalizer`, the other statistics means over this part's tokens.
        totals += torch.stack((out.stats / run.ranks, out.stats * part.mask.sum() / tokens))
    ptx_tokens = run.sum(sum((text.response[:, 1:].sum() for text in ptx), tokens.new_zeros(())))
    ptx_loss = torch.zeros((), device=run.device)
    for number, text in enumerate(ptx, 1):
        with run.accumulating(number < len(ptx), policy):
            nats = cross_entropy(policy, text) / ptx_tokens
            run.accelerator.backward(config.ptx_coef * run.ranks * nats)
        ptx_loss += nats.detach()
    norm = run.update(optimizer, *modules)
    sums, means = run.sum(totals).tolist()
    metrics = {name: sums[names.index(name)] for name in ("policy_loss", "value_loss")}
    metrics |= {name: means[names.index(name)] for name in LOGGED}
    if ptx:
        metrics["ptx_loss"] = run.sum(ptx_loss).item()
    return metrics | {"grad_norm": norm}


class Pretraining:
    """Blocks of pretraining text for the ptx gradient, in an order that the seed fixes."""

    def __init__(self, run: Run, tokenizer: Any) -> None:
        config = run.config
        self.run, self.filler = run, batches.pad_id(tokenizer)
        records = load(config.pretraining_data)
        self.blocks = batches.text_blocks(tokenizer, config, records)
        self.order = batches.Order(len(self.blocks), config.seed)

    def batch(self, place: int, pieces: int) -> list[Batch]:
        """This rank's micro-batches of optimiser step number `place`."""
        config, run = self.run.config, self.run
        rows = config.ptx_batch or config.batch_size * config.samples_per_prompt // pieces
        rows = math.ceil(rows / run.ranks) * run.ranks  # every rank takes part in every step
        chosen = self.order.batch(place, rows, run.rank, run.ranks)
        return [
            batches.pad([self.blocks[i] for i in part], self.filler, run.device)
            for part in batches.chunks(chosen, config.micro_batch)
        ]


def describe(
    run: Run, rollout: Experience, rewards: torch.Tensor, gold: torch.Tensor | None
) -> dict[str, float]:
    """Means over the responses of a rollout, of all ranks: a score's per response, kl in nats per
    response, entropy in nats per token, length in tokens."""
    per_response = {
        "score": rollout.scores,
        "reward": rewards.sum(1),
        "kl": (rollout.logprob - rollout.ref_logprob).sum(1),
        "length": rollout.mask.sum(1),
        "finished": rollout.finished,
    }
    if gold is not None:
        per_response["gold"] = gold
    compared = rollout.sampled_logprob, rollout.logprob, rollout.mask
    gaps = mismatch.sums(*compared)
    sums = [x.double().sum() for x in per_response.values()]
    sums += [rollout.entropy.double().sum(), gaps.new_tensor(len(rollout)), *gaps]
    found = run.sum(torch.stack(sums)).tolist()
    values, (entropy, count, *meter) = found[: len(per_response)], found[len(per_response) :]
    tokens = meter[-1]
    metrics = {name: x / count for name, x in zip(per_response, values, strict=True)}
    metrics |= mismatch.metrics(meter, run.max(mismatch.largest(*compared)))
    return metrics | {"entropy": entropy / max(tokens, 1), "tokens": tokens, "sequences": count}


def evaluate(run: Run, actors: Actors, prompts: list[str], step: int) -> dict[str, float]:
    """Score, gold reward and KL of responses to held-out prompts, sampled with one seed always."""
    config = run.config
    chosen = prompts[: config.eval_batches * config.batch_size][run.rank :: run.ranks]
    rollout = collect(run, actors, chosen, config.seed * run.ranks + run.rank)
    gold = actors.gold_scores(chosen, rollout)
    found = describe(run, rollout, torch.zeros_like(rollout.logprob), gold)
    shown = {"score": rollout.scores.tolist()} | ({} if gold is None else {"gold": gold.tolist()})
    texts = actors.texts(rollout)
    samples = [
        {"prompt": chosen[i // config.samples_per_prompt], "response": texts[i]}
        | {name: values[i] for name, values in shown.items()}
        for i in range(0, min(len(texts), 8 * config.samples_per_prompt), config.samples_per_prompt)
    ]
    run.log_samples(step, samples)
    names = ("score", "gold", "kl", "length", "finished", "entropy")
    result = {name: found[name] for name in names if name in found}
    words = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
    run.say(f"held-out prompts after step {step}: {words}")
    return result


def main(argv: Sequence[str]) -> int:
    """`rlhf-fast ppo`."""
    config = parse("ppo", argv)
    if config is not None:
        train(config)
    return 0
