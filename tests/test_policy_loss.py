"""The policy loss of every kind against literal float64 formulas under autograd."""

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
from tests.loss_truth import KINDS, REDUCTIONS, batch, clean, on, policy_truth, reduced, token_terms

OPTIONS = (
    {},
    {"clip_low": 0.1, "clip_high": 0.3},
    {"clip_low": None},
    {"dual_clip": 1.5},
    {"clip_low": None, "dual_clip": 1.5},
)


@pytest.fixture(params=usable_backends("policy_loss"))
def backend(request):
    with rlhf_fast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_policy_loss(backend, kind, reduction):
    for seed, options in enumerate(OPTIONS):
        for spread in (0.05, 0.5, 3.0):
            data = batch(seed=10 * seed, spread=spread)
            x = on(backend, data, "logprob")
            with poisoned_memory():
                out = rlhf_fast.policy_loss(**x, kind=kind, reduction=reduction, **options)
                (3 * out.loss).backward()
            loss, grad, *_ = policy_truth(data, kind, reduction, **options)
            assert out.loss.dtype == torch.float32 and out.loss.ndim == 0
            assert_accurate("loss", out.loss, loss)
            assert_accurate("gradient", x["logprob"].grad, 3 * grad)
            assert not x["logprob"].grad[~x["mask"]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(backend, kind, dtype):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is served by the reference")
    data = batch(B=6, T=33, seed=3)
    data = {k: x if k == "mask" else x.to(dtype) for k, x in data.items()}
    x = on(backend, data, "logprob", "advantages")
    out = rlhf_fast.policy_loss(**x, kind=kind)
    out.loss.backward()
    loss, grad, grad_advantages, *_ = policy_truth(data, kind)
    lp, old, A = (
        clean(data[k], data["mask"], dtype) for k in ("logprob", "old_logprob", "advantages")
    )
    lp.requires_grad_()
    plain = reduced(token_terms(lp, old, A, data["mask"], kind)[0], data["mask"], "token-mean")
    plain.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.loss.dtype == out.stats.dtype == wide and x["logprob"].grad.dtype == dtype
    assert_accurate("loss", out.loss, loss, plain)
    assert_accurate("gradient", x["logprob"].grad, grad, lp.grad)
    if kind == "reinforce":
        assert x["advantages"].grad.dtype == dtype
        assert_accurate("gradient of A", x["advantages"].grad, grad_advantages)
    else:
        assert x["advantages"].grad is None


def test_mixed_dtypes_compute_in_the_widest():
    data = batch()
    x = on("reference", data, "logprob")
    x["advantages"] = x["advantages"].double()
    out = rlhf_fast.policy_loss(**x)
    out.loss.backward()
    assert out.loss.dtype == torch.float64 and x["logprob"].grad.dtype == torch.float32
    assert_accurate("loss", out.loss, policy_truth(data, "ppo")[0])


@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo", "sapo", "reinforce"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_importance_weights_multiply_the_token_losses_only(backend, kind, reduction):
    data = batch(seed=4)
    weights = randn(4, 7, seed=9).abs()
    weights[~data["mask"]] = math.nan
    x = on(backend, data, "logprob", "advantages")
    w = weights.to(device_of(backend)).requires_grad_()
    out = rlhf_fast.policy_loss(**x, kind=kind, reduction=reduction, importance_weights=w)
    out.loss.backward()
    loss, grad, grad_advantages, *_ = policy_truth(data, kind, reduction, weights=weights)
    assert_accurate("loss", out.loss, loss)
    assert_accurate("gradient", x["logprob"].grad, grad)
    if kind == "reinforce":
        assert_accurate("gradient of A", x["advantages"].grad, grad_advantages)
    assert w.grad is None
    bare = rlhf_fast.policy_loss(**x, kind=kind, reduction=reduction)
    assert_same_bits("statistics", out.stats[1:], bare.stats[1:])
    assert_accurate("policy_loss", out.stats[0], loss)
    assert not out.stats.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_micro_batches_add_up_with_a_normalizer(backend, kind, reduction):
    data = batch(B=6, seed=5)
    x = on(backend, data, "logprob")
    whole = rlhf_fast.policy_loss(**x, kind=kind, reduction=reduction, normalizer=11.0)
    whole.loss.backward()
    loss, *_ = policy_truth(data, kind, reduction, normalizer=11.0)
    assert_accurate("whole", whole.loss, loss)
    parts = on(backend, data, "logprob")
    normalizers = (11.0, torch.tensor(11), torch.tensor([11.0]))
    total = sum(
        rlhf_fast.policy_loss(
            **{k: v[2 * i : 2 * i + 2] for k, v in parts.items()},
            kind=kind, reduction=reduction,
            normalizer=n.to(device_of(backend)) if torch.is_tensor(n) else n,
        ).loss
        for i, n in enumerate(normalizers)
    )  # fmt: skip
    total.backward()
    assert_accurate("sum of parts", total, loss)
    assert_accurate("gradient", parts["logprob"].grad, x["logprob"].grad.double())


def test_statistics_of_the_policy(backend):
    for kind in KINDS:
        data = batch(B=5, T=9, seed=6)
        mask, tokens = data["mask"], data["mask"].sum()
        out = rlhf_fast.policy_loss(**on(backend, data), kind=kind, clip_low=0.1, clip_high=0.4)
        assert out.stats.ndim == 1 and len(out.stats) == len(out.stats_names)
        loss, _, _, rho, clipped = policy_truth(data, kind, clip_low=0.1, clip_high=0.4)
        lp, old = (clean(data[k], mask) for k in ("logprob", "old_logprob"))
        d = (lp - old)[mask]
        expected = dict.fromkeys(out.stats_names, 0.0) | {
            "policy_loss": loss,
            "clip_fraction": (clipped & mask).sum() / tokens,
            "clip_fraction_low": (clipped & mask & (rho < 0.9)).sum() / tokens,
            "clip_fraction_high": (clipped & mask & (rho > 1.4)).sum() / tokens,
            "approx_kl_k1": -d.mean(),
            "approx_kl_k3": (d.exp() - 1 - d).mean(),
            "ratio_mean": rho[mask].mean(),
            "ratio_min": rho[mask].min(),
            "ratio_max": rho[mask].max(),
            "tokens": tokens,
        }
        assert list(out.stats_dict()) == list(out.stats_names)
        for name, value in out.stats_dict().items():
            assert_accurate(
                f"{kind} {name}", torch.tensor(value), torch.as_tensor(expected[name]).double()
            )


def test_names_of_the_statistics():
    names = rlhf_fast.Loss.stats_names
    assert names[:14] == (
        "policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "clip_fraction_low",
        "clip_fraction_high", "value_clip_fraction", "approx_kl_k1", "approx_kl_k3", "ratio_mean",
        "ratio_min", "ratio_max", "tokens",
    )  # fmt: skip


def test_known_values_of_the_clipped_surrogate(backend):
    """The numbers that rlax publishes for its clipped surrogate (epsilon 0.2, tolerance 1e-4)."""
    device = device_of(backend)
    logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]], device=device)
    old_logits = logits.clone()
    old_logits[2] = logits[2].flip(0)
    steps = torch.arange(3, device=device)
    lp, old = (rlhf_fast.logprob(z, steps).unsqueeze(0) for z in (logits, old_logits))
    A, one = torch.tensor([[0.3, 0.2, 0.1]], device=device), torch.ones(1, 3, device=device)
    exact = {1: -(0.5 + 0.1 * math.exp(-2)) / 3, -1: (0.5 + 0.1 * 0.8) / 3}
    for sign, published in ((1, -0.17117467), (-1, 0.19333333)):
        loss = rlhf_fast.policy_loss(lp, old, sign * A, one).loss.item()
        assert loss == pytest.approx(exact[sign], rel=1e-6)
        assert loss == pytest.approx(published, abs=1e-5)


