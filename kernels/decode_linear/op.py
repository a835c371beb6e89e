"""A linear layer for the few rows of a decode step: checks, schema, fake."""

from __future__ import annotations

import torch

from rlhf_fast import _args, _dispatch

_LIBRARY = "on a GPU a library's product reads the weights at the memory's speed: the reference"

_dispatch.implementations("decode_linear", __package__, triton=_LIBRARY, cuda=_LIBRARY)


def _fake(x, weight, *_):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_dispatch.define(
    "decode_linear",
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    fake=_fake,
)


def decode_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer applied to few rows, reading each weight once.

        out[..., o] = bias[o] + sum_h x[..., h] weight[o, h]

    A decode step multiplies every weight of a model with one token per slot, so that it takes as
    long as reading the weights. CPU libraries are made for many rows and reach a fifth of the
    memory's speed there; here the rows stand side by side in the lanes of a vector, and up to some
    64 of them the native kernel is ahead. It adds up in float32 in an order of its own: a row's
    bits depend on no other row, and not on their number. Source: sums kept in registers as in Goto
    and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; the fixed order as
    in He et al., "Defeating nondeterminism in LLM inference", 2025.

    In half precision, and on a GPU, PyTorch's product serves: in bfloat16 it is as fast. For
    inference: the result is detached. Rollouts hand their models' layers to it by themselves.

    Args:
        x: `[..., H]` float64, float32, float16 or bfloat16.
        weight: `[O, H]` of the same dtype, as `torch.nn.Linear` keeps it; the transpose of a dense
            tensor, as transformers' `Conv1D` has it, is read in place too.
        bias: `[O]`, or None.

    Returns:
        `[..., O]` in the inputs' dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.

    >>> rlhf_fast.decode_linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[3., 7.]])
    """
    _args.check_float_tensor("x", x)
    _args.check_float_tensor("weight", weight)
    if x.ndim < 1 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape [O, H] with the H of x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    _args.check_dtype("weight", weight, x.dtype, "x")
    _args.check_device("weight", weight, x.device, "x")
    if bias is not None:
        _args.check_float_tensor("bias", bias)
        _args.check_shape("bias", bias, weight.shape[:1], "one per row of weight")
        _args.check_dtype("bias", bias, x.dtype, "x")
        _args.check_device("bias", bias, x.device, "x")
        bias = bias.detach()
    return torch.ops.rlhf_fast.decode_linear(
        x.detach(), weight.detach(), bias, _dispatch.requested("decode_linear")
    )
