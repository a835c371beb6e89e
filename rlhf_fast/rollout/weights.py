"""The linear layers of a decode step served by `decode_linear`, without touching a module.

On a CPU three quarters of a decode step are PyTorch's products of 16 rows at a fifth of the
memory's speed. `torch.func.functional_call` runs a model with other tensors in the place of its
parameters and puts them back, after an error too; here those are the same weights under a class of
their own, which PyTorch asks before it runs a function on them (`__torch_function__`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import OptimizedModule
from torch.func import functional_call
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from rlhf_fast import _dispatch

# Where the native kernel is ahead of a library's product, for a Linear and for a Conv1D.
_LINEAR_ROWS, _CONV1D_ROWS = range(1, 65), range(2, 17)


class DecodeWeight(torch.Tensor):
    """The weight of a linear layer, which few rows reach by `decode_linear`.

    Every other function sees a plain tensor and gives one.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is linear and not kwargs and _suits(args[0], _LINEAR_ROWS):
                x, weight, *bias = args
                return _decode_linear(x, weight, *(bias or (None,)))
            if func is torch.addmm and not kwargs and _suits(args[1], _CONV1D_ROWS):
                bias, x, weight = args
                return _decode_linear(x, weight.t(), bias)
            return func(*args, **(kwargs or {}))


def _decode_linear(x, weight, bias) -> torch.Tensor:
    backend = _dispatch.requested("decode_linear")
    return torch.ops.rlhf_fast.decode_linear(x, weight, bias, backend)


def _suits(x: torch.Tensor, rows: range) -> bool:
    """Whether `decode_linear` is to multiply `x` with a float32 weight on the CPU."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() > 0 and x.numel() // x.shape[-1] in rows


def _is_compiled(module: torch.nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


class _Run(torch.nn.Module):
    """What `functional_call` calls: `function`, around the module whose parameters it replaces."""

    def __init__(self, model: torch.nn.Module, function: Callable[[], None]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> None:
        self.function()


def with_decode_weights(model: torch.nn.Module, function: Callable[[], None]) -> None:
    """Call `function`; the model's linear layers that it runs multiply few rows by `decode_linear`.

    Those are the `torch.nn.Linear`, and the `Conv1D` of GPT-2, whose weight is a plain float32
    parameter on the CPU. A model of which something is compiled keeps its graphs, and its weights.
    """
    if any(map(_is_compiled, model.modules())):
        return function()
    weights: dict[str, torch.Tensor] = {
        f"model.{name}.weight": module.weight.detach().as_subclass(DecodeWeight)
        for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D)
        and type(module.weight) is torch.nn.Parameter
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    }
    functional_call(_Run(model, function), weights, (), tie_weights=False)
