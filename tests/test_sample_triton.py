"""The Triton sampling kernels: they draw and keep what the reference does, bit for bit.

Small enough for Triton's interpreter, where one row takes 0.1 s; on a GPU the ops' own tests run
them at every size.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    generator,
    poisoned_memory,
    randn,
)
from tests import sample_truth
from tests.sample_truth import FLOATS, INF, any_case, arguments, hugging_face, truth
from tests.test_sample_draws import race_number

pytest.importorskip("triton")
if rlhf_fast.backends()["sample"]["triton"] is not True:
    pytest.skip(str(rlhf_fast.backends()["sample"]["triton"]), allow_module_level=True)

import triton
import triton.language as tl

from rlhf_fast.kernels.sample import _triton, _triton_cut, _triton_draw, reference

DEVICE = device_of("triton")
CUTS = (
    {},
    {"top_k": 1},
    {"top_k": 6},
    {"top_p": 0.9},
    {"top_p": 0.1, "temperature": 3.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.01},
)


def on_device(*values):
    return tuple(x.to(DEVICE) if torch.is_tensor(x) else x for x in values)


class OnDevice:
    """The kernels, on tensors of the CPU."""

    @staticmethod
    def sample(*arguments):
        return tuple(x.cpu() for x in _triton.sample(*on_device(*arguments)))

    @staticmethod
    def replay_logprob(*arguments):
        return tuple(x.cpu() for x in _triton.replay_logprob(*on_device(*arguments)))


def assert_like_reference(logits, **options):
    """The same ids and kept sets, the twin's log-probs bit for bit; returns ours."""
    return sample_truth.assert_like_reference(OnDevice, logits, **options)


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 2050])
def test_ids_and_kept_sets_are_the_reference_s(vocabulary):
    """The last row has ties at every edge and a tail of -inf."""
    logits = 3 * randn(2, vocabulary, seed=1)
    logits[1] = logits[1].round().masked_fill(logits[1] < -2, -INF)
    logits[1, vocabulary // 2] = 1.0
    for parameters, dtype in zip(CUTS, itertools.cycle(FLOATS), strict=False):
        z = logits.to(dtype)
        ids, *values = assert_like_reference(z, **parameters)
        logq, *true = truth(z, **parameters)
        if parameters.get("temperature") == 0:
            assert not any(x.any() for x in values)
            continue
        if "top_p" in parameters:  # where float32 and float64 may cut differently
            true[0] = reference.replay_logprob(z.double(), ids, *arguments(**parameters))[1]
            logq = None
        scores = hugging_face(z.float(), **parameters)
        u = z.float() / parameters.get("temperature", 1.0)
        if logq is not None:
            at = ids[:, None]
            assert_accurate("logprob", values[0], logq.gather(-1, at)[:, 0],
                            scores.log_softmax(-1).gather(-1, at)[:, 0])  # fmt: skip
        assert_accurate("log_mass", values[1], true[0], scores.logsumexp(-1) - u.logsumexp(-1))
        assert_accurate("entropy", values[2], true[1])


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 60),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.sampled_from([1.0, 0.5, 2.0, 0.01, 0.0]),
    st.integers(0, 70),
    st.one_of(st.just(1.0), st.floats(1e-9, 1.0)),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    st.booleans(),
)
def test_any_parameters(seed, vocabulary, scale, temperature, top_k, top_p, min_p, per_row):
    options = any_case(2, seed, vocabulary, scale, temperature, top_k, top_p, min_p, per_row)
    assert_like_reference(**options)


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e6])
def test_offsets_that_blur_the_tempered_logits(offset):
    logits = 2 * randn(3, 300, seed=2) + offset
    for parameters in ({}, {"temperature": 0.3}, {"top_p": 0.7, "min_p": 0.1}):
        assert_like_reference(logits, **parameters)


