"""What the native CPU kernels promise beyond their ops' tests: every instruction set, every bit."""

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
    poisoned_memory,
    randn,
    random_mask,
)

pytest.importorskip("rlhf_fast._C")

from rlhf_fast import _C
from rlhf_fast.kernels.gae import _native as native_gae
from rlhf_fast.kernels.gae import reference as reference_gae
from rlhf_fast.kernels.logprob import _native as native
from rlhf_fast.kernels.logprob import reference

# Around a vector of 4, 8 or 16 floats, a group of 64, a block of 1024, a piece of 16384; models.
VOCABULARIES = (1, 3, 7, 15, 16, 17, 63, 65, 1023, 1025, 2047, 16384, 16385, 50257, 151937)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def options(softcap=None, temperature=1.0, temperatures=None, mask=None):
    return mask, temperature, temperatures, softcap, -100


def everything(module, logits, ids, g, h, call):
    """(logprob, entropy, gradient) of one of the implementations."""
    forward = module.logprob_entropy
    backward = module.logprob_backward
    logprob, entropy, row_max, log_sum = forward(logits, ids, *call)
    grad = backward(g, h, logits, ids, *call, row_max, log_sum, entropy)
    return logprob, entropy, grad


def tokens_of(rows, vocabulary):
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(4))


def assert_right(logits, ids, call):
    """All results against the reference in float64, by the package's tolerance rule."""
    g, h = randn(len(ids), seed=2), randn(len(ids), seed=3)
    with poisoned_memory():
        ours = everything(native, logits, ids, g, h, call)
    plain = everything(reference, logits, ids, g, h, call)
    truth = everything(reference, logits.double(), ids, g.double(), h.double(), call)
    for name, *x in zip(("logprob", "entropy", "gradient"), ours, truth, plain, strict=True):
        assert_accurate(name, *x)
    alone = native.logprob(logits, ids, *call)
    assert_accurate("logprob alone", alone[0], truth[0], plain[0])


def test_the_best_instruction_set_is_the_default():
    assert _C.isa() == _C.isas()[-1]
    with pytest.raises(ValueError, match="isa: expected one of baseline"):
        _C.set_isa("sse9")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabularies_and_types(isa, dtype, vocabulary):
    rows = 3 if vocabulary < 20_000 else 1
    logits = (3 * randn(rows, vocabulary, seed=1)).to(dtype)
    assert_right(logits, tokens_of(rows, vocabulary), options())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperature_and_softcap(isa, dtype, softcap, temperature):
    logits = (8 * randn(4, 1030, seed=1)).to(dtype)
    logits[0, ::3] = -math.inf
    assert_right(logits, torch.tensor([1, 5, 0, 1029]), options(softcap, temperature))
    per_token = torch.tensor([temperature, 1.0, 0.7, 5.0])
    assert_right(logits, torch.tensor([1, 5, 0, 1029]), options(softcap, 1.0, per_token))


@pytest.mark.parametrize("name", adversarial_logits(8))
def test_adversarial_rows(isa, name):
    assert_right(adversarial_logits(1500)[name], torch.tensor([0, 750, 1499, 3]), options())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_exactly(isa, dtype):
    """The maximum of a row of one logit is that logit: subnormal, infinite or not."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    ids = torch.zeros(len(z), dtype=torch.int64)
    logprob, row_max, _ = native.logprob(z.unsqueeze(1), ids, *options())
    number = ~z.isnan()
    assert torch.equal(row_max[number], z[number].float())
    assert logprob[~number].isnan().all() and not logprob[z.isfinite()].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_the_nearest(isa, dtype):
    """The half-precision gradient is torch's rounding of the float32 one of the same logits."""
    logits = (4 * randn(3, 3000, seed=1)).to(dtype)
    ids, one = torch.tensor([0, 7, 2999]), torch.tensor([1.0, 1e5, 1e-4])
    call = options()
    full = everything(native, logits.float(), ids, one, one, call)
    half = everything(native, logits, ids, one, one, call)
    assert_same_bits("gradient", half[2], full[2].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 37, 1500, 40_000])
def test_a_rows_bits_depend_on_nothing_else(isa, threads, dtype, vocabulary):
    rows = 5
    logits = (3 * randn(rows, vocabulary, seed=1)).to(dtype)
    ids, g, h = tokens_of(rows, vocabulary), randn(rows, seed=2), randn(rows, seed=3)
    whole = everything(native, logits, ids, g, h, options())

    def same(x, rows):
        found = everything(native, x, ids[rows], g[rows], h[rows], options())
        for name, a, b in zip(("logprob", "entropy", "gradient"), found, whole, strict=True):
            assert_same_bits(name, a, b[rows])

    for count in (1, 2, 3, 7):
        threads(count)
        same(logits, torch.arange(rows))
        same(logits[3:4], torch.tensor([3]))
    same(logits.flip(0), torch.arange(rows).flip(0))
    for shift in (1, 2, 5, 31):  # elements: every alignment that a row can have
        buffer = torch.full((rows, vocabulary + 64), math.nan, dtype=dtype)
        view = buffer[:, shift : shift + vocabulary]
        view.copy_(logits)
        same(view, torch.arange(rows))


