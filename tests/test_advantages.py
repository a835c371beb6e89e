"""Shaped rewards, whitening, group and PPO advantages against loops in double precision."""

import math
import statistics

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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

ESTIMATORS = ("k1", "abs", "k2", "k3")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=usable_backends("ppo_advantages"))
def backend(request):
    with rlhf_fast.use_backend(request.param):
        yield request.param


def on(backend, *tensors):
    return [x.to(device_of(backend)) for x in tensors]


def reward_batch(B=5, T=9, seed=0):
    """Scores, log-probs, reference, mask; the last row has no token, NaN stands under the mask."""
    mask = random_mask(B, T, seed=seed)
    mask[-1] = False
    lp = -randn(B, T, seed=seed + 1).abs()
    ref = lp + randn(B, T, seed=seed + 2)
    lp[~mask], ref[~mask] = math.nan, -math.inf
    scores = randn(B, seed=seed + 3)
    scores[-1] = math.nan
    return scores, lp, ref, mask


def scalar_kl(d, estimator, clamp):
    low, high = clamp or (None, None)
    d = d if low is None else max(-low, min(low, d))
    k = {"k1": d, "abs": abs(d), "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
    return k if high is None else max(-high, min(high, k))


def rewards_truth(scores, lp, ref, mask, kl_coef, estimator="k1", clamp=None, at=None):
    """(rewards, kl) token by token."""
    rewards, kl = torch.zeros(2, *lp.shape, dtype=torch.float64)
    for b in range(lp.shape[0]):
        kept = [t for t in range(lp.shape[1]) if mask[b, t]]
        for t in kept:
            kl[b, t] = scalar_kl(lp[b, t].item() - ref[b, t].item(), estimator, clamp)
            rewards[b, t] = -kl_coef * kl[b, t]
        place = (kept[-1] if kept else -1) if at is None else int(at[b])
        if place in kept:
            rewards[b, place] += scores[b].item()
    return rewards, kl


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("clamp", [None, (0.5, None), (None, 0.2), (0.6, 0.3)])
@pytest.mark.parametrize("place", ["last", "index"])
def test_shaped_rewards(backend, estimator, clamp, place):
    scores, lp, ref, mask = reward_batch(seed=1)
    index = torch.tensor([0, 3, 8, 4, -1])
    at = "last" if place == "last" else index.to(device_of(backend))
    with poisoned_memory():
        rewards, kl = rlhf_fast.shaped_rewards(
            *on(backend, scores, lp, ref, mask), kl_coef=0.3, estimator=estimator, clamp=clamp,
            at=at,
        )  # fmt: skip
    expected = rewards_truth(
        scores, lp, ref, mask, 0.3, estimator, clamp, None if place == "last" else index
    )
    assert rewards.dtype == kl.dtype == torch.float32
    assert_accurate("rewards", rewards, expected[0])
    assert_accurate("kl", kl, expected[1])
    assert not rewards[~mask].any() and not kl[~mask].any()


def test_the_score_needs_an_unmasked_place(backend):
    """Known values: reward at the index, nothing for a masked index or an empty row."""
    scores, zero = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 4)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    arguments = on(backend, scores, zero, zero, mask)
    last, _ = rlhf_fast.shaped_rewards(*arguments, kl_coef=0.1)
    assert last.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 3, 0]]
    for at, expected in (
        ([1, 0, 0], [[0, 1, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]]),
        ([2, 99, 3], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    ):
        index = torch.tensor(at, device=device_of(backend), dtype=torch.int32)
        assert rlhf_fast.shaped_rewards(*arguments, kl_coef=0.1, at=index)[0].tolist() == expected
    index = torch.tensor([4, 0, 0], device=device_of(backend))
    if device_of(backend) == "cpu":
        with pytest.raises(IndexError, match=r"at: expected values in \[0, 4\), got 4"):
            rlhf_fast.shaped_rewards(*arguments, kl_coef=0.1, at=index)


def test_a_coefficient_of_zero_ignores_an_infinite_kl(backend):
    scores, lp, ref, mask = on(backend, *reward_batch(seed=2))
    ref = torch.full_like(ref, -math.inf)
    rewards, kl = rlhf_fast.shaped_rewards(scores, lp, ref, mask, kl_coef=0.0)
    assert (kl[mask] == math.inf).all() and rewards.isfinite().all()


def whiten_truth(x, mask, shift_mean=True, unbiased=True, eps=1e-8):
    kept = [v for v, m in zip(x.double().flatten().tolist(), mask.flatten(), strict=True) if m]
    out = torch.zeros(x.shape, dtype=torch.float64)
    if not kept:
        return out
    mean = math.fsum(kept) / len(kept)
    squares = math.fsum((v - mean) ** 2 for v in kept)
    variance = squares / (len(kept) - unbiased) if len(kept) > 1 else 0.0
    whitened = (x.double() - mean) / math.sqrt(variance + eps) if len(kept) > 1 else 0 * out
    return torch.where(mask, whitened + (0 if shift_mean else mean), 0.0)


def plain_whiten(x, mask):
    kept = torch.where(mask, x, 0.0)
    mean = kept.sum() / mask.sum()
    variance = torch.where(mask, (x - mean) ** 2, 0.0).sum() / (mask.sum() - 1)
    return (kept - mean) * torch.rsqrt(variance + 1e-8) * mask


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_whiten(backend, shift_mean, unbiased, dtype):
    for shape in ((2,), (5, 7), (2, 3, 4), (64, 33)):
        x, mask = (3 * randn(*shape, seed=1) + 2).to(dtype), random_mask(*shape, seed=2)
        mask.view(-1)[:2] = True
        x[~mask] = math.nan
        options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": 1e-5}
        with poisoned_memory():
            out = rlhf_fast.whiten(*on(backend, x, mask), **options)
        assert out.dtype == torch.float32 and out.shape == shape and not out[~mask].any()
        assert_accurate("whiten", out, whiten_truth(x, mask, **options))
        clean = torch.where(mask, x, 0).float()
        everything = rlhf_fast.whiten(*on(backend, clean), **options)
        assert_accurate(
            "no mask", everything, whiten_truth(clean, torch.ones_like(mask), **options)
        )


def test_published_whitening_conventions(backend):
    """Mean and spread of the kept values under the conventions of TRL, torchtune and OpenAI."""
    x, mask = on(backend, 1.8 * randn(50, 20, seed=3) + 0.8132, random_mask(50, 20, seed=4))
    raw = x[mask].mean().item()
    for options, mean, spread in (
        ({}, 0.0, 1.0),  # TRL, verl
        ({"shift_mean": False}, raw, 1.0),  # torchtune's shift_mean=True
        ({"unbiased": False}, 0.0, math.sqrt(mask.sum().item() / (mask.sum().item() - 1))),
    ):
        kept = rlhf_fast.whiten(x, mask, **options)[mask].double()
        assert kept.mean().item() == pytest.approx(mean, abs=1e-6)
        assert kept.std().item() == pytest.approx(spread, abs=1e-6)


def test_whitening_far_from_zero_keeps_its_digits(backend):
    """E[x^2] - E[x]^2 has no digit left at a mean of 1e4 and a deviation of 0.01."""
    x, mask = 1e4 + 0.01 * randn(40, 25, seed=5), random_mask(40, 25, seed=6)
    out = rlhf_fast.whiten(*on(backend, x, mask))
    assert_accurate("whiten", out, whiten_truth(x, mask), plain_whiten(x, mask))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("unbiased", [True, False])
def test_whitening_one_token_or_none(backend, tokens, unbiased):
    x = torch.full((2, 3), math.nan)
    mask = torch.zeros(2, 3)
    if tokens:
        x[1, 1], mask[1, 1] = 7.5, 0.5
    x, mask = on(backend, x, mask)
    assert not rlhf_fast.whiten(x, mask, unbiased=unbiased).any()
    kept = rlhf_fast.whiten(x, mask, unbiased=unbiased, shift_mean=False)
    assert kept.tolist() == [[0, 0, 0], [0, 7.5 * tokens, 0]]
    for eps in (0.0, 1e-8):
        constant = torch.full_like(x, 0.1)
        assert not rlhf_fast.whiten(constant, eps=eps, unbiased=unbiased).any()
    assert rlhf_fast.whiten(x[:0]).shape == (0, 3)
    assert rlhf_fast.whiten(x[1, 1].nan_to_num(), shift_mean=False) == (7.5 if tokens else 0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 30),
    st.floats(0.0, 1.0),
    st.floats(-100, 100),
    st.floats(0.01, 100),
    st.booleans(),
    st.booleans(),
)
def test_whitening_any_tokens(seed, n, keep, mean, spread, shift_mean, unbiased):
    x, mask = mean + spread * randn(n, seed=seed), random_mask(n, seed=seed, keep=keep)
    out = rlhf_fast.whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased)
    assert_accurate("whiten", out, whiten_truth(x, mask, shift_mean, unbiased))


