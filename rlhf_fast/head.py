"""Log-probs and policy losses of a Hugging Face causal LM without its logits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhf_fast import _args
from rlhf_fast.kernels.linear_head import (
    linear_logprob,
    linear_logprob_entropy,
    linear_ppo_loss,
)
from rlhf_fast.kernels.logprob import LogprobEntropy
from rlhf_fast.kernels.ppo_loss import Loss
from rlhf_fast.rollout.models import evaluation

# What this file decides itself, or what would ask the model for logits.
_OURS = ("labels", "logits_to_keep", "num_logits_to_keep", "return_dict")

# Models whose logits were compared with what `causal_lm_head` says of them.
_VERIFIED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Head(NamedTuple):
    """What a causal LM does between its last hidden states and its logits.

        z = logit_scale * hidden (weight + scaling B A)^T + bias
        logits = softcap * tanh(z / softcap)

    The fields are arguments of the `linear_*` functions: `linear_logprob(hidden, head.weight, ids,
    **head.options())`.
    """

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    softcap: float | None  # None: no cap
    logit_scale: float
    lora: tuple[torch.Tensor, torch.Tensor, float] | None  # A [r, H], B [V, r], scaling

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the `linear_*` functions: everything but the weight."""
        return {name: x for name, x in self._asdict().items() if name != "weight"}


def _causal_lm(model: Any) -> Any:
    """The transformers model inside DistributedDataParallel, PEFT and other wrappers."""
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers causal LM, got {type(model).__name__}")
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None or inner.config.is_encoder_decoder or not inner.can_generate():
        found = type(model if inner is None else inner).__name__
        raise TypeError(f"model: expected a transformers causal LM, got {found}")
    if inner.get_output_embeddings() is None:
        raise NotImplementedError(f"model: {type(inner).__name__} names no output embeddings")
    if getattr(inner, "tp_size", None):
        raise NotImplementedError(
            "model: tensor parallelism of transformers splits the head; call linear_logprob with "
            "this rank's slice of the weight and group="
        )
    return inner


def _refuse(layer: nn.Module, why: str) -> NotImplementedError:
    return NotImplementedError(f"model: its head is a {type(layer).__name__} {why}")


def _lora(layer: Any) -> tuple[nn.Module, tuple | None]:
    """(linear layer, (A, B, scaling) or None) of a PEFT LoRA layer."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        if layer.merged and layer.disable_adapters:
            raise _refuse(layer, "whose adapter is merged and disabled: unmerge it")
        return layer.base_layer, None
    if len(active) > 1:
        raise _refuse(layer, f"with {len(active)} active adapters; one is supported")
    (name,) = active
    dropout, a, b = layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
    if dropout.training and getattr(dropout, "p", 0.0):
        raise _refuse(layer, f"with dropout {dropout.p} in front of the adapter while training")
    if a.bias is not None or b.bias is not None or name in getattr(layer, "lora_variant", {}):
        raise _refuse(layer, "whose adapter is more than B A (a bias, DoRA or another variant)")
    return layer.base_layer, (a.weight, b.weight, layer.scaling[name])


def _read(model: Any) -> Head:
    """The head as the model's layer and config describe it."""
    layer, lora = model.get_output_embeddings(), None
    if all(hasattr(layer, name) for name in ("base_layer", "lora_A", "lora_B", "scaling")):
        layer, lora = _lora(layer)
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    if not plain or "forward" in vars(layer):
        raise _refuse(layer, "; expected an nn.Linear or a LoRA layer of PEFT around one")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    bias = layer.bias
    if bias is not None and scale != 1:
        bias = bias * scale  # models scale what the layer returns, `linear_*` the product alone
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, bias, softcap, scale, lora)


