"""Log-prob and entropy from logits against float64, on every backend that runs here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_fast
from rlhf_fast.testing import (
    adversarial_logits,
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    usable_backends,
)

BACKENDS = usable_backends("logprob")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_fast.use_backend(request.param):
        yield request.param


def truth(logits, ids, temperature=1.0, softcap=None):
    """(logprob, entropy) in float64 from `torch.log_softmax`, differentiable where it is finite."""
    u = logits.double()
    if softcap is not None:
        u = torch.where(u == -torch.inf, u, softcap * torch.tanh(u / softcap))
    u = u / (temperature.double().unsqueeze(-1) if torch.is_tensor(temperature) else temperature)
    dead = (u == -torch.inf).all(-1, keepdim=True)
    lp = torch.log_softmax(torch.where(dead, 0.0, u), -1)
    lp = torch.where(dead | (u == -torch.inf), -torch.inf, lp)
    entropy = -(torch.where(lp == -torch.inf, 0.0, lp) * lp.exp()).sum(-1)
    return lp.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1), entropy


def plain(logits, ids, temperature=1.0):
    """What a trainer writes: at the logits' own dtype."""
    lp = torch.log_softmax(logits / temperature, -1)
    return lp.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1), -(lp.exp() * lp).sum(-1)


def pick_ids(shape, vocabulary, seed=11):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def gradient_truth(logits, ids, g, h):
    """Closed form in float64: g (1{j=y} - p_j) - h p_j (log p_j + H), 0 for a log-prob of -inf."""
    lp, entropy = truth(logits, ids)
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    log_p = torch.log_softmax(torch.where(dead, 0.0, logits.double()), -1)
    p = torch.where(dead | (logits == -torch.inf), 0.0, log_p.exp())
    g = torch.where(lp == -torch.inf, 0.0, g).unsqueeze(-1)
    one_hot = torch.nn.functional.one_hot(ids.long(), logits.shape[-1])
    log_p = torch.where(p == 0, 0.0, log_p)
    return g * (one_hot - p) - h.unsqueeze(-1) * p * (log_p + entropy.unsqueeze(-1))


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 17, 1000, 1024, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_forward_and_backward(backend, vocabulary, dtype):
    logits = (3 * randn(5, vocabulary, seed=1)).to(dtype)
    ids = pick_ids((5,), vocabulary)
    g, h = randn(5, seed=2), randn(5, seed=3)
    z = logits.to(device_of(backend)).requires_grad_()
    with poisoned_memory():
        out = rlhf_fast.logprob_entropy(z, ids.to(z.device))
        (out.logprob @ g.to(z.device) + out.entropy @ h.to(z.device)).backward()
    expected, naive = truth(logits, ids), plain(logits, ids)
    assert out.logprob.dtype == out.entropy.dtype == torch.float32 and z.grad.dtype == dtype
    assert_accurate("logprob", out.logprob, expected[0], naive[0])
    assert_accurate("entropy", out.entropy, expected[1], naive[1])
    assert_accurate("gradient", z.grad, gradient_truth(logits, ids, g.double(), h.double()))
    alone = rlhf_fast.logprob(z, ids.to(z.device))
    assert_accurate("logprob alone", alone, expected[0], naive[0])


@pytest.mark.parametrize("vocabulary", [50257, 151935, 151936, 151937])
def test_vocabularies_of_real_models(backend, vocabulary):
    rows = 1 if backend == "triton" else 2
    logits = 2 * randn(rows, vocabulary, seed=1)
    ids = torch.tensor([vocabulary - 1, 0])[:rows]
    z = logits.to(device_of(backend)).requires_grad_()
    out = rlhf_fast.logprob_entropy(z, ids.to(z.device))
    (out.logprob.sum() + out.entropy.sum()).backward()
    expected, naive = truth(logits, ids), plain(logits, ids)
    assert_accurate("logprob", out.logprob, expected[0], naive[0])
    assert_accurate("entropy", out.entropy, expected[1], naive[1])
    one = torch.ones(rows, dtype=torch.float64)
    assert_accurate("gradient", z.grad, gradient_truth(logits, ids, one, one))


