"""What a caller hands over: prompts, EOS ids and the seed, checked and in one form."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch

Prompts = Sequence[torch.Tensor] | Sequence[Sequence[int]] | tuple[torch.Tensor, torch.Tensor]

_MASK64 = (1 << 64) - 1


def integer(name: str, value: int, low: int) -> int:
    """`value` as an int of at least `low`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if number < low:
        raise ValueError(f"{name}: expected an int of at least {low}, got {number}")
    return number


def _unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The tokens under which the mask is not 0, row by row; the others are not looked at."""
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(
            "prompts: expected (ids[B, S], mask[B, S]) of equal shape, got "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    return [row[keep] for row, keep in zip(ids, mask.to(ids.device) != 0, strict=True)]


def as_prompts(prompts: Prompts, vocabulary: int, device: torch.device) -> list[torch.Tensor]:
    """`prompts` as a list of 1-D int64 tensors on `device`, none of them empty, ids in range."""
    if isinstance(prompts, tuple) and len(prompts) == 2:
        ids, mask = prompts
        if isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor) and ids.ndim == 2:
            prompts = _unpad(ids, mask)
    if isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable):
        raise TypeError(
            "prompts: expected a list of token id lists or 1-D tensors, or (ids[B, S], mask[B, S]),"
            f" got {type(prompts).__name__}"
        )
    return [_as_prompt(p, prompt, vocabulary, device) for p, prompt in enumerate(prompts)]


def _as_prompt(p: int, prompt, vocabulary: int, device: torch.device) -> torch.Tensor:
    name = f"prompts[{p}]"
    try:
        ids = prompt.detach() if torch.is_tensor(prompt) else torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected token ids, got {type(prompt).__name__}") from error
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D list of token ids, got {ids.ndim} dimensions")
    if ids.numel() == 0:
        raise ValueError(f"{name}: expected at least one token, got an empty prompt")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer token ids, got {str(ids.dtype)[6:]}")
    ids = ids.to(device=device, dtype=torch.int64)
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(f"{name}: expected ids in [0, {vocabulary}), got {bad}")
    return ids


def as_eos_ids(eos_ids: int | Iterable[int], vocabulary: int) -> list[int]:
    """`eos_ids` as a list of ids in range. An id that can never be drawn is a wrong tokenizer."""
    if torch.is_tensor(eos_ids):
        eos_ids = eos_ids.flatten().tolist()
    ids = list(eos_ids) if isinstance(eos_ids, Iterable) else [eos_ids]
    ids = [integer("eos_ids", i, 0) for i in ids]
    if ids and max(ids) >= vocabulary:
        raise ValueError(f"eos_ids: expected ids in [0, {vocabulary}), got {max(ids)}")
    return ids


def _mix(x: int) -> int:
    """The finaliser of SplitMix64, a bijection of 64 bits (Steele, Lea, Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def row_seed(seed: int, p: int, j: int) -> int:
    """The seed of sample `j` of prompt `p`: a signed 64-bit mix of the three and of nothing else.

        row_seed = mix(mix(mix(seed) ^ p) ^ j)        mix: the finaliser of SplitMix64

    Rows of one call never share a seed by construction of their index, only by the chance of two
    64-bit hashes (3e-8 among a million rows).
    """
    x = _mix(_mix(_mix(seed & _MASK64) ^ p) ^ j)
    return x - (1 << 64) if x >> 63 else x


def as_seed(seed: int) -> int:
    """`seed` as an int of 64 bits, signed or unsigned."""
    number = integer("seed", seed, -(1 << 63))
    if number > _MASK64:
        raise ValueError(f"seed: expected an int of 64 bits, got {number}")
    return number


def pad_left(prompts: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """(ids, mask) of the prompts, left-padded with 0 to the longest of them."""
    width = max((len(p) for p in prompts), default=0)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = True
    return ids, mask
