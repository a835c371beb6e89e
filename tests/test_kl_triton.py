"""What the Triton kernels of KL promise beyond their tests: layouts, bad input, GPU rounding."""

import math

import numpy as np
import pytest
import torch

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import (
    adversarial_logits,
    assert_accurate,
    assert_same_bits,
    device_of,
    randn,
)

pytest.importorskip("triton")
if rlhf_fast.backends()["kl_divergence"]["triton"] is not True:
    pytest.skip(str(rlhf_fast.backends()["kl_divergence"]["triton"]), allow_module_level=True)

from rlhf_fast.kernels.kl import _triton, reference

DEVICE = device_of("triton")
INTERPRETED = _dispatch.interpreting()
NAMES = ("kl", "logprob", "ref_logprob", "entropy", "gradient")
INF = math.inf


def everything(module, logits, ref, ids, weights, options=(None, 1.0, None)):
    """(kl, logprob, ref_logprob, entropy, gradient) of one of the implementations, on the CPU."""
    if module is _triton:
        logits, ref, ids, *weights = (x.to(DEVICE) for x in (logits, ref, ids, *weights))
    *values, entropy, row_max, log_sum, ref_max, ref_sum = module.kl_divergence_full(
        logits, ref, ids, *options
    )
    saved = (row_max, log_sum, ref_max, ref_sum, values[0], entropy)
    grad = module.kl_divergence_backward(*weights, logits, ref, ids, *options, *saved)
    return tuple(x.cpu() for x in (*values, entropy, grad))


def assert_right(logits, ref, ids, options=(None, 1.0, None)):
    """All results against the reference in float64, by the package's tolerance rule."""
    weights = [randn(len(ids), seed=seed) for seed in (5, 6, 7)]
    ours = everything(_triton, logits, ref, ids, weights, options)
    plain = everything(reference, logits, ref, ids, weights, options)
    double = [w.double() for w in weights]
    truth = everything(reference, logits.double(), ref.double(), ids, double, options)
    for name, *x in zip(NAMES, ours, truth, plain, strict=True):
        assert_accurate(name, *x)


def pair(rows, vocabulary):
    logits = 3 * randn(rows, vocabulary, seed=1)
    return logits, logits + randn(rows, vocabulary, seed=2)


@pytest.mark.parametrize("other", adversarial_logits(8))
def test_adversarial_rows(other):
    ref = adversarial_logits(700)[other].roll(1, 0)
    for logits in adversarial_logits(700).values():
        assert_right(logits, ref, torch.tensor([0, 350, 699, 3]))


@pytest.mark.parametrize("order", ["policy first", "reference first", "both"])
def test_maxima_that_rise_along_the_row(order):
    """The first half far below the rest, of one model or of both, finite or -inf."""
    logits, ref = pair(4, 5000)
    for row, low in enumerate((-80.0, -1e4, -3.4e38, -INF)):
        if order != "reference first":
            logits[row, :2500] = low
        if order != "policy first" and low > -1e4:
            ref[row, :2500] += low
        if order == "both":
            ref[row, :2500] = low
    for temperature in (1.0, 0.3):
        ids = torch.tensor([2501, 4999, 3000, 4000])
        assert_right(logits, ref, ids, (None, temperature, None))


@pytest.mark.parametrize("column", [0, 700, 1499])
@pytest.mark.parametrize("fill", [0.0, -INF])
def test_a_nan_in_a_row_that_counts_is_not_hidden(column, fill):
    clean = torch.full((2, 1500), fill)
    clean[:, 5] = 0.0
    dirty = clean.clone()
    dirty[1, column] = math.nan
    ids, one = torch.tensor([5, 5]), torch.ones(2)
    kl, logprob, ref_logprob, entropy, _ = everything(_triton, dirty, clean, ids, [one] * 3)
    for x in (kl, logprob, entropy):
        assert x.isnan().tolist() == [False, True]
    assert ref_logprob.isfinite().all()
    kl, logprob, ref_logprob, entropy, _ = everything(_triton, clean, dirty, ids, [one] * 3)
    for x in (kl, ref_logprob):
        assert x.isnan().tolist() == [False, True]
    assert logprob.isfinite().all() and entropy.isfinite().all()


def test_the_gradient_may_be_written_over_the_logits():
    logits, ref = (x.to(DEVICE) for x in pair(3, 1500))
    ids = torch.tensor([0, 1499, 700], device=DEVICE)
    logits[1, 1499] = -INF
    weights = [randn(3, seed=seed).to(DEVICE) for seed in (5, 6, 7)]
    kl, _, _, entropy, *saved = _triton.kl_divergence_full(logits, ref, ids, None, 0.7, None)
    call = ref, ids, None, 0.7, None, *saved, kl, entropy
    apart = _triton.kl_divergence_backward(*weights, logits, *call)
    inside = logits.clone()
    assert _triton.kl_divergence_backward(*weights, inside, *call, out=inside) is inside
    assert_same_bits("gradient", inside, apart)


