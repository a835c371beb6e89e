"""Host-side helpers of the Triton launchers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Make the device of `x` current: Triton launches there, not where its arguments live."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """A small per-token tensor as a contiguous vector (stride-0 gradients and views are copied)."""
    return None if x is None else x.reshape(-1).contiguous()


# The id of a token that is not among a row's columns; csrc/logprob/logprob.h has the same number.
ELSEWHERE = -(2**62)


def dense_last(x: torch.Tensor) -> torch.Tensor:
    """`x` with a last axis whose elements are neighbours; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gradient_of(
    x: torch.Tensor, out: torch.Tensor | None, *, rounded: bool = False, placed: bool = False
) -> torch.Tensor:
    """Where the gradient of `x` goes: a new tensor, or `out`, which may be `x` itself.

    With `rounded`, `out` may be in half precision where `x` is float32, with `placed` it may have
    another number of rows.
    """
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = out.dtype in (torch.bfloat16, torch.float16) and x.dtype == torch.float32
    fits = out.dtype == x.dtype or (rounded and half)
    same = out.shape[-1:] == x.shape[-1:] if placed else out.shape == x.shape
    if not same or not fits or not out.is_contiguous():
        raise ValueError(
            f"out: expected a contiguous {str(x.dtype)[6:]} tensor of shape {tuple(x.shape)}, got "
            f"{str(out.dtype)[6:]} of shape {tuple(out.shape)} and strides {out.stride()}"
        )
    return out


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """See `x[..., V]` as rows: (tensor, rows per outer step, outer stride, inner stride).

    Row n starts at `(n // inner) * outer_stride + (n % inner) * inner_stride`. Two strides address
    every slice of a [B, T, V] tensor, `logits[:, :-1]` among them, in place. What they cannot
    address (three separate axes, or a last axis that is not dense) is copied.
    """
    # Axes of length 1 have arbitrary strides and are dropped; adjacent axes merge where they can.
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        x = x.contiguous()
        axes = [(max(x.shape[:-1].numel(), 1), x.shape[-1])]
    if not axes:
        return x, 1, 0, 0
    if len(axes) == 1:
        return x, axes[0][0], 0, axes[0][1]
    return x, axes[1][0], axes[0][1], axes[1][1]


def inverse(temperature: float) -> float:
    """1 / temperature, at most 2e38 so that 0 times it stays 0 at any legal temperature."""
    return min(1.0 / temperature, 2e38)
