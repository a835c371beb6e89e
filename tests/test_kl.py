"""Sampled and exact KL against float64, on every backend that runs here."""

import itertools
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

INF = math.inf
ESTIMATORS = ("k1", "abs", "k2", "k3")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=usable_backends("kl_estimate"))
def sampled(request):
    with rlhf_fast.use_backend(request.param):
        yield device_of(request.param)


@pytest.fixture(params=usable_backends("kl_divergence"))
def exact(request):
    with rlhf_fast.use_backend(request.param):
        yield device_of(request.param)


def estimate(d, estimator):
    return {
        "k1": lambda: d,
        "abs": lambda: d.abs(),
        "k2": lambda: d * d / 2,
        "k3": lambda: torch.expm1(-d) + d,
    }[estimator]()


def truth(logits, ref_logits, temperature=1.0):
    """KL in float64 term by term, with the -inf rules written out."""
    t = temperature.double().unsqueeze(-1) if torch.is_tensor(temperature) else temperature
    u, r = logits.double() / t, ref_logits.double() / t
    log_p = torch.log_softmax(torch.where((u == -INF).all(-1, True), 0.0, u), -1)
    log_q = torch.log_softmax(torch.where((r == -INF).all(-1, True), 0.0, r), -1)
    log_q = torch.where(r == -INF, -INF, log_q)
    terms = torch.where(r == -INF, INF, log_p.exp() * (log_p - log_q))
    return torch.where(u == -INF, 0.0, terms).sum(-1)


def plain(logits, ref_logits, temperature=1.0):
    t = temperature.unsqueeze(-1) if torch.is_tensor(temperature) else temperature
    log_p, log_q = torch.log_softmax(logits / t, -1), torch.log_softmax(ref_logits / t, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def pick_ids(shape, vocabulary):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(11))


# ----------------------------------------------------------------------------------- sampled


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clamp", [None, (1.0, None), (None, 0.4), (2.0, 0.5)])
def test_estimates(sampled, estimator, dtype, clamp):
    lp, ref = (randn(4, 9, seed=s).to(dtype) for s in (1, 2))
    a, b = (x.clone().to(sampled).requires_grad_() for x in (lp, ref))
    weight = randn(4, 9, seed=3)
    with poisoned_memory():
        out = rlhf_fast.kl_estimate(a, b, estimator=estimator, clamp=clamp)
        (out * weight.to(sampled)).sum().backward()
    x, y = lp.double().requires_grad_(), ref.double().requires_grad_()
    low, high = clamp or (None, None)
    d = x - y if low is None else (x - y).clamp(-low, low)
    k = estimate(d, estimator)
    k = k if high is None else k.clamp(-high, high)
    (k * weight).sum().backward()
    assert out.dtype == torch.float32 and a.grad.dtype == b.grad.dtype == dtype
    assert_accurate("kl", out, k)
    assert_accurate("d kl / d logprob", a.grad, x.grad)
    assert_accurate("d kl / d ref_logprob", b.grad, y.grad)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_of_impossible_tokens(sampled, estimator):
    a = torch.tensor([-INF, -INF, -1.0, 0.0], device=sampled, requires_grad=True)
    b = torch.tensor([-INF, -1.0, -INF, 0.0], device=sampled, requires_grad=True)
    out = rlhf_fast.kl_estimate(a, b, estimator=estimator)
    out.backward(torch.ones_like(out))
    assert out.tolist() == [0.0, -INF if estimator == "k1" else INF, INF, 0.0]
    slope = 1.0 if estimator == "k1" else 0.0
    assert a.grad.tolist() == [0.0, 0.0, 0.0, slope]
    assert b.grad.tolist() == [0.0, 0.0, 0.0, -slope]
    clamped = rlhf_fast.kl_estimate(a, b, estimator=estimator, clamp=(2.0, 3.0))
    assert clamped.isfinite().all() and clamped.abs().max() <= 3.0