def _verify(model: Any, head: Head) -> None:
    """Raise unless the model makes of its head's output what `head` says.

    One forward of one token, in which the head seems to return numbers from -100 to 100.
    """
    shown: list[torch.Tensor] = []

    def show(_layer: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        size = output.shape[-1]
        line = torch.linspace(-100, 100, size, dtype=output.dtype, device=output.device)
        shown.append(line)
        return line.expand_as(output)

    device = model.get_input_embeddings().weight.device
    hook = model.get_output_embeddings().register_forward_hook(show)
    try:
        with evaluation(model):
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        hook.remove()
    name = type(model).__name__
    if len(shown) != 1 or logits.shape != (1, 1, shown[0].numel()):
        raise NotImplementedError(
            f"model: {name} applies its output embeddings {len(shown)} times in a forward of one "
            f"token and returns logits {tuple(logits.shape)}; expected once, and (1, 1, V)"
        )
    expected = head.logit_scale * shown[0].float()
    if head.softcap is not None:
        expected = head.softcap * (expected / head.softcap).tanh()
    difference = (logits[0, 0].float() - expected).abs().max().item()
    rough = 1e-5 if shown[0].dtype in (torch.float32, torch.float64) else 2.0**-6
    if not difference <= rough * expected.abs().max().item():
        raise NotImplementedError(
            f"model: {name} changes what its head returns in a way that is not its config's "
            f"logit_scale, logits_scaling and final_logit_softcapping: logits are off by up to "
            f"{difference:.3g} where the head returns -100 to 100"
        )


def causal_lm_head(model: Any) -> Head:
    """Weight, bias, softcap, scale and LoRA of a Hugging Face causal LM's head.

    `final_logit_softcapping` (Gemma 2), `logit_scale` (Cohere) and `logits_scaling` (Granite, which
    divides by it) are read from the config. At the first call per model, one forward of one token
    without gradients checks that the model's forward does this and nothing else to what its head
    returns.

    Args:
        model: a transformers causal LM, also inside DistributedDataParallel or a PEFT model.

    Returns:
        `Head`; its tensors are the model's own, so gradients reach them.

    Raises:
        TypeError: no causal LM.
        NotImplementedError: a head that is no linear layer (with or without one LoRA adapter), or
            logits that are made of its output in another way.
    """
    inner = _causal_lm(model)
    head = _read(inner)
    if inner not in _VERIFIED:
        _verify(inner, head)
        _VERIFIED.add(inner)
    return head


def _forward(model: Any, inputs: dict[str, Any], use: Callable[[torch.Tensor, Head], Any]) -> Any:
    """What `use(hidden [B, S, H], head)` returns, called inside the model's own forward.

    There every wrapper has done its part: gradients are synchronised (DDP) and weights gathered
    (FSDP2). The head itself gets no row to multiply.
    """
    inner = _causal_lm(model)
    causal_lm_head(inner)  # verified before the hook is in place
    layer = inner.get_output_embeddings()
    found: list[Any] = []

    def take(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (hidden,) = inputs
        head = _read(inner)
        if hasattr(head.weight, "to_local"):
            raise NotImplementedError(
                "model: its head's weight is a DTensor in the forward pass; call linear_logprob "
                "with weight.to_local() and group="
            )
        found.append(use(hidden, head))
        return (hidden[:, :0],)

    hook = layer.register_forward_pre_hook(take)
    try:
        model(**inputs, return_dict=True)
    finally:
        hook.remove()
    if len(found) != 1:
        raise NotImplementedError(
            f"model: expected its forward to call the head once, got {len(found)} calls"
        )
    if torch.is_grad_enabled() and hasattr(_read(inner).weight, "to_local"):
        raise NotImplementedError(
            "model: its head's weight is sharded again after the forward pass, so the backward "
            "pass could not read it; leave the head to the root's fully_shard(model)"
        )
    return found[0]


def _score_mask(mask, attention_mask, shape: tuple[int, ...], device) -> torch.Tensor | None:
    """[B, T] of tokens that count: `mask`, or those that are no padding and follow none."""
    if mask is not None:
        _args.check_shape("mask", mask, shape, "[B, T] of the tokens that are scored")
        return mask.to(device)
    if attention_mask is None:
        return None
    seen = attention_mask.bool()
    return (seen[:, 1:] & seen[:, :-1])[:, -shape[1] :]


def _check_batch(input_ids, attention_mask, model_kwargs: dict[str, Any]) -> int:
    """S of a batch [B, S] that is what the model and the head can take."""
    if wrong := [name for name in _OURS if name in model_kwargs]:
        raise TypeError(f"{wrong[0]}: not an argument, the model is asked for hidden states only")
    _args.check_ids("input_ids", input_ids)
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(
            f"input_ids: expected shape [B, S] with S >= 2, got {tuple(input_ids.shape)}"
        )
    if attention_mask is not None:
        _args.check_shape("attention_mask", attention_mask, input_ids.shape, "that of input_ids")
    return input_ids.shape[1]


def _score(
    op: Callable[..., Any],
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    last: int,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
    model_kwargs: dict[str, Any],
) -> Any:
    """What `op`, one of the `linear_*` functions, returns for the last tokens of each row."""
    ids = input_ids[:, -last:]
    mask = _score_mask(mask, attention_mask, tuple(ids.shape), ids.device)

    def use(hidden: torch.Tensor, head: Head) -> Any:
        if hidden.shape[:-1] != input_ids.shape:
            raise NotImplementedError(
                f"model: expected one hidden state per token, {tuple(input_ids.shape)}, at its "
                f"head, got {tuple(hidden.shape[:-1])}"
            )
        rows = hidden[:, -last - 1 : -1].to(head.weight.dtype)
        return op(
            rows, head.weight, ids, mask=mask, temperature=temperature, **head.options()
        )  # fmt: skip

    inputs = {"use_cache": False, **model_kwargs, "input_ids": input_ids}
    return _forward(model, inputs | {"attention_mask": attention_mask}, use)


def model_logprob(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    last: int | None = None,
    mask: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    entropy: bool = False,
    **model_kwargs: Any,
) -> torch.Tensor | LogprobEntropy:
    """Log-probs of the tokens of a batch under a Hugging Face causal LM, in nats; no [B, S, V].

        logprob[b, t] = log p(input_ids[b, S - T + t] | the tokens before it),   t = 0 ... T - 1

    The model's own forward runs up to its head; in the head's place stands `linear_logprob`, which
    makes logits of one chunk of rows at a time, in float32 also under autocast, and those of
    masked tokens not at all. See `causal_lm_head` for the heads that are known.

    Args:
        model: as `causal_lm_head` takes it, on one device; a root of FSDP2 too, if the head has
            no `fully_shard` of its own. DistributedDataParallel and FSDP2 synchronise gradients as
            they always do.
        input_ids: `[B, S]`, S >= 2.
        attention_mask: `[B, S]`; of tokens that are 0 nothing is seen.
        last: T, how many tokens at the end of each row are scored; S - 1 if not given.
        mask: `[B, T]`; where it is 0 the results and the gradients are 0. If not given, tokens
            that are padding or behind padding in `attention_mask`.
        temperature: a positive number, or a tensor that broadcasts to `[B, T]`.
        entropy: whether to return the entropy as well.
        model_kwargs: more arguments of the model, such as `position_ids`, which transformers does
            not make of the attention mask in all families. `use_cache` is False if not given.

    Returns:
        `[B, T]` float32 (float64 for float64), differentiable in the model's parameters; with
        `entropy`, `LogprobEntropy(logprob, entropy)`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or value; an argument that the function needs
            for itself (labels, logits_to_keep, return_dict).
        NotImplementedError: as `causal_lm_head`; hidden states that are not one per token (prompt
            tuning); a weight that is not whole in the forward pass or is freed after it.
    """
    size = _check_batch(input_ids, attention_mask, model_kwargs)
    last = size - 1 if last is None else _args.integer("last", last)
    if not 1 <= last < size:
        raise ValueError(f"last: expected 1 to {size - 1}, the tokens with one before, got {last}")
    op = linear_logprob_entropy if entropy else linear_logprob
    return _score(op, model, input_ids, attention_mask, last, mask, temperature, model_kwargs)


def model_policy_loss(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
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
    **model_kwargs: Any,
) -> Loss:
    """Policy-gradient loss of the last tokens of a batch under a Hugging Face causal LM.

        logprob, entropy = model_logprob(model, input_ids, attention_mask, last=T, entropy=True)
        loss = policy_loss(logprob, old_logprob, advantages, mask)
               - entropy_coef entropy + kl_coef kl_estimate(logprob, ref_logprob)

    with `linear_ppo_loss` in the head's place. While gradients are on, the head's are made in the
    forward pass, from each chunk of logits as it is: three products with the head instead of the
    four of `model_logprob` and a loss. The gradient of the head is held, in float32, until the
    backward pass.

    Args:
        model, input_ids, attention_mask, temperature, model_kwargs: as in `model_logprob`.
        old_logprob: `[B, T]` log-probs in nats of the last T tokens of each row when they were
            drawn, 1 <= T < S. Data.
        advantages: `[B, T]`; gets a gradient in kind "reinforce" alone.
        mask: `[B, T]` of the tokens that count; if not given, those of `model_logprob`.
        kind, clip_low, clip_high, dual_clip, reduction, normalizer, importance_weights: as in
            `policy_loss`; each row of the batch is a sequence.
        entropy_coef, ref_logprob, kl_coef, kl_estimator: as in `linear_ppo_loss`.

    Returns:
        `Loss(loss, stats)` of `policy_loss`, differentiable in the model's parameters.

    Raises:
        TypeError, ValueError, NotImplementedError: as `model_logprob` and `linear_ppo_loss`.
    """
    size = _check_batch(input_ids, attention_mask, model_kwargs)
    _args.check_float_tensor("old_logprob", old_logprob)
    shape = tuple(old_logprob.shape)
    if len(shape) != 2 or not 1 <= shape[1] < size:
        raise ValueError(
            f"old_logprob: expected shape [B, T] with T from 1 to {size - 1}, got {shape}"
        )
    op = partial(
        linear_ppo_loss, old_logprob=old_logprob, advantages=advantages, kind=kind,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, reduction=reduction,
        normalizer=normalizer, importance_weights=importance_weights, entropy_coef=entropy_coef,
        ref_logprob=ref_logprob, kl_coef=kl_coef, kl_estimator=kl_estimator,
    )  # fmt: skip
    return _score(op, model, input_ids, attention_mask, shape[1], mask, temperature, model_kwargs)
