"""The policy-gradient loss from hidden states: checks, schema, fake, autograd.

The forward op returns each gradient for an upstream gradient of 1, taken while a chunk's logits
still exist; the backward multiplies it by the upstream gradient, a scalar.
"""

from __future__ import annotations

import torch

from rlhf_fast import _args, _dispatch
from rlhf_fast.kernels.kl.op import ESTIMATORS
from rlhf_fast.kernels.ppo_loss import Loss
from rlhf_fast.kernels.ppo_loss._checks import (
    check_normalizer,
    clip_arguments,
    common_dtype,
    rows,
    split_normalizer,
)
from rlhf_fast.kernels.ppo_loss.op import (
    KINDS,
    REDUCTIONS,
    drop_units,
    scaled,
    units_are_dropped,
)

from .op import ARGUMENTS, GRADIENTS, check_values, prepare
from .reference_ppo import unit_dtype

_dispatch.implementations("linear_ppo_loss", __package__)

_LOSS = (
    "Tensor old_logprob, Tensor advantages, Tensor? weights, Tensor? ref_logprob, "
    "Tensor? normalizer, float? divisor, str kind, float? clip_low, float? clip_high, "
    "float? dual_clip, float entropy_coef, float kl_coef, str kl_estimator, str reduction, "
    "bool[] needs"
)
_COUNT = ARGUMENTS.count(",") + _LOSS.count(",") + 3  # with the backend
_ADVANTAGES, _NORMALIZER, _KIND = (ARGUMENTS.count(",") + n for n in (2, 5, 7))


def _fake(hidden, weight, ids, bias, lora_a, lora_b, *others):
    old_logprob, kind, needs = others[9], others[_KIND - 6], others[-2]
    dtype = _args.compute_dtype(hidden.dtype)
    inputs = (hidden, weight, bias, lora_a, lora_b)
    dtypes = dtype, unit_dtype(hidden), dtype, dtype, dtype
    units = (
        x.new_empty(x.shape, dtype=unit) if need else hidden.new_empty(0)
        for x, unit, need in zip(inputs, dtypes, needs, strict=True)
    )
    advantages = old_logprob.new_empty(old_logprob.shape if kind == "reinforce" else 0)
    return (
        old_logprob.new_empty(()),
        old_logprob.new_empty(len(Loss.stats_names)),
        *units,
        advantages,
    )


def _check(*arguments) -> None:
    check_values(*arguments)
    ids, mask, ignore_index = arguments[2], arguments[6], arguments[12]
    counts = ids != ignore_index
    options = arguments[_NORMALIZER : _NORMALIZER + 2]
    check_normalizer(counts if mask is None else counts & mask, *options)


