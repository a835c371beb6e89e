"""What the kernels of all backends share: numbers of the options, and the tensors of each loss.

A kernel is `launch(tokens, grads, normalizer, divisor, kind, estimator, reduction, clips,
coefficients)`, which fills `grads` and returns (loss, stats). The torch ops' functions follow with
the launch in front of their arguments. What is passed on is float32 (the table of implementations
sends float64 elsewhere) and dense.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# The numbers of csrc/ppo_loss and of the Triton kernels.
KINDS = {"ppo": 0, "grpo": 0, "gspo": 1, "reinforce": 2, "a2c": 2, "cispo": 3, "sapo": 4}
REDUCTIONS = {
    "token-mean": 0,
    "token-sum": 1,
    "seq-mean-token-mean": 2,
    "seq-mean-token-sum": 3,
}

Launch = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def policy_loss(
    launch: Launch,
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    weights: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    divisor: float | None,
    kind: str,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, stats, unit gradient of logprob, that of advantages: empty unless "reinforce")."""
    grad = torch.empty_like(logprob)
    grad_advantages = torch.empty_like(logprob) if kind == "reinforce" else None
    tokens = (logprob, old_logprob, advantages, weights, None, None, None, None, None, mask)
    loss, stats = launch(
        tokens, (grad, grad_advantages, None, None), normalizer, divisor, kind, "k1", reduction,
        (clip_low, clip_high, dual_clip, None), (0.0, 0.0, 0.0),
    )  # fmt: skip
    empty = logprob.new_empty(0) if grad_advantages is None else grad_advantages
    return loss, stats, grad, empty


def value_loss(
    launch: Launch,
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    divisor: float | None,
    clip: float | None,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, stats, unit gradient of values)."""
    grad = torch.empty_like(values)
    tokens = (None, None, None, None, values, old_values, returns, None, None, mask)
    loss, stats = launch(
        tokens, (None, None, grad, None), normalizer, divisor, "ppo", "k1", reduction,
        (None, None, None, clip), (1.0, 0.0, 0.0),
    )  # fmt: skip
    return loss, stats, grad


def ppo_loss(
    launch: Launch,
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    entropy: torch.Tensor | None,
    ref_logprob: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    divisor: float | None,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, stats, unit gradients of logprob, values and entropy: the last empty without one)."""
    grad, grad_values = torch.empty_like(logprob), torch.empty_like(logprob)
    grad_entropy = None if entropy is None else torch.empty_like(logprob)
    tokens = (
        logprob, old_logprob, advantages, None, values, old_values, returns, entropy, ref_logprob,
        mask,
    )  # fmt: skip
    loss, stats = launch(
        tokens, (grad, None, grad_values, grad_entropy), normalizer, divisor, "ppo", kl_estimator,
        reduction, (clip_low, clip_high, dual_clip, value_clip),
        (value_coef, entropy_coef, kl_coef),
    )  # fmt: skip
    empty = logprob.new_empty(0) if grad_entropy is None else grad_entropy
    return loss, stats, grad, grad_values, empty


LOSSES = policy_loss, value_loss, ppo_loss