@pytest.mark.parametrize("name", adversarial_logits(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adversarial_rows(backend, name, dtype):
    logits = adversarial_logits(1500)[name].to(dtype)
    ids = torch.tensor([0, 750, 1499, 3])
    g = torch.tensor([1.0, -2.0, 0.5, 1.0])
    z = logits.to(device_of(backend)).requires_grad_()
    out = rlhf_fast.logprob_entropy(z, ids.to(z.device))
    (
        torch.where(out.logprob == -torch.inf, 0.0, out.logprob) @ g.to(z.device)
        + out.entropy @ g.to(z.device)
    ).backward()
    expected, naive = truth(logits, ids), plain(logits, ids)
    assert_accurate("logprob", out.logprob, expected[0], naive[0])
    assert_accurate("entropy", out.entropy, expected[1], naive[1])
    assert_accurate("gradient", z.grad, gradient_truth(logits, ids, g.double(), g.double()))


def test_log_prob_of_an_impossible_token_has_no_gradient(backend):
    z = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3], device=device_of(backend))
    z.requires_grad_()
    out = rlhf_fast.logprob(z, torch.tensor([1, 2], device=z.device))
    assert out.tolist() == [-math.inf, -math.inf]
    out.backward(torch.ones_like(out))
    assert not z.grad.any()


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_temperature_and_softcap(backend, softcap, per_token):
    logits, ids = 8 * randn(2, 3, 129, seed=1), pick_ids((2, 3), 129)
    logits[0, 0, ::3] = -math.inf
    ids[0, 0] = 1
    temperature = torch.tensor([[0.3, 1.0, 2.5]]) if per_token else 0.7
    z = logits.clone().to(device_of(backend)).requires_grad_()
    hot = temperature.to(z.device) if per_token else temperature
    out = rlhf_fast.logprob_entropy(z, ids.to(z.device), temperature=hot, softcap=softcap)
    (out.logprob.sum() + 0.3 * out.entropy.sum()).backward()
    t64 = temperature.expand(2, 3).double() if per_token else temperature
    expected = truth(logits, ids, t64, softcap)
    finite = torch.where(logits == -math.inf, 0.0, logits).double().requires_grad_()
    u = softcap * torch.tanh(finite / softcap) if softcap else finite
    u = u / (t64.unsqueeze(-1) if per_token else t64)
    logs = torch.log_softmax(torch.where(logits == -math.inf, -1e9, u), -1)
    (logs.gather(-1, ids.unsqueeze(-1)).sum() - 0.3 * (logs.exp() * logs).sum()).backward()
    naive = plain(
        softcap * torch.tanh(logits / softcap) if softcap else logits,
        ids,
        temperature.unsqueeze(-1) if per_token else temperature,
    )
    assert_accurate("logprob", out.logprob, expected[0], naive[0])
    assert_accurate("entropy", out.entropy, expected[1], naive[0])
    assert_accurate("gradient", z.grad, finite.grad)


def test_masked_rows_are_not_looked_at(backend):
    logits, ids = randn(6, 50, seed=1), pick_ids((6,), 50)
    clean = logits.clone()
    logits[1], logits[3] = math.nan, math.inf
    ids[1], ids[4] = 10**6, -100
    mask = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, -2.0])
    temperature = torch.tensor([1.0, 0.0, 1.0, math.nan, 1.0, 1.0])
    z = logits.to(device_of(backend)).requires_grad_()
    with poisoned_memory():
        out = rlhf_fast.logprob_entropy(
            z, ids.to(z.device), mask=mask.to(z.device), temperature=temperature.to(z.device)
        )
        (out.logprob.sum() + out.entropy.sum()).backward()
    live = torch.tensor([True, False, True, False, False, True])
    expected = truth(clean[live], ids[live])
    assert_accurate("logprob", out.logprob[live.to(z.device)], expected[0])
    assert_accurate("entropy", out.entropy[live.to(z.device)], expected[1])
    for x in (out.logprob, out.entropy, z.grad):
        assert not x[~live.to(z.device)].any()
    assert z.grad.isfinite().all()


