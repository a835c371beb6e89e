"""Loading and saving: tokenizers, language models, and transformers with one number per token."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.rollout.models import position_limit
from rlhf_fast.train.config import Config

HEAD = "scalar_head.safetensors"
_WEIGHTS = ("*.safetensors", "*.bin")


def folder_of(name: str) -> str:
    """`name`, or the `model/` inside it where `name` is the output of a stage."""
    path = Path(name).expanduser()
    if not path.is_dir():
        beside = len(path.parts) == 2 and path.parent.is_dir()  # outputs/typo is no hub name
        if beside or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise FileNotFoundError(f"{name}: no such folder")
        return name
    return str(path / "model" if (path / "model").is_dir() else path)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder, a stage's output or a hub name; it must have an EOS token."""
    folder = folder_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name}: expected a folder with model and tokenizer, or their name on the hub: {error}"
        ) from error
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
        # Rewards and values in float32 under mixed precision too: bfloat16 would make ties of them.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()

    def save_pretrained(self, folder: Path) -> None:
        """The backbone as transformers saves it, with the head beside it."""
        self.backbone.save_pretrained(folder)
        save_file(self.head.state_dict(), folder / HEAD)


def load_scalar_model(name: str, *, trained: bool = False) -> ScalarModel:
    """A reward model from a stage's output, or a new head on a language model's transformer.

    With `trained` the head must be there: the scores of a new one are random.
    """
    head = Path(folder_of(name)) / HEAD
    if trained and not head.is_file():
        raise ValueError(
            f"reward_model: expected the output of the reward stage, got {name} without {HEAD}"
        )
    model = ScalarModel(_load(AutoModel, name))
    if head.is_file():
        model.head.load_state_dict(load_file(head))
    return model


def check_fit(model: Any, filler: int, *sequences: Sequence[int]) -> None:
    """Raise `ValueError` where `model` has no embedding for an id or no position for a token."""
    transformer = getattr(model, "backbone", model)
    rows, limit = transformer.get_input_embeddings().num_embeddings, position_limit(transformer)
    highest = max(filler, *(max(ids) for ids in sequences))
    if highest >= rows:
        raise ValueError(
            f"model: expected a tokenizer with ids below {rows}, the model's embeddings, got "
            f"{highest}"
        )
    longest = max(len(ids) for ids in sequences)
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_prompt_tokens, max_response_tokens: expected texts of at most {limit} tokens, "
            f"the model's positions, got {longest}"
        )


def device_of(config: Config) -> torch.device:
    """Where a stage without training computes."""
    return torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu")


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
