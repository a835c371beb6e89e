"""Rewards, whitening and advantages: checks, schemas, fakes. Nothing here is differentiable."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf_fast import _args, _dispatch
from rlhf_fast.kernels.kl.op import ESTIMATORS, clamp_bounds
from rlhf_fast.kernels.ppo_loss._checks import common_dtype

for _op in ("shaped_rewards", "whiten", "ppo_advantages", "group_advantages"):
    _dispatch.implementations(_op, __package__)

GROUP_KINDS = ("grpo", "dr_grpo", "rloo")
_PENALTY = "float kl_coef, str estimator, float? clamp_in, float? clamp_out"


class Advantages(NamedTuple):
    """What `ppo_advantages` returns; all `[B, T]`."""

    advantages: torch.Tensor
    returns: torch.Tensor
    rewards: torch.Tensor
    kl: torch.Tensor


def _like(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape) for _ in range(count))


def _check_place(mask: torch.Tensor | None, at: torch.Tensor | None, tokens: int) -> None:
    """Raise for an index outside the row; one of a row without an unmasked token is not read."""
    if at is None:
        return
    bad = (at < 0) | (at >= tokens)
    if mask is not None:
        bad = bad & mask.any(1)
    if bad.any():
        raise IndexError(f"at: expected values in [0, {tokens}), got {int(at[bad][0])}")


def _check_rewards(scores, logprob, ref_logprob, mask, at, *_) -> None:
    _check_place(mask, at, logprob.shape[1])


def _check_ppo(scores, logprob, ref_logprob, values, mask, at, *_) -> None:
    _check_place(mask, at, logprob.shape[1])


_dispatch.define(
    "shaped_rewards",
    "shaped_rewards(Tensor scores, Tensor logprob, Tensor ref_logprob, Tensor? mask, Tensor? at, "
    f"{_PENALTY}, str backend) -> (Tensor, Tensor)",
    fake=lambda scores, logprob, *_: _like(logprob, 2),
    check=_check_rewards,
)
_dispatch.define(
    "whiten",
    "whiten(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps, str group, "
    "str backend) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
)
_dispatch.define(
    "ppo_advantages",
    "ppo_advantages(Tensor scores, Tensor logprob, Tensor ref_logprob, Tensor values, "
    f"Tensor? mask, Tensor? at, {_PENALTY}, float gamma, float lam, bool carry, bool whitened, "
    "bool unbiased, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda scores, logprob, *_: _like(logprob, 4),
    check=_check_ppo,
)
_dispatch.define(
    "group_advantages",
    "group_advantages(Tensor scores, Tensor group_ids, str kind, float eps, str backend) -> Tensor",
    fake=lambda scores, *_: scores.new_empty(scores.shape),
)


def _place(at: str | torch.Tensor, rows: int, device: torch.device) -> torch.Tensor | None:
    """`at` as int64 [B], or None for "last"."""
    if isinstance(at, str):
        _args.choice("at", at, ("last",))
        return None
    _args.check_ids("at", at)
    _args.check_shape("at", at, (rows,), "one per row")
    _args.check_device("at", at, device, "logprob")
    return at.detach().to(torch.int64).contiguous()


def _rows(scores, tokens: dict[str, torch.Tensor], mask, at):
    """Checked and converted: (scores, each of `tokens`, mask, at), contiguous and of one dtype."""
    name, first = next(iter(tokens.items()))
    for required, x in tokens.items():
        _args.check_float_tensor(required, x)
    if first.ndim != 2:
        raise ValueError(f"{name}: expected shape [B, T], got {tuple(first.shape)}")
    dtype = common_dtype(**tokens)
    _args.check_float_tensor("scores", scores)
    _args.check_shape("scores", scores, first.shape[:1], f"one per row of {name}")
    _args.check_device("scores", scores, first.device, name)
    dtype = _args.compute_dtype(torch.promote_types(scores.dtype, dtype))
    mask = _args.as_mask("mask", mask, first.shape, first.device, f"that of {name}")
    converted = (x.detach().to(dtype).contiguous() for x in (scores, *tokens.values()))
    at = _place(at, first.shape[0], first.device)
    return *converted, None if mask is None else mask.contiguous(), at


def _penalty(kl_coef, estimator, clamp):
    kl_coef = _args.number("kl_coef", kl_coef)
    return kl_coef, _args.choice("estimator", estimator, ESTIMATORS), *clamp_bounds(clamp)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def shaped_rewards(
    scores: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    kl_coef: float,
    estimator: str = "k1",
    clamp: tuple[float | None, float | None] | None = None,
    at: str | torch.Tensor = "last",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the tokens: a KL penalty each, and the score of the response on one of them.

        rewards[b, t] = -kl_coef * kl[b, t] + scores[b] [t is b's place]

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019.

    Args:
        scores: `[B]` scores of the responses.
        logprob, ref_logprob: `[B, T]` log-probs under policy and reference, in nats.
        mask: `[B, T]`; where it is 0 both results are 0. None counts every token.
        kl_coef: coefficient of the penalty.
        estimator, clamp: as in `kl_estimate`.
        at: "last" puts the score on the last unmasked token of the row; an int32 or int64 tensor
            `[B]` names the column. A row with no unmasked token drops its score, and so does an
            index that points at a masked token.

    Returns:
        (rewards, kl), `[B, T]` float32 (float64 if an input is), detached; `kl` in nats, without
        the coefficient.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, name or number.
        IndexError: an index `at` outside [0, T), in a row with an unmasked token (on CPU).

    >>> lp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]])
    >>> rlhf_fast.shaped_rewards(torch.tensor([1.0]), lp, ref, torch.ones(1, 2), kl_coef=0.1)[0]
    tensor([[-0.0500,  1.0000]])
    """
    inputs = _rows(scores, {"logprob": logprob, "ref_logprob": ref_logprob}, mask, at)
    return torch.ops.rlhf_fast.shaped_rewards(
        *inputs, *_penalty(kl_coef, estimator, clamp), _dispatch.requested("shaped_rewards")
    )


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Shift and scale to mean 0 and variance 1 over the unmasked elements.

        y = (x - mean) * rsqrt(var + eps),   plus mean if `shift_mean` is False

    Mean and variance come from two passes (deviations from the mean are squared, never E[x^2] -
    E[x]^2); ranks are merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise
    algorithm for computing sample variances", 1979. One element, or none, has variance 0 and gives
    0 (its mean, with `shift_mean=False`).

    Args:
        x: `[...]` values of any shape.
        mask: `[...]`; where it is 0 the result is 0 and x is not looked at.
        shift_mean: False keeps the mean and scales the deviations only. (torchtune calls this
            True.)
        unbiased: divide the squares by n - 1 (TRL, verl), not by n (OpenRLHF, OpenAI).
        eps: added to the variance, >= 0.
        group: a process group; mean and variance are those of all ranks' unmasked elements. A rank
            may have none, but every rank must call.

    Returns:
        Like x, float32 (float64 for float64), detached.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number.

    >>> rlhf_fast.whiten(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    """
    _args.check_float_tensor("x", x)
    mask = _args.as_mask("mask", mask, x.shape, x.device, "that of x")
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"group: expected None or a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    return torch.ops.rlhf_fast.whiten(
        x.detach().to(_args.compute_dtype(x.dtype)).contiguous(),
        None if mask is None else mask.contiguous(),
        _flag("shift_mean", shift_mean), _flag("unbiased", unbiased),
        _args.number("eps", eps, low=0.0), "" if group is None else group.group_name,
        _dispatch.requested("whiten"),
    )  # fmt: skip


def ppo_advantages(
    scores: torch.Tensor,
    logprob: torch.Tensor,
    ref_logprob: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    kl_coef: float,
    estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
    whiten: bool = True,
    unbiased: bool = True,
    clamp: tuple[float | None, float | None] | None = None,
    at: str | torch.Tensor = "last",
    eps: float = 1e-8,
) -> Advantages:
    """From scores, log-probs and values to advantages and returns: one launch, two to whiten too.

        rewards, kl         = shaped_rewards(scores, logprob, ref_logprob, mask, ...)
        advantages, returns = gae(rewards, values, mask=mask, ...)
        advantages          = whiten(advantages, mask)        (unless `whiten` is False)

    The returns are those before whitening, and nothing stands behind the last token. Sources:
    Ziegler et al., 2019 (rewards); Schulman et al., 2015 (advantages).

    Args:
        scores, logprob, ref_logprob, mask, kl_coef, estimator, clamp, at: as in `shaped_rewards`.
        values: `[B, T]` values of the states before each token.
        gamma, lam, mask_mode: as in `gae`.
        whiten: whiten the advantages over all unmasked tokens of this call.
        unbiased, eps: as in `whiten`.

    Returns:
        `Advantages(advantages, returns, rewards, kl)`, each `[B, T]` float32 (float64 if an input
        is), detached, 0 where masked.

    Raises:
        TypeError, ValueError, IndexError: as in `shaped_rewards`.

    >>> lp, mask = torch.zeros(1, 2), torch.ones(1, 2)
    >>> out = rlhf_fast.ppo_advantages(
    ...     torch.tensor([1.0]), lp, lp, lp, mask, kl_coef=0.1, lam=0.5, whiten=False
    ... )
    >>> out.advantages
    tensor([[0.5000, 1.0000]])
    """
    tokens = {"logprob": logprob, "ref_logprob": ref_logprob, "values": values}
    inputs = _rows(scores, tokens, mask, at)
    out = torch.ops.rlhf_fast.ppo_advantages(
        *inputs, *_penalty(kl_coef, estimator, clamp), _args.number("gamma", gamma, low=0.0),
        _args.number("lam", lam, low=0.0),
        _args.choice("mask_mode", mask_mode, ("carry", "zero")) == "carry",
        _flag("whiten", whiten), _flag("unbiased", unbiased), _args.number("eps", eps, low=0.0),
        _dispatch.requested("ppo_advantages"),
    )  # fmt: skip
    return Advantages(*out)


def group_advantages(
    scores: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    kind: str = "grpo",
    eps: float = 1e-4,
) -> torch.Tensor:
    """Advantages of responses against the others of their group (the same prompt, mostly).

        grpo      (r - mean) / (std + eps),   std with n - 1
        dr_grpo   r - mean
        rloo      r - mean of the others

    A group of one gives 0. Sources: Shao et al., "DeepSeekMath", 2024 (grpo); Liu et al.,
    "Understanding R1-Zero-Like Training", 2025 (dr_grpo); Kool et al., 2019, and Ahmadian et al.,
    "Back to Basics", 2024 (rloo).

    Args:
        scores: `[B]` scores r.
        group_ids: `[B]` integers of any type, value and order; equal numbers make a group.
        kind: "grpo", "dr_grpo" or "rloo".
        eps: added to the standard deviation of "grpo", >= 0 (1e-4 in TRL, 1e-6 in verl).

    Returns:
        `[B]` float32 (float64 for float64 scores), detached.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, kind or eps.

    >>> ids = torch.tensor([7, 3, 7])
    >>> rlhf_fast.group_advantages(torch.tensor([1.0, 5.0, 3.0]), ids, kind="rloo")
    tensor([-2.,  0.,  2.])
    """
    _args.check_float_tensor("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores: expected shape [B], got {tuple(scores.shape)}")
    if not isinstance(group_ids, torch.Tensor):
        raise TypeError(f"group_ids: expected a tensor, got {type(group_ids).__name__}")
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids: expected integers, got {str(group_ids.dtype)[6:]}")
    _args.check_shape("group_ids", group_ids, scores.shape, "that of scores")
    _args.check_device("group_ids", group_ids, scores.device, "scores")
    return torch.ops.rlhf_fast.group_advantages(
        scores.detach().to(_args.compute_dtype(scores.dtype)).contiguous(),
        group_ids.detach().to(torch.int64).contiguous(),
        _args.choice("kind", kind, GROUP_KINDS), _args.number("eps", eps, low=0.0),
        _dispatch.requested("group_advantages"),
    )  # fmt: skip
