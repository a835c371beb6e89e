"""Which models can be driven, and the two switches that a rollout throws and puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# `config.model_type` of the families whose output is tested against `model.generate` and a plain
# forward (tests/test_rollout.py walks this tuple): their attention takes everything it needs from
# transformers' AttentionInterface, and position_ids alone say where a token stands.
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral",
    "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip

# Families whose position table ends: no token can stand behind it.
_LEARNED_POSITIONS = ("gpt2", "opt")

# Rotary embeddings that look at the longest row of the batch, so that a row's log-probs depend on
# its neighbours and keys written earlier turn stale.
_BATCH_ROPE = ("dynamic", "longrope")


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding in a config, which may hold one per type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    return {g["rope_type"] for g in groups if isinstance(g.get("rope_type"), str)}


def check_model(model: Any) -> None:
    """Raise `TypeError` for what is no causal LM, `NotImplementedError` for one we cannot drive."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers causal LM (a PreTrainedModel, unwrapped), got "
            f"{type(model).__name__}"
        )
    name, config = type(model).__name__, model.config
    if not model.can_generate() or config.is_encoder_decoder:
        raise TypeError(f"model: expected a causal LM, got {name}")
    if config.model_type not in FAMILIES:
        raise NotImplementedError(
            f"model: {name} (model_type {config.model_type!r}) is not among the families whose "
            f"attention rollouts drive exactly: {', '.join(FAMILIES)}"
        )
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(model, causal_lm):
        raise NotImplementedError(
            f"model: {name} is not transformers' causal LM of model_type {config.model_type!r}"
        )
    looks_ahead = getattr(config, "use_bidirectional_attention", False)
    if looks_ahead or not getattr(config, "is_causal", True):
        raise NotImplementedError(
            "model: its config turns causal attention off, so that a new token would change the "
            "log-probs of the tokens before it"
        )
    if bad := _rope_types(config).intersection(_BATCH_ROPE):
        raise NotImplementedError(
            f"model: rotary embeddings of type {sorted(bad)[0]!r} depend on the longest row of the "
            "batch, so a row's log-probs would depend on its neighbours"
        )


def position_limit(model: Any) -> int | None:
    """How many tokens the model has positions for, or None where positions never end."""
    config = model.config
    return config.max_position_embeddings if config.model_type in _LEARNED_POSITIONS else None


@contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each module's own mode put back afterwards.

    The flags are set one by one: `model.train()` would also switch modules that were frozen in
    evaluation mode. Ordinary tensors come out, inside `torch.inference_mode` too.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.inference_mode(False), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def attention(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Every attention layer of `model` served by the registered function `name`.

    Layers look the name up in their config at each call, and all of them may share one config.
    """
    from transformers import PreTrainedConfig

    found = [model.config, *(getattr(m, "config", None) for m in model.modules())]
    configs = {id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
