"""The ranking loss against a loop over the pairs in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_fast
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    random_mask,
    usable_backends,
)


@pytest.fixture(params=usable_backends("ranking_loss"))
def backend(request):
    with rlhf_fast.use_backend(request.param):
        yield request.param


def truth(scores, ranks, mask=None, margin=0.0):
    """(loss, gradient) by loops over prompts and pairs."""
    P, K = scores.shape
    mask = torch.ones(P, K, dtype=torch.bool) if mask is None else mask != 0
    s = torch.where(mask, scores.detach().cpu(), 0.0).double().requires_grad_()
    prompts = []
    for p in range(P):
        pairs = [
            torch.nn.functional.softplus(-(s[p, w] - s[p, i] - margin), threshold=1e9)
            for w in range(K)
            for i in range(K)
            if mask[p, w] and mask[p, i] and ranks[p, w] < ranks[p, i]
        ]
        if pairs:
            prompts.append(torch.stack(pairs).mean())
    loss = torch.stack(prompts).mean() if prompts else (s * 0).sum()
    return loss, torch.autograd.grad(loss, s)[0]


def ranks_with_ties(P, K, seed):
    return torch.randint(K, (P, K), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (5, 4), (3, 9), (40, 2), (2, 33)])
def test_ranking_loss(backend, shape, dtype):
    for margin, masked in ((0.0, False), (0.5, True), (-0.3, True)):
        scores = (2 * randn(*shape, seed=1)).to(dtype)
        ranks = ranks_with_ties(*shape, seed=2)
        mask = random_mask(*shape, seed=3) if masked else None
        if masked:
            scores[~mask] = math.nan
        x = scores.to(device_of(backend)).requires_grad_()
        with poisoned_memory():
            out = rlhf_fast.ranking_loss(
                x, ranks.to(x.device), None if mask is None else mask.to(x.device), margin=margin
            )
            (2 * out).backward()
        loss, grad = truth(scores, ranks, mask, margin)
        assert out.dtype == torch.float32 and out.ndim == 0 and x.grad.dtype == dtype
        assert_accurate("loss", out, loss)
        assert_accurate("gradient", x.grad, 2 * grad)


def test_known_values(backend):
    """-log sigmoid of 1 and 2 for a pair; log 2 where the scores say nothing."""
    x = torch.tensor([[3.0, 1.0], [0.0, 1.0]], device=device_of(backend))
    ranks = torch.tensor([[0, 1], [1, 0]], device=x.device)
    assert rlhf_fast.ranking_loss(x, ranks).item() == pytest.approx((0.126928 + 0.313262) / 2, 1e-5)
    assert rlhf_fast.ranking_loss(0 * x, ranks).item() == pytest.approx(math.log(2))
    assert rlhf_fast.ranking_loss(x, ranks, margin=1.0).item() == pytest.approx(
        (0.313262 + math.log(2)) / 2, 1e-5
    )


def test_k_completions_are_the_mean_of_their_pairs(backend):
    """K choose 2 in one row is the mean over K choose 2 rows of two."""
    x = randn(1, 4, seed=4).to(device_of(backend))
    ranks = torch.tensor([[2, 0, 3, 1]], device=x.device)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    rows = torch.stack([x[0, list(p)] for p in pairs])
    row_ranks = torch.stack([ranks[0, list(p)] for p in pairs])
    assert_accurate(
        "loss", rlhf_fast.ranking_loss(x, ranks), rlhf_fast.ranking_loss(rows, row_ranks).double()
    )


def test_prompts_without_a_pair_do_not_count(backend):
    x = randn(3, 3, seed=5).to(device_of(backend)).requires_grad_()
    ranks = torch.tensor([[0, 1, 2], [4, 4, 4], [0, 1, 2]], device=x.device)
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 0]], device=x.device)
    out = rlhf_fast.ranking_loss(x, ranks, mask)
    out.backward()
    assert_accurate("loss", out, rlhf_fast.ranking_loss(x[:1], ranks[:1]).double())
    assert x.grad[0].any() and not x.grad[1:].any()


def test_no_pair_at_all(backend):
    x = torch.full((2, 3), math.nan, device=device_of(backend), requires_grad=True)
    ranks = torch.arange(3, device=x.device).expand(2, 3)
    for out in (
        rlhf_fast.ranking_loss(x, ranks, torch.zeros(2, 3, device=x.device)),
        rlhf_fast.ranking_loss(x[:0], ranks[:0]),
        rlhf_fast.ranking_loss(x[:, :0], ranks[:, :0]),
        rlhf_fast.ranking_loss(x[:, :1].nan_to_num(), ranks[:, :1]),
    ):
        assert out == 0
        out.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])  # a processor's NaN, a GPU's
def test_a_nan_that_counts_is_not_hidden(backend, bits):
    x = torch.arange(20.0).view(2, 10)
    x.view(torch.int32)[0, 9] = bits
    x, ranks = x.to(device_of(backend)), torch.arange(20, device=device_of(backend)).view(2, 10)
    x.requires_grad_()
    out = rlhf_fast.ranking_loss(x, ranks)
    out.backward()
    assert out.isnan() and x.grad[0].isnan().all() and x.grad[1].isfinite().all()


def test_far_apart_scores_are_exact(backend):
    """-log sigmoid(-200) is 200 with slope 1, and that of +200 is 0 and not NaN."""
    x = torch.tensor([[200.0, 0.0], [0.0, 200.0], [1e4, -1e4]], device=device_of(backend))
    ranks = torch.tensor([[1, 0], [1, 0], [1, 0]], device=x.device)
    x.requires_grad_()
    out = rlhf_fast.ranking_loss(x, ranks)
    out.backward()
    assert out.item() == pytest.approx(20200 / 3)
    third = 1 / 3
    expected = torch.tensor([[third, -third], [0.0, 0.0], [third, -third]], dtype=torch.float64)
    assert_accurate("gradient", x.grad, expected)


def test_ranks_of_any_type_and_any_strides(backend):
    x = randn(4, 6, seed=6).to(device_of(backend))
    ranks = ranks_with_ties(4, 6, seed=7).to(x.device)
    base = rlhf_fast.ranking_loss(x, ranks)
    for other in (ranks.int(), ranks.float() * 0.5 - 3, ranks.to(torch.uint8), ranks.double()):
        assert_same_bits("ranks", rlhf_fast.ranking_loss(x, other), base)
    strided = rlhf_fast.ranking_loss(x.t().contiguous().t(), ranks.t().contiguous().t())
    assert_same_bits("strides", strided, base)
    assert_accurate("sign", rlhf_fast.ranking_loss(-x, -ranks), base.double())


def test_second_backward_and_no_double_backward(backend):
    x = randn(2, 3).to(device_of(backend)).requires_grad_()
    ranks = torch.arange(3, device=x.device).expand(2, 3)
    loss = rlhf_fast.ranking_loss(x, ranks)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert_same_bits("second backward", x.grad, 2 * first)
    (grad,) = torch.autograd.grad(rlhf_fast.ranking_loss(x, ranks), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_gradcheck_of_the_reference():
    ranks, mask = ranks_with_ties(3, 5, seed=8), random_mask(3, 5, seed=9)
    x = randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: rlhf_fast.ranking_loss(s, ranks, mask, margin=0.4), (x,)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0.0, 1.0),
    st.floats(-2.0, 2.0),
    st.floats(0.0, 30.0),
)
def test_any_batch(seed, P, K, keep, margin, spread):
    scores, ranks = spread * randn(P, K, seed=seed), ranks_with_ties(P, K, seed)
    mask = random_mask(P, K, seed=seed, keep=keep)
    x = scores.clone().requires_grad_()
    out = rlhf_fast.ranking_loss(x, ranks, mask, margin=margin)
    out.backward()
    loss, grad = truth(scores, ranks, mask, margin)
    assert_accurate("loss", out, loss, loss)
    assert_accurate("gradient", x.grad, grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(2)}, ValueError, r"scores: expected shape \[P, K\]"),
        ({"scores": torch.zeros(2, 3).int()}, TypeError, "scores: expected float64"),
        ({"ranks": torch.zeros(3, 2)}, ValueError, r"ranks: expected shape \(2, 3\)"),
        ({"ranks": [1, 2]}, TypeError, "ranks: expected a tensor"),
        ({"ranks": torch.zeros(2, 3).cfloat()}, TypeError, "ranks: expected real numbers"),
        ({"mask": torch.ones(3)}, ValueError, "mask: expected shape"),
        ({"margin": math.nan}, ValueError, "margin: expected a finite number"),
        ({"margin": None}, TypeError, "margin: expected a number"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    arguments = {"scores": torch.zeros(2, 3), "ranks": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=message):
        rlhf_fast.ranking_loss(**arguments)


def test_a_prompt_has_the_same_bits_wherever_it_stands(backend):
    scores, ranks = randn(5, 5, seed=1).to(device_of(backend)), ranks_with_ties(5, 5, seed=2)
    ranks = ranks.to(scores.device)

    def gradient(rows):
        leaf = scores[rows].requires_grad_()
        return torch.autograd.grad(rlhf_fast.ranking_loss(leaf, ranks[rows]), leaf)[0]

    order = torch.tensor([3, 0, 4, 2, 1])
    assert_same_bits("permuted", gradient(order), gradient(torch.arange(5))[order])
