"""What `sample` and `replay_logprob` keep and say about it: Hugging Face's processors, float64.

Gradients are in test_sample_replay.py, the draws (Philox, frequencies, tails) in
test_sample_draws.py.
"""

import importlib
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
from tests.sample_truth import (
    FLOATS,
    INF,
    PARAMETERS,
    hugging_face,
    quick_backends,
    replay_all,
    truth,
)


@pytest.fixture(params=usable_backends("sample"))
def sampler(request):
    with rlhf_fast.use_backend(request.param, op="sample"):
        yield device_of(request.param)


@pytest.fixture(params=quick_backends("sample"))
def quick_sampler(request):
    with rlhf_fast.use_backend(request.param, op="sample"):
        yield device_of(request.param)


@pytest.fixture(params=quick_backends("replay_logprob"))
def replayer(request):
    with rlhf_fast.use_backend(request.param, op="replay_logprob"):
        yield device_of(request.param)


# ------------------------------------------------------------------------- values against truth


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 300])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_sample_against_float64(quick_sampler, vocabulary, dtype, parameters):
    logits = (2 * randn(6, vocabulary, seed=1)).to(dtype)
    with poisoned_memory():
        out = rlhf_fast.sample(logits.to(quick_sampler), seed=3, position=7, **parameters)
    logq, log_mass, entropy = truth(logits, **parameters)
    ids = out.ids.cpu()
    scores = hugging_face(logits.float(), **parameters)
    plain = scores.log_softmax(-1)
    u = logits.float() / parameters.get("temperature", 1.0)
    assert out.ids.dtype == torch.int64
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in out[1:])
    assert_accurate("logprob", out.logprob, logq.gather(-1, ids[:, None])[:, 0],
                    plain.gather(-1, ids[:, None])[:, 0])  # fmt: skip
    assert_accurate("log_mass", out.log_mass, log_mass, scores.logsumexp(-1) - u.logsumexp(-1))
    log_p = u.log_softmax(-1)
    assert_accurate("entropy", out.entropy, entropy, -(log_p.exp() * log_p).sum(-1))
    whole = rlhf_fast.logprob(logits, ids, temperature=parameters.get("temperature", 1.0))
    torch.testing.assert_close((out.logprob + out.log_mass).cpu(), whole, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_replay_against_float64(replayer, parameters):
    logits = 2 * randn(5, 60, seed=2)
    logprob, log_mass = replay_all(logits.to(replayer), **parameters)
    logq, true_mass, _ = truth(logits, **parameters)
    scores = hugging_face(logits, **parameters)
    assert_accurate("logprob", logprob, logq, scores.log_softmax(-1))
    assert_accurate("log_mass", log_mass, true_mass)


@pytest.mark.parametrize("name", adversarial_logits(8))
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_adversarial_rows(replayer, name, parameters):
    logits = adversarial_logits(64)[name]
    possible = ~(logits == -INF).all(-1)
    logprob, log_mass = replay_all(logits.to(replayer), **parameters)
    scores = hugging_face(logits, **parameters)
    true = hugging_face(logits.double(), **parameters)[possible].log_softmax(-1)
    plain = scores[possible].log_softmax(-1)
    # Sorted, since which of equal logits stay at the edge of top-p is free.
    logprob, true, plain = (x.sort(-1).values for x in (logprob, true, plain))
    assert_accurate("logprob", logprob[possible.to(replayer)], true, plain)
    whole = (logits.double() / parameters.get("temperature", 1.0))[possible]
    true = hugging_face(logits.double(), **parameters)[possible].logsumexp(-1) - whole.logsumexp(-1)
    plain = scores[possible].logsumexp(-1) - whole.float().logsumexp(-1)
    assert_accurate("log_mass", log_mass[possible.to(replayer)], true, plain)
    assert (logprob[~possible.to(replayer)] == -INF).all()
    assert not log_mass[~possible.to(replayer)].any()


@pytest.mark.parametrize("backend", quick_backends("sample"))
def test_sample_and_replay_agree(backend):
    """Bit for bit where a backend has both."""
    logits = (3 * randn(40, 700, seed=4)).bfloat16().to(device_of(backend))
    both = backend in usable_backends("replay_logprob")
    for parameters in PARAMETERS:
        with rlhf_fast.use_backend(backend, op="sample"):
            out = rlhf_fast.sample(logits, seed=9, position=torch.arange(40, device=logits.device),
                                   **parameters)  # fmt: skip
        with rlhf_fast.use_backend(backend if both else "reference", op="replay_logprob"):
            replayed = rlhf_fast.replay_logprob(logits, out.ids, **parameters)
            truth = (
                rlhf_fast.replay_logprob(logits.double(), out.ids, **parameters)
                if not both
                else replayed
            )
        for name, x, y, true in zip(
            ("logprob", "log_mass"), out[1:], replayed, truth, strict=False
        ):
            if both:
                assert_same_bits(name, x, y)
            else:
                assert_accurate(name, x, true, y)
        assert (out.log_mass <= 0).all() and (out.logprob <= 0).all()


# -------------------------------------------------------------- the kept set is Hugging Face's


def assert_same_support(logits, *, ours=None, **parameters):
    """Each row keeps the same logits as Hugging Face's processors do, ties in the same number."""
    scores = hugging_face(logits, **parameters)
    ours = (replay_all(logits, **parameters)[0] if ours is None else ours) > -INF
    for row, mine, theirs in zip(logits, ours, scores > -INF, strict=True):
        if sorted(row[mine].tolist()) == sorted(row[theirs].tolist()):
            continue
        # The masses of the two sets may only differ by what float32 cannot tell at the edges.
        few, many = sorted((mine, theirs), key=lambda kept: int(kept.sum()))
        u = row.double() / parameters.get("temperature", 1.0)
        ranked = torch.where(few | many, u, -INF).softmax(0).sort().values.cumsum(0)
        edge = (ranked - (1 - parameters.get("top_p", 1.0))).abs().min()
        ratio = (u - u.max()).exp() - parameters.get("min_p", 0.0)
        assert min(edge, ratio.abs().min()) < 1e-6, (row, mine, theirs)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 24),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.floats(0.1, 8.0),
    st.floats(0.0, 0.7),
    st.floats(0.05, 4.0),
    st.integers(0, 30),
    st.one_of(st.just(1.0), st.floats(1e-9, 1.0), st.sampled_from([0.1, 0.5, 0.9, 0.99])),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.sampled_from([0.05, 1.0])),
)
def test_support_is_that_of_hugging_face(
    seed, vocabulary, dtype, scale, banned, temperature, top_k, top_p, min_p
):
    logits = scale * randn(4, vocabulary, seed=seed)
    # Few bits, so that ties stand at every edge.
    logits = (logits.to(dtype) if dtype != torch.bfloat16 else logits.round() / 2).to(dtype)
    logits = logits.double() if dtype == torch.float64 else logits.float()
    hidden = torch.rand(4, vocabulary, generator=torch.Generator().manual_seed(seed)) < banned
    hidden[:, seed % vocabulary] = False
    logits = logits.masked_fill(hidden, -INF)
    assert_same_support(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 4, 5, 7, 10, 20, 30, 49])
