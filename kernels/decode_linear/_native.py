"""Calls of the native linear layer, for tensors on the CPU."""

from __future__ import annotations

import torch

from rlhf_fast.kernels._common.native import address, kernel

from . import reference


def decode_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[..., O]`; in half precision by PyTorch's product."""
    if x.dtype != torch.float32:
        return reference.decode_linear(x, weight, bias)
    outputs, size = weight.shape
    out = x.new_empty((*x.shape[:-1], outputs))
    if out.numel() == 0:
        return out
    if size == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    # As transformers' Conv1D keeps it; read in place.
    transposed = not weight.is_contiguous() and weight.t().is_contiguous()
    x, weight = x.contiguous(), weight if transposed else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    kernel("decode_linear", x)(
        *map(address, (x, weight, bias, out)),
        x.numel() // size,
        size,
        outputs,
        transposed,
    )
    return out