def test_k3_keeps_small_differences(sampled):
    d = torch.tensor([1e-3, -1e-3, 1e-2], device=sampled)
    out = rlhf_fast.kl_estimate(d, torch.zeros_like(d), estimator="k3")
    assert (out > 0).all()
    assert_accurate("k3", out, torch.expm1(-d.double()) + d.double())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masked_estimates_leak_nothing(sampled, estimator):
    lp = torch.tensor([[0.5, math.nan, INF], [-INF, 1.0, 0.0]], device=sampled, requires_grad=True)
    ref = torch.tensor([[0.0, 1.0, math.nan], [INF, 1.5, math.nan]], device=sampled)
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, -0.5, 0.0]], device=sampled)
    out = rlhf_fast.kl_estimate(lp, ref, estimator=estimator, mask=mask)
    out.sum().backward()
    d = torch.tensor([0.5, -0.5], dtype=torch.float64)
    assert_accurate("kl", out[mask != 0], estimate(d, estimator))
    assert not out[mask == 0].any() and not lp.grad[mask == 0].any()
    everything = rlhf_fast.kl_estimate(lp, ref, mask=torch.zeros(2, 3, device=sampled))
    everything.sum().backward()
    assert not everything.any()


def test_estimates_of_any_layout(sampled):
    lp, ref = (randn(3, 8, seed=s).to(sampled) for s in (1, 2))
    out = rlhf_fast.kl_estimate(lp.t(), ref[:, ::1].t())
    assert out.is_contiguous()
    assert_same_bits("transposed", out, (lp - ref).t().contiguous())
    assert rlhf_fast.kl_estimate(lp[0, 0], ref[0, 0]).shape == ()
    assert rlhf_fast.kl_estimate(lp[:0], ref[:0]).shape == (0, 8)


# ------------------------------------------------------------------------------------- exact


def pair(*shape, dtype=torch.float32):
    return (2 * randn(*shape, seed=1)).to(dtype), (2 * randn(*shape, seed=2)).to(dtype)


def gradient_truth(logits, ref_logits, ids, weights, temperature=1.0):
    """Autograd in float64 through finite logits."""
    z = logits.double().requires_grad_()
    t = temperature.double().unsqueeze(-1) if torch.is_tensor(temperature) else temperature
    log_p = torch.log_softmax(z / t, -1)
    log_q = torch.log_softmax(ref_logits.double() / t, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    lp = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    a, b, c = weights
    ((a * kl).sum() + (b * lp).sum() + (c * entropy).sum()).backward()
    ref_lp = log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return kl, lp, ref_lp, entropy, z.grad


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 1000, 4097])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per row"])
def test_exact_kl(exact, vocabulary, dtype, temperature):
    logits, ref = pair(2, 3, vocabulary, dtype=dtype)
    ids = pick_ids((2, 3), vocabulary)
    t = torch.tensor([[0.5], [2.0]]).expand(2, 3) if temperature == "per row" else temperature
    weights = [randn(2, 3, seed=s).double() for s in (4, 5, 6)]
    z = logits.clone().to(exact).requires_grad_()
    r = ref.clone().to(exact).requires_grad_()
    with poisoned_memory():
        out = rlhf_fast.kl_divergence_full(
            z, r, ids.to(exact), temperature=t.to(exact) if torch.is_tensor(t) else t
        )
        a, b, c = (w.float().to(exact) for w in weights)
        ((a * out.kl).sum() + (b * out.logprob).sum() + (c * out.entropy).sum()).backward()
    weights = [w.float().double() for w in weights]
    *expected, gradient = gradient_truth(logits, ref, ids, weights, t)
    naive = plain(logits, ref, t)
    for name, value, true in zip(out._fields, out, expected, strict=True):
        assert value.dtype == torch.float32
        assert_accurate(name, value, true, naive if name == "kl" else None)
    assert not out.ref_logprob.requires_grad and r.grad is None
    assert_accurate("gradient", z.grad, gradient)
    alone = rlhf_fast.kl_divergence(z, r, temperature=t.to(exact) if torch.is_tensor(t) else t)
    assert_same_bits("kl alone", alone, out.kl)
    z.grad = None
    (a * alone).sum().backward()
    gradient = gradient_truth(logits, ref, ids, (weights[0], 0, 0), t)[-1]
    assert_accurate("gradient of kl alone", z.grad, gradient)


