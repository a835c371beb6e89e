"""Policy, value and PPO losses: checks, schemas, fakes, autograd.

The forward op returns each gradient for an upstream gradient of 1; the backward multiplies it by
the upstream gradient, a scalar. So a loss, its statistics and its gradients take one pass over the
tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rlhf_fast import _args, _dispatch
from rlhf_fast.kernels.kl.op import ESTIMATORS

from ._checks import (
    check_normalizer,
    clip_arguments,
    common_dtype,
    data_rows,
    optional,
    rows,
    split_normalizer,
    token_mask,
)
from .reference import STATS

for _op in ("policy_loss", "value_loss", "ppo_loss"):
    _dispatch.implementations(_op, __package__)

KINDS = ("ppo", "grpo", "reinforce", "a2c", "cispo", "gspo", "sapo")
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")


class Loss(NamedTuple):
    """A scalar loss and its statistics, all of them in one 1-D tensor on the device.

    `stats[k]` is called `stats_names[k]`. Fractions and means are per unmasked token, and a
    statistic that the function does not have is 0:

    - `policy_loss`, `value_loss`: the two losses as reduced, before their coefficients
    - `entropy`, `kl`: means of the terms given
    - `clip_fraction`: tokens whose clipped term is strictly the larger one (cispo: whose weight is
      clipped); `clip_fraction_low` of them below 1 - clip_low, `clip_fraction_high` above
      1 + clip_high; `dual_clip_fraction`: tokens at the dual clip; `value_clip_fraction`
    - `approx_kl_k1` = mean(old - new), `approx_kl_k3` = mean(rho - 1 - log rho), both of the tokens
      (in gspo too)
    - `ratio_mean`, `ratio_min`, `ratio_max`: of the rho in the loss (in gspo the sequence's)
    - `tokens`: how many are unmasked
    """

    loss: torch.Tensor
    stats: torch.Tensor

    stats_names = STATS

    def stats_dict(self) -> dict[str, float]:
        """The statistics by name, by one copy to the host."""
        return dict(zip(self.stats_names, self.stats.tolist(), strict=True))


# ------------------------------------------------------------------------------------- registration

_POLICY = (
    "Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor? mask, Tensor? weights, "
    "Tensor? normalizer, float? divisor, str kind, float? clip_low, float? clip_high, "
    "float? dual_clip, str reduction"
)
_VALUE = (
    "Tensor values, Tensor old_values, Tensor returns, Tensor? mask, Tensor? normalizer, "
    "float? divisor, float? clip, str reduction"
)
_PPO = (
    "Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor values, Tensor old_values, "
    "Tensor returns, Tensor? mask, Tensor? entropy, Tensor? ref_logprob, Tensor? normalizer, "
    "float? divisor, float? clip_low, float? clip_high, float? dual_clip, float? value_clip, "
    "float value_coef, float entropy_coef, float kl_coef, str kl_estimator, str reduction"
)


def _fake_loss(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return like.new_empty(()), like.new_empty(len(STATS))


def _fake_policy(logprob, old_logprob, advantages, *others):
    kind = others[4]
    unit_advantages = logprob.new_empty(logprob.shape if kind == "reinforce" else 0)
    return *_fake_loss(logprob), logprob.new_empty(logprob.shape), unit_advantages


def _fake_value(values, *_):
    return *_fake_loss(values), values.new_empty(values.shape)


def _fake_ppo(logprob, *others):
    entropy = others[6]
    unit_entropy = logprob.new_empty(0 if entropy is None else logprob.shape)
    return (
        *_fake_loss(logprob),
        logprob.new_empty(logprob.shape),
        logprob.new_empty(logprob.shape),
        unit_entropy,
    )


def _check_policy(logprob, old_logprob, advantages, mask, weights, normalizer, divisor, *_):
    check_normalizer(mask, normalizer, divisor)


def _check_value(values, old_values, returns, mask, normalizer, divisor, *_):
    check_normalizer(mask, normalizer, divisor)


def _check_ppo(
    logprob, old_logprob, advantages, values, old_values, returns, mask, entropy, ref_logprob,
    normalizer, divisor, *_,
) -> None:  # fmt: skip
    check_normalizer(mask, normalizer, divisor)


_dispatch.define(
    "policy_loss",
    f"policy_loss({_POLICY}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_policy,
    check=_check_policy,
)
_dispatch.define(
    "value_loss",
    f"value_loss({_VALUE}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_value,
    check=_check_value,
)
_dispatch.define(
    "ppo_loss",
    f"ppo_loss({_PPO}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_ppo,
    check=_check_ppo,
)


def _scale(grad, unit, source, owned=False):
    # Every backend rounds the product alike, so the device alone chooses.
    scale = _dispatch.choose("scale_unit_gradient", unit.device.type, unit.dtype, "")
    return scale(grad, unit, owned)


def scaled(
    grad: torch.Tensor, unit: torch.Tensor, source: torch.Tensor, owned: bool = False
) -> torch.Tensor:
    """The gradient of `source`.

    Where nobody can differentiate it again, without the op's 25 us; and for `loss.backward()`, with
    its upstream gradient of 1, without a copy (0.2 ms for two of 256 x 1024). As long as the graph
    is retained autograd sees that the tensor is shared, and copies it into `.grad`.

    A GPU does not know the upstream gradient on the host. There a unit gradient is scaled in place
    if it is `owned`, by this graph alone, and the graph is not kept: the kernel leaves at once for
    an upstream gradient of 1.
    """
    if torch.is_grad_enabled() or type(grad) is not torch.Tensor:  # create_graph, or traced
        return torch.ops.rlhf_fast.scale_unit_gradient(grad, unit, source)
    if grad.device.type == "cpu" and grad.item() == 1:
        return unit
    owned = owned and not torch._C._autograd._get_current_graph_task_keep_graph()
    return _scale(grad, unit, source, owned)


# grad * unit, as an op of its own so that a second derivative raises: `source`, the tensor whose
# gradient this is, does not enter the product and is there to keep the result in the graph.
_dispatch.serve("ppo_loss", "scale_unit_gradient")
_dispatch.LIB.define("scale_unit_gradient(Tensor grad, Tensor unit, Tensor source) -> Tensor")
_dispatch.LIB.impl("scale_unit_gradient", _scale, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rlhf_fast::scale_unit_gradient", lambda grad, unit, source: unit * grad, lib=_dispatch.LIB
)
_dispatch.once_differentiable("scale_unit_gradient")


class _Caller(threading.local):
    drops_units = False


_caller = _Caller()


def drop_units(op: Callable[..., tuple], *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two results, loss and statistics, of the torch op `op`, whose unit gradients are
    then owned by its graph."""
    if torch.compiler.is_compiling():
        loss, stats, *_ = op(*args)
        return loss, stats
    _caller.drops_units = True
    try:
        loss, stats, *_ = op(*args)
    finally:
        _caller.drops_units = False
    return loss, stats


def units_are_dropped() -> bool:
    """Whether the op at hand was called by `drop_units`."""
    return _caller.drops_units


def register_unit_gradients(name: str, sources: Sequence[int], arguments: int) -> None:
    """Autograd of the torch op `name`, which has `arguments` arguments and returns
    (loss, others..., unit gradient of each argument number in `sources`)."""
    count = len(sources)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros as large as each unit gradient
        ctx.owned = units_are_dropped()
        ctx.save_for_backward(*output[-count:], *(inputs[k] for k in sources))

    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
        saved = ctx.saved_tensors
        grads: list[torch.Tensor | None] = [None] * arguments
        for k, unit, source in zip(sources, saved[:count], saved[count:], strict=True):
            if ctx.needs_input_grad[k] and grad is not None:
                grads[k] = scaled(grad, unit, source, ctx.owned)
        return tuple(grads)

    _dispatch.differentiable(name, setup_context=setup_context, backward=backward)


register_unit_gradients("policy_loss", (0, 2), 13)
register_unit_gradients("value_loss", (0,), 9)
register_unit_gradients("ppo_loss", (0, 3, 7), 21)


# ---------------------------------------------------------------------------------------- functions


def policy_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    kind: str = "ppo",
    clip_low: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    reduction: str = "token-mean",
    normalizer: float | torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
) -> Loss:
    """Policy-gradient loss of sampled tokens, with its statistics and gradients in one call.

        rho  = exp(clamp(logprob - old_logprob, +-20)),  c(rho) = clip(rho, 1 - low, 1 + high)
        ppo, grpo   max(-A rho, -A c(rho));  where A < 0 at most -A dual_clip
        gspo        the same with rho = exp(mean log-ratio of the sequence) exp(lp - sg[lp])
        cispo       -sg[c(rho)] A logprob
        sapo        -A 4 / tau sigmoid(tau (rho - 1)),  tau = 1 where A > 0, 1.05 elsewhere
        reinforce   -A logprob;   a2c: the same, no gradient for A

    sg stops the gradient. Where the log-ratio is beyond +-20 the gradient of the kinds with a ratio
    is 0, cispo and gspo included; gspo averages the clamped log-ratios. Where a clip makes no
    difference to the term (rho on the bound, A = 0) the gradient is that of the unclipped term.

    Sources: Williams, 1992 (reinforce); Mnih et al., 2016 (a2c); Schulman et al., "Proximal Policy
    Optimization Algorithms", 2017; Ye et al., 2020 (dual clip); Shao et al., "DeepSeekMath", 2024
    (grpo); Yu et al., "DAPO", 2025 (two bounds, token mean); Zheng et al., 2025 (gspo); MiniMax,
    2025 (cispo); Gao et al., 2025 (sapo).

    Args:
        logprob: `[B, T]` log-probs of the tokens under the policy, in nats. With other leading
            dimensions `[..., T]` each row is a sequence.
        old_logprob: `[B, T]` the same under the policy that sampled them. Data: no gradient.
        advantages: `[B, T]`; one per sequence is `a.unsqueeze(1).expand_as(logprob)`.
        mask: `[B, T]`; tokens where it is 0 count nowhere. None counts all of them.
        kind: one of the seven above.
        clip_low, clip_high: distances of the bounds of rho from 1, both >= 0. `clip_high=None`
            means the same as `clip_low`; `clip_low=None` turns the clip off whatever `clip_high`.
            Kinds without a clip (reinforce, a2c, sapo) do not look at them.
        dual_clip: c > 1 of ppo, grpo and gspo; None is off.
        reduction: "token-mean", "token-sum", "seq-mean-token-mean" or "seq-mean-token-sum". Rows
            without an unmasked token do not count in a sequence mean.
        normalizer: a positive number, or a tensor with one, that replaces the denominator: the
            number of tokens in "token-mean", of sequences in the two sequence means; it divides a
            "token-sum". With the counts of the whole batch, micro-batches add up to its loss.
        importance_weights: `[B, T]` factors of the token losses and of nothing else. Data.

    Returns:
        `Loss(loss, stats)`, float32 (float64 if an input is). The loss is differentiable in
        `logprob`, and with kind "reinforce" in `advantages`, in their own dtypes.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, name or number.

    >>> lp = torch.tensor([[-1.0, -1.0]])
    >>> out = rlhf_fast.policy_loss(lp + 0.5, lp, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    >>> out.loss, out.stats_dict()["clip_fraction_high"]
    (tensor(0.2244), 0.5)
    """
    _args.choice("kind", kind, KINDS)
    _args.choice("reduction", reduction, REDUCTIONS)
    dtype = common_dtype(
        logprob=logprob,
        old_logprob=old_logprob,
        advantages=advantages,
        importance_weights=importance_weights,
    )
    advantage_rows = rows if kind == "reinforce" else data_rows
    loss, stats = drop_units(
        torch.ops.rlhf_fast.policy_loss,
        rows(logprob, dtype), data_rows(old_logprob, dtype), advantage_rows(advantages, dtype),
        token_mask(mask, logprob, "logprob"), data_rows(importance_weights, dtype),
        *split_normalizer(normalizer, logprob.device, dtype), kind,
        *clip_arguments(clip_low, clip_high, dual_clip), reduction,
        _dispatch.requested("policy_loss"),
    )  # fmt: skip
    return Loss(loss, stats)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    clip: float | None = 0.2,
    reduction: str = "token-mean",
    normalizer: float | torch.Tensor | None = None,
) -> Loss:
    """Clipped squared error of the value function, with statistics and gradient in one call.

        l = 0.5 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)

    The gradient is v - R, and 0 where the clipped term is strictly the larger one. Source: the
    PPO implementation of OpenAI baselines, 2017; Schulman et al., "Proximal Policy Optimization
    Algorithms", 2017.

    Args:
        values: `[B, T]` predictions v (or `[..., T]`).
        old_values: `[B, T]` predictions at the time of the rollout. Data: no gradient.
        returns: `[B, T]` targets R. Data: no gradient.
        mask: `[B, T]`; tokens where it is 0 count nowhere. None counts all of them.
        clip: how far v may move from v_old, >= 0; None is off.
        reduction, normalizer: as in `policy_loss`.

    Returns:
        `Loss(loss, stats)`, float32 (float64 if an input is). Differentiable in `values`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, name or number.

    >>> v, one = torch.tensor([[1.0]]), torch.ones(1, 1)
    >>> rlhf_fast.value_loss(v, 0 * v, 0 * v, one).loss
    tensor(0.5000)
    """
    _args.choice("reduction", reduction, REDUCTIONS)
    dtype = common_dtype(values=values, old_values=old_values, returns=returns)
    loss, stats = drop_units(
        torch.ops.rlhf_fast.value_loss,
        rows(values, dtype), data_rows(old_values, dtype), data_rows(returns, dtype),
        token_mask(mask, values, "values"), *split_normalizer(normalizer, values.device, dtype),
        optional("clip", clip, low=0.0), reduction, _dispatch.requested("value_loss"),
    )  # fmt: skip
    return Loss(loss, stats)


