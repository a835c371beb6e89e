"""Loading and saving: tokenizers, language models, and transformers with one number per token."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

HEAD = "scalar_head.safetensors"
_WEIGHTS = ("*.safetensors", "*.bin")


def folder_of(name: str) -> str:
    """`name`, or the `model/` inside it where `name` is the output of a stage."""
    inner = Path(name) / "model"
    return str(inner) if inner.is_dir() else name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder, a stage's output or a hub name; it must have an EOS token."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: expected a tokenizer with an EOS token, got none in {name}")
    return tokenizer


def _load(auto: Any, name: str) -> Any:
    """Weights in float32; a folder with a config.json alone is a new model with random weights."""
    folder = Path(folder_of(name))
    if (folder / "config.json").is_file() and not any(
        path.name != HEAD for pattern in _WEIGHTS for path in folder.glob(pattern)
    ):
        return auto.from_config(AutoConfig.from_pretrained(str(folder))).float()
    return auto.from_pretrained(str(folder), dtype=torch.float32)


def load_causal_lm(name: str) -> Any:
    """A language model in float32."""
    return _load(AutoModelForCausalLM, name)


class ScalarModel(nn.Module):
    """A transformer that gives one number per token: a reward model, or a value model.

    The head's weights start as normal numbers with standard deviation 1 / sqrt(H + 1), its bias at
    0 (Stiennon et al., "Learning to summarize from human feedback", 2020).
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        size = backbone.get_input_embeddings().embedding_dim
        self.head = nn.Linear(size, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(size + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Numbers [B, S] float32 of token ids [B, S]; tokens where `mask` is 0 are not seen."""
        hidden = self.backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).last_hidden_state
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()

    def save_pretrained(self, folder: Path) -> None:
        """The backbone as transformers saves it, with the head beside it."""
        self.backbone.save_pretrained(folder)
        save_file(self.head.state_dict(), folder / HEAD)


def load_scalar_model(name: str) -> ScalarModel:
    """A reward model from a stage's output, or a new head on a language model's transformer."""
    model = ScalarModel(_load(AutoModel, name))
    head = Path(folder_of(name)) / HEAD
    if head.is_file():
        model.head.load_state_dict(load_file(head))
    return model


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, S] that count unmasked tokens: padding on either side is no matter."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def at_last_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """values[b, last unmasked token of b] [B]: where a reward model's number is the score."""
    column = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), column, 0).amax(1, keepdim=True)
    return values.gather(1, last).squeeze(1)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it in `target`'s place: never half a folder there."""
    fresh = target.with_name(f".{target.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(fresh, target)
        shutil.rmtree(old)
    else:
        os.replace(fresh, target)