def test_masked_rows_are_not_looked_at(isa):
    logits = torch.full((3, 20), math.nan)
    logits[1] = randn(20, seed=1)
    ids, mask = torch.tensor([10**9, 3, -100]), torch.tensor([False, True, True])
    g = torch.full((3,), math.nan)
    g[1] = 1.0
    with poisoned_memory():
        out = everything(native, logits, ids, g, g, options(mask=mask))
    for x in out:
        assert not x[::2].any() and x[1].isfinite().all()


@pytest.mark.parametrize("column", [0, 700, 1499])
def test_a_nan_in_a_row_that_counts_is_not_hidden(isa, column):
    for fill in (0.0, -math.inf):
        logits = torch.full((2, 1500), fill)
        logits[:, 5] = 0.0
        logits[1, column] = math.nan
        out = native.logprob_entropy(logits, torch.tensor([5, 5]), *options())
        for x in out[:2]:
            assert x.isnan().tolist() == [False, True]


def test_an_unchecked_id_out_of_range_reads_nothing_and_gives_nan(isa):
    logits, ids = randn(4, 10, seed=1), torch.tensor([-1, 3, 10, 2**40])
    one = torch.ones(4)
    logprob, _, grad = everything(native, logits, ids, one, one, options())
    assert logprob.isnan().tolist() == [True, False, True, True]
    assert grad[0].isnan().all() and grad[1].isfinite().all()


def test_rows_more_than_two_to_the_31_elements_apart(isa):
    """Only the pages of two short rows of the 4.3 GB buffer are ever touched."""
    buffer = torch.empty(2**31 + 100, dtype=torch.bfloat16)
    z = buffer.as_strided((2, 100), (2**31, 1))
    z.copy_(randn(2, 100, seed=1).bfloat16())
    ids, one = torch.tensor([3, 99]), torch.ones(2)
    far = everything(native, z, ids, one, one, options())
    near = everything(native, z.clone(), ids, one, one, options())
    for name, a, b in zip(("logprob", "entropy", "gradient"), far, near, strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 1500, 40_000])
def test_the_gradient_may_be_written_over_the_logits(isa, threads, dtype, vocabulary):
    threads(2)
    logits = randn(5, vocabulary, dtype=dtype, seed=1)
    ids, g, h = tokens_of(5, vocabulary), randn(5, seed=2), randn(5, seed=3)
    logits[1, ids[1]] = -math.inf  # what every piece of the row asks for
    call = options(softcap=20.0, temperature=0.7, mask=torch.arange(5) != 3)
    _, entropy, *saved = native.logprob_entropy(logits, ids, *call)
    for weights, stats in (((g, h), (*saved, entropy)), ((g, None), (*saved, None))):
        apart = native.logprob_backward(*weights, logits, ids, *call, *stats)
        inside = logits.clone()
        out = native.logprob_backward(*weights, inside, ids, *call, *stats, out=inside)
        assert out is inside
        assert_same_bits("gradient", inside, apart)


def test_an_unfit_place_for_the_gradient_is_refused():
    logits, ids = randn(4, 6, seed=1), tokens_of(4, 6)
    call = options()
    out, *saved = native.logprob(logits, ids, *call)
    for place in (torch.empty(4, 5), torch.empty(4, 6).double(), torch.empty(6, 4).T):
        with pytest.raises(ValueError, match="out: expected a contiguous float32"):
            native.logprob_backward(out, None, logits, ids, *call, *saved, None, out=place)


def test_wrong_types_are_refused():
    ids = torch.tensor([0])
    with pytest.raises(TypeError, match="logits: expected one of float32"):
        native.logprob(torch.zeros(1, 2, dtype=torch.float64), ids, *options())
    x = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="rewards: expected float32, got float64"):
        native_gae.gae(x, x, None, None, None, 0.0, 1.0, 1.0, None, True)
    with pytest.raises(ValueError, match="logits: expected an address, got 0"):
        rows = (0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1.0, 0.0, -100)
        _C.cpu_logprob(1, rows, 1, 0, 1, 1)


# ------------------------------------------------------------------------------ GAE


def gae_inputs(rows, length, seed, masked, done, boot):
    rewards, values = randn(rows, length, seed=seed), randn(rows, length, seed=seed + 1)
    mask = random_mask(rows, length, seed=seed + 2, keep=0.6) if masked else None
    dones = random_mask(rows, length, seed=seed + 3, keep=0.05) if done else None
    bootstrap = randn(rows, seed=seed + 4) if boot else None
    return rewards, values, mask, dones, bootstrap


