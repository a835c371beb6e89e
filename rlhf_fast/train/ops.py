"""The ops of the loop on the tensors of a run: time, plain PyTorch's time, largest difference."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rlhf_fast
from rlhf_fast import _dispatch, testing
from rlhf_fast.bench import eager
from rlhf_fast.train import batches
from rlhf_fast.train.config import Config, read_yaml
from rlhf_fast.train.data import load
from rlhf_fast.train.experience import Actors, Experience
from rlhf_fast.train.models import load_causal_lm, load_scalar_model, load_tokenizer, positions
from rlhf_fast.train.reward import encode_ranked, scores_and_ranks

ROWS = 64
Tensors = tuple[torch.Tensor, ...]


class Case(NamedTuple):
    """An op and the plain PyTorch that it replaces; `expected` is compared where it is not
    `plain`, because that one draws at random."""

    name: str
    ours: Callable[[], Tensors]
    plain: Callable[[], Tensors]
    expected: Callable[[], Tensors] | None = None


def _with_gradient(function: Callable[..., Tensors], *leaves: torch.Tensor) -> Tensors:
    """What `function` returns, and the gradients of the sum of its first result."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    outputs = function(*leaves)
    return *outputs, *torch.autograd.grad(outputs[0].sum(), leaves)


def _hidden(model: Any, rollout: Experience) -> torch.Tensor:
    """Hidden states [N, T, H] that predict the response."""
    with torch.no_grad():
        states = model.base_model(
            input_ids=rollout.sequence,
            attention_mask=rollout.sequence_mask,
            position_ids=positions(rollout.sequence_mask),
            use_cache=False,
        ).last_hidden_state
    return states[:, -rollout.ids.shape[1] - 1 : -1]


def _head_case(hidden: torch.Tensor, weight: torch.Tensor, rollout: Experience) -> Case:
    mask, ids = rollout.mask, rollout.ids

    def ours(x: torch.Tensor, w: torch.Tensor) -> Tensors:
        return (rlhf_fast.linear_logprob(x, w, ids, mask=mask),)

    def plain(x: torch.Tensor, w: torch.Tensor) -> Tensors:
        return (eager.logprob(x @ w.t(), ids) * mask,)

    return Case(
        "linear_logprob, gradient",
        lambda: _with_gradient(ours, hidden, weight),
        lambda: _with_gradient(plain, hidden, weight),
    )


def _token_cases(config: Config, rollout: Experience, logits: torch.Tensor) -> list[Case]:
    """Log-probs, rewards, advantages and the loss of one rollout."""
    mask, ids = rollout.mask, rollout.ids
    scores, old, ref = rollout.scores, rollout.logprob, rollout.ref_logprob
    rewards, _ = rlhf_fast.shaped_rewards(scores, old, ref, mask, kl_coef=config.kl_coef)
    gamma, lam = config.gamma, config.lam
    advantages, returns = rlhf_fast.gae(rewards, rollout.values, gamma=gamma, lam=lam, mask=mask)
    new = old - 0.1 * mask * testing.randn(*old.shape, seed=1)
    values = rollout.values + 0.1 * mask * testing.randn(*old.shape, seed=2)

    def plain_loss(logprob: torch.Tensor, value: torch.Tensor) -> Tensors:
        policy, _ = eager.policy_loss(logprob, old, advantages, mask)
        return (policy + 0.1 * eager.value_loss(value, rollout.values, returns, mask)[0],)

    def our_loss(logprob: torch.Tensor, value: torch.Tensor) -> Tensors:
        found = rlhf_fast.ppo_loss(
            logprob, old, advantages, value, rollout.values, returns, mask, value_coef=0.1
        )
        return (found.loss,)

    def plain_logprob(z: torch.Tensor) -> Tensors:
        return (eager.logprob(z, ids) * mask,)

    def plain_entropy(z: torch.Tensor) -> Tensors:
        return tuple(x * mask for x in eager.logprob_entropy(z, ids))

    return [
        Case(
            "logprob, gradient",
            lambda: _with_gradient(lambda z: (rlhf_fast.logprob(z, ids, mask=mask),), logits),
            lambda: _with_gradient(plain_logprob, logits),
        ),
        Case(
            "logprob_entropy",
            lambda: tuple(rlhf_fast.logprob_entropy(logits, ids, mask=mask)),
            lambda: plain_entropy(logits),
        ),
        Case(
            "shaped_rewards",
            lambda: rlhf_fast.shaped_rewards(scores, old, ref, mask, kl_coef=config.kl_coef),
            lambda: eager.shaped_rewards(scores, old, ref, mask, config.kl_coef),
        ),
        Case(
            "gae",
            lambda: tuple(rlhf_fast.gae(rewards, rollout.values, gamma=gamma, lam=lam, mask=mask)),
            lambda: eager.gae_loop(rewards, rollout.values, gamma, lam, mask),
        ),
        Case(
            "whiten",
            lambda: (rlhf_fast.whiten(advantages, mask),),
            lambda: (eager.whiten(advantages, mask),),
        ),
        Case(
            "ppo_loss, gradients",
            lambda: _with_gradient(our_loss, new, values),
            lambda: _with_gradient(plain_loss, new, values),
        ),
    ]


