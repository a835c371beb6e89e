"""Float32 arithmetic in plain PyTorch, whatever surrounds the call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def full_precision(function: Callable[..., object]) -> Callable[..., object]:
    """Run `function` outside `torch.autocast`, whose dispatch key reaches into an op's body.

    Without this a float32 head under bf16 autocast would give log-probs that are wrong by 0.06.
    """

    @functools.wraps(function)
    def wrapper(*arguments):
        device = next(x.device.type for x in arguments if isinstance(x, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return wrapper
