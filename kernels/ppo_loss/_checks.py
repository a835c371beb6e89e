"""Checks and conversions of the arguments that the losses share."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_fast import _args

# Token tensors that a loss can do without.
OPTIONAL = frozenset(("importance_weights", "entropy", "ref_logprob"))


def common_dtype(**tensors: torch.Tensor | None) -> torch.dtype:
    """The arithmetic's dtype of tensors that must agree in shape [..., T] and device.

    It is float64 if one of them is float64, else float32. Those in `OPTIONAL` may be None.
    """
    first_name, first = next(iter(tensors.items()))
    _args.check_float_tensor(first_name, first)
    if first.ndim < 1:
        raise ValueError(f"{first_name}: expected shape [B, T], got {tuple(first.shape)}")
    dtype = first.dtype
    for name, x in tensors.items():
        if x is first or (x is None and name in OPTIONAL):
            continue
        _args.check_float_tensor(name, x)
        _args.check_shape(name, x, first.shape, f"that of {first_name}")
        _args.check_device(name, x, first.device, first_name)
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return _args.compute_dtype(dtype)


def rows(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`x` as a contiguous [B, T] tensor of `dtype`; leading dimensions are one."""
    if x is None:
        return None
    # Each call that need not be made saves about 1 us.
    x = (x if x.dtype == dtype else x.to(dtype)).contiguous()
    return x if x.ndim == 2 else x.view(x.shape[:-1].numel(), x.shape[-1])


def data_rows(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`rows` of what gets no gradient."""
    return rows(x if x is None or not x.requires_grad else x.detach(), dtype)


def token_mask(mask: torch.Tensor | None, like: torch.Tensor, of: str) -> torch.Tensor | None:
    """`mask` as a contiguous bool [B, T] tensor."""
    mask = _args.as_mask("mask", mask, like.shape, like.device, f"that of {of}")
    if mask is None:
        return None
    mask = mask.contiguous()
    return mask if mask.ndim == 2 else mask.view(mask.shape[:-1].numel(), mask.shape[-1])


def split_normalizer(
    normalizer: float | torch.Tensor | None, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor | None, float | None]:
    """`normalizer` as (0-dim tensor of `dtype` on `device`, None) or (None, number)."""
    if normalizer is None:
        return None, None
    if not isinstance(normalizer, torch.Tensor):
        return None, _args.number("normalizer", normalizer, low=0.0)
    if normalizer.numel() != 1 or normalizer.dtype == torch.bool or normalizer.is_complex():
        raise ValueError(
            "normalizer: expected a number or a tensor with one number, "
            f"got {str(normalizer.dtype)[6:]} of shape {tuple(normalizer.shape)}"
        )
    return normalizer.detach().reshape(()).to(device=device, dtype=dtype), None


def optional(name: str, value: float | None, **limits: Any) -> float | None:
    """`value` as a number inside `limits`, or None."""
    return None if value is None else _args.number(name, value, **limits)


def clip_arguments(
    clip_low: float | None, clip_high: float | None, dual_clip: float | None
) -> tuple[float | None, float | None, float | None]:
    """The clips of the ratio as numbers or None."""
    return (
        optional("clip_low", clip_low, low=0.0),
        optional("clip_high", clip_high, low=0.0),
        optional("dual_clip", dual_clip, low=1.0, exclusive_low=True),
    )


def check_normalizer(
    mask: torch.Tensor | None, normalizer: torch.Tensor | None, divisor: float | None
) -> None:
    """Raise for a denominator that is not positive; 0 is legal where no token counts."""
    value = divisor if normalizer is None else float(normalizer)
    if value is None or 0 < value < float("inf"):
        return
    if value != 0 or mask is None or mask.any():
        raise ValueError(f"normalizer: expected a positive finite number, got {value}")
