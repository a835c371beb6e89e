"""What every op owes the package, walked over the registry: an op that joins is held to all of it.

A new op fails here by name until it has an entry in `SAMPLES`, a docstring, a reference, a test
file, benchmark files, a fake kernel that tells the truth, and compiles without a graph break.
"""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.bench.case import room_cases
from rlhf_fast.testing import randn

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(_dispatch.backends())
B, T, V, H, K = 3, 5, 11, 4, 3

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) != 0


def logits(seed: int = 0) -> torch.Tensor:
    return randn(B, T, V, seed=seed).requires_grad_()


def ids(*shape: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 7 % V).view(shape)


def tokens(seed: int, grad: bool = False) -> torch.Tensor:
    x = -0.3 * randn(B, T, seed=seed).abs()
    return x.requires_grad_() if grad else x


def head() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(B * T, H, seed=1).requires_grad_(), randn(V, H, seed=2).requires_grad_()


def losses() -> dict[str, torch.Tensor]:
    return {"old_logprob": tokens(2), "advantages": randn(B, T, seed=3), "mask": MASK}


def values() -> dict[str, torch.Tensor]:
    return {
        "values": randn(B, T, seed=4).requires_grad_(),
        "old_values": randn(B, T, seed=5),
        "returns": randn(B, T, seed=6),
    }


# op -> its sample call as (positional arguments, keyword arguments), fresh at each use.
SAMPLES = {
    "logprob": lambda: ((logits(), ids(B, T)), {"mask": MASK, "temperature": 0.7}),
    "logprob_entropy": lambda: ((logits(), ids(B, T)), {"mask": MASK, "softcap": 5.0}),
    "kl_estimate": lambda: (
        (tokens(1, grad=True), tokens(2)),
        {"estimator": "k3", "mask": MASK, "clamp": (10.0, 10.0)},
    ),
    "kl_divergence": lambda: (
        (logits(), logits(1).detach()),
        {"mask": MASK, "temperature": 0.7},
    ),
    "kl_divergence_full": lambda: (
        (logits(), logits(1).detach()),
        {"ids": ids(B, T), "mask": MASK, "temperature": 0.7},
    ),
    "logprob_entropy_and_grad": lambda: (
        (logits(), ids(B, T), tokens(3)),
        {"grad_entropy": 0.01, "mask": MASK, "softcap": 5.0},
    ),
    "kl_divergence_and_grad": lambda: (
        (logits(), logits(1), 0.1),
        {"ids": ids(B, T), "grad_logprob": tokens(3), "mask": MASK, "temperature": 0.7},
    ),
    "linear_logprob": lambda: (
        (*head(), ids(B * T)),
        {"mask": MASK.flatten(), "temperature": 0.7, "logit_scale": 1.5},
    ),
    "linear_logprob_entropy": lambda: ((*head(), ids(B * T)), {"temperature": 0.7}),
    "linear_kl": lambda: (
        (*head(), randn(B * T, H, seed=3), randn(V, H, seed=4)),
        {"ids": ids(B * T), "mask": MASK.flatten(), "temperature": 0.7},
    ),
    "linear_ppo_loss": lambda: (
        (*head(), ids(B * T)),
        {name: x.flatten() for name, x in losses().items()} | {"clip_low": 0.1},
    ),
    "gae": lambda: ((randn(B, T), randn(B, T, seed=1)), {"gamma": 0.9, "mask": MASK}),
    "gae_packed": lambda: (
        (randn(B * T), randn(B * T, seed=1), torch.tensor([0, 4, 4, B * T])),
        {"gamma": 0.9},
    ),
    "discounted_returns": lambda: ((randn(B, T),), {"gamma": 0.9, "mask": MASK}),
    "shaped_rewards": lambda: ((randn(B), tokens(1), tokens(2), MASK), {"kl_coef": 0.1}),
    "whiten": lambda: ((randn(B, T), MASK), {"eps": 1e-6}),
    "ppo_advantages": lambda: (
        (randn(B), tokens(1), tokens(2), randn(B, T, seed=3), MASK),
        {"kl_coef": 0.1, "gamma": 0.9},
    ),
    "group_advantages": lambda: ((randn(6), torch.tensor([4, 1, 4, 1, 1, -2])), {"eps": 1e-6}),
    "policy_loss": lambda: ((tokens(1, grad=True),), {**losses(), "dual_clip": 3.0}),
    "value_loss": lambda: ((), {**values(), "mask": MASK, "clip": 0.3}),
    "ppo_loss": lambda: ((tokens(1, grad=True),), {**losses(), **values(), "value_coef": 0.5}),
    "ranking_loss": lambda: ((randn(B, K).requires_grad_(), ids(B, K) % K), {"margin": 0.1}),
    "decode_attention": lambda: (
        (
            randn(B, 4, H),
            randn(B, 2, T, H, seed=1),
            randn(B, 2, T, H, seed=2),
            torch.tensor([5, 0, 3]),
        ),
        {
            "window": 4,
            "softcap": 5.0,
            "prefix": rlhf_fast.Prefix(
                randn(2, 2, 3, H, seed=3),
                randn(2, 2, 3, H, seed=4),
                torch.tensor([1, 1, 0]),
                torch.tensor([3, 1, 0]),
            ),
        },
    ),
    "decode_linear": lambda: ((randn(B, H), randn(5, H, seed=1), randn(5, seed=2)), {}),
    "sample": lambda: (
        (randn(B, V),),
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 3, "position": 1},
    ),
    "replay_logprob": lambda: (
        (logits(), ids(B, T)),
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    ),
}