# --------------------------------------------------------------------------- whitening over ranks

SHARES = (5, 0, 12)  # tokens of each rank; the second has none


def _share(rank):
    x = 1e3 + randn(3, 6, seed=rank)
    mask = torch.zeros(18, dtype=torch.bool)
    mask[: SHARES[rank]] = True
    return x, mask[torch.randperm(18, generator=torch.Generator().manual_seed(rank))].view(3, 6)


def _work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=len(SHARES)
    )
    group = dist.new_group(list(range(len(SHARES))))
    x, mask = _share(rank)
    outs = [
        rlhf_fast.whiten(x, mask, group=group),
        rlhf_fast.whiten(x, mask, group=group, shift_mean=False, unbiased=False),
        torch.compile(
            lambda x, m: rlhf_fast.whiten(x, m, group=group), fullgraph=True, backend="aot_eager"
        )(x, mask),
        rlhf_fast.whiten(x, torch.zeros_like(mask), group=group),
        # one token in all, on the last rank
        rlhf_fast.whiten(x[: 1 if rank == 2 else 0, :1], group=group, shift_mean=False),
    ]
    torch.save(outs, f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_whitening_over_ranks_is_that_of_all_tokens(tmp_path):
    mp.spawn(_work, (tmp_path / "store", tmp_path), nprocs=len(SHARES))
    parts = [_share(rank) for rank in range(len(SHARES))]
    x, mask = (torch.cat(column) for column in zip(*parts, strict=True))
    outs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARES))]
    whole = [torch.cat([out[k] for out in outs]) for k in range(5)]
    assert_accurate("whiten", whole[0], whiten_truth(x, mask))
    assert_accurate("with mean", whole[1], whiten_truth(x, mask, False, False))
    assert_same_bits("compiled", whole[2], whole[0])
    assert not whole[3].any()
    assert whole[4].flatten().tolist() == [parts[2][0][0, 0].item()]