def test_everything_masked_still_backpropagates(backend):
    z = torch.full((2, 3, 5), math.nan, device=device_of(backend), requires_grad=True)
    ids = torch.zeros(2, 3, dtype=torch.int32, device=z.device)
    out = rlhf_fast.logprob_entropy(z, ids, mask=torch.zeros(2, 3, device=z.device))
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert not out.logprob.any() and not out.entropy.any() and not z.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, dtype):
    device = device_of(backend)
    whole = (2 * randn(2, 4, 40, seed=1)).to(dtype).to(device)
    ids = pick_ids((2, 4), 40).to(device)
    views = {
        "shifted": (whole[:, :-1], ids[:, 1:]),
        "every other column": (whole[..., ::2], ids % 20),
        "transposed": (whole.transpose(0, 1), ids.t()),
        "expanded": (whole[:1].expand(2, 4, 40), ids),
        "one row": (whole[0, 0], ids[0, 0]),
        "four axes": (whole.view(2, 2, 2, 40), ids.view(2, 2, 2)),
        "int32": (whole, ids.int()),
    }
    for name, (z, y) in views.items():
        strided = z.detach().requires_grad_()
        dense = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        a = rlhf_fast.logprob_entropy(strided, y)
        b = rlhf_fast.logprob_entropy(dense, y.contiguous().long())
        assert_same_bits(name, a.logprob, b.logprob)
        assert_same_bits(name, a.entropy, b.entropy)
        (a.logprob.sum() + a.entropy.sum()).backward()  # the upstream gradient has stride 0
        (b.logprob.sum() + b.entropy.sum()).backward()
        assert_same_bits(name, strided.grad.contiguous(), dense.grad)


def test_empty_batches(backend):
    for shape in ((0, 7), (2, 0, 7)):
        z = torch.zeros(shape, device=device_of(backend), requires_grad=True)
        out = rlhf_fast.logprob(z, torch.zeros(shape[:-1], dtype=torch.int64, device=z.device))
        out.sum().backward()
        assert out.shape == shape[:-1] and z.grad.shape == shape


@pytest.mark.parametrize("vocabulary", [50, 5000])
def test_a_row_does_not_depend_on_the_others(backend, vocabulary):
    z = 3 * randn(9, vocabulary, seed=1).to(device_of(backend))
    ids = pick_ids((9,), vocabulary).to(z.device)

    def run(rows):
        x = z[rows].clone().requires_grad_()
        out = rlhf_fast.logprob_entropy(x, ids[rows])
        (out.logprob.sum() + 0.5 * out.entropy.sum()).backward()
        return out.logprob, out.entropy, x.grad

    everything = run(torch.arange(9))
    for rows in (torch.randperm(9), torch.tensor([3]), torch.tensor([8, 0])):
        for name, part, whole in zip(
            ["logprob", "entropy", "grad"], run(rows), everything, strict=True
        ):
            assert_same_bits(name, part, whole[rows])
    for part, whole in zip(run(torch.arange(9)), everything, strict=True):
        assert_same_bits("run to run", part, whole)


def test_a_long_row_alone_has_the_bits_of_the_batch(backend):
    """torch shares the sum of a single row of 32768 or more elements among its threads."""
    z = 3 * randn(3, 40001, seed=1).to(device_of(backend))
    ids = torch.tensor([0, 7, 40000], device=z.device)
    whole = rlhf_fast.logprob_entropy(z, ids)
    for name, part, every in zip(
        whole._fields, rlhf_fast.logprob_entropy(z[1], ids[1]), whole, strict=True
    ):
        assert_same_bits(name, part, every[1])


def test_an_offset_of_the_row_costs_no_digits_at_any_temperature(backend):
    """Dividing before the maximum is subtracted would lose those of max / temperature."""
    z = (16 * randn(4, 50, seed=1)).round() / 16  # exact in float32, with an offset too
    ids = torch.tensor([0, 1, 2, 49])
    for offset in (-1000, 1e4):
        out, base = (
            rlhf_fast.logprob_entropy(x.to(device_of(backend)), ids.to(device_of(backend)),
                                      temperature=0.7)
            for x in (z + offset, z)
        )  # fmt: skip
        for name, a, b in zip(out._fields, out, base, strict=True):
            assert_same_bits(name, a, b)


