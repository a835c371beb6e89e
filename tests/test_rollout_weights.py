"""Linear layers of a rollout that go to `decode_linear`: which ones, and that nothing stays."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rlhf_fast
from rlhf_fast.kernels.decode_linear import _native
from rlhf_fast.rollout.weights import DecodeWeight, with_decode_weights
from tests.rollout_models import (
    PROMPTS,
    assert_same_state,
    compare_with_forward,
    greedy,
    state_of,
    tiny,
)


@pytest.fixture
def seen(monkeypatch):
    """(rows, shape of the weight) of each call of the native kernel."""
    calls = []
    kernel = _native.decode_linear

    def record(x, weight, bias):
        calls.append((x.numel() // x.shape[-1], tuple(weight.shape)))
        return kernel(x, weight, bias)

    # The table of implementations is cached: replace what the cached function calls.
    rlhf_fast._dispatch._resolve.cache_clear()
    monkeypatch.setattr(_native, "decode_linear", record)
    yield calls
    rlhf_fast._dispatch._resolve.cache_clear()


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "qwen2", "gpt2"])
def test_every_linear_layer_of_a_decode_step(family, seen):
    model = tiny(family)
    layers = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    greedy(model, PROMPTS[:3], max_new_tokens=5)
    steps = [shape for rows, shape in seen if rows == 3]
    assert len(steps) >= 4 * len(layers)
    assert set(steps) == {
        tuple((m.weight.t() if type(m) is Conv1D else m.weight).shape) for m in layers
    }


def test_responses_do_not_depend_on_who_multiplies():
    model = tiny()
    ours = greedy(model, PROMPTS, max_new_tokens=9)
    with rlhf_fast.use_backend("reference", op="decode_linear"):
        plain = greedy(model, PROMPTS, max_new_tokens=9)
    assert torch.equal(ours.ids, plain.ids)


def test_many_rows_and_other_functions_see_a_plain_tensor(seen):
    weight = torch.randn(5, 4).as_subclass(DecodeWeight)
    out = nn.functional.linear(torch.randn(65, 4), weight)
    assert type(out) is torch.Tensor and not seen
    assert type(nn.functional.linear(torch.randn(64, 4), weight)) is torch.Tensor and len(seen) == 1
    assert type(weight + 1) is torch.Tensor and type(weight[0]) is torch.Tensor
    assert nn.functional.linear(torch.randn(0, 4), weight).shape == (0, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.functional.linear(torch.randn(3, 4), weight).dtype == torch.bfloat16
    assert len(seen) == 1


def test_the_rows_of_a_conv1d(seen):
    weight, bias = torch.randn(4, 5).as_subclass(DecodeWeight), torch.randn(5)
    for rows in (1, 2, 16, 17):
        x = torch.randn(rows, 4)
        out = torch.addmm(bias, x, weight)
        assert type(out) is torch.Tensor
        torch.testing.assert_close(out, x @ weight.as_subclass(torch.Tensor) + bias)
    assert seen == [(2, (5, 4)), (16, (5, 4))]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_which_layers(seen):
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 3),
            "own": Scaled(4, 3),
            "wide": nn.Linear(4, 3).double(),
            "computed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        }
    )
    kinds = {}

    def look():
        kinds.update({name: type(module.weight) for name, module in model.items()})

    before = {name: module.weight for name, module in model.items()}
    with torch.no_grad():
        with_decode_weights(model, look)
    assert kinds["plain"] is DecodeWeight
    assert all(kinds[name] is not DecodeWeight for name in ("own", "wide", "computed"))
    assert all(model[name].weight is before[name] for name in ("plain", "own", "wide"))


def test_tied_weights_and_a_change_between_calls():
    """A head that shares its weight with the embedding: the lookup sees the plain one."""
    model = tiny("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for _ in range(2):
        out = rlhf_fast.generate(model, PROMPTS, max_new_tokens=6)
        compare_with_forward(model, PROMPTS, out, {})
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("compiled", ["model", "layer", "wrapped layer"])
def test_compiled_modules_keep_their_weights(compiled, seen):
    model = tiny()
    expected = greedy(model, PROMPTS[:3], max_new_tokens=3)
    seen.clear()
    layer = model.model.layers[0]
    if compiled == "wrapped layer":
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    else:
        (model if compiled == "model" else layer.mlp).compile(backend="eager")
    assert torch.equal(greedy(model, PROMPTS[:3], max_new_tokens=3).ids, expected.ids)
    assert not seen


def test_parameters_are_put_back_after_an_error(monkeypatch):
    model = tiny()
    before, parameters = state_of(model), dict(model.named_parameters())
    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("out of patience")

    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of patience"):
        greedy(model, PROMPTS, max_new_tokens=20)
    handle.remove()
    assert_same_state(model, before)
    assert all(x is parameters[name] for name, x in model.named_parameters())
    greedy(model, PROMPTS, max_new_tokens=2)