# -------------------------------------------------------------------------------- group advantages


def groups_truth(scores, ids, kind, eps=1e-4):
    out = torch.zeros(len(scores), dtype=torch.float64)
    for i, group in enumerate(ids.tolist()):
        r = [scores[j].item() for j in range(len(scores)) if ids[j] == group]
        if len(r) == 1:
            continue
        mean, mine = statistics.fmean(r), scores[i].item()
        out[i] = {
            "grpo": lambda r=r, mean=mean, mine=mine: (mine - mean) / (statistics.stdev(r) + eps),
            "dr_grpo": lambda mean=mean, mine=mine: mine - mean,
            "rloo": lambda r=r, mine=mine: mine - (math.fsum(r) - mine) / (len(r) - 1),
        }[kind]()
    return out


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_group_advantages(backend, kind, dtype):
    for B, groups in ((1, 1), (2, 1), (8, 3), (33, 5), (64, 64), (100, 1)):
        scores = randn(B, seed=B).to(dtype)
        ids = torch.randint(groups, (B,), generator=torch.Generator().manual_seed(B)) * 10**12 - 7
        with poisoned_memory():
            out = rlhf_fast.group_advantages(*on(backend, scores, ids), kind=kind)
        assert out.dtype == torch.float32
        assert_accurate("advantages", out, groups_truth(scores, ids, kind))