@pytest.mark.parametrize("name", adversarial_logits(8))
@pytest.mark.parametrize("other", ["normal", "offset 1e4", "near -1000", "every other -inf"])
def test_adversarial_rows(exact, name, other):
    logits = adversarial_logits(700)[name]
    ref = adversarial_logits(700)[other].roll(1, 0)
    z = logits.clone().to(exact).requires_grad_()
    out = rlhf_fast.kl_divergence(z, ref.to(exact))
    assert_accurate("kl", out, truth(logits, ref), plain(logits, ref))
    out.backward(torch.ones_like(out))
    assert z.grad.isfinite().all()
    assert not z.grad[out == INF].any()
    assert not z.grad[(logits == -INF).to(exact)].any()


def test_rules_of_minus_infinity(exact):
    logits = torch.tensor(
        [
            [0.0, 1.0, -INF],  # policy -inf: adds 0
            [0.0, 1.0, -INF],  # both -inf: adds 0
            [0.0, 1.0, 2.0],  # reference -inf only
            [0.0, 1.0, -1e4],  # the same with a probability that underflows
            [-INF, -INF, -INF],  # no distribution
            [-INF, 3.0, -INF],  # certain
            [0.0, 1.0, 2.0],  # a reference without any token
        ]
    )
    ref = torch.tensor(
        [
            [0.0, 0.0, 0.0],
            [0.0, 0.0, -INF],
            [0.0, 0.0, -INF],
            [0.0, 0.0, -INF],
            [0.0, 0.0, 0.0],
            [-INF, 7.0, 0.0],
            [-INF, -INF, -INF],
        ]
    )
    z = logits.clone().to(exact).requires_grad_()
    ids = torch.zeros(7, dtype=torch.int64, device=z.device)
    out = rlhf_fast.kl_divergence_full(z, ref.to(exact), ids)
    assert (out.kl == INF).tolist() == [False, False, True, True, False, False, True]
    assert_accurate("kl", out.kl, truth(logits, ref))
    assert out.kl[4] == 0 and out.entropy[4] == 0 and out.logprob[4] == -INF
    out.kl.backward(torch.ones_like(out.kl), retain_graph=True)
    assert z.grad.isfinite().all() and not z.grad[[2, 3, 4, 6]].any()
    z.grad = None
    out.entropy.sum().backward()  # an infinite KL does not spoil what stands beside it
    assert z.grad[2].any() and z.grad.isfinite().all()


def test_masked_rows_are_not_looked_at(exact):
    logits, ref = pair(5, 20)
    clean, clean_ref = logits.clone(), ref.clone()
    logits[1], ref[1], logits[3], ref[3] = math.nan, INF, INF, -INF
    ids = torch.tensor([0, 99, 3, -5, -100])
    mask = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    t = torch.tensor([1.0, 0.0, 1.0, math.nan, 1.0])
    z = logits.clone().to(exact).requires_grad_()
    with poisoned_memory():
        out = rlhf_fast.kl_divergence_full(
            z, ref.to(exact), ids.to(exact), temperature=t.to(exact), mask=mask.to(exact)
        )
        sum(x.sum() for x in (out.kl, out.logprob, out.entropy)).backward()
    live = torch.tensor([True, False, True, False, False])
    assert_accurate("kl", out.kl[live.to(exact)], truth(clean[live], clean_ref[live]))
    for x in (*out, z.grad):
        assert not x[~live.to(exact)].any()
    assert z.grad.isfinite().all()
    z.grad = None
    none = rlhf_fast.kl_divergence(z, ref.to(exact), mask=torch.zeros(5, device=exact))
    none.sum().backward()
    assert not none.any() and not z.grad.any()


