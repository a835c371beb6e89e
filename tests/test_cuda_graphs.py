"""CUDA graphs: every op is captured with its backward pass, and replayed on new inputs.

A host read, a copy from pageable memory, a launch on another stream or an allocation outside
PyTorch's pools would break the capture or make the replay differ from a plain call.
"""

from __future__ import annotations

import pytest
import torch

import rlhf_fast
from rlhf_fast.testing import assert_same_bits, device_of, usable_backends
from tests.test_contract import OPS, sample_call, tensors_of

CASES = [
    (op, backend)
    for op in OPS
    for backend in usable_backends(op)
    if backend != "reference" and device_of(backend) == "cuda"
]


def mapped(x, function):
    """`x` with `function` applied to each tensor in it."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, dict):
        return {name: mapped(value, function) for name, value in x.items()}
    return tuple(mapped(value, function) for value in x) if isinstance(x, tuple) else x


def tensors_in(x) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(x, found.append)
    return found


def fresh(call, device: str):
    """A copy of the call's tensors on `device`, leaves where they were leaves."""
    return mapped(call, lambda x: x.detach().to(device, copy=True).requires_grad_(x.requires_grad))


def varied(op: str, call):
    """Other values of the same shapes; offsets of packed sequences stay what they are."""

    def flipped(x):
        if op == "gae_packed" and not x.is_floating_point():
            return x
        return x.detach().flip(0).contiguous().requires_grad_(x.requires_grad)

    return mapped(call, flipped)


def results(op: str, call) -> list[torch.Tensor]:
    """Outputs of the op, then the gradients of all leaves."""
    args, kwargs = call
    outputs = tensors_of(getattr(rlhf_fast, op)(*args, **kwargs))
    leaves = [x for x in tensors_in(call) if x.requires_grad]
    ends = [x for x in outputs if x.requires_grad]
    grads: tuple[torch.Tensor | None, ...] = ()
    if ends and leaves:
        upstream = [torch.full_like(x, 0.5) for x in ends]
        grads = torch.autograd.grad(ends, leaves, upstream, allow_unused=True)
    return [x.detach() for x in outputs] + [x for x in grads if x is not None]


def captured(op: str, call) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """The graph of `results(op, call)` and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and loaded here
        for _ in range(3):
            results(op, call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = results(op, call)
    return graph, outputs


def assert_same(op: str, what: str, ours: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    assert len(ours) == len(plain)
    for k, (a, b) in enumerate(zip(ours, plain, strict=True)):
        if op.startswith("linear_") and a.is_floating_point():
            torch.testing.assert_close(a, b)  # the library may choose another product in a graph
        elif a.is_floating_point():
            assert_same_bits(f"{op} {what} {k}", a, b)
        else:
            assert torch.equal(a, b), f"{op} {what} {k}"


def replay(op: str, first, second) -> None:
    """Capture on `first`, then replay on both."""
    graph, outputs = captured(op, first_copy := fresh(first, "cuda"))
    static = tensors_in(first_copy)
    for what, call in (("second", second), ("first", first), ("second again", second)):
        with torch.no_grad():
            for target, source in zip(static, tensors_in(call), strict=True):
                target.copy_(source)
        for x in outputs:
            x.fill_(float("nan") if x.is_floating_point() else -1)
        graph.replay()
        assert_same(op, what, outputs, results(op, fresh(call, "cuda")))


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_a_captured_call_replays_on_new_inputs(op, backend):
    first = sample_call(op)
    with rlhf_fast.use_backend(backend, op=op):
        replay(op, first, varied(op, first))


LONG = [(op, backend) for op, backend in CASES if op in ("gae", "ppo_advantages", "ppo_loss")]


@pytest.mark.parametrize(("op", "backend"), LONG)
def test_long_rows_are_captured_too(op, backend):
    """Rows that are split over blocks, and enough tokens for every block of the device."""
    args, kwargs = sample_call(op)

    def longer(x):
        if x.ndim < 2:
            return x
        x = x.detach().repeat(1, 8000)
        return x.requires_grad_() if x.is_floating_point() and op == "ppo_loss" else x

    first = mapped((args, kwargs), longer)
    if op == "ppo_loss":  # data keep no gradient
        names = ("old_logprob", "advantages", "old_values", "returns")
        first[1].update({name: first[1][name].detach() for name in names})
    with rlhf_fast.use_backend(backend, op=op):
        replay(op, first, varied(op, first))