def test_equal_logits_keep_as_many_as_hugging_face(vocabulary):
    """Exact ties of mass, the lowest ids staying, with p as a number or as a tensor."""
    logits = torch.full((1, vocabulary), 3.7)
    for top_p in (1e-12, 0.1, 0.2, 0.25, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.99):
        count = int((hugging_face(logits, top_p=top_p) > -INF).sum())
        for p in (top_p, torch.tensor(top_p, dtype=torch.float64)):
            kept = replay_all(logits, top_p=p)[0] > -INF
            assert kept[0].tolist() == [v < count for v in range(vocabulary)], p
        single = torch.tensor(top_p)
        assert_same_bits(
            "float32",
            replay_all(logits, top_p=single)[0],
            replay_all(logits, top_p=single.item())[0],
        )


def test_top_p_of_a_large_vocabulary():
    """Heads that are too short for the nucleus, and nuclei that end among ties behind the head."""
    logits = torch.stack(
        [
            8 * randn(20_000, seed=1),
            0.5 * randn(20_000, seed=2),
            (2 * randn(20_000, seed=3)).round(),
            torch.zeros(20_000),
        ]
    )
    for top_p in (0.3, 0.9, 0.999):
        out = rlhf_fast.sample(logits, seed=1, position=0, top_p=top_p)
        scores = hugging_face(logits.double(), top_p=top_p)
        mass = scores.logsumexp(-1) - logits.double().logsumexp(-1)
        # One token of a flat row is 1e-4 of its mass.
        torch.testing.assert_close(out.log_mass.double(), mass, rtol=0, atol=2e-6)
        both = rlhf_fast.sample(logits, seed=1, position=0, top_p=top_p, top_k=19_999)
        torch.testing.assert_close(both.log_mass.exp(), out.log_mass.exp(), rtol=0, atol=1e-3)