def test_a_token_has_the_same_bits_wherever_it_stands(backend):
    """A vectorised function with a scalar tail (torch.sigmoid) would round the last few apart."""
    x = on(backend, batch(B=5, T=7, seed=4, spread=0.5))

    def gradient(rows, kind):
        part = {name: value[rows].detach() for name, value in x.items()}
        leaf = part.pop("logprob").requires_grad_()
        out = rlhf_fast.policy_loss(leaf, **part, kind=kind, reduction="token-sum")
        return torch.autograd.grad(out.loss, leaf)[0]

    order = torch.tensor([3, 0, 4, 2, 1])
    for kind in KINDS:
        whole = gradient(torch.arange(5), kind)
        assert_same_bits(f"{kind} permuted", gradient(order, kind), whole[order])
        for row in range(5):
            assert_same_bits(f"{kind} alone", gradient([row], kind), whole[[row]])


def test_an_infinite_upstream_gradient_stays_out_of_the_mask(backend):
    """A gradient scaler that overflowed must not turn masked tokens into 0 * inf."""
    x = on(backend, batch(B=3, T=6, seed=5), "logprob")
    rlhf_fast.policy_loss(**x).loss.backward(torch.tensor(math.inf, device=x["mask"].device))
    assert not x["logprob"].grad[~x["mask"]].any()