def test_group_known_values(backend):
    scores = torch.tensor([1.0, 5.0, 3.0, 2.0])
    ids = torch.tensor([2, -9, 2, 2], dtype=torch.int8)
    for kind, expected in (
        ("grpo", [-1 / 1.0001, 0.0, 1 / 1.0001, 0.0]),
        ("dr_grpo", [-1.0, 0.0, 1.0, 0.0]),
        ("rloo", [-1.5, 0.0, 1.5, 0.0]),
    ):
        out = rlhf_fast.group_advantages(*on(backend, scores, ids), kind=kind)
        assert_accurate(kind, out, torch.tensor(expected, dtype=torch.float64))


def test_equal_scores_have_no_advantage(backend):
    scores, ids = on(backend, torch.full((6,), 0.1), torch.tensor([0, 0, 0, 1, 1, 2]))
    for kind in ("grpo", "dr_grpo", "rloo"):
        for eps in (0.0, 1e-4):
            assert not rlhf_fast.group_advantages(scores, ids, kind=kind, eps=eps).any()
    assert rlhf_fast.group_advantages(scores[:0], ids[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_does_not_depend_on_the_others(backend, kind):
    """Bitwise: alone, permuted, and between other groups."""
    scores = randn(60, seed=9)
    ids = torch.randint(7, (60,), generator=torch.Generator().manual_seed(9))
    s, i = on(backend, scores, ids)
    whole = rlhf_fast.group_advantages(s, i, kind=kind)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).to(s.device)
    assert_same_bits(
        "permuted", rlhf_fast.group_advantages(s[order], i[order], kind=kind), whole[order]
    )
    for group in range(7):
        mine = i == group
        alone = rlhf_fast.group_advantages(s[mine], i[mine] - 100, kind=kind)
        assert_same_bits("alone", alone, whole[mine])


# ---------------------------------------------------------------------------------- ppo advantages


@pytest.mark.parametrize("mode", ["carry", "zero"])
@pytest.mark.parametrize("whiten", [True, False])
def test_ppo_advantages_is_the_chain_of_its_parts(backend, mode, whiten):
    scores, lp, ref, mask = reward_batch(seed=20)
    values = randn(5, 9, seed=21)
    values[~mask] = math.nan
    options = {"estimator": "k3", "clamp": (5.0, 1.0)}
    at = torch.tensor([0, 3, 8, 4, 0])
    with poisoned_memory():
        out = rlhf_fast.ppo_advantages(
            *on(backend, scores, lp, ref, values, mask), kl_coef=0.2, gamma=0.97, lam=0.8,
            mask_mode=mode, whiten=whiten, unbiased=False, at=at.to(device_of(backend)), **options,
        )  # fmt: skip
    rewards, kl = rewards_truth(scores, lp, ref, mask, 0.2, at=at, **options)
    clean = torch.where(mask, values, 0.0).double()
    with rlhf_fast.use_backend("reference"):
        advantages, returns = rlhf_fast.gae(
            rewards, clean, gamma=0.97, lam=0.8, mask=mask, mask_mode=mode
        )
    if whiten:
        advantages = whiten_truth(advantages, mask, unbiased=False)
    assert_accurate("rewards", out.rewards, rewards)
    assert_accurate("kl", out.kl, kl)
    assert_accurate("returns", out.returns, returns)
    assert_accurate("advantages", out.advantages, advantages)
    for x in out:
        assert x.dtype == torch.float32 and x.is_contiguous() and not x[~mask].any()


def test_published_rewards_of_torchtune(backend):
    """pytorch/torchtune, test_rewards.py, get_rewards_ppo: its inputs, signs and numbers."""
    scores = torch.tensor([1.0, 2.0, 3.0])
    lp = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8]])
    gap = torch.tensor([[0.1], [0.2], [0.3]]).expand(3, 3)
    for at in ("last", torch.tensor([2, 2, 2], device=device_of(backend))):
        rewards, kl = rlhf_fast.shaped_rewards(
            *on(backend, scores, lp, lp + gap), None, kl_coef=0.5, at=at
        )
        expected = torch.tensor([[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]])
        torch.testing.assert_close(kl.cpu(), -gap, atol=1e-6, rtol=0)
        torch.testing.assert_close(rewards.cpu(), expected, atol=1e-6, rtol=0)