def _sample_case(logits: torch.Tensor) -> Case:
    """One step of decoding. Plain PyTorch draws other ids; what it says of ours is compared."""

    def expected() -> Tensors:
        ids = rlhf_fast.sample(logits, seed=0, position=0).ids
        return (ids, *eager.describe(*eager.filtered(logits, 1.0, 0, 1.0), ids))

    return Case(
        "sample",
        lambda: tuple(rlhf_fast.sample(logits, seed=0, position=0)),
        lambda: eager.sample(logits, 1.0, 0, 1.0),
        expected,
    )


def _ranking_case(scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> Case:
    def plain(r: torch.Tensor) -> Tensors:
        """A loop over the pairs of each prompt, as trainers with one pair a row would need."""
        losses = []
        for p in range(r.shape[0]):
            terms = [
                -torch.nn.functional.logsigmoid(r[p, i] - r[p, j])
                for i in range(r.shape[1])
                for j in range(r.shape[1])
                if mask[p, i] and mask[p, j] and ranks[p, i] < ranks[p, j]
            ]
            losses += [torch.stack(terms).mean()] if terms else []
        return (torch.stack(losses).mean(),)

    return Case(
        "ranking_loss, gradient",
        lambda: _with_gradient(lambda r: (rlhf_fast.ranking_loss(r, ranks, mask),), scores),
        lambda: _with_gradient(plain, scores),
    )


def cases(output: Path) -> list[Case]:
    """The ops that a demo run in `output` has used, on its models, prompts and completions."""
    config = replace(Config(**read_yaml(output / "ppo" / "config.yaml")), samples_per_prompt=1)
    tokenizer = load_tokenizer(config.model)
    policy, reference = load_causal_lm(str(output / "ppo")), load_causal_lm(config.model)
    reward = load_scalar_model(config.reward_model)
    actors = Actors(
        config, tokenizer, policy.eval(), reference.eval(), reward.eval(), reward.eval()
    )
    prompts = [record.prompt for record in load(config.eval_data)][:ROWS]
    rollout = actors.collect(prompts, config.seed, torch.device("cpu"))
    hidden, weight = _hidden(policy, rollout), rlhf_fast.causal_lm_head(policy).weight.detach()
    logits = hidden @ weight.t()
    ranked = load(output / "data" / "ranked_held_out.jsonl")
    encoded = encode_ranked(tokenizer, config, ranked)[:ROWS]
    with torch.no_grad():
        judged = scores_and_ranks(reward, encoded, batches.pad_id(tokenizer), torch.device("cpu"))
    return [
        _head_case(hidden, weight, rollout),
        *_token_cases(config, rollout, logits),
        _sample_case(logits[:, 0]),
        _ranking_case(*judged),
    ]


def table(output: Path) -> str:
    """A line per op: ours and plain PyTorch in milliseconds (medians, in turns), the ratio, the
    largest difference of any result or gradient."""
    lines = [
        f"{'op':<25} {'backend':<10} {'ours':>9} {'plain':>9} {'ratio':>7}  largest difference"
    ]
    for name, ours, plain, expected in cases(output):
        op = name.split(",")[0]
        usual = next(b for b in ("cpu", "reference") if _dispatch.backends()[op][b] is True)
        backend = os.environ.get("RLHF_FAST_BACKEND", usual)
        times = testing.time_ms({"ours": ours, "plain": plain}, seconds=0.3)
        ms = {key: statistics.median(values) for key, values in times.items()}
        pairs = zip(ours(), (expected or plain)(), strict=True)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        ratio = ms["plain"] / ms["ours"]
        lines.append(
            f"{name:<25} {backend:<10} {ms['ours']:6.2f} ms {ms['plain']:6.2f} ms {ratio:6.1f}x"
            f"  {difference:.1e}"
        )
    return "\n".join(lines)
