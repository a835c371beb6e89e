"""What a benchmark case is, and where the cases are found."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import _dispatch


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype, beside the plain PyTorch that it replaces.

    `make(dtype=..., **sizes)` gives the inputs on torch's default device, as keyword arguments of
    `ours` and `eager`, which return tuples. What `eager` returns beyond `ours` (statistics that a
    trainer logs too) is timed and not compared. `eager` on the inputs in float64 is the truth,
    unless `expected(inputs, outputs)` computes it, for results that contain a random choice.

    `bytes` and `flops` are what the op must move and do at the least: every input read once, every
    output written once, and inputs read a second time where a separate backward pass needs them.
    `grad` names the inputs that get a gradient; with it the case is forward and backward.
    `compiled` replaces `eager` under torch.compile where `eager` is a Python loop over time, which
    takes minutes to compile unrolled. `left_out` names backends that this case does not time.
    """

    op: str
    sizes: dict[str, int]
    make: Callable[..., dict[str, Any]]
    ours: Callable[..., tuple]
    eager: Callable[..., tuple]
    bytes: int
    flops: int
    dtype: torch.dtype = torch.float32
    grad: tuple[str, ...] = ()
    compiled: Callable[..., tuple] | None = None
    expected: Callable[[dict[str, Any], tuple], tuple] | None = None
    label: str = ""
    note: str = ""
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    left_out: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """The sizes as text: "2048x50257", with the label that tells twins apart."""
        return "x".join(str(n) for n in self.sizes.values()) + (
            f" {self.label}" if self.label else ""
        )

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def direction(self) -> str:
        return "fwd_bwd" if self.grad else "fwd"

    @property
    def name(self) -> str:
        """Op, shape, dtype and direction in one line."""
        return f"{self.op} {self.shape} {self.dtype_name} {self.direction}"

    def inputs(self, device: str) -> dict[str, Any]:
        """The inputs on `device`; those named in `grad` require a gradient."""
        with torch.device(device):
            return self.with_gradients(self.make(dtype=self.dtype, **self.sizes))

    def with_gradients(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Fresh leaves in place of the inputs that get a gradient."""
        leaves = {name: inputs[name].detach().requires_grad_() for name in self.grad}
        return {**inputs, **leaves}


def rooms() -> list[str]:
    """The rooms that have a `bench.py`."""
    package = importlib.import_module("rlhf_fast.kernels")
    return sorted(
        {file.parent.name for path in package.__path__ for file in Path(path).glob("*/bench.py")}
    )


def room_cases(room: str) -> list[Case]:
    """The cases of one room."""
    return importlib.import_module(f"rlhf_fast.kernels.{room}.bench").CASES


def cases(op: str | None = None, *, device: str = "cpu", quick: bool = False) -> list[Case]:
    """The cases of `op` (None: of every op), the small ones under `quick`, the real ones else."""
    known = _dispatch.backends()
    if op is not None and op not in known:
        raise ValueError(f"op: expected one of {', '.join(known)}, got {op!r}")
    return [
        case
        for room in rooms()
        for case in room_cases(room)
        if case.op in known
        and case.op in (op or case.op,)
        and case.quick == quick
        and device in case.devices
    ]