def ppo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprob: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    reduction: str = "token-mean",
    normalizer: float | torch.Tensor | None = None,
) -> Loss:
    """The whole PPO objective: loss, gradients and statistics in one call.

        loss = policy + value_coef value - entropy_coef entropy + kl_coef kl

    Policy term as in `policy_loss` with kind "ppo", value term as in `value_loss`, KL term the
    `kl_estimator` of `logprob` against `ref_logprob` (unclamped, see `kl_estimate`); each term is
    reduced alike. Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017.

    Args:
        logprob, old_logprob, advantages, mask: as in `policy_loss`; `advantages` are data.
        values, old_values, returns: as in `value_loss`.
        clip_low, clip_high, dual_clip, reduction, normalizer: as in `policy_loss`.
        value_clip: `clip` of `value_loss`.
        value_coef, entropy_coef, kl_coef: finite numbers. A term of coefficient 0 is left out of
            the loss, not of the statistics.
        entropy: `[B, T]` entropies of the policy, from `logprob_entropy`, in nats.
        ref_logprob: `[B, T]` log-probs under the reference. Data: no gradient.
        kl_estimator: "k1", "abs", "k2" or "k3".

    Returns:
        `Loss(loss, stats)`, float32 (float64 if an input is). Differentiable in `logprob` (the KL
        term too), `values` and `entropy`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, name or number, or a coefficient whose
            tensor is missing.

    >>> lp, one = torch.full((1, 2), -1.0), torch.ones(1, 2)
    >>> rlhf_fast.ppo_loss(lp, lp, one, one, one, 3 * one, one).loss
    tensor(-0.8000)
    """
    _args.choice("reduction", reduction, REDUCTIONS)
    _args.choice("kl_estimator", kl_estimator, ESTIMATORS)
    value_coef = _args.number("value_coef", value_coef)
    entropy_coef = _args.number("entropy_coef", entropy_coef)
    kl_coef = _args.number("kl_coef", kl_coef)
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"entropy: expected a tensor (entropy_coef is {entropy_coef}), got None")
    if kl_coef != 0.0 and ref_logprob is None:
        raise ValueError(f"ref_logprob: expected a tensor (kl_coef is {kl_coef}), got None")
    dtype = common_dtype(
        logprob=logprob,
        old_logprob=old_logprob,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        entropy=entropy,
        ref_logprob=ref_logprob,
    )
    loss, stats = drop_units(
        torch.ops.rlhf_fast.ppo_loss,
        rows(logprob, dtype), data_rows(old_logprob, dtype), data_rows(advantages, dtype),
        rows(values, dtype), data_rows(old_values, dtype), data_rows(returns, dtype),
        token_mask(mask, logprob, "logprob"), rows(entropy, dtype), data_rows(ref_logprob, dtype),
        *split_normalizer(normalizer, logprob.device, dtype),
        *clip_arguments(clip_low, clip_high, dual_clip),
        optional("value_clip", value_clip, low=0.0), value_coef, entropy_coef, kl_coef,
        kl_estimator, reduction, _dispatch.requested("ppo_loss"),
    )  # fmt: skip
    return Loss(loss, stats)