def test_rows_layouts_and_inputs(exact):
    whole, ref = (x.to(exact) for x in pair(3, 6, 40))
    ids = pick_ids((3, 6), 40).to(exact)
    version = whole._version
    out = rlhf_fast.kl_divergence_full(whole, ref, ids)
    shifted = rlhf_fast.kl_divergence_full(whole[:, :-1], ref[:, :-1], ids[:, :-1].int())
    assert_same_bits("shifted", shifted.kl, out.kl[:, :-1].contiguous())
    turned = rlhf_fast.kl_divergence(whole.transpose(0, 1), ref.transpose(0, 1))
    assert_same_bits("transposed", turned, out.kl.t().contiguous())
    alone = rlhf_fast.kl_divergence(whole[1, 2], ref[1, 2])
    assert_same_bits("alone", alone, out.kl[1, 2])
    assert rlhf_fast.kl_divergence(whole[:0], ref[:0]).shape == (0, 6)
    assert whole._version == version


def test_a_long_row_alone_has_the_bits_of_the_batch(exact):
    """torch shares the sum of a single row of 32768 or more elements among its threads."""
    logits, ref = (x.to(exact) for x in pair(3, 40001))
    ids = torch.tensor([0, 7, 40000], device=logits.device)
    whole = rlhf_fast.kl_divergence_full(logits, ref, ids)
    alone = rlhf_fast.kl_divergence_full(logits[1], ref[1], ids[1])
    for name, part, every in zip(whole._fields, alone, whole, strict=True):
        assert_same_bits(name, part, every[1])


def test_double_backward_raises(sampled):
    x = randn(3).to(sampled).requires_grad_()
    (g,) = torch.autograd.grad(
        rlhf_fast.kl_estimate(x, x.detach() - 1, estimator="k2").sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()
    z = randn(2, 5).to(sampled).requires_grad_()
    (g,) = torch.autograd.grad(
        rlhf_fast.kl_divergence(z, z.detach().roll(1)).sum(), z, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize("dtypes", list(itertools.permutations(FLOATS, 2)))
def test_the_two_models_may_differ_in_dtype(exact, dtypes):
    logits, ref = (x.to(dtype) for x, dtype in zip(pair(3, 1100), dtypes, strict=True))
    ids = pick_ids((3,), 1100)
    z = logits.clone().to(exact).requires_grad_()
    out = rlhf_fast.kl_divergence_full(z, ref.to(exact), ids.to(exact))
    (out.kl + out.logprob + out.entropy).sum().backward()
    *expected, gradient = gradient_truth(logits, ref, ids, (1, 1, 1))
    naive = plain(logits.float(), ref.float())
    for name, value, true in zip(out._fields, out, expected, strict=True):
        assert value.dtype == torch.float32
        assert_accurate(name, value, true, naive if name == "kl" else None)
    assert z.grad.dtype == logits.dtype
    assert_accurate("gradient", z.grad, gradient)


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)]
)
def test_float64_of_one_input_is_that_of_the_result(dtypes):
    z, r = (x.to(dtype) for x, dtype in zip(pair(3, 9), dtypes, strict=True))
    z.requires_grad_()
    assert rlhf_fast.kl_estimate(z, r).dtype == torch.float64
    out = rlhf_fast.kl_divergence_full(z, r, pick_ids((3,), 9))
    out.kl.sum().backward()
    assert z.grad.dtype == z.dtype and all(x.dtype == torch.float64 for x in out)
    assert_accurate("kl", rlhf_fast.kl_divergence(z, r), truth(z.detach(), r))


