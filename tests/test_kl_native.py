"""What the native CPU kernels of KL promise beyond their ops' tests: instruction sets, bits."""

import math

import pytest
import torch

import rlhf_fast
from rlhf_fast.testing import (
    adversarial_logits,
    assert_accurate,
    assert_same_bits,
    poisoned_memory,
    randn,
    random_mask,
)

pytest.importorskip("rlhf_fast._C")

from rlhf_fast import _C
from rlhf_fast.kernels.kl import _native as native
from rlhf_fast.kernels.kl import reference

# Around a vector of 4, 8 or 16 floats, a group of 32, a block of 1024, a piece of 16384; models.
VOCABULARIES = (1, 3, 7, 15, 16, 17, 31, 33, 1023, 1025, 2049, 16384, 16385, 50257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("kl", "logprob", "ref_logprob", "entropy", "gradient")
INF = math.inf


@pytest.fixture(params=_C.isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    """A setter of torch's number of threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(module, logits, ref, ids, weights, options=(None, 1.0, None)):
    """(kl, logprob, ref_logprob, entropy, gradient) of one of the implementations."""
    forward = module.kl_divergence_full
    backward = module.kl_divergence_backward
    *values, entropy, row_max, log_sum, ref_max, ref_sum = forward(logits, ref, ids, *options)
    saved = (row_max, log_sum, ref_max, ref_sum, values[0], entropy)
    grad = backward(*weights, logits, ref, ids, *options, *saved)
    return *values, entropy, grad


def tokens_of(rows, vocabulary):
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(4))


def weights_of(rows):
    return [randn(rows, seed=seed) for seed in (5, 6, 7)]


def pair(rows, vocabulary, dtype, ref_dtype):
    logits = 3 * randn(rows, vocabulary, seed=1)
    return logits.to(dtype), (logits + randn(rows, vocabulary, seed=2)).to(ref_dtype)


def assert_right(logits, ref, ids, options=(None, 1.0, None)):
    """All results against the reference in float64, by the package's tolerance rule."""
    weights = weights_of(len(ids))
    with poisoned_memory():
        ours = everything(native, logits, ref, ids, weights, options)
    plain = everything(reference, logits, ref, ids, weights, options)
    double = [w.double() for w in weights]
    truth = everything(reference, logits.double(), ref.double(), ids, double, options)
    for name, *x in zip(NAMES, ours, truth, plain, strict=True):
        assert_accurate(name, *x)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("dtype", "ref_dtype"), [(d, d) for d in DTYPES])
def test_vocabularies_and_types(isa, dtype, ref_dtype, vocabulary):
    rows = 3 if vocabulary < 20_000 else 1
    assert_right(*pair(rows, vocabulary, dtype, ref_dtype), tokens_of(rows, vocabulary))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref_dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperatures_and_mixed_types(isa, dtype, ref_dtype, temperature):
    logits, ref = pair(4, 1030, dtype, ref_dtype)
    logits[0, ::3] = ref[0, ::3] = -INF
    ids = torch.tensor([1, 5, 0, 1029])
    assert_right(logits, ref, ids, (None, temperature, None))
    per_token = torch.tensor([temperature, 1.0, 0.7, 5.0])
    assert_right(logits, ref, ids, (torch.tensor([1, 0, 1, 1]) > 0, 1.0, per_token))


@pytest.mark.parametrize("name", adversarial_logits(8))
@pytest.mark.parametrize("other", adversarial_logits(8))
def test_adversarial_rows(isa, name, other):
    ref = adversarial_logits(1500)[other].roll(1, 0)
    assert_right(adversarial_logits(1500)[name], ref, torch.tensor([0, 750, 1499, 3]))


@pytest.mark.parametrize("order", ["policy first", "reference first", "both"])
def test_maxima_that_rise_from_piece_to_piece(isa, order):
    """Whole pieces far below the rest, of one model or of both, finite or -inf."""
    logits, ref = pair(4, 40_000, torch.float32, torch.float32)
    for row, low in enumerate((-80.0, -1e4, -3.4e38, -INF)):
        if order != "reference first":
            logits[row, : 16384 + 700] = low
        if order != "policy first" and low > -1e4:
            ref[row, : 16384 + 700] += low
        if order == "both":
            ref[row, : 16384 + 700] = low
    assert_right(logits, ref, torch.tensor([20_000, 39_999, 17_084, 30_000]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 37, 1500, 40_000])
def test_a_rows_bits_depend_on_nothing_else(isa, threads, dtype, vocabulary):
    rows = 5
    logits, ref = pair(rows, vocabulary, dtype, dtype)
    ids, weights = tokens_of(rows, vocabulary), weights_of(rows)
    whole = everything(native, logits, ref, ids, weights)

    def same(x, y, rows):
        found = everything(native, x, y, ids[rows], [w[rows] for w in weights])
        for name, a, b in zip(NAMES, found, whole, strict=True):
            assert_same_bits(name, a, b[rows])

    for count in (1, 2, 3):
        threads(count)
        same(logits, ref, torch.arange(rows))
        same(logits[3:4], ref[3:4], torch.tensor([3]))
    same(logits.flip(0), ref.flip(0), torch.arange(rows).flip(0))
    for shift, ref_shift in ((1, 0), (2, 31), (5, 1)):
        views = []
        for x, offset in ((logits, shift), (ref, ref_shift)):
            buffer = torch.full((rows, vocabulary + 64), math.nan, dtype=dtype)
            views.append(buffer[:, offset : offset + vocabulary])
            views[-1].copy_(x)
        same(*views, torch.arange(rows))


def test_masked_rows_are_not_looked_at(isa):
    logits, ref = torch.full((3, 20), math.nan), torch.full((3, 20), INF)
    logits[1], ref[1] = randn(20, seed=1), randn(20, seed=2)
    ids, mask = torch.tensor([10**9, 3, -100]), torch.tensor([False, True, True])
    weights = [torch.tensor([math.nan, 1.0, math.nan])] * 3
    with poisoned_memory():
        out = everything(native, logits, ref, ids, weights, (mask, 1.0, None))
    for x in out:
        assert not x[::2].any() and x[1].isfinite().all()


@pytest.mark.parametrize("column", [0, 700, 1499])
@pytest.mark.parametrize("fill", [0.0, -INF])
def test_a_nan_in_a_row_that_counts_is_not_hidden(isa, column, fill):
    clean = torch.full((2, 1500), fill)
    clean[:, 5] = 0.0
    dirty = clean.clone()
    dirty[1, column] = math.nan
    ids = torch.tensor([5, 5])
    options = (None, 1.0, None)
    kl, logprob, ref_logprob, entropy, *_ = native.kl_divergence_full(dirty, clean, ids, *options)
    for x in (kl, logprob, entropy):
        assert x.isnan().tolist() == [False, True]
    assert ref_logprob.isfinite().all()
    kl, logprob, ref_logprob, entropy, *_ = native.kl_divergence_full(clean, dirty, ids, *options)
    for x in (kl, ref_logprob):
        assert x.isnan().tolist() == [False, True]
    assert logprob.isfinite().all() and entropy.isfinite().all()


def test_an_unchecked_id_out_of_range_reads_nothing_and_gives_nan(isa):
    logits, ref = pair(4, 10, torch.float32, torch.float32)
    ids, one = torch.tensor([-1, 3, 10, 2**40]), torch.ones(4)
    kl, logprob, ref_logprob, entropy, grad = everything(native, logits, ref, ids, [one] * 3)
    for x in (logprob, ref_logprob):
        assert x.isnan().tolist() == [True, False, True, True]
    assert kl.isfinite().all() and entropy.isfinite().all()
    assert grad[0].isnan().all() and grad[1].isfinite().all()


def test_rows_more_than_two_to_the_31_elements_apart(isa):
    """Only the pages of two short rows of each 4.3 GB buffer are ever touched."""
    near = pair(2, 100, torch.bfloat16, torch.bfloat16)
    far = []
    for x in near:
        far.append(torch.empty(2**31 + 100, dtype=torch.bfloat16).as_strided((2, 100), (2**31, 1)))
        far[-1].copy_(x)
    ids, weights = torch.tensor([3, 99]), weights_of(2)
    results = [everything(native, *x, ids, weights) for x in (far, near)]
    for name, a, b in zip(NAMES, *results, strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 1500, 40_000])
