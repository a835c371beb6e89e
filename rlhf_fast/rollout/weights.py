"""The linear layers of a decode step served by `decode_linear`, without touching a module.

On a CPU three quarters of a decode step are PyTorch's products of 16 rows at a fifth of the
memory's speed. `torch.func.functional_call` runs a model with other tensors in the place of its
parameters and puts them back, after an error too; here those stand for the same parameters, under a
class that PyTorch asks before it runs a function on them (`__torch_function__`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from rlhf_fast import _dispatch

# Where the native kernel is ahead of a library's product, for a Linear and for a Conv1D.
_LINEAR_ROWS, _CONV1D_ROWS = range(1, 65), range(2, 17)


class DecodeWeight(torch.Tensor):
    """Stands for the weight of a linear layer, which few rows then reach by `decode_linear`.

    Every function gets the parameter itself, as it is at that time, and gives a plain tensor.
    """

    parameter: torch.nn.Parameter

    @classmethod
    def of(cls, parameter: torch.nn.Parameter) -> DecodeWeight:
        weight = parameter.detach().as_subclass(cls)
        weight.parameter = parameter
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> Any:
        out = None
        with torch._C.DisableTorchFunctionSubclass():
            if not kwargs and not torch.compiler.is_compiling():
                if func is linear:
                    out = _as_linear(*args)
                elif func is torch.addmm:
                    out = _as_conv1d(*args)
            if out is None:
                out = func(*(_plain(x) for x in args), **(kwargs or {}))
        return out


def _plain(x: Any) -> Any:
    return x.parameter if type(x) is DecodeWeight else x


def _as_linear(x, weight, bias=None) -> torch.Tensor | None:
    """What `torch.nn.Linear` computes, or None where that is left to PyTorch, errors included."""
    if type(weight) is not DecodeWeight:
        return None
    return _decode_linear(x, weight.parameter, bias, _LINEAR_ROWS)


def _as_conv1d(bias, x, weight) -> torch.Tensor | None:
    """What `Conv1D` computes, or None."""
    if type(weight) is not DecodeWeight:
        return None
    return _decode_linear(x, weight.parameter.t(), bias, _CONV1D_ROWS)


def _decode_linear(x, weight, bias, rows: range) -> torch.Tensor | None:
    if torch.is_autocast_enabled("cpu") or x.numel() == 0 or x.shape[-1] != weight.shape[1]:
        return None
    if x.numel() // weight.shape[1] not in rows:
        return None
    for y in (x, bias):
        if y is not None and (y.dtype != weight.dtype or y.device != weight.device):
            return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    backend = _dispatch.requested("decode_linear")
    return torch.ops.rlhf_fast.decode_linear(x, weight, bias, backend)


def _is_served(module: torch.nn.Module) -> bool:
    """Whether `module` is a Linear or a Conv1D with a dense float32 parameter on the CPU."""
    if type(module) not in (torch.nn.Linear, Conv1D):
        return False
    weight = module.weight
    plain = type(weight) is torch.nn.Parameter and weight.is_contiguous()
    return plain and weight.dtype == torch.float32 and weight.device.type == "cpu"


class _Run(torch.nn.Module):
    """What `functional_call` calls: `function`, around the module whose parameters it replaces."""

    def __init__(self, model: torch.nn.Module, function: Callable[[], None]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> None:
        self.function()


def with_decode_weights(model: torch.nn.Module, function: Callable[[], None]) -> None:
    """Call `function`; the linear layers of `model` multiply few rows by `decode_linear` in it.

    Those are the `torch.nn.Linear`, and the `Conv1D` of GPT-2, whose weight is a dense float32
    parameter on the CPU; what is compiled and what runs under autocast is left to PyTorch.
    """
    weights: dict[str, torch.Tensor] = {
        f"model.{name}.weight": DecodeWeight.of(module.weight)
        for name, module in model.named_modules()
        if _is_served(module)
    }
    if weights:
        functional_call(_Run(model, function), weights, (), tie_weights=False)
    else:
        function()