def test_inputs_are_not_written_to(backend):
    z = randn(4, 33, seed=1).to(device_of(backend)).requires_grad_()
    ids = pick_ids((4,), 33).to(z.device)
    before, version = z.detach().clone(), z._version
    out = rlhf_fast.logprob(z, ids)
    out.sum().backward(retain_graph=True)
    first = z.grad.clone()
    out.sum().backward()
    assert_same_bits("logits", z, before)
    assert z._version == version
    assert_same_bits("second backward", z.grad, 2 * first)


def test_double_backward_raises(backend):
    z = randn(2, 5).to(device_of(backend)).requires_grad_()
    out = rlhf_fast.logprob(z, torch.tensor([0, 1], device=z.device))
    (grad,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_gradcheck_of_the_reference():
    z = randn(3, 6, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([0, 5, 2])
    temperature = torch.tensor([0.5, 1.0, 2.0])

    def function(x):
        return rlhf_fast.logprob_entropy(x, ids, temperature=temperature, softcap=3.0)

    assert torch.autograd.gradcheck(function, (z,))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.floats(0.05, 20.0),
    st.floats(-1e4, 1e4),
    st.floats(0.0, 0.9),
)
def test_any_row(seed, vocabulary, scale, offset, banned):
    logits = scale * randn(3, vocabulary, seed=seed) + offset
    logits[
        torch.rand(3, vocabulary, generator=torch.Generator().manual_seed(seed)) < banned
    ] = -math.inf
    ids = pick_ids((3,), vocabulary, seed)
    expected = truth(logits, ids)
    naive = plain(logits, ids)
    for backend in BACKENDS:
        if backend == "triton":
            continue  # the interpreter takes 10 ms a call; the cases above cover it
        with rlhf_fast.use_backend(backend):
            out = rlhf_fast.logprob_entropy(
                logits.to(device_of(backend)), ids.to(device_of(backend))
            )
        assert_accurate("logprob", out.logprob, expected[0], naive[0])
        assert_accurate("entropy", out.entropy, expected[1])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native module is not built")
def test_more_than_two_to_the_31_elements():
    """bf16 rows far apart in one 4.4 GB buffer of which only two rows' pages are ever touched."""
    vocabulary, rows = 151_936, 14_500
    z = torch.empty(rows, vocabulary, dtype=torch.bfloat16)
    assert z.numel() > 2**31
    z[-1] = 2 * randn(vocabulary, seed=1).bfloat16()
    ids = torch.full((rows,), -100)
    ids[-1] = vocabulary - 1
    with rlhf_fast.use_backend("cpu"):
        out = rlhf_fast.logprob_entropy(z, ids)
    expected = truth(z[-1:], ids[-1:])
    assert_accurate("logprob", out.logprob[-1:], expected[0])
    assert_accurate("entropy", out.entropy[-1:], expected[1])
    assert not out.logprob[:-1].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.tensor([0, 3])}, IndexError, r"ids: expected values in \[0, 3\), got 3"),
        ({"ids": torch.tensor([0, -1])}, IndexError, "got -1"),
        ({"ids": torch.tensor([0.0, 1.0])}, TypeError, "ids: expected int32 or int64, got float32"),
        ({"ids": torch.tensor([0])}, ValueError, r"ids: expected shape \(2,\)"),
        ({"logits": torch.zeros(2, 3).int()}, TypeError, "logits: expected float64"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "V >= 1"),
        ({"mask": torch.ones(3)}, ValueError, "mask: expected shape"),
        ({"mask": [1, 1]}, TypeError, "mask: expected a tensor"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a finite number"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature: expected positive"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature: expected a shape"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a finite number"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_DEBUG", "1")  # a GPU's values are looked at only then
    arguments = {"logits": torch.zeros(2, 3), "ids": torch.tensor([0, 1])} | change
    device = device_of(backend)
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        rlhf_fast.logprob(arguments.pop("logits"), arguments.pop("ids"), **arguments)
