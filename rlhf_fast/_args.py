"""Argument checks that every op shares: errors name the argument, what was expected and what came.

Only shapes, dtypes and devices are looked at here, so that torch.compile can trace the public
functions; values (ids in range, positive temperatures) are checked inside the ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float_tensor(name: str, x: torch.Tensor) -> None:
    """Raise unless `x` is a tensor of one of the four floating-point types."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float64, float32, float16 or bfloat16, got {_name(x.dtype)}"
        )


def check_ids(name: str, ids: torch.Tensor) -> None:
    """Raise unless `ids` is an int32 or int64 tensor."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(ids).__name__}")
    if ids.dtype not in INTS:
        raise TypeError(f"{name}: expected int32 or int64, got {_name(ids.dtype)}")


def check_shape(name: str, x: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise unless `x` has exactly `shape`; `meaning` says where that shape comes from."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({meaning}), got {tuple(x.shape)}")


def check_device(name: str, x: torch.Tensor, device: torch.device, other: str) -> None:
    """Raise unless `x` lives on the device of the argument called `other`."""
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} (that of {other}), got {x.device}")


def check_dtype(name: str, x: torch.Tensor, dtype: torch.dtype, other: str) -> None:
    """Raise unless `x` has the dtype of the argument called `other`."""
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {_name(dtype)} (that of {other}), got {_name(x.dtype)}")


def as_mask(
    name: str, mask: torch.Tensor | None, shape: Sequence[int], device: torch.device, meaning: str
) -> torch.Tensor | None:
    """`mask` as a bool tensor: any non-zero number counts, a float mask is no weight."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    if mask.is_complex():
        raise TypeError(f"{name}: expected a bool, integer or float mask, got {_name(mask.dtype)}")
    check_shape(name, mask, shape, meaning)
    if mask.device != device:
        raise ValueError(f"{name}: expected device {device}, got {mask.device}")
    return mask.detach() if mask.dtype == torch.bool else mask.detach() != 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of arithmetic and outputs: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def number(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive_low: bool = False,
) -> float:
    """`value` as a finite float inside [low, high] (or ]low, high])."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    # Comparisons only: under torch.compile a number that changes between calls is symbolic.
    finite = -math.inf < value < math.inf
    inside = low < value <= high if exclusive_low else low <= value <= high
    if not (finite and inside):
        bracket = "]" if exclusive_low else "["
        raise ValueError(
            f"{name}: expected a finite number in {bracket}{low}, {high}], got {value}"
        )
    return value


def integer(name: str, value: int) -> int:
    """`value` if it is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return value


def choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value
