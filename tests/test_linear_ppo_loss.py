"""The policy loss from hidden states against the composition of the two ops it stands for."""

import math

import pytest
import torch

import rlhf_fast
from rlhf_fast.kernels.linear_head import _logits, _tiles, reference_ppo
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    usable_backends,
)

KINDS = ("ppo", "grpo", "reinforce", "a2c", "cispo", "gspo", "sapo")
REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")
B, T, H, V, R = 4, 9, 6, 70, 2


@pytest.fixture(params=usable_backends("linear_ppo_loss"))
def device(request):
    with rlhf_fast.use_backend(request.param, op="linear_ppo_loss"):
        yield device_of(request.param)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks of rows, blocks and slices at sizes that a test can afford."""
    monkeypatch.setattr(_tiles, "SLICE", 24)
    monkeypatch.setattr(_tiles, "ROWS", 5)
    monkeypatch.setattr(reference_ppo, "INVARIANT_ROWS", 7)
    monkeypatch.setattr(reference_ppo, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_logits, "MIN_ROWS", 7)
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", "1")


def make(dtype=torch.float32, device="cpu"):
    """(leaves that get gradients, data by name)."""
    tensors = (
        randn(B, T, H, seed=1),
        2 * randn(V, H, seed=2) / math.sqrt(H),
        randn(V, seed=3),
        randn(R, H, seed=4) / math.sqrt(H),
        randn(V, R, seed=5),
    )
    x, w, bias, a, b = (t.to(dtype).to(device).requires_grad_() for t in tensors)
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(6)).to(device)
    mask = (torch.arange(T) < torch.tensor([[T], [4], [0], [7]])).to(device)
    with torch.no_grad():
        old = rlhf_fast.linear_logprob(x, w, ids, bias=bias, lora=(a, b, 0.5))
    data = {
        "ids": ids,
        "old_logprob": (old + 0.3 * randn(B, T, seed=7).to(device)),
        "advantages": randn(B, T, seed=8).to(device),
        "mask": mask,
    }
    return (x, w, bias, a, b), data


def fused(leaves, data, **kwargs):
    x, w, bias, a, b = leaves
    return rlhf_fast.linear_ppo_loss(x, w, **data, bias=bias, lora=(a, b, 0.5), **kwargs)


def composed(leaves, data, head=None, **kwargs):
    x, w, bias, a, b = leaves
    ids, mask = data["ids"], data["mask"] & (data["ids"] != -100)
    lp = rlhf_fast.linear_logprob(x, w, ids, bias=bias, lora=(a, b, 0.5), mask=mask, **(head or {}))
    return rlhf_fast.policy_loss(lp, data["old_logprob"], data["advantages"], mask, **kwargs)


def check(leaves, data, head=None, **kwargs):
    """Both ways, loss, statistics and five gradients; the composition in float64 is the truth."""
    with poisoned_memory():
        ours = fused(leaves, data, **kwargs, **(head or {}))
        grads = torch.autograd.grad(3 * ours.loss, leaves)
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    host = {k: v.cpu() for k, v in data.items()}
    host_head = {k: v.cpu() if torch.is_tensor(v) else v for k, v in (head or {}).items()}
    plain_kwargs = {k: v.cpu() if torch.is_tensor(v) else v for k, v in kwargs.items()}
    with rlhf_fast.use_backend("reference"):
        true = composed(wide, host, host_head, **plain_kwargs)
        true_grads = torch.autograd.grad(3 * true.loss, wide)
    plain = composed(leaves, data, head, **kwargs)
    plain_grads = torch.autograd.grad(3 * plain.loss, leaves)
    assert ours.loss.dtype == plain.loss.dtype and ours.stats_names == plain.stats_names
    assert_accurate("loss", ours.loss, true.loss, plain.loss)
    assert_accurate("stats", ours.stats, true.stats, plain.stats)
    for x, a, b, c in zip(leaves, grads, true_grads, plain_grads, strict=True):
        assert a.dtype == x.dtype
        assert_accurate("gradient", a, b, c)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_composition(device, kind, reduction):
    leaves, data = make(device=device)
    check(leaves, data, kind=kind, reduction=reduction, dual_clip=3.0, clip_high=0.28)


def with_terms(leaves, data, *, entropy_coef, kl_coef, kl_estimator, ref_logprob, **kwargs):
    """The composition with `ppo_loss` (without advantages) for the entropy and KL terms."""
    x, w, bias, a, b = leaves
    ids, mask = data["ids"], data["mask"]
    out = rlhf_fast.linear_logprob_entropy(x, w, ids, bias=bias, lora=(a, b, 0.5), mask=mask)
    old, advantages = data["old_logprob"], data["advantages"]
    policy = rlhf_fast.policy_loss(out.logprob, old, advantages, mask, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k in ("reduction", "normalizer")}
    zero = torch.zeros_like(old)
    terms = rlhf_fast.ppo_loss(
        out.logprob, old, zero, zero, zero, zero, mask, value_coef=0.0, entropy=out.entropy,
        entropy_coef=entropy_coef, ref_logprob=ref_logprob, kl_coef=kl_coef,
        kl_estimator=kl_estimator, **kwargs,
    )  # fmt: skip
    return policy, terms, policy.loss + terms.loss


@pytest.mark.parametrize("kind", ["ppo", "reinforce", "gspo"])
@pytest.mark.parametrize("coefs", [(0.02, 0.0), (0.0, 0.3), (0.02, 0.3)])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_entropy_bonus_and_kl_penalty(device, kind, coefs, estimator):
    leaves, data = make(device=device)
    weights = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(9)).to(device)
    options = {
        "kind": kind, "reduction": "seq-mean-token-mean", "importance_weights": weights,
        "entropy_coef": coefs[0], "kl_coef": coefs[1], "kl_estimator": estimator,
        "ref_logprob": data["old_logprob"] + 0.3 * randn(B, T, seed=11).to(device),
    }  # fmt: skip
    ours = fused(leaves, data, **options)
    grads = torch.autograd.grad(ours.loss, leaves)
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    host, host_options = (
        {k: v.cpu() if torch.is_tensor(v) else v for k, v in d.items()} for d in (data, options)
    )
    with rlhf_fast.use_backend("reference"):
        policy, terms, total = with_terms(wide, host, **host_options)
        _, _, plain = with_terms(leaves, data, **options)
    assert_accurate("loss", ours.loss, total, plain)
    found = ours.stats_dict()
    for name, value in policy.stats_dict().items():
        if name not in ("entropy", "kl"):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    expected = terms.stats_dict()
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    entropy = expected["entropy"] if coefs[0] else 0.0
    assert found["entropy"] == pytest.approx(entropy, rel=1e-5)
    true_grads = torch.autograd.grad(total, wide)
    plain_grads = torch.autograd.grad(plain, leaves)
    for a, b, c in zip(grads, true_grads, plain_grads, strict=True):
        assert_accurate("gradient", a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("invariant", [False, True])
def test_everything_at_once(device, dtype, invariant):
    leaves, data = make(dtype, device)
    data["ids"][0, 3] = -100
    data["ids"][1, 5], data["old_logprob"][1, 6], data["advantages"][1, 7] = 10**6, math.nan, -1.0
    leaves[0].data[2] = math.nan
    weights = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(9)).to(device)
    weights[2] = math.nan
    head = {
        "temperature": 0.5
        + torch.rand(B, T, generator=torch.Generator().manual_seed(3)).to(device),
        "softcap": 5.0,
        "logit_scale": 0.8,
    }
    clean = leaves[0].detach().clone()
    clean[2] = 0
    leaves = (clean.requires_grad_(), *leaves[1:])
    kwargs = {"importance_weights": weights, "normalizer": torch.tensor(13.0, device=device)}
    if invariant:
        with rlhf_fast.batch_invariant():
            check(leaves, data, head, **kwargs)
    else:
        check(leaves, data, head, **kwargs)


def test_masked_tokens_leak_nothing(device):
    (x, w, *_), data = make(device=device)
    dirty = x.detach().clone()
    dirty[~data["mask"]] = math.nan
    dirty.requires_grad_()
    data["advantages"][~data["mask"]] = math.inf
    loss = rlhf_fast.linear_ppo_loss(dirty, w, **data).loss
    gx, gw = torch.autograd.grad(loss, (dirty, w))
    assert loss.isfinite() and gx.isfinite().all() and gw.isfinite().all()
    assert not gx[~data["mask"]].any()
    data["mask"] = torch.zeros(B, T, device=device)
    nothing = rlhf_fast.linear_ppo_loss(dirty, w, **data)
    gx, gw = torch.autograd.grad(nothing.loss, (dirty, w))
    assert nothing.loss == 0 and not gx.any() and not gw.any()


@pytest.mark.parametrize("shape", [(B * T,), (2, 2, T), (0, T)])
def test_shapes(device, shape):
    (x, w, *_), data = make(device=device)
    if 0 in shape:
        x, data = x[:0], {k: v[:0] for k, v in data.items()}
    else:
        x, data = x.view(*shape, H), {k: v.view(shape) for k, v in data.items()}
    out = rlhf_fast.linear_ppo_loss(x, w, **data)
    (grad,) = torch.autograd.grad(out.loss, w)
    lp = rlhf_fast.linear_logprob(x, w, data["ids"], mask=data["mask"])
    plain = rlhf_fast.policy_loss(lp, data["old_logprob"], data["advantages"], data["mask"])
    assert_accurate("loss", out.loss, plain.loss)
    assert_accurate("d weight", grad, torch.autograd.grad(plain.loss, w)[0])


def test_only_what_is_needed(device):
    leaves, data = make(device=device)
    everything = torch.autograd.grad(fused(leaves, data).loss, leaves)
    for i in range(5):
        some = [x.detach().requires_grad_(k == i) for k, x in enumerate(leaves)]
        out = fused(some, data)
        out.loss.backward(retain_graph=True)
        assert_accurate(f"gradient {i}", some[i].grad, everything[i])
        assert all(x.grad is None for k, x in enumerate(some) if k != i)
        out.loss.backward()
        assert_accurate("second backward", some[i].grad, 2 * everything[i])
    with torch.no_grad():
        assert not fused(leaves, data).loss.requires_grad
    data["old_logprob"].requires_grad_()
    data["advantages"].requires_grad_()
    fused(leaves, data).loss.backward()
    assert data["old_logprob"].grad is None and data["advantages"].grad is None
    fused(leaves, data, kind="reinforce").loss.backward()
    lp = rlhf_fast.linear_logprob(*leaves[:2], data["ids"], bias=leaves[2], lora=(*leaves[3:], 0.5))
    expected = torch.where(data["mask"], -lp.detach() / data["mask"].sum(), 0.0)
    assert_accurate("d advantages", data["advantages"].grad, expected)


def test_double_backward_raises(device):
    leaves, data = make(device=device)
    (grad,) = torch.autograd.grad(fused(leaves, data).loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_gradcheck_of_the_reference():
    leaves, data = make(torch.float64)
    data["old_logprob"] = data["old_logprob"].double()
    # One random projection of the Jacobian: its thousands of columns would take 10 s.
    assert torch.autograd.gradcheck(
        lambda *x: fused(x, data, kind="reinforce", temperature=0.7).loss, leaves, fast_mode=True
    )


def test_torch_library_and_compile():
    leaves, data = make()
    x, w, bias, a, b = leaves
    head = (
        x.reshape(-1, H).detach().requires_grad_(), w, data["ids"].flatten(), bias, a, b,
        data["mask"].flatten(), 0.7, None, 5.0, 0.9, 0.5, -100, "", False,
    )  # fmt: skip
    for kind in ("ppo", "gspo"):
        loss = (
            data["old_logprob"], data["advantages"], None, data["old_logprob"] - 0.1, None, None,
            kind, 0.2, None, None, 0.01, 0.1, "k3", "token-mean", [True] * 5, "",
        )  # fmt: skip
        torch.library.opcheck(torch.ops.rlhf_fast.linear_ppo_loss.default, (*head, *loss))

    def function(*x):
        return fused(x, data, kind="cispo", dual_clip=3.0).loss

    eager = function(*leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert_same_bits("compiled", compiled, eager)
    for p, q in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True
    ):
        assert_same_bits("gradient", p, q)


def test_a_backend_that_cannot_serve_says_so():
    leaves, data = make(torch.float64)
    with (
        rlhf_fast.use_backend("cpu", op="linear_ppo_loss"),
        pytest.raises(NotImplementedError, match="linear_ppo_loss: backend 'cpu' cannot serve"),
    ):
        fused(leaves, data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"old_logprob": torch.zeros(B, T + 1)}, ValueError, "old_logprob: expected shape"),
        ({"advantages": torch.zeros(B, T).int()}, TypeError, "advantages: expected float64"),
        ({"mask": torch.zeros(B)}, ValueError, "mask: expected shape"),
        ({"ids": torch.full((B, T), V)}, IndexError, "ids: expected values in"),
        ({"kind": "dpo"}, ValueError, "kind: expected one of"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprob: expected a tensor"),
        ({"ref_logprob": torch.zeros(B)}, ValueError, "ref_logprob: expected shape"),
        ({"kl_estimator": "k9"}, ValueError, "kl_estimator: expected one of"),
        ({"entropy_coef": math.nan}, ValueError, "entropy_coef: expected"),
        ({"reduction": "mean"}, ValueError, "reduction: expected one of"),
        ({"normalizer": 0.0}, ValueError, "normalizer"),
        ({"dual_clip": 0.5}, ValueError, "dual_clip"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"importance_weights": torch.zeros(T)}, ValueError, "importance_weights: expected shape"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    (x, w, *_), data = make()
    data["mask"][:] = True
    with pytest.raises(error, match=message):
        rlhf_fast.linear_ppo_loss(x, w, **(data | change))