def test_which_bound_binds(backend):
    """By hand: above for A > 0, below for A < 0, where the dual clip bounds the other side."""
    device = device_of(backend)
    rho = torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.5]], device=device).expand(2, 5)
    A = torch.tensor([[2.0], [-2.0]], device=device).expand(2, 5)
    lp, one = rho.log(), torch.ones(2, 5, device=device)
    positive = -2 * (0.5 + 0.9 + 1.0 + 1.1 + 1.2)
    negative = 2 * (0.8 + 0.9 + 1.0 + 1.1 + 1.5)
    out = rlhf_fast.policy_loss(lp, 0 * lp, A, one, reduction="token-sum")
    assert out.loss.item() == pytest.approx(positive + negative, rel=1e-6)
    stats = out.stats_dict()
    assert stats["clip_fraction_low"] == stats["clip_fraction_high"] == pytest.approx(0.1)
    out = rlhf_fast.policy_loss(lp, 0 * lp, A, one, reduction="token-sum", dual_clip=1.2)
    assert out.loss.item() == pytest.approx(positive + negative - 2 * 0.3, rel=1e-6)
    assert out.stats_dict()["dual_clip_fraction"] == pytest.approx(0.1)


def test_ratio_one_gives_the_policy_gradient(backend):
    """On the first step rho is 1: loss -mean A, gradient -A / n, and nothing is clipped."""
    data = batch(seed=8)
    data["logprob"] = data["old_logprob"].clone()
    mask, A = data["mask"], clean(data["advantages"], data["mask"])
    for kind in ("ppo", "grpo", "gspo", "cispo"):
        x = on(backend, data, "logprob")
        out = rlhf_fast.policy_loss(**x, kind=kind)
        out.loss.backward()
        assert_accurate("gradient", x["logprob"].grad, -A / mask.sum())
        stats = out.stats_dict()
        assert stats["ratio_mean"] == stats["ratio_min"] == stats["ratio_max"] == 1.0
        assert stats["clip_fraction"] == stats["approx_kl_k1"] == stats["approx_kl_k3"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_ratios(backend, kind):
    """Finite everywhere; no gradient beyond +-20; A = 0 gives 0 whatever the ratio."""
    device = device_of(backend)
    lp = torch.tensor([[0.0, -100.0, -1e4, 19.0, -math.inf, -math.inf, 300.0]], device=device)
    old = torch.tensor([[-100.0, 0.0, 0.0, 0.0, 0.0, -math.inf, 0.0]], device=device)
    one = torch.ones(1, 7, device=device)
    for A in (one, -one, 0 * one):
        x = lp.clone().requires_grad_()
        out = rlhf_fast.policy_loss(x, old, A, one, kind=kind, reduction="token-sum")
        out.loss.backward()
        assert x.grad.isfinite().all()
        if kind in ("reinforce", "a2c"):
            assert torch.equal(x.grad, -A) and (A.any() or out.loss == 0)
            continue
        assert not x.grad[0, [0, 1, 2, 4, 6]].any()
        if kind != "cispo":
            assert out.loss.isfinite()
        if not A.any():
            assert out.loss == 0 and not x.grad.any()
    finite = out.stats_dict()
    assert finite["ratio_max"] <= math.exp(20) * 1.0001
    assert all(not math.isnan(v) for v in finite.values())


def test_gspo_averages_the_clamped_log_ratios(backend):
    lp = torch.tensor([[100.0, 0.0]], device=device_of(backend))
    one = torch.ones_like(lp)
    out = rlhf_fast.policy_loss(lp, 0 * lp, -one, one, kind="gspo", clip_low=None)
    assert out.stats_dict()["ratio_max"] == pytest.approx(math.exp(10), rel=1e-6)


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("bound", [0.5, 1.5])
def test_gradient_on_the_bound_is_the_unclipped_one(A, bound):
    """The clip is chosen as |rho - 1|, so that rho stands on the bound to the bit."""
    x = torch.tensor([[bound]], dtype=torch.float64).log().requires_grad_()
    clip = abs(x.detach().exp().item() - 1)
    one = torch.ones_like(x)
    out = rlhf_fast.policy_loss(x, 0 * one, A * one, one, clip_low=clip)
    out.loss.backward()
    assert x.grad.item() == pytest.approx(-A * bound) and out.stats_dict()["clip_fraction"] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(1, 6),
    st.floats(0.0, 1.0),
    st.sampled_from(KINDS),
    st.sampled_from(REDUCTIONS),
    st.floats(0.0, 8.0),
    st.sampled_from(OPTIONS),
)
def test_any_batch(seed, B, T, keep, kind, reduction, spread, options):
    data = batch(B, T, seed=seed, spread=spread)
    data["mask"] = random_mask(B, T, seed=seed, keep=keep) & data["old_logprob"].isfinite()
    x = on("reference", data, "logprob")
    out = rlhf_fast.policy_loss(**x, kind=kind, reduction=reduction, **options)
    out.loss.backward()
    loss, grad, *_ = policy_truth(data, kind, reduction, **options)
    mask = data["mask"]
    lp, old, A = (
        clean(data[k], mask, torch.float32) for k in ("logprob", "old_logprob", "advantages")
    )
    lp.requires_grad_()
    plain = reduced(token_terms(lp, old, A, mask, kind, **options)[0], mask, reduction)
    plain.backward()
    assert_accurate("loss", out.loss, loss, plain)
    # cispo's own formula has no clamp in its gradient; the contract's is 0 beyond +-20.
    beyond = mask & ((data["logprob"] - data["old_logprob"]).abs() > 20)
    if kind not in ("reinforce", "a2c"):
        grad = torch.where(beyond, 0.0, grad)
    assert_accurate("gradient", x["logprob"].grad, grad, lp.grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "trpo"}, ValueError, "kind: expected one of ppo, grpo"),
        ({"reduction": "mean"}, ValueError, "reduction: expected one of token-mean"),
        ({"old_logprob": torch.zeros(2, 4)}, ValueError, r"old_logprob: expected shape \(2, 3\)"),
        ({"advantages": torch.zeros(2)}, ValueError, r"advantages: expected shape \(2, 3\)"),
        ({"advantages": torch.zeros(2, 3).int()}, TypeError, "advantages: expected float64"),
        ({"logprob": torch.tensor(0.0)}, ValueError, "logprob: expected shape"),
        ({"logprob": [0.0]}, TypeError, "logprob: expected a tensor, got list"),
        ({"old_logprob": None}, TypeError, "old_logprob: expected a tensor, got NoneType"),
        ({"mask": torch.ones(2)}, ValueError, "mask: expected shape"),
        ({"mask": [1]}, TypeError, "mask: expected a tensor"),
        ({"importance_weights": torch.ones(3)}, ValueError, "importance_weights: expected shape"),
        ({"clip_low": -0.1}, ValueError, "clip_low: expected a finite number"),
        ({"clip_high": math.inf}, ValueError, "clip_high: expected a finite number"),
        ({"clip_low": "0.2"}, TypeError, "clip_low: expected a number"),
        ({"dual_clip": 0.5}, ValueError, "dual_clip: expected a finite number"),
        ({"normalizer": 0.0}, ValueError, "normalizer: expected a positive finite number"),
        ({"normalizer": -1.0}, ValueError, "normalizer: expected a finite number"),
        ({"normalizer": torch.zeros(())}, ValueError, "normalizer: expected a positive finite"),
        ({"normalizer": torch.tensor(math.nan)}, ValueError, "normalizer: expected a positive"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer: expected a number or a tensor"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_DEBUG", "1")  # a GPU's values are looked at only then
    names = ("logprob", "old_logprob", "advantages", "mask")
    arguments = {name: torch.ones(2, 3, device=device_of(backend)) for name in names} | change
    with pytest.raises(error, match=message):
        rlhf_fast.policy_loss(**arguments)


def test_compiles_with_a_normalizer_on_the_device(backend):
    data = on(backend, batch(seed=60), "logprob")

    def function(normalizer, **x):
        return rlhf_fast.policy_loss(**x, kind="gspo", normalizer=normalizer)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    normalizer = data["mask"].sum()
    a, b = function(normalizer, **data), compiled(normalizer, **data)
    assert isinstance(b, rlhf_fast.Loss) and b.stats_dict() == a.stats_dict()
    (grad_a,), (grad_b,) = (torch.autograd.grad(x.loss, data["logprob"]) for x in (a, b))
    assert_same_bits("gradient", grad_a, grad_b)


def test_transforms_raise_instead_of_dropping_a_derivative():
    """torch.func and forward mode know no formula of these ops; a tangent of 0 would be silent."""
    x = on("reference", batch(), "logprob")
    leaf = x.pop("logprob").detach().nan_to_num()

    def loss(logprob):
        return rlhf_fast.policy_loss(logprob, **x).loss

    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(loss)(leaf)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative of policy_loss"):
        torch.func.jvp(loss, (leaf,), (torch.ones_like(leaf),))
