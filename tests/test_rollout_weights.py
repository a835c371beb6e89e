"""Linear layers of a rollout that go to `decode_linear`: which ones, and that nothing stays."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
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


def weight_of(*shape):
    return DecodeWeight.of(nn.Parameter(torch.randn(*shape), requires_grad=False))


def test_many_rows_and_other_functions_see_the_parameter(seen):
    weight = weight_of(5, 4)
    out = linear(torch.randn(65, 4), weight)
    assert type(out) is torch.Tensor and not seen
    assert type(linear(torch.randn(64, 4), weight)) is torch.Tensor and len(seen) == 1
    assert type(weight + 1) is torch.Tensor and type(weight[0]) is torch.Tensor
    assert linear(torch.randn(0, 4), weight).shape == (0, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(3, 4), weight).dtype == torch.bfloat16
    assert len(seen) == 1


def test_the_rows_of_a_conv1d(seen):
    weight, bias = weight_of(4, 5), torch.randn(5)
    for rows in (1, 2, 16, 17):
        x = torch.randn(rows, 4)
        out = torch.addmm(bias, x, weight)
        assert type(out) is torch.Tensor
        torch.testing.assert_close(out, x @ weight.parameter + bias)
    assert seen == [(2, (5, 4)), (16, (5, 4))]


def test_what_no_layer_computes_is_left_to_pytorch(seen):
    weight = weight_of(5, 4)
    x, plain = torch.randn(3, 4), weight.parameter
    assert torch.equal(linear(plain, x), linear(weight, x))
    a, b = torch.randn(5, 2), torch.randn(2, 4)
    assert torch.equal(torch.addmm(weight, a, b), torch.addmm(plain, a, b))
    for bias in (torch.randn(3, 4), torch.randn(1), torch.randn(3, 1)):
        y = torch.randn(3, 5)
        assert torch.equal(torch.addmm(bias, y, weight), torch.addmm(bias, y, plain))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 8), weight)
    with pytest.raises(RuntimeError):
        linear(x, weight, torch.randn(7))
    with pytest.raises(RuntimeError):
        linear(x.double(), weight)
    with pytest.raises(RuntimeError):
        linear(x, weight, torch.randn(5).double())
    assert not seen


def test_a_wrong_input_inside_the_model_is_pytorchs_error():
    model = tiny()
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: torch.cat(args + args, -1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        greedy(model, PROMPTS, max_new_tokens=3)
    handle.remove()
    greedy(model, PROMPTS, max_new_tokens=3)


def test_a_parameter_whose_data_comes_and_goes():
    """As wrappers do that keep a weight elsewhere between the calls of its layer."""
    model = tiny()
    expected = greedy(model, PROMPTS, max_new_tokens=4)
    layer = model.model.layers[1].mlp.up_proj
    weight, data = layer.weight, layer.weight.data

    def gather(*_):
        weight.data = data

    def free(*_):
        weight.data = torch.empty(0)

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(free)
    for _ in range(2):
        assert torch.equal(greedy(model, PROMPTS, max_new_tokens=4).ids, expected.ids)


def test_under_autocast_the_weights_are_cast_once():
    """PyTorch keeps the casts of parameters, not of what stands for them."""
    model = tiny()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        casts = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].ndim == 2:
                self.casts += any(args[0].shape == m.weight.shape for m in layers)
            return function(*args, **(kwargs or {}))

    layers = [m for m in model.modules() if type(m) is nn.Linear]
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch() as watch:
        greedy(model, PROMPTS[:2], max_new_tokens=8)
    assert watch.casts < 3 * len(layers)


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
            "strided": nn.Linear(4, 3),
        }
    )
    model["strided"].weight = nn.Parameter(torch.randn(3, 8)[:, ::2])
    kinds = {}

    def look():
        kinds.update({name: type(module.weight) for name, module in model.items()})

    before = {name: module.weight for name, module in model.items()}
    with torch.no_grad():
        with_decode_weights(model, look)
    assert kinds["plain"] is DecodeWeight
    assert all(kinds[name] is not DecodeWeight for name in ("own", "wide", "computed", "strided"))
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


@pytest.mark.parametrize("compiled", ["model", "forward", "layer", "layer's forward", "wrapped"])
def test_what_is_compiled_computes_as_it_did(compiled):
    model = tiny()
    expected = greedy(model, PROMPTS[:3], max_new_tokens=3)
    layer = model.model.layers[0]
    module = model if compiled in ("model", "forward") else layer.mlp
    if compiled == "wrapped":
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    elif compiled.endswith("forward"):
        module.forward = torch.compile(module.forward, backend="eager")
    else:
        module.compile(backend="eager")
    assert torch.equal(greedy(model, PROMPTS[:3], max_new_tokens=3).ids, expected.ids)


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
