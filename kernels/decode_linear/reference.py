"""The linear layer in plain PyTorch: the definition of truth."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from rlhf_fast.kernels._common.precision import full_precision


@full_precision
def decode_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias."""
    return linear(x, weight, bias)