def test_order_of_the_filters():
    """Top-p works on what top-k leaves: 0.5 and 0.3 become 0.625 and 0.375."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (replay_all(logits, top_p=0.6)[0] > -INF).tolist() == [[True, True, False, False]]
    kept = replay_all(logits, top_p=0.6, top_k=2)[0] > -INF
    assert kept.tolist() == [[True, False, False, False]]
    kept = replay_all(logits, top_k=3, top_p=0.99, min_p=0.4)[0] > -INF
    assert kept.tolist() == [[True, True, False, False]]


def test_parameters_per_row(sampler):
    """Numbers and tensors mix, and each row is as if it were alone with its numbers."""
    logits = (2 * randn(7, 50, seed=5)).to(sampler)
    columns = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, 2.0, 0.3, 1.0, 1.0]),
        "top_k": torch.tensor([0, 5, 1, 50, 7, 99, 3], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 0.25, 1.0, 0.75, 1.0]),
        "min_p": torch.tensor([0.0, 0.5, 0.25, 0.0, 0.125, 0.0, 1.0]),
        "seed": torch.tensor([1, 2, -3, 4, 5, 6, 7]),
        "position": torch.arange(7) * 1000,
    }
    for names in (set(columns), {"top_k", "seed"}, {"temperature", "min_p", "position"}):
        rest = {"seed": 8, "position": 2, "top_p": 0.75}
        mixed = {**rest, **{k: x.to(sampler) for k, x in columns.items() if k in names}}
        out = rlhf_fast.sample(logits, **mixed)
        for b in range(7):
            alone = {k: x[b].item() if torch.is_tensor(x) else x for k, x in mixed.items()}
            row = rlhf_fast.sample(logits[b : b + 1], **alone)
            for name, x, y in zip(out._fields, out, row, strict=True):
                assert_same_bits(f"{name} of row {b}", x[b : b + 1], y)


def test_logit_mask_is_minus_infinity(sampler):
    logits = randn(5, 30, seed=6).to(sampler)
    allowed = (torch.arange(30) % 3 > 0).to(sampler)
    spoiled = torch.where(allowed, logits, torch.tensor([math.nan, INF, 7.0] * 10, device=sampler))
    options = {"seed": 1, "position": 2, "top_k": 9, "temperature": 0.8}
    expected = rlhf_fast.sample(logits.masked_fill(~allowed, -INF), **options)
    for mask in (allowed, allowed.float() * -0.25, allowed.expand(5, -1), allowed.long() * 2):
        out = rlhf_fast.sample(spoiled, logit_mask=mask, **options)
        for name, x, y in zip(out._fields, out, expected, strict=True):
            assert_same_bits(name, x, y)
    assert allowed[out.ids].all()


# ---------------------------------------------------------------------------------- edge cases


def test_greedy(sampler):
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, -INF], [-INF, -INF, -7.0]], device=sampler)
    out = rlhf_fast.sample(logits, temperature=0.0, top_k=2, top_p=0.1, seed=1, position=0)
    assert out.ids.tolist() == [1, 0, 2]
    assert not any(x.any() for x in out[1:])
    ids = torch.tensor([[0, 1, 2]] * 3, device=sampler)
    every = logits.unsqueeze(1).expand(3, 3, 3).clone().requires_grad_()
    logprob, log_mass = rlhf_fast.replay_logprob(every, ids, temperature=0)
    assert logprob.tolist() == [[-INF, 0, -INF], [0, -INF, -INF], [-INF, -INF, 0]]
    (logprob.exp() + log_mass).sum().backward()
    assert not log_mass.any() and not every.grad.any()


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_tiny_temperature_is_nearly_greedy(sampler, temperature, sign):
    logits = sign * torch.tensor([[1.0, 2.0, 3.0], [3e3, 2e3, 1e3], [4.0, -INF, 4.0]])
    logits = logits.masked_fill(logits == INF, -INF).to(sampler)
    out = rlhf_fast.sample(logits, temperature=temperature, seed=1, position=0)
    best = logits == logits.amax(-1, keepdim=True)
    assert best.gather(-1, out.ids[:, None]).all()
    assert_accurate("entropy", out.entropy, best.sum(-1).double().log())
    assert_accurate("logprob", out.logprob, -best.sum(-1).double().log())
    assert not out.log_mass.any()


def test_rows_layouts_and_dtypes(sampler):
    logits = (2 * randn(6, 40, seed=7)).bfloat16().float().to(sampler)
    options = {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "seed": 5, "position": 6}
    expected = rlhf_fast.sample(logits, **options)
    wide = torch.full((6, 90), math.nan, device=sampler)
    wide[:, 5:85:2] = logits
    version = wide._version
    for other in (logits.bfloat16(), logits.t().contiguous().t(), wide[:, 5:85:2]):
        out = rlhf_fast.sample(other.requires_grad_() if other.is_leaf else other, **options)
        for name, x, y in zip(out._fields, out, expected, strict=True):
            assert_same_bits(name, x, y)
    assert wide._version == version
    empty = rlhf_fast.sample(logits[:0], **options)
    assert [x.shape for x in empty] == [(0,)] * 4
    one = rlhf_fast.sample(logits[:, :1], **options)
    assert not any(x.any() for x in one)


def test_float64_stays_float64():
    logits = randn(5, 60, seed=8, dtype=torch.float64)
    out = rlhf_fast.sample(logits, seed=1, position=1, top_k=9, temperature=0.7)
    logq, log_mass, entropy = truth(logits, top_k=9, temperature=0.7)
    for x, y in zip(
        out[1:], (logq.gather(-1, out.ids[:, None])[:, 0], log_mass, entropy), strict=True
    ):
        assert x.dtype == torch.float64
        assert_accurate("float64", x, y)


def test_rows_without_a_token():
    """What the reference gives where the checks do not run (on CUDA)."""
    logits = torch.tensor([[-INF, -INF], [0.0, -INF], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    reference = importlib.import_module("rlhf_fast.kernels.sample.reference")
    out = reference.sample(
        logits, mask, 1.0, None, 1, None, 0.9, None, 0.1, None, 0, None, 0, None
    )  # fmt: skip
    assert [x.tolist() for x in out] == [[-1, -1, 0], [-INF, -INF, 0], [0, 0, 0], [0, 0, 0]]