def test_ppo_advantages_by_hand(backend):
    """One row, gamma 0.5, lambda 0.5: a penalty of 0.1 a token and a score of 1 at the end."""
    lp, ref = torch.tensor([[-1.0, -1.0, -9.0]]), torch.tensor([[-2.0, -2.0, 5.0]])
    values, mask = torch.tensor([[0.4, 0.2, 7.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    out = rlhf_fast.ppo_advantages(
        *on(backend, torch.tensor([1.0]), lp, ref, values, mask), kl_coef=0.1, gamma=0.5, lam=0.5,
        whiten=False,
    )  # fmt: skip
    last = 1.0 - 0.1 - 0.2
    first = -0.1 + 0.5 * 0.2 - 0.4 + 0.25 * last
    assert_accurate("rewards", out.rewards, torch.tensor([[-0.1, 0.9, 0.0]]).double())
    assert_accurate("advantages", out.advantages, torch.tensor([[first, last, 0.0]]).double())
    assert_accurate("returns", out.returns, torch.tensor([[first + 0.4, last + 0.2, 0.0]]).double())


def test_nothing_is_differentiable_or_written_to(backend):
    scores, lp, ref, mask = reward_batch(seed=30)
    scores[-1] = 0.0
    scores, lp, ref, values, mask = on(backend, scores, lp, ref, randn(5, 9), mask)
    for x in (scores, lp, ref, values):
        x.requires_grad_()
    ids = torch.zeros(5, dtype=torch.int64, device=scores.device)
    before = [x.detach().clone() for x in (scores, lp, ref, values)]
    outs = [
        *rlhf_fast.ppo_advantages(scores, lp, ref, values, mask, kl_coef=0.1),
        *rlhf_fast.shaped_rewards(scores, lp, ref, mask, kl_coef=0.1),
        rlhf_fast.whiten(values, mask),
        rlhf_fast.group_advantages(scores, ids),
    ]
    assert not any(out.requires_grad for out in outs)
    for x, old in zip((scores, lp, ref, values), before, strict=True):
        assert_same_bits("input", x, old)


def test_layouts_masks_and_dtypes(backend):
    scores, lp, ref, mask = on(backend, *reward_batch(seed=31))
    values = randn(5, 9, seed=1).to(lp.device)
    base = rlhf_fast.ppo_advantages(scores, lp, ref, values, mask, kl_coef=0.1)
    strided = [x.t().contiguous().t() for x in (lp, ref, values, mask)]
    for other in (mask.int() * 3, mask.double() * -0.5, strided[3]):
        out = rlhf_fast.ppo_advantages(scores, *strided[:3], other, kl_coef=0.1)
        for a, b in zip(out, base, strict=True):
            assert_same_bits("layout", a, b)
    half = rlhf_fast.ppo_advantages(scores.bfloat16(), lp, ref, values.half(), mask, kl_coef=0.1)
    assert all(x.dtype == torch.float32 for x in half)
    if backend == "reference":
        wide = rlhf_fast.ppo_advantages(scores, lp, ref, values.double(), mask, kl_coef=0.1)
        assert all(x.dtype == torch.float64 for x in wide)
    for shape in ((0, 4), (3, 0)):
        x = lp.new_zeros(shape)
        out = rlhf_fast.ppo_advantages(x.new_zeros(shape[0]), x, x, x, x, kl_coef=0.1)
        assert all(y.shape == shape for y in out)
    none = rlhf_fast.shaped_rewards(scores[:1], values[:1], ref[:1] * 0, None, kl_coef=0.1)[0]
    assert none.shape == (1, 9)


def test_everything_masked(backend):
    x = torch.full((2, 3), math.nan, device=device_of(backend))
    out = rlhf_fast.ppo_advantages(x[:, 0], x, x, x, torch.zeros_like(x), kl_coef=0.1)
    assert not any(y.any() for y in out)


BASE = {
    "scores": torch.zeros(2),
    "logprob": torch.zeros(2, 3),
    "ref_logprob": torch.zeros(2, 3),
    "values": torch.zeros(2, 3),
    "mask": torch.ones(2, 3),
    "kl_coef": 0.1,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(3)}, ValueError, r"scores: expected shape \(2,\)"),
        ({"scores": torch.zeros(2).int()}, TypeError, "scores: expected float64"),
        ({"logprob": torch.zeros(2)}, ValueError, r"logprob: expected shape \[B, T\]"),
        ({"ref_logprob": torch.zeros(2, 4)}, ValueError, "ref_logprob: expected shape"),
        ({"values": None}, TypeError, "values: expected a tensor"),
        ({"ref_logprob": None}, TypeError, "ref_logprob: expected a tensor"),
        ({"mask": torch.ones(2)}, ValueError, "mask: expected shape"),
        ({"kl_coef": math.nan}, ValueError, "kl_coef: expected a finite number"),
        ({"kl_coef": "0.1"}, TypeError, "kl_coef: expected a number"),
        ({"estimator": "k4"}, ValueError, "estimator: expected one of k1"),
        ({"clamp": (1.0,)}, ValueError, "clamp: expected two"),
        ({"at": "first"}, ValueError, "at: expected one of last"),
        ({"at": torch.zeros(3, dtype=torch.int64)}, ValueError, "at: expected shape"),
        ({"at": torch.zeros(2)}, TypeError, "at: expected int32 or int64"),
        ({"at": torch.tensor([0, 3])}, IndexError, "at: expected values in"),
        ({"mask_mode": "skip"}, ValueError, "mask_mode: expected one of carry, zero"),
        ({"gamma": -1.0}, ValueError, "gamma: expected a finite number"),
        ({"whiten": None}, TypeError, "whiten: expected True or False"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        rlhf_fast.ppo_advantages(**BASE | change)


def test_errors_of_whitening_and_groups():
    x, ids = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for call, error, message in (
        (lambda: rlhf_fast.whiten(x, torch.ones(2)), ValueError, "mask: expected shape"),
        (lambda: rlhf_fast.whiten(x.int()), TypeError, "x: expected float64"),
        (lambda: rlhf_fast.whiten(x, eps=-1.0), ValueError, "eps: expected a finite"),
        (lambda: rlhf_fast.whiten(x, group="all"), TypeError, "group: expected None or a"),
        (lambda: rlhf_fast.group_advantages(x, ids, kind="ppo"), ValueError, "kind: expected"),
        (lambda: rlhf_fast.group_advantages(x, x), TypeError, "group_ids: expected integers"),
        (lambda: rlhf_fast.group_advantages(x, ids[:2]), ValueError, "group_ids: expected shape"),
        (lambda: rlhf_fast.group_advantages(x.view(3, 1), ids), ValueError, "scores: expected"),
    ):
        with pytest.raises(error, match=message):
            call()