def test_an_unchecked_id_out_of_range_gives_nan():
    ids, one = torch.tensor([-1, 3, 10, 2**40]), torch.ones(4)
    kl, logprob, ref_logprob, entropy, grad = everything(_triton, *pair(4, 10), ids, [one] * 3)
    for x in (logprob, ref_logprob):
        assert x.isnan().tolist() == [True, False, True, True]
    assert kl.isfinite().all() and entropy.isfinite().all()
    assert grad[0].isnan().all() and grad[1].isfinite().all()


def test_rows_more_than_two_to_the_31_elements_apart():
    """Only the pages of two short rows of the 4.3 GB buffer are ever touched."""
    logits, ref = (x.bfloat16().to(DEVICE) for x in pair(2, 100))
    buffer = torch.empty(2**31 + 100, dtype=torch.bfloat16, device=DEVICE)
    far = buffer.as_strided((2, 100), (2**31, 1))
    far.copy_(ref)
    options = (None, 1.0, None)
    for name, z, q in (("reference", logits, far), ("policy", far, logits)):
        near = (z.clone(), q.clone())
        found = _triton.kl_divergence(z, q, *options)
        for a, b in zip(found, _triton.kl_divergence(*near, *options), strict=True):
            assert_same_bits(name, a, b)
        call = (*options, *found[1:], found[0], None)
        one = torch.ones(2, device=DEVICE)
        a, b = (
            _triton.kl_divergence_backward(one, None, None, *x, None, *call) for x in ((z, q), near)
        )
        assert_same_bits(f"{name}, gradient", a, b)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("clamps", [(None, None), (20.0, 10.0), (0.5, None), (None, 2.0)])
def test_estimates_of_any_difference(estimator, clamps):
    sizes = (0.0, 1e-30, 1e-6, 0.3, 0.99, 1.01, 5.0, 86.9, 87.1, 88.6, 88.8, 200.0, 3e38, INF)
    a = torch.tensor([*sizes, *(-x for x in sizes)], device=DEVICE)
    b, grad = torch.zeros_like(a), torch.ones_like(a)
    call = (None, estimator, *clamps)
    value = _triton.kl_estimate(a, b, *call)
    slope = _triton.kl_estimate_backward(grad, a, b, *call)
    truth = reference.kl_estimate(a.double(), b.double(), *call)
    true_slope = reference.kl_estimate_backward(grad.double(), a.double(), b.double(), *call)
    for name, ours, true in (("value", value, truth), ("slope", slope, true_slope)):
        # One by one: the tolerance is relative to the largest magnitude, here 1e38 and more.
        for i, (x, y) in enumerate(zip(ours, true.float().double(), strict=True)):
            assert_accurate(f"{name} of {a[i]}", x, y)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the ops' own tests see its rounding")
def test_the_tolerance_holds_with_the_rounding_of_a_gpu(monkeypatch):
    """PTX allows `ex2.approx` and `div.full` an error of 2 ulp, where NumPy's are exact."""
    from triton.runtime.interpreter import InterpreterBuilder

    noise = np.random.default_rng(0)

    def inexact(method):
        def wrapper(self, *args):
            out = method(self, *args)
            factor = 1 + 2.0**-22 * noise.uniform(-1, 1, out.data.shape)
            out.data = (out.data * factor).astype(out.data.dtype)
            return out

        return wrapper

    for name in ("create_exp2", "create_fdiv"):
        monkeypatch.setattr(InterpreterBuilder, name, inexact(getattr(InterpreterBuilder, name)))
    ids = torch.tensor([0, 7, 1500, 2999])
    for scale, temperature in ((1, 1.0), (3, 0.7), (3, 0.3)):
        logits, ref = (scale * x for x in pair(4, 3000))
        assert_right(logits, ref, ids, (None, temperature, None))
    ref[:, 0] = 60.0  # a KL of about 60 out of terms of about 60
    assert_right(logits, ref, ids)
    a, b = 4 * randn(3000, seed=1), 4 * randn(3000, seed=2)
    call = (None, "k3", None, None)
    truth = reference.kl_estimate(a.double(), b.double(), *call)
    assert_accurate(
        "k3", _triton.kl_estimate(a, b, *call), truth, reference.kl_estimate(a, b, *call)
    )