def test_nuclei_of_every_shape(monkeypatch):
    """Flat, all equal, two values, steep, far off; more rows than share their probabilities."""
    monkeypatch.setattr(_triton, "ROWS_AT_ONCE", 4)
    n = 300
    rows = torch.stack(
        [
            1e-4 * randn(n, seed=2),
            torch.zeros(n),
            (torch.arange(n) % 7 == 3).float(),
            30 * randn(n, seed=3),
            torch.where(torch.arange(n) == 77, 0.0, -1e30),
            (4 * randn(n, seed=4)).bfloat16().float(),
        ]
    )
    for top_p in (1e-9, 0.3, 0.9, 1 - 1e-9):
        assert_like_reference(rows, top_p=top_p)


def test_equal_logits_keep_as_many_as_hugging_face():
    for vocabulary, top_p in itertools.product((3, 10, 30), (0.1, 0.3, 0.7, 0.9)):
        logits = torch.full((1, vocabulary), 3.7)
        count = int((hugging_face(logits, top_p=top_p) > -INF).sum())
        ids = torch.zeros(1, dtype=torch.int64)
        last = _triton.replay_logprob(*on_device(logits, ids, *arguments(top_p=top_p)))[3]
        assert last.item() == count - 1, (vocabulary, top_p)


def test_rows_keep_their_bits():
    """Alone, permuted, at any stride, with a mask; the second shape takes more than one block."""
    for vocabulary, parameters in ((50, CUTS[-1]), (50, {}), (2100, {"top_p": 0.5, "top_k": 90})):
        wide = 3 * randn(3, vocabulary + 3, seed=7)
        mask = torch.rand(3, vocabulary + 3, generator=generator(1)) < 0.9
        seeds, order = torch.tensor([7, -3, 2**60]), torch.tensor([2, 0, 1])

        def sample(rows, z=wide, m=mask, parameters=parameters, seeds=seeds):
            call = *arguments(**parameters), 3, seeds[rows], 4, None
            return _triton.sample(*on_device(z[rows], m[rows], *call))

        first = sample(slice(None), wide[:, 3:], mask[:, 3:])
        second = sample(order, wide[:, 3:].t().contiguous().t(), mask[:, 3:].t().contiguous().t())
        alone = sample(slice(1, 2), wide[:, 3:].contiguous(), mask[:, 3:])
        for name, x, y, z in zip("ilme", first, second, alone, strict=True):
            assert_same_bits(name, y, x[order.to(DEVICE)])
            assert_same_bits(name, z, x[1:2])