def assert_gae_right(inputs, numbers):
    rewards, values, mask, dones, bootstrap = inputs
    if mask is not None:
        rewards = rewards.masked_fill(~mask, math.nan)
        values = values.masked_fill(~mask, math.inf)
    call = (rewards, values, mask, dones, bootstrap, *numbers)
    with poisoned_memory():
        ours = native_gae.gae(*call)
    plain = reference_gae.gae(*call)
    double = [x.double() if x is not None and x.is_floating_point() else x for x in call[:5]]
    truth = reference_gae.gae(*double, *numbers)
    for name, *x in zip(("advantages", "returns"), ours, truth, plain, strict=True):
        assert_accurate(name, *x)
    return ours


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 90),
    *(st.booleans(),) * 4,
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.none() | st.floats(0.0, 1.0),
)
def test_gae_on_any_input(seed, rows, length, masked, done, boot, carry, gamma, lam, lam_value):
    inputs = gae_inputs(rows, length, seed, masked, done, boot)
    assert_gae_right(inputs, (0.5, gamma, lam, lam_value, carry))


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2500])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("done", [False, True])
def test_gae_across_chunks(isa, length, masked, done):
    inputs = gae_inputs(2, length, 1, masked, done, True)
    for carry in (True, False):
        assert_gae_right(inputs, (0.0, 0.99, 0.95, 1.0, carry))
    assert_gae_right(inputs, (0.0, 1.0, 1.0, None, True))


def test_a_chunk_without_a_token_passes_values_and_traces_on(isa):
    inputs = list(gae_inputs(1, 3500, 1, True, False, True))
    inputs[2][:, 900:3200] = False
    assert_gae_right(inputs, (0.0, 0.99, 0.95, None, True))
    assert_gae_right(inputs, (0.0, 0.999, 1.0, None, False))


@pytest.mark.parametrize("masked", [False, True])
def test_a_trajectorys_bits_depend_on_nothing_else(isa, threads, masked):
    inputs = gae_inputs(7, 1300, 1, masked, masked, True)
    numbers = (0.0, 0.99, 0.95, 0.9, True)
    whole = native_gae.gae(*inputs, *numbers)
    for count in (1, 2, 5):
        threads(count)
        for rows in (torch.arange(7), torch.tensor([4]), torch.tensor([6, 0, 3])):
            part = native_gae.gae(*(None if x is None else x[rows] for x in inputs), *numbers)
            for name, a, b in zip(("advantages", "returns"), part, whole, strict=True):
                assert_same_bits(name, a, b[rows])
    offsets = torch.arange(0, 7 * 1300 + 1, 1300)
    flat = [None if x is None else x.flatten() for x in inputs[:4]]
    packed = native_gae.gae_packed(*flat[:2], offsets, *flat[2:], inputs[4], *numbers)
    for name, a, b in zip(("advantages", "returns"), packed, whole, strict=True):
        assert_same_bits(f"packed {name}", a, b.flatten())


def test_done_cuts_off_even_nan(isa):
    """What lies behind the end of an episode leaks nowhere, whatever it is."""
    rewards, values = randn(1, 60, seed=1), randn(1, 60, seed=2)
    dones = torch.zeros(1, 60, dtype=torch.bool)
    dones[0, 29] = True
    clean = native_gae.gae(
        rewards[:, :30], values[:, :30], None, None, None, 0.0, 0.9, 0.9, None, True
    )
    rewards[:, 30:], values[:, 30:] = math.nan, math.inf
    out = native_gae.gae(rewards, values, None, dones, None, 0.0, 0.9, 0.9, None, True)
    for name, a, b in zip(("advantages", "returns"), out, clean, strict=True):
        assert_accurate(name, a[:, :30], b.double())


def test_discounted_returns_of_long_rows(isa):
    rewards, mask = randn(3, 2500, seed=1), random_mask(3, 2500, seed=2)
    ours = native_gae.discounted_returns(rewards, mask, 0.99)
    truth = reference_gae.discounted_returns(rewards.double(), mask, 0.99)
    plain = reference_gae.discounted_returns(rewards, mask, 0.99)
    assert_accurate("returns", ours, truth, plain)


def test_the_backend_is_the_default_on_cpu():
    with rlhf_fast.use_backend("cpu"):
        forced = rlhf_fast.logprob(randn(3, 9, seed=1), torch.tensor([1, 2, 3]))
    assert_same_bits(
        "logprob", rlhf_fast.logprob(randn(3, 9, seed=1), torch.tensor([1, 2, 3])), forced
    )
