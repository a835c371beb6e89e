"""The native sampling kernels: every instruction set draws and keeps what the reference does."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_fast
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    generator,
    poisoned_memory,
    randn,
)
from tests import sample_truth
from tests.sample_truth import FLOATS, INF, any_case, arguments, truth

_C = pytest.importorskip("rlhf_fast._C")

from rlhf_fast.kernels.sample import _native as native  # noqa: E402
from rlhf_fast.kernels.sample import reference  # noqa: E402

# Around a vector of 4, 8 or 16 floats, a group of 64, a block of 1024, and a model's vocabulary.
VOCABULARIES = (1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 130, 1023, 1024, 1025, 5000, 50_257)
CUTS = (
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.1, "temperature": 3.0},
    {"top_p": 0.99999},
    {"min_p": 0.05},
    {"min_p": 1e-6},
    {"min_p": 1.0},
    {"temperature": 0.0},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
)


def every_isa():
    """Use one instruction set after the other."""
    before = _C.isa()
    try:
        for name in _C.isas():
            _C.set_isa(name)
            yield name
    finally:
        _C.set_isa(before)


@pytest.fixture(params=_C.isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def assert_like_reference(logits, **options):
    """On each instruction set the same ids and kept sets, and the twin's log-probs bit for bit."""
    for _ in every_isa():
        sample_truth.assert_like_reference(native, logits, **options)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_and_kept_sets_are_the_reference_s(vocabulary):
    """The last row has ties at every edge and a tail of -inf."""
    logits = 3 * randn(3, vocabulary, seed=1)
    logits[2] = logits[2].round().masked_fill(logits[2] < -2, -INF)
    logits[2, vocabulary // 2] = 1.0
    for parameters, dtype in zip(CUTS, itertools.cycle(FLOATS), strict=False):
        assert_like_reference(logits.to(dtype), **parameters)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 3e6])
def test_offsets_that_blur_the_tempered_logits(offset):
    """u is rounded at 1e4: the screening in float leaves room for it."""
    logits = 2 * randn(30, 300, seed=2) + offset
    for parameters in ({}, {"temperature": 0.3}, {"top_p": 0.7}, {"min_p": 0.1}):
        assert_like_reference(logits, **parameters)


def test_nuclei_of_every_shape():
    """Rows for which top-p takes each of its ways: flat, all equal, two values, steep, far off."""
    n = 4000
    rows = torch.stack(
        [
            randn(n, seed=1),
            1e-4 * randn(n, seed=2),
            torch.zeros(n),
            (torch.arange(n) % 7 == 3).float(),
            30 * randn(n, seed=3),
            torch.where(torch.arange(n) == 77, 0.0, -1e30),
            (4 * randn(n, seed=4)).bfloat16().float(),
            -torch.arange(n) / 300.0,
        ]
    )
    for top_p in (1e-9, 0.3, 0.9, 0.999999, 1 - 1e-9):
        assert_like_reference(rows, top_p=top_p)
    assert_like_reference(rows, top_p=0.8, temperature=0.25, top_k=3000, min_p=1e-4)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 400),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.sampled_from([1.0, 0.5, 2.0, 0.01, 0.0]),
    st.integers(0, 420),
    st.one_of(st.just(1.0), st.floats(1e-9, 1.0)),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    st.booleans(),
)
def test_any_parameters(seed, vocabulary, scale, temperature, top_k, top_p, min_p, per_row):
    options = any_case(3, seed, vocabulary, scale, temperature, top_k, top_p, min_p, per_row)
    assert_like_reference(**options)


@pytest.mark.parametrize("vocabulary", [1, 17, 1025])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_against_float64(isa, vocabulary, dtype):
    logits = (2 * randn(4, vocabulary, seed=3)).to(dtype)
    for parameters in ({}, {"temperature": 0.6, "top_k": 20}, {"top_p": 0.9}, {"min_p": 0.03}):
        with poisoned_memory():
            ids, logprob, log_mass, entropy = native.sample(
                logits, None, *arguments(**parameters), 1, None, 2, None
            )
        logq, true_mass, true_entropy = truth(logits, **parameters)
        assert_accurate("logprob", logprob, logq.gather(-1, ids[:, None])[:, 0])
        assert_accurate("log_mass", log_mass, true_mass)
        assert_accurate("entropy", entropy, true_entropy)


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 67, 1030])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_against_float64(isa, vocabulary, dtype):
    logits = (2 * randn(4, vocabulary, seed=4)).to(dtype)
    g, h = randn(4, seed=5), randn(4, seed=6)
    for parameters in ({}, {"temperature": 0.6, "top_k": 9}, {"top_p": 0.9}, {"temperature": 0.0}):
        call = arguments(**parameters)
        ids = logits.float().argmax(-1)
        grads = []
        for module, z in (
            (native, logits),
            (reference, logits.double()),
            (reference, logits.float()),
        ):
            with poisoned_memory():
                stats = module.replay_logprob(z, ids, *call)[2:]
                u = [x.to(z.dtype) if z.dtype == torch.float64 else x for x in (g, h)]
                backward = module.replay_logprob_backward
                grads.append(backward(*u, z, ids, *call[:2], *stats))
        ours, true, plain = grads
        assert_accurate("gradient", ours, true.to(dtype).double(), plain.to(dtype))


def test_rows_keep_their_bits(isa):
    """With one thread or two, alone or in a batch, at any alignment and stride, under a mask."""
    wide = 3 * randn(9, 2100, seed=7)
    mask = torch.rand(9, 2100, generator=generator(1)) < 0.9
    before = torch.get_num_threads()
    try:
        for begin, parameters in itertools.product((0, 3, 5), CUTS):
            logits, allowed = wide[:, begin : begin + 2050], mask[:, begin : begin + 2050]
            draw = *arguments(**parameters), 3, None, 4, None
            torch.set_num_threads(1)
            first = native.sample(logits.contiguous(), allowed.contiguous(), *draw)
            torch.set_num_threads(2)
            second = native.sample(logits, allowed, *draw)
            alone = native.sample(logits[4:5], allowed[4:5], *draw)
            turned = native.sample(logits.t().contiguous().t(), allowed, *draw)
            for name, x, y, z, t in zip("ilme", first, second, alone, turned, strict=True):
                assert_same_bits(name, y, x)
                assert_same_bits(name, t, x)
                assert_same_bits(name, z, x[4:5])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocabulary", [1, 40, 3000])
@pytest.mark.parametrize("parameters", CUTS)
def test_rows_that_cannot_be_drawn_from(isa, vocabulary, parameters):
    def sample(row, value, mask=None):
        logits = randn(5, vocabulary, seed=8)
        logits[row, -1 if value != -INF else slice(None)] = value
        with rlhf_fast.use_backend("cpu"):
            return rlhf_fast.sample(logits, logit_mask=mask, seed=1, position=0, **parameters)

    for value, words in ((math.nan, "NaN in row 3"), (INF, r"\+inf in row 3"), (-INF, "row 3")):
        with pytest.raises(ValueError, match=rf"logits: .*{words}"):
            sample(3, value)
    mask = torch.ones(5, vocabulary, dtype=torch.bool)
    mask[2] = False
    with pytest.raises(ValueError, match=r"logits: .*row 2"):
        sample(3, 0.0, mask)
    mask[2] = True
    if vocabulary > 1:
        mask[3, -1] = False
        assert (sample(3, math.nan, mask).ids >= 0).all()