def sample_call(op: str) -> tuple[tuple, dict]:
    assert op in SAMPLES, f"{op}: add a sample call to SAMPLES in tests/test_contract.py"
    return SAMPLES[op]()


def room_of(op: str) -> str:
    return _dispatch._TABLE[op]["reference"].split(".")[-2]


def tensors_of(result) -> list[torch.Tensor]:
    """The tensors of a result: a tensor, a tuple, or a Loss."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result if isinstance(result, tuple) else (result.loss, result.stats)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def leaves_of(arguments: tuple, keywords: dict) -> list[torch.Tensor]:
    every = [*arguments, *keywords.values()]
    return [x for x in every if isinstance(x, torch.Tensor) and x.requires_grad]


def outputs_and_gradients(function, op: str) -> list[torch.Tensor]:
    arguments, keywords = sample_call(op)
    outputs = tensors_of(function(*arguments, **keywords))
    live = [out for out in outputs if out.requires_grad]
    leaves = leaves_of(arguments, keywords)
    if not live:
        return outputs
    upstream = [randn(*out.shape, seed=9).to(out.dtype) for out in live]
    gradients = torch.autograd.grad(live, leaves, upstream, allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


def torch_calls(op: str) -> list[tuple[str, tuple]]:
    """(torch op, arguments) of everything a sample call runs, forward and backward."""
    calls = []

    def recording(name, original):
        def call(*arguments):
            calls.append((name, arguments))
            return original(*arguments)

        return call

    with mock.patch.multiple(
        torch.ops.rlhf_fast,
        **{name: recording(name, getattr(torch.ops.rlhf_fast, name)) for name in _dispatch._OWNER},
    ):
        outputs_and_gradients(getattr(rlhf_fast, op), op)
    assert calls, f"{op} runs no torch op"
    return calls


def test_every_public_op_of_the_contract_is_registered():
    missing = sorted(set(SAMPLES) - set(OPS))
    assert not missing, f"not registered: {', '.join(missing)}"


@pytest.mark.parametrize("op", OPS)
def test_op_is_public_and_documented(op):
    function = getattr(rlhf_fast, op)
    assert op in rlhf_fast.__all__
    text = inspect.getdoc(function) or ""
    for part in ("Args", "Returns:", "Raises", ">>>", " = ", "["):
        assert part in text, f"{op}: its docstring has no {part!r}"
    assert (
        "Source" in text
        or any(str(year) in text for year in range(1980, 2030))
        or ("as in" in text or "those of" in text)
    ), f"{op}: its docstring names no source"
    named = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    if "those of" not in text:
        undocumented = [name for name in named if name not in text]
        assert not undocumented, f"{op}: its docstring says nothing about {undocumented}"


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_files(op):
    room = room_of(op)
    assert hasattr(torch.ops.rlhf_fast, op)
    reference = importlib.import_module(f"rlhf_fast.kernels.{room}.reference")
    for name, owner in _dispatch._OWNER.items():
        assert owner != op or hasattr(reference, name), f"{room}/reference.py has no {name}"
    for path in (
        f"tests/test_{room}.py",
        f"benchmarks/bench_{room}.py",
        f"kernels/{room}/bench.py",
    ):
        assert (ROOT / path).exists(), f"{op}: {path} is missing"
    mine = [case for case in room_cases(room) if case.op == op]
    assert any(case.quick for case in mine), f"{op}: no quick case in kernels/{room}/bench.py"
    for device in ("cpu", "cuda"):
        full = [case for case in mine if not case.quick and device in case.devices]
        assert full, f"{op}: no full case for {device} in kernels/{room}/bench.py"


@pytest.mark.parametrize("op", OPS)
def test_table_is_complete(op):
    states = _dispatch.backends()[op]
    assert tuple(states) == _dispatch.BACKENDS
    assert states["reference"] is True
    for backend, state in states.items():
        assert state is True or (isinstance(state, str) and len(state) > 10), (op, backend)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    for name, arguments in torch_calls(op):
        if name.endswith("_backward"):  # their own backward raises, by design
            arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        arguments = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.rlhf_fast, name).default, tuple(arguments))


@pytest.mark.parametrize("op", OPS)
def test_fake_kernel_tells_the_truth(op):
    for name, arguments in torch_calls(op):
        function = getattr(torch.ops.rlhf_fast, name)
        plain = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        real = function(*plain)
        with FakeTensorMode() as mode:
            fake = function(*tree_map_only(torch.Tensor, mode.from_tensor, plain))
        real, fake = tensors_of(real), tensors_of(fake)
        assert len(real) == len(fake), name
        for k, (a, b) in enumerate(zip(real, fake, strict=True)):
            for what in ("shape", "dtype", "device"):
                assert getattr(a, what) == getattr(b, what), f"{name}: output {k}: {what}"
            assert a.stride() == b.stride(), f"{name}: output {k}: stride"
            assert a.is_contiguous(), f"{name}: output {k} is not contiguous"


@pytest.mark.parametrize("op", OPS)
def test_outputs_are_no_views_of_inputs(op):
    for name, arguments in torch_calls(op):
        with torch.no_grad():
            outputs = tensors_of(getattr(torch.ops.rlhf_fast, name)(*arguments))
        storages = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves(arguments)
            if isinstance(x, torch.Tensor)
        }
        for k, out in enumerate(outputs):
            assert out.untyped_storage().data_ptr() not in storages, f"{name}: output {k}"


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(op):
    torch._dynamo.reset()
    function = getattr(rlhf_fast, op)
    eager = outputs_and_gradients(function, op)
    compiled = outputs_and_gradients(
        torch.compile(function, fullgraph=True, backend="aot_eager"), op
    )
    assert len(eager) == len(compiled)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_compiles_with_numbers_that_change_between_calls(op):
    """A KL coefficient changes at every step; torch.compile then makes it symbolic."""
    torch._dynamo.reset()
    function = getattr(rlhf_fast, op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for factor in (1.0, 0.99, 0.98):
        arguments, keywords = sample_call(op)
        changed = {k: x * factor if type(x) is float else x for k, x in keywords.items()}
        pairs = zip(
            tensors_of(function(*arguments, **changed)),
            tensors_of(compiled(*arguments, **changed)),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_same_call_same_bits(op):
    first = outputs_and_gradients(getattr(rlhf_fast, op), op)
    again = outputs_and_gradients(getattr(rlhf_fast, op), op)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("op", OPS)
def test_forced_backend_serves_or_says_why_not(op):
    """Every backend that the table calls available serves; the others raise, listing all four."""
    function = getattr(rlhf_fast, op)
    for backend, state in _dispatch.backends()[op].items():
        arguments, keywords = sample_call(op)
        with rlhf_fast.use_backend(backend, op=op):
            if state is True and not (backend in ("triton", "cuda") and torch.cuda.is_available()):
                function(*arguments, **keywords)
                continue
            with pytest.raises(NotImplementedError) as caught:
                function(*arguments, **keywords)
        for name in _dispatch.BACKENDS:
            assert f"{name}:" in str(caught.value), f"{op}: the error does not list {name}"


def test_unknown_backend_or_op_raises_at_once():
    with pytest.raises(ValueError, match="reference, cpu, triton, cuda"):
        rlhf_fast.use_backend("gpu")
    with pytest.raises(ValueError, match="gae"):
        rlhf_fast.use_backend("cpu", op="no_such_op")


def test_use_backend_compiles():
    def function(z, i):
        with rlhf_fast.use_backend("reference"):
            return rlhf_fast.logprob(z, i)

    z, i = randn(3, V), ids(3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, i), function(z, i))
    assert _dispatch.requested("logprob") == ""


def test_innermost_request_wins_and_ends():
    with rlhf_fast.use_backend("cuda"):
        with rlhf_fast.use_backend("reference", op="gae"):
            assert _dispatch.requested("gae") == "reference"
            assert _dispatch.requested("logprob") == "cuda"
        assert _dispatch.requested("gae") == "cuda"
    assert _dispatch.requested("gae") == ""


def test_environment_variable_sets_the_default():
    code = """
import torch, rlhf_fast
x, i = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
with rlhf_fast.use_backend("reference"):
    rlhf_fast.logprob(x, i)
try:
    rlhf_fast.logprob(x, i)
except {error} as error:
    print("raised", error)
"""
    for backend, error in (("cuda", "NotImplementedError"), ("gpu", "ValueError")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(error=error)],
            env={**os.environ, "RLHF_FAST_BACKEND": backend, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert "raised" in result.stdout and "cuda" in result.stdout


def test_kernels_is_no_package():
    """`kernels/__init__.py` would hide Hugging Face's package of that name from transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_needs_neither_triton_nor_cuda():
    code = """
import sys
sys.modules["triton"] = None
import rlhf_fast
print(rlhf_fast.backends()["logprob"]["reference"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "True", result.stderr