def test_the_gradient_may_be_written_over_the_logits(isa, threads, dtype, vocabulary):
    threads(2)
    logits, ref = pair(5, vocabulary, dtype, torch.float32)
    ids, weights = tokens_of(5, vocabulary), weights_of(5)
    logits[1, ids[1]] = -INF  # what every piece of the row asks for
    ref[2, (ids[2] + 1) % vocabulary] = -INF
    options = torch.arange(5) != 3, 0.7, None
    kl, _, _, entropy, *saved = native.kl_divergence_full(logits, ref, ids, *options)
    for masked in (weights, (weights[0], None, None)):
        call = ref, ids, *options, *saved, kl, entropy
        apart = native.kl_divergence_backward(*masked, logits, *call)
        inside = logits.clone()
        out = native.kl_divergence_backward(*masked, inside, *call, out=inside)
        assert out is inside
        assert_same_bits("gradient", inside, apart)


def test_wrong_types_are_refused():
    x, double = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="ref_logits: expected one of float32"):
        native.kl_divergence(x, double, None, 1.0, None)
    with pytest.raises(TypeError, match="logits: expected one of float32"):
        native.kl_divergence(double, x, None, 1.0, None)


# ------------------------------------------------------------------------- estimates

EXTREMES = (0.0, -0.0, 1e-30, 1e-6, 0.3, 0.99, 1.01, 5.0, 86.9, 87.1, 88.6, 88.8, 200.0, 3e38, INF)