def test_gradcheck_of_the_reference():
    lp, ref = (randn(5, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    for estimator in ESTIMATORS:
        assert torch.autograd.gradcheck(
            lambda a, b, e=estimator: rlhf_fast.kl_estimate(a, b, estimator=e, clamp=(1.3, 0.9)),
            (lp, ref),
        )
    z, r = (randn(3, 6, seed=s, dtype=torch.float64) for s in (3, 4))
    t, ids = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 5, 2])

    def function(x):
        out = rlhf_fast.kl_divergence_full(x, r, ids, temperature=t)
        return out.kl, out.logprob, out.entropy

    assert torch.autograd.gradcheck(function, (z.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: rlhf_fast.kl_divergence(x, r), (z,))


def test_torch_library_and_compile():
    lp, ref = (randn(4, seed=s).requires_grad_() for s in (1, 2))
    mask = torch.tensor([True, True, False, True])
    ops = torch.ops.rlhf_fast
    torch.library.opcheck(ops.kl_estimate.default, (lp, ref, mask, "k3", 1.0, None, ""))
    z, r = (randn(4, 7, seed=s).requires_grad_() for s in (3, 4))
    ids = torch.tensor([0, 6, 2, 3])
    torch.library.opcheck(ops.kl_divergence.default, (z, r, mask, 0.7, None, ""))
    torch.library.opcheck(ops.kl_divergence_full.default, (z, r, ids, mask, 1.0, lp.exp(), ""))

    def function(z, r, ids):
        full = rlhf_fast.kl_divergence_full(z, r, ids, temperature=0.7)
        k3 = rlhf_fast.kl_estimate(
            full.logprob, full.ref_logprob, estimator="k3", clamp=(20.0, None)
        )
        return full.kl + k3 + rlhf_fast.kl_divergence(z, r)

    eager = function(z, r, ids)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(z, r, ids)
    assert_same_bits("compiled", compiled, eager)
    (a,) = torch.autograd.grad(eager.sum(), z)
    (b,) = torch.autograd.grad(compiled.sum(), z)
    assert_same_bits("compiled gradient", b, a)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.floats(0.05, 15.0),
    st.floats(-1e4, 1e4),
    st.floats(0.0, 0.9),
)
def test_any_row(seed, vocabulary, scale, offset, banned):
    logits, ref = (
        scale * randn(3, vocabulary, seed=seed),
        scale * randn(3, vocabulary, seed=seed + 1),
    )
    logits = logits + offset
    hidden = torch.rand(3, vocabulary, generator=torch.Generator().manual_seed(seed)) < banned
    logits[hidden] = -INF
    ref[hidden] = -INF
    out = rlhf_fast.kl_divergence(logits, ref)
    assert_accurate("kl", out, truth(logits, ref), plain(logits, ref))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rlhf_fast.kl_estimate(x, x, estimator="k4"), ValueError, "estimator"),
        (lambda x: rlhf_fast.kl_estimate(x, x[:1]), ValueError, "ref_logprob: expected shape"),
        (lambda x: rlhf_fast.kl_estimate(x.int(), x), TypeError, "logprob: expected float64"),
        (lambda x: rlhf_fast.kl_estimate(x, x, clamp=3.0), TypeError, "clamp"),
        (lambda x: rlhf_fast.kl_estimate(x, x, clamp=(1.0,)), ValueError, "clamp"),
        (lambda x: rlhf_fast.kl_estimate(x, x, clamp=(-1.0, None)), ValueError, "clamp"),
        (lambda x: rlhf_fast.kl_estimate(x, x, mask=x[:1]), ValueError, "mask: expected shape"),
        (lambda x: rlhf_fast.kl_divergence(x, x[:, :2]), ValueError, "ref_logits: expected shape"),
        (lambda x: rlhf_fast.kl_divergence(x, x, temperature=0.0), ValueError, "temperature"),
        (
            lambda x: rlhf_fast.kl_divergence(x, x, temperature=torch.tensor([1.0, -1.0])),
            ValueError,
            "temperature: expected positive",
        ),
        (
            lambda x: rlhf_fast.kl_divergence_full(x, x, torch.tensor([0, 3])),
            IndexError,
            r"ids: expected values in \[0, 3\), got 3",
        ),
        (
            lambda x: rlhf_fast.kl_divergence_full(x, x, torch.tensor([0.0, 3.0])),
            TypeError,
            "ids: expected int32 or int64",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3))