def test_rows_that_cannot_be_drawn_from():
    """Where nobody looks at values, as on CUDA; on the CPU the op raises."""
    logits = randn(5, 40, seed=8)
    logits[0, 3], logits[1, 39], logits[2] = math.nan, INF, -INF
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[3] = False
    for parameters in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}, {"temperature": 0.0}):
        call = *arguments(**parameters), 1, None, 0, None
        ids, logprob, log_mass, entropy = _triton.sample(*on_device(logits, mask, *call))
        assert ids[:4].tolist() == [-1] * 4 and 0 <= ids[4] < 40
        assert (logprob[:4] == -INF).all() and logprob[4] > -INF
        assert not log_mass[:4].any() and not entropy[:4].any()
    if _dispatch.interpreting():
        for row, words in ((0, "NaN in row 0"), (1, r"\+inf in row 0"), (2, "in row 0")):
            with rlhf_fast.use_backend("triton"), pytest.raises(ValueError, match=words):
                rlhf_fast.sample(logits[row : row + 1], seed=1, position=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_against_float64(dtype):
    logits = (2 * randn(3, 37, seed=4)).to(dtype)
    g, h = randn(3, seed=5), randn(3, seed=6)
    ids = logits.float().argmax(-1)
    for parameters in ({}, {"temperature": 0.6, "top_k": 9}, {"top_p": 0.9}, {"temperature": 0.0}):
        call = arguments(**parameters)
        grads = []
        for module, z in ((reference, logits.double()), (reference, logits.float())):
            stats = module.replay_logprob(z, ids, *call)[2:]
            u = [x.to(z.dtype) if z.dtype == torch.float64 else x for x in (g, h)]
            grads.append(module.replay_logprob_backward(*u, z, ids, *call[:2], *stats))
        with poisoned_memory():
            z, y = on_device(logits, ids)
            stats = _triton.replay_logprob(z, y, *call)[2:]
            ours = _triton.replay_logprob_backward(*on_device(g, h), z, y, *call[:2], *stats)
        true, plain = grads
        assert ours.dtype == dtype
        assert_accurate("gradient", ours, true.to(dtype).double(), plain.to(dtype))


@triton.jit
def _numbers(seed_ptr, position_ptr, token_ptr, out_ptr):
    i = tl.program_id(0)
    seed, position, token = (
        tl.load(seed_ptr + i),
        tl.load(position_ptr + i),
        tl.load(token_ptr + i),
    )
    tl.store(out_ptr + i, _triton_draw.race_number(seed, position, token))


@triton.jit
def _order(x_ptr, key_ptr, back_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    key = _triton_cut._key(tl.load(x_ptr + i))
    tl.store(key_ptr + i, key.to(tl.int64))
    tl.store(back_ptr + i, _triton_cut._float(key))


def test_race_numbers_against_python():
    """All 64 bits of seed and position count, and the ends of the uniforms are exact."""
    random = np.random.default_rng(1)
    seeds, positions = (
        torch.from_numpy(random.integers(-(2**63), 2**63 - 1, 24)) for _ in range(2)
    )
    positions[:12] %= 1000
    tokens = torch.from_numpy(random.integers(0, 200_000, 24)).int()
    out = torch.empty(24, dtype=torch.float64, device=DEVICE)
    _numbers[(24,)](*on_device(seeds, positions, tokens), out)
    for seed, position, token, number in zip(
        *(x.tolist() for x in (seeds, positions, tokens, out)), strict=True
    ):
        assert number == pytest.approx(race_number(seed, position, token), rel=2e-15)


def test_keys_are_in_the_order_of_the_floats():
    x = torch.tensor([-INF, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38, INF])
    x = torch.cat((x, torch.full((5,), INF)))
    key, back = torch.empty(16, dtype=torch.int64), torch.empty(16)
    key, back = on_device(key, back)
    _order[(1,)](x.to(DEVICE), key, back, 16)
    assert torch.equal(back.cpu(), x)
    steps = key.diff().cpu()[:10]
    assert (steps >= 0).all() and (steps == 0).tolist() == [k == 4 for k in range(10)]


@pytest.mark.skipif(not _dispatch.interpreting(), reason="a GPU has its own rounding")
def test_ids_do_not_depend_on_the_rounding_of_a_gpu(monkeypatch):
    """PTX allows `ex2.approx` and `div.full` an error of 2 ulp, where NumPy's are exact."""
    from triton.runtime.interpreter import InterpreterBuilder

    noise = np.random.default_rng(0)

    def inexact(method):
        def wrapper(self, *args):
            out = method(self, *args)
            if out.data.dtype == np.float32:
                factor = 1 + 2.0**-22 * noise.uniform(-1, 1, out.data.shape)
                out.data = (out.data * factor).astype(out.data.dtype)
            return out

        return wrapper

    for name in ("create_exp2", "create_fdiv"):
        monkeypatch.setattr(InterpreterBuilder, name, inexact(getattr(InterpreterBuilder, name)))
    logits = torch.stack((3 * randn(500, seed=2), 0.01 * randn(500, seed=3)))
    for parameters in ({}, {"temperature": 0.3, "top_p": 0.9}, {"top_k": 300, "min_p": 1e-3}):
        call = *arguments(**parameters), 0, torch.tensor([1, 2]), 9, None
        out = _triton.sample(logits, None, *call)
        plain, true = (reference.sample(z, None, *call) for z in (logits, logits.double()))
        assert torch.equal(out[0], plain[0])
        for name, x, y, z in zip("lme", out[1:], true[1:], plain[1:], strict=True):
            assert_accurate(name, x, y, z)
