"""Registration of the ops with PyTorch, and the choice between their implementations.

Two questions, two mechanisms. *Which device* a call runs on is answered by PyTorch's dispatcher:
each op is defined in the `torch.library` namespace `rlhf_fast` with a fake kernel and, where it is
differentiable, an autograd formula. *Which implementation* serves it there is answered by the table
below: every public op lists one candidate per backend, and `choose` resolves
(op, device, dtype, requested backend) once and caches the function.

`Library.define` + `impl` is used instead of the `torch.library.custom_op` decorator because a call
costs 2.3 us instead of 8.1 us (16 float32 elements, CPU).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

logger = logging.getLogger("rlhf_fast")

BACKENDS = ("reference", "cpu", "triton", "cuda")
LIB = torch.library.Library("rlhf_fast", "DEF")

# The fastest backend first; "reference" serves what nothing else can.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# public op -> backend -> its module, or the sentence (the one with spaces) why there is none.
_TABLE: dict[str, dict[str, str]] = {}
# torch op -> public op whose row of the table serves it.
_OWNER: dict[str, str] = {}
# What the open `use_backend` blocks ask for, outermost first: (op or None for all, backend).
_requests: list[tuple[str | None, str]] = []


# --------------------------------------------------------------------------- what is available


@functools.cache
def native_module() -> Any | None:
    """The compiled module `rlhf_fast._C`, or None where it was not built."""
    try:
        return importlib.import_module("rlhf_fast._C")
    except ImportError:
        return None


def interpreting() -> bool:
    """True under `TRITON_INTERPRET=1`: Triton kernels then run in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _machine_lacks(backend: str) -> str | None:
    """Why `backend` cannot run on this machine at all, or None."""
    if backend in ("cpu", "cuda") and native_module() is None:
        return "the native module rlhf_fast._C is not built (pip install . builds it)"
    if backend == "cuda" and not getattr(native_module(), "WITH_CUDA", False):
        return "rlhf_fast._C was built without CUDA (nvcc was not found, or RLHF_FAST_CUDA=OFF)"
    if backend == "triton" and not _has_triton():
        return "the package triton is not installed"
    if backend == "triton" and not interpreting() and not torch.cuda.is_available():
        return "no CUDA device is visible to torch (TRITON_INTERPRET=1 runs it on CPU tensors)"
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return None


def _lacks(op: str, backend: str) -> str | None:
    entry = _TABLE[op][backend]
    return _machine_lacks(backend) if " " not in entry else entry