_dispatch.define(
    "linear_ppo_loss",
    f"linear_ppo_loss({ARGUMENTS}, {_LOSS}, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    check=_check,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    *units, unit_advantages = output[2:]
    pairs = [(i, unit) for i, unit, need in zip(GRADIENTS, units, inputs[-2], strict=True) if need]
    if inputs[_KIND] == "reinforce":
        pairs.append((_ADVANTAGES, unit_advantages))
    ctx.places = [i for i, _ in pairs]
    ctx.set_materialize_grads(False)  # zeros as large as each unit gradient
    ctx.owned = units_are_dropped()
    ctx.save_for_backward(*(unit for _, unit in pairs), *(inputs[i] for i, _ in pairs))


def _backward(ctx, grad, *_):
    saved, count = ctx.saved_tensors, len(ctx.places)
    out = [None] * _COUNT
    for i, unit, source in zip(ctx.places, saved[:count], saved[count:], strict=True):
        if ctx.needs_input_grad[i] and grad is not None:
            out[i] = scaled(grad, unit, source, ctx.owned).to(source.dtype)
    return tuple(out)


_dispatch.differentiable("linear_ppo_loss", setup_context=_setup_context, backward=_backward)


def linear_ppo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
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
    entropy_coef: float = 0.0,
    ref_logprob: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Loss:
    """Policy-gradient loss of tokens from hidden states, without the [N, V] logits.

        logprob, entropy = linear_logprob_entropy(hidden, weight, ids, ...)
        loss = policy_loss(logprob, old_logprob, advantages, mask)
               - entropy_coef entropy + kl_coef kl_estimate(logprob, ref_logprob)

    with the entropy and the KL estimate reduced as the policy loss is, without its weights.
    An id equal to `ignore_index` counts as masked, in the loss and in every statistic. While a
    gradient is needed, the forward pass takes it from each chunk of logits before the next one
    overwrites it: three matrix products instead of the four of `linear_logprob` (kind "gspo" and a
    `group` take the four). On the CPU, masked tokens enter no product, and tokens whose gradient
    is 0 (clipped, or with advantage 0) only the first. On CUDA all tokens enter the first, because
    the host does not know how many count; bfloat16 calls of up to four chunks leave the others out
    of the products of the gradient on sm_90 and sm_100, without a synchronisation
    (`torch._grouped_mm`; no bias, LoRA or logit scale). Memory beside the result: a chunk of logits
    as in `linear_logprob`, in half precision on CUDA the gradients of up to four chunks of logits,
    and the unit gradients until the backward pass. These are float32, but that of a half-precision
    head on CUDA is rounded to its dtype, and again if the upstream gradient is no power of two.
    Sources: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; Hsu et al., "Liger
    Kernel", 2024 (gradient in the forward pass); those of `linear_logprob` and `policy_loss`.

    Args:
        hidden: `[..., H]` hidden states; `[B, T, H]` where a sequence matters (the "seq-"
            reductions and kind "gspo"), the last of the leading axes being time.
        weight: `[V, H]` the head.
        ids: `[...]` the tokens that were drawn.
        old_logprob: `[...]` their log-probs when they were drawn, in nats.
        advantages: `[...]`.
        mask: `[...]` bool, integer or float, or None; where it is 0 the token does not count.
        kind, clip_low, clip_high, dual_clip, reduction, normalizer, importance_weights: as in
            `policy_loss`; the weights are `[...]`.
        entropy_coef: coefficient of the entropy bonus. At 0 the entropy is not computed, and its
            statistic is 0.
        ref_logprob: `[...]` log-probs of the reference, or None; its KL is among the statistics.
        kl_coef, kl_estimator: coefficient and estimator ("k1", "abs", "k2" or "k3") of the KL
            penalty; a coefficient other than 0 needs `ref_logprob`.
        bias, temperature, ignore_index, softcap, logit_scale, lora, group: as in `linear_logprob`.

    Returns:
        `Loss(loss, stats)` of `policy_loss`, differentiable in hidden, weight, bias, A and B.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value.
        IndexError: an id out of range that is neither masked nor `ignore_index` (on CPU).

    >>> x, w, ids = torch.ones(1, 2, 4), torch.zeros(8, 4), torch.zeros(1, 2).long()
    >>> old = torch.full((1, 2), -2.0794)
    >>> rlhf_fast.linear_ppo_loss(x, w, ids, old, torch.ones(1, 2), None).loss
    tensor(-1.0000)
    """
    _args.choice("kind", kind, KINDS)
    _args.choice("reduction", reduction, REDUCTIONS)
    _args.choice("kl_estimator", kl_estimator, ESTIMATORS)
    entropy_coef = _args.number("entropy_coef", entropy_coef)
    kl_coef = _args.number("kl_coef", kl_coef)
    if kl_coef != 0.0 and ref_logprob is None:
        raise ValueError(f"ref_logprob: expected a tensor (kl_coef is {kl_coef}), got None")
    head = prepare(
        hidden, weight, ids, bias, temperature, mask, ignore_index, softcap, logit_scale, lora,
        group,
    )  # fmt: skip
    data = {"old_logprob": old_logprob, "advantages": advantages}
    if importance_weights is not None:
        data["importance_weights"] = importance_weights
    if ref_logprob is not None:
        data["ref_logprob"] = ref_logprob
    for name, x in data.items():
        _args.check_float_tensor(name, x)
        _args.check_shape(name, x, ids.shape, "that of ids")
        _args.check_device(name, x, ids.device, "ids")
    dtype = torch.promote_types(common_dtype(**data), _args.compute_dtype(hidden.dtype))
    if kind != "reinforce":
        advantages = advantages.detach()
    weights, ref_logprob = (
        x if x is None else rows(x.detach(), dtype) for x in (importance_weights, ref_logprob)
    )
    # The gradients are taken in the forward pass, so it has to know which of them will be needed.
    needs = [
        x is not None and x.requires_grad and torch.is_grad_enabled()
        for x in (head[i] for i in GRADIENTS)
    ]
    loss, stats = drop_units(
        torch.ops.rlhf_fast.linear_ppo_loss,
        *head, rows(old_logprob.detach(), dtype), rows(advantages, dtype), weights, ref_logprob,
        *split_normalizer(normalizer, hidden.device, dtype), kind,
        *clip_arguments(clip_low, clip_high, dual_clip), entropy_coef, kl_coef, kl_estimator,
        reduction, needs,
        _dispatch.requested("linear_ppo_loss"),
    )  # fmt: skip
    return Loss(loss, stats)