@pytest.mark.parametrize("estimator", native.ESTIMATORS)
@pytest.mark.parametrize("clamps", [(None, None), (20.0, 10.0), (0.5, None), (None, 2.0)])
def test_estimates_of_any_difference(isa, estimator, clamps):
    a = torch.tensor([*EXTREMES, *(-x for x in EXTREMES)])
    b = torch.zeros_like(a)
    grad = torch.ones_like(a)
    call = (None, estimator, *clamps)
    with poisoned_memory():
        value = native.kl_estimate(a, b, *call)
        slope = native.kl_estimate_backward(grad, a, b, *call)
    truth = reference.kl_estimate(a.double(), b.double(), *call)
    true_slope = reference.kl_estimate_backward(grad.double(), a.double(), b.double(), *call)
    for name, ours, true in (("value", value, truth), ("slope", slope, true_slope)):
        # One by one: the tolerance is relative to the largest magnitude, here 1e38 and more.
        for i, (x, y) in enumerate(zip(ours, true.float().double(), strict=True)):
            assert_accurate(f"{name} of {a[i]}", x, y)


@pytest.mark.parametrize("estimator", native.ESTIMATORS)
@pytest.mark.parametrize("size", [1, 3, 4, 15, 16, 17, 40_001])
def test_estimates_of_any_number_of_tokens(isa, threads, estimator, size):
    a, b, grad = (randn(size, seed=seed) for seed in (1, 2, 3))
    mask = random_mask(size, seed=4)
    a[~mask] = math.nan
    call = (mask, estimator, 1.5, 2.0)
    with poisoned_memory():
        value = native.kl_estimate(a, b, *call)
        slope = native.kl_estimate_backward(grad, a, b, *call)
    x, y, g = (v.double() for v in (a, b, grad))
    assert_accurate("value", value, reference.kl_estimate(x, y, *call))
    assert_accurate("slope", slope, reference.kl_estimate_backward(g, x, y, *call))
    assert not value[~mask].any() and not slope[~mask].any()
    threads(2)
    assert_same_bits("two threads", native.kl_estimate(a, b, *call), value)
    last = native.kl_estimate(a[-1:], b[-1:], mask[-1:], *call[1:])
    assert_same_bits("alone", last, value[-1:])


def test_the_backend_is_the_default_on_cpu():
    z, r = randn(3, 9, seed=1), randn(3, 9, seed=2)
    with rlhf_fast.use_backend("cpu"):
        forced = rlhf_fast.kl_divergence(z, r)
    assert_same_bits("kl", rlhf_fast.kl_divergence(z, r), forced)