def _call_lacks(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve tensors of this device and dtype, or None."""
    if backend == "reference":
        return None
    served = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if interpreting() else "cuda"}[backend]
    if device != served and not (backend == "triton" and device == "cuda"):
        return f"it serves {served} tensors, not {device} tensors"
    if dtype == torch.float64:
        return "it computes in float32; float64 is served by the reference"
    return None


def backends() -> dict[str, dict[str, bool | str]]:
    """Which backend serves which op here: `backends()[op][name]` is True or the reason why not."""
    return {op: {b: _lacks(op, b) or True for b in BACKENDS} for op in sorted(_TABLE)}


# --------------------------------------------------------------------------- the user's choice


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def use_backend(name: str, op: str | None = None) -> AbstractContextManager[None]:
    """Serve every op (or only `op`) by the backend `name` inside the `with` block.

    `name` is "reference", "cpu", "triton" or "cuda". The choice is process-wide, holds for the
    backward pass of what was computed inside the block, and never falls back: a call that the
    backend cannot serve raises `NotImplementedError` with the reason of each candidate. An unknown
    `name` or `op` raises `ValueError` at once, before any block is entered.

    >>> with rlhf_fast.use_backend("reference"):
    ...     truth = rlhf_fast.logprob(logits.double(), ids)
    """
    _check_backend(name, "use_backend(name)")
    if op is not None and op not in _TABLE:
        raise ValueError(
            f"use_backend(op): expected one of {', '.join(sorted(_TABLE))}, got {op!r}"
        )
    return _request(op, name)


@contextmanager
def _request(op: str | None, name: str) -> Iterator[None]:
    _requests.append((op, name))
    try:
        yield
    finally:
        _requests.pop()


def requested(op: str) -> str:
    """The backend asked for `op` by the innermost `use_backend` that applies, or "".

    Public functions pass it on as the last argument of their torch op, so that forward and backward
    are served alike and torch.compile guards on it.
    """
    for target, name in reversed(_requests):
        if target is None or target == op:
            return name
    return ""


def debug() -> bool:
    """True under `RLHF_FAST_DEBUG=1`: values are checked on CUDA too, at the price of a sync."""
    return os.environ.get("RLHF_FAST_DEBUG", "0") == "1"


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether value checks (ids in range, positive temperatures) run for tensors on this device."""
    return tensor.device.type == "cpu" or debug()


# --------------------------------------------------------------------------- resolution


def choose(name: str, device: str, dtype: torch.dtype, backend: str) -> Callable[..., Any]:
    """The function that implements the torch op `name` for this device, dtype and request."""
    backend = backend or os.environ.get("RLHF_FAST_BACKEND", "")
    return _resolve(name, device, dtype, backend, interpreting())


@functools.cache
def _resolve(
    name: str, device: str, dtype: torch.dtype, backend: str, _interpret: bool
) -> Callable[..., Any]:
    op = _OWNER[name]
    if backend:
        _check_backend(backend, "RLHF_FAST_BACKEND")
    reasons = {
        b: reason
        for b in BACKENDS
        if (reason := _lacks(op, b) or _call_lacks(b, device, dtype)) is not None
    }
    for candidate in (backend,) if backend else _PREFERENCE.get(device, ("reference",)):
        if candidate in reasons:
            logger.info("%s on %s: not served by %s: %s", op, device, candidate, reasons[candidate])
        else:
            return getattr(importlib.import_module(_TABLE[op][candidate]), name)
    others = "; ".join(f"{b}: {reasons.get(b, 'available')}" for b in BACKENDS)
    raise NotImplementedError(
        f"{op}: backend {backend!r} cannot serve {str(dtype)[6:]} tensors on {device} ({others})"
    )


# --------------------------------------------------------------------------- registration


def implementations(
    op: str, room: str, *, native: str = "", triton: str = "", cuda: str = ""
) -> None:
    """Fill `op`'s row of the table. `room` is the package of its files.

    The reference is always there. `native` and `triton` are either empty (the room's `_native.py`
    and `_triton.py` serve it) or the sentence why they do not; `cuda` is such a sentence where
    `_native.py` serves the CPU alone.
    """
    _TABLE[op] = {
        "reference": f"{room}.reference",
        "cpu": native or f"{room}._native",
        "triton": triton or f"{room}._triton",
        "cuda": cuda or native or f"{room}._native",
    }


def serve(op: str, name: str) -> None:
    """Have `choose` look for the function `name` in the files of `op`'s row."""
    _OWNER[name] = op


def define(
    op: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    dtype_of: int = 0,
) -> None:
    """Define the torch op `schema` (its last argument must be `str backend`), served by `op`'s row.

    `fake` returns empty outputs for meta tensors. `check` gets the op's arguments and raises for
    bad values; it runs only where values may be looked at (`checks_values`). Argument number
    `dtype_of` is the tensor whose device and dtype select the implementation.
    """
    name = schema.split("(")[0]
    serve(op, name)
    LIB.define(schema)

    def run(*args: Any) -> Any:
        leading = args[dtype_of]
        implementation = choose(name, leading.device.type, leading.dtype, args[-1])
        if check is not None and checks_values(leading):
            check(*args)
        return implementation(*args[:-1])

    run.__name__ = name
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=LIB)


def _no_forward_mode(name: str, args: tuple) -> None:
    """Raise where a tensor carries a tangent: without a formula it would be dropped silently."""
    for x in args:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"rlhf_fast: no forward-mode derivative of {name}")


def differentiable(
    name: str, *, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Register the autograd formula of the torch op `name`, whose schema has no default values.

    `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are those of
    `torch.library.register_autograd`. That one looks up the default value of each argument at each
    call, which is quadratic in their number: 0.11 of the 0.22 ms of a small `ppo_loss` with its 21.
    """
    op = getattr(torch.ops.rlhf_fast, name).default
    assert not any(argument.has_default_value() for argument in op._schema.arguments), name

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
            setup_context(ctx, args, output)
            return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _no_forward_mode(name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIB.impl(name, run, "Autograd")


def once_differentiable(name: str) -> None:
    """Make a second derivative through the backward op `name` raise, not silently be zero."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"rlhf_fast: double backward through {name} is not supported")

    differentiable(name, setup_context=setup_context, backward=backward)
