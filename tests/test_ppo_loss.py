"""Value and PPO losses against literal float64 formulas, and what all three losses promise.

The kinds of the policy loss are in test_policy_loss.py.
"""

import math

import pytest
import torch

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.kernels.ppo_loss import reference
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    random_mask,
    usable_backends,
)
from tests.loss_truth import (
    KINDS,
    REDUCTIONS,
    batch,
    clean,
    estimate,
    on,
    reduced,
    token_terms,
    value_batch,
    value_truth,
)


@pytest.fixture(params=usable_backends("ppo_loss"))
def backend(request):
    with rlhf_fast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_loss(backend, reduction, dtype):
    for clip, normalizer in ((0.2, None), (None, 5.0), (0.0, None), (1e6, torch.tensor(3.0))):
        mask = batch(seed=11)["mask"]
        data = {k: x.to(dtype) for k, x in value_batch(seed=12).items()}
        for k, bad in (("values", math.nan), ("old_values", math.inf), ("returns", math.nan)):
            data[k][~mask] = bad
        x = on(backend, data | {"mask": mask}, "values")
        with poisoned_memory():
            out = rlhf_fast.value_loss(**x, clip=clip, reduction=reduction, normalizer=normalizer)
            (-2 * out.loss).backward()
        loss, grad, clipped = value_truth(data, mask, clip, reduction, normalizer)
        plain = value_truth(data, mask, clip, reduction, normalizer, dtype)
        assert out.loss.dtype == torch.float32 and x["values"].grad.dtype == dtype
        assert_accurate("loss", out.loss, loss, plain[0])
        assert_accurate("gradient", x["values"].grad, -2 * grad, -2 * plain[1])
        stats = out.stats_dict()
        assert stats["value_clip_fraction"] == pytest.approx((clipped.sum() / mask.sum()).item())
        assert stats["value_loss"] == out.loss.item() and stats["tokens"] == mask.sum().item()
        assert stats["policy_loss"] == stats["ratio_mean"] == stats["clip_fraction"] == 0


def ppo_batch(seed=0):
    data = batch(seed=seed) | value_batch(seed=seed)
    data["entropy"] = randn(4, 7, seed=seed + 20).abs()
    data["ref_logprob"] = clean(data["logprob"], data["mask"]).float() + 0.3 * randn(4, 7, seed=21)
    for name in ("entropy", "ref_logprob", "values", "logprob"):
        data[name][~data["mask"]] = math.nan
    return data


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ppo_loss_is_the_sum_of_its_terms(backend, estimator, reduction):
    data, options = ppo_batch(seed=30), {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0}
    mask = data["mask"]
    leaves = ("logprob", "values", "entropy", "old_logprob", "ref_logprob", "returns", "advantages")
    x = on(backend, data, *leaves)
    with poisoned_memory():
        out = rlhf_fast.ppo_loss(
            **x, **options, value_clip=0.25, value_coef=0.7, entropy_coef=0.03, kl_coef=0.2,
            kl_estimator=estimator, reduction=reduction,
        )  # fmt: skip
        (1.5 * out.loss).backward()
    lp, old, A, h, ref = [
        clean(data[k], mask).requires_grad_()
        for k in ("logprob", "old_logprob", "advantages", "entropy", "ref_logprob")
    ]
    policy = reduced(token_terms(lp, old, A, mask, "ppo", **options)[0], mask, reduction)
    value, grad_values, _ = value_truth(data, mask, 0.25, reduction)
    kl = estimate(lp - ref, estimator)
    smooth = policy - 0.03 * reduced(h, mask, reduction) + 0.2 * reduced(kl, mask, reduction)
    grad_lp, grad_h = torch.autograd.grad(smooth, (lp, h))
    assert_accurate("loss", out.loss, smooth + 0.7 * value)
    assert_accurate("logprob", x["logprob"].grad, 1.5 * grad_lp * mask)
    assert_accurate("values", x["values"].grad, 1.5 * 0.7 * grad_values)
    assert_accurate("entropy", x["entropy"].grad, 1.5 * grad_h * mask)
    assert all(x[k].grad is None for k in leaves[3:])
    expected = {
        "policy_loss": policy,
        "value_loss": value,
        "entropy": h[mask].mean(),
        "kl": kl[mask].mean(),
        "tokens": mask.sum(),
    }
    stats = out.stats_dict()
    for name, truth in expected.items():
        assert_accurate(name, torch.tensor(stats[name]), truth.double())
    alone = rlhf_fast.policy_loss(
        *(x[k] for k in ("logprob", "old_logprob", "advantages", "mask")), **options
    ).stats_dict()
    for name in ("clip_fraction", "approx_kl_k3", "ratio_min", "ratio_max", "dual_clip_fraction"):
        assert stats[name] == pytest.approx(alone[name], rel=1e-6)


def test_ppo_loss_without_the_optional_terms(backend):
    data = batch(seed=31) | value_batch(seed=31)
    x = on(backend, data, "logprob", "values")
    out = rlhf_fast.ppo_loss(**x)
    policy = rlhf_fast.policy_loss(
        *(x[k] for k in ("logprob", "old_logprob", "advantages", "mask"))
    )
    value = rlhf_fast.value_loss(*(x[k] for k in ("values", "old_values", "returns", "mask")))
    assert_accurate("loss", out.loss, policy.loss.double() + 0.1 * value.loss.double())
    stats = out.stats_dict()
    assert stats["entropy"] == stats["kl"] == 0.0
    # A term with coefficient 0 does no harm, however infinite it is.
    infinite = torch.full_like(x["logprob"], -math.inf)
    same = rlhf_fast.ppo_loss(**x, entropy=infinite, ref_logprob=infinite)
    assert_same_bits("loss", same.loss, out.loss)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_of_several_parts(backend, reduction, masked):
    """Kernels split long rows; the interpreter of Triton splits them earlier."""
    length = 140 if backend == "triton" and device_of(backend) == "cpu" else 4100
    data = batch(B=3, T=length, seed=32) | value_batch(B=3, T=length, seed=33)
    data |= {name: randn(3, length, seed=s).abs() for s, name in ((34, "entropy"), (35, "ref"))}
    data["ref_logprob"] = clean(data["logprob"], data["mask"]).float() - 0.2 * data.pop("ref")
    if not masked:
        data = {k: torch.where(data["mask"], x, 0.1) for k, x in data.items() if k != "mask"}
        data["mask"] = None
    leaves = ("logprob", "values", "entropy")
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, "reduction": reduction}

    def results(data, loss, **more):
        x = {k: v if v is None else v.clone().requires_grad_(k in leaves) for k, v in data.items()}
        out = loss(**x, **more)
        wanted = [x[k] for k in leaves if x.get(k) is not None]
        return (out.loss, out.stats, *torch.autograd.grad(out.loss, wanted))

    moved = {k: v if v is None else v.to(device_of(backend)) for k, v in data.items()}
    wide = {
        k: v.double() if v is not None and v.is_floating_point() else v for k, v in data.items()
    }
    policy = ("logprob", "old_logprob", "advantages", "mask")
    sequences = {"kind": "gspo", "clip_low": 0.01, "reduction": reduction}
    for names, loss, more in (
        (data, rlhf_fast.ppo_loss, options),
        (policy, rlhf_fast.policy_loss, sequences),
    ):
        ours = results({k: moved[k] for k in names}, loss, **more)
        with rlhf_fast.use_backend("reference"):
            truth = results({k: wide[k] for k in names}, loss, **more)
        for k, (a, b) in enumerate(zip(ours, truth, strict=True)):
            assert_accurate(f"{loss.__name__} result {k}", a, b.to(a.device))
        for a, b in zip(ours, results({k: moved[k] for k in names}, loss, **more), strict=True):
            assert_same_bits("again", a, b)


def test_entropy_may_carry_a_graph(backend):
    logits = randn(2, 3, 5, seed=1).to(device_of(backend)).requires_grad_()
    ids = torch.zeros(2, 3, dtype=torch.int64, device=logits.device)
    one = torch.ones(2, 3, device=logits.device)
    lp, entropy = rlhf_fast.logprob_entropy(logits, ids)
    loss = rlhf_fast.ppo_loss(
        lp, lp, 0 * one, one, one, one, one, entropy=entropy, entropy_coef=0.5
    ).loss
    loss.backward()
    z = logits.detach().double().requires_grad_()
    p = z.softmax(-1)
    (0.5 * (p * p.log()).sum(-1).mean()).backward()
    assert_accurate("gradient", logits.grad, z.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_masked(backend, reduction):
    data = {
        k: torch.full((2, 3), math.nan)
        for k in ("logprob", "old_logprob", "advantages", "values", "old_values", "returns")
    }
    data["mask"] = torch.zeros(2, 3)
    x = on(backend, data, "logprob", "values")
    policy = (x["logprob"], x["old_logprob"], x["advantages"], x["mask"])
    outs = [rlhf_fast.policy_loss(*policy, kind=k, reduction=reduction) for k in KINDS]
    outs.append(
        rlhf_fast.value_loss(
            x["values"], x["old_values"], x["returns"], x["mask"], reduction=reduction
        )
    )
    outs.append(
        rlhf_fast.ppo_loss(
            **x,
            reduction=reduction,
            entropy=x["logprob"],
            entropy_coef=1.0,
            ref_logprob=x["returns"],
            kl_coef=1.0,
            normalizer=x["mask"].sum(),
        )
    )
    for out in outs:
        assert out.loss == 0 and not out.stats.any()
    torch.stack([out.loss for out in outs]).sum().backward()
    assert not x["logprob"].grad.any() and not x["values"].grad.any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(backend, shape):
    x = torch.zeros(shape, device=device_of(backend), requires_grad=True)
    for kind in KINDS:
        out = rlhf_fast.policy_loss(x, x, x, x.detach(), kind=kind)
        out.loss.backward()
        assert out.loss == 0 and not out.stats.any() and x.grad.shape == shape
    rlhf_fast.ppo_loss(x, x, x, x, x, x, None).loss.backward()


def test_masks_layouts_and_rows(backend):
    """Any kind of mask, any strides, and one row without a batch dimension."""
    data = on(backend, batch(seed=40))
    mask = data.pop("mask")
    base = rlhf_fast.policy_loss(**data, mask=mask, kind="gspo", reduction="seq-mean-token-mean")
    for other in (mask.int() * 7, mask.double() * -0.25, mask.to(torch.uint8), mask.half()):
        out = rlhf_fast.policy_loss(
            **data, mask=other, kind="gspo", reduction="seq-mean-token-mean"
        )
        assert_same_bits("mask", out.stats, base.stats)
    strided = {k: x.t().contiguous().t() for k, x in data.items()}
    leaf = strided["logprob"].requires_grad_()
    out = rlhf_fast.policy_loss(**strided, mask=mask.t().contiguous().t(), kind="gspo")
    out.loss.backward()
    dense = data["logprob"].clone().requires_grad_()
    rlhf_fast.policy_loss(**data | {"logprob": dense}, mask=mask, kind="gspo").loss.backward()
    assert_same_bits("gradient", leaf.grad.contiguous(), dense.grad)
    rows = rlhf_fast.policy_loss(**{k: x[0] for k, x in data.items()}, mask=mask[0], kind="gspo")
    same = rlhf_fast.policy_loss(**{k: x[:1] for k, x in data.items()}, mask=mask[:1], kind="gspo")
    assert_same_bits("one row", rows.stats, same.stats)
    finite = {k: torch.where(mask, x.detach(), 0.0) for k, x in data.items()}
    everything = rlhf_fast.policy_loss(**finite, mask=None)
    ones = rlhf_fast.policy_loss(**finite, mask=torch.ones_like(mask))
    assert_same_bits("no mask", everything.stats, ones.stats)


def test_second_backward_and_no_double_backward(backend):
    x = on(backend, ppo_batch(), "logprob", "values", "entropy")
    version = x["logprob"]._version
    loss = rlhf_fast.ppo_loss(**x, entropy_coef=0.1, kl_coef=0.1).loss
    loss.backward(retain_graph=True)
    first = x["logprob"].grad.clone()
    loss.backward()
    assert_same_bits("second backward", x["logprob"].grad, 2 * first)
    assert x["logprob"]._version == version
    loss = rlhf_fast.ppo_loss(**x, entropy_coef=0.1, kl_coef=0.1).loss
    for name in ("logprob", "values", "entropy"):
        (grad,) = torch.autograd.grad(loss, x[name], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.nan_to_num().sum().backward()
    out = rlhf_fast.value_loss(*(x[k] for k in ("values", "old_values", "returns", "mask")))
    (grad,) = torch.autograd.grad(out.loss, x["values"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.nan_to_num().sum().backward()


def test_a_changed_gradient_changes_no_later_one(backend):
    """Gradients of `loss.backward()` are handed over without a copy unless the graph is kept."""
    x = on(backend, batch(), "logprob")
    loss = rlhf_fast.policy_loss(**x).loss
    loss.backward(retain_graph=True)
    first = x["logprob"].grad.clone()
    x["logprob"].grad.mul_(5)
    loss.backward()
    assert_accurate("accumulated", x["logprob"].grad, 6 * first.double())
    x["logprob"].grad = None
    (rlhf_fast.policy_loss(**x).loss + rlhf_fast.policy_loss(**x).loss).backward()
    assert_same_bits("two losses", x["logprob"].grad, 2 * first)


@pytest.mark.parametrize("upstream", [-2.5, 0.0, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("shape", [(3, 700), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaling_of_unit_gradients_has_the_same_bits(backend, shape, upstream, dtype):
    device = torch.device(device_of(backend))
    unit = randn(*shape, seed=3).to(device, dtype)
    unit[:, ::3] = 0.0
    grad = torch.tensor(upstream, device=device)
    scale = _dispatch.choose("scale_unit_gradient", device.type, unit.dtype, backend)
    plain = reference.scale_unit_gradient(grad, unit)
    before = unit.clone()
    assert_same_bits("gradient", scale(grad, unit) + 0.0, plain + 0.0)  # a zero has either sign
    assert_same_bits("unit gradient", unit, before)
    assert_same_bits("owned", scale(grad, unit, True) + 0.0, plain + 0.0)


def test_a_unit_gradient_is_overwritten_by_the_last_backward_pass_alone(backend):
    """A GPU scales it in place, but never one that another pass or a caller may still read."""
    x = on(backend, batch(), "logprob")
    two = torch.tensor(2.0, device=device_of(backend))
    loss = rlhf_fast.policy_loss(**x).loss
    (first,) = torch.autograd.grad(loss, x["logprob"], two, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x["logprob"], two / 2, retain_graph=True)
    (third,) = torch.autograd.grad(loss, x["logprob"], two)
    assert_same_bits("scaled", first, 2 * second)
    assert_same_bits("again", third, first)
    arguments = (x["logprob"], x["old_logprob"], x["advantages"], x["mask"].bool())
    options = (None, None, None, "ppo", 0.2, None, None, "token-mean", backend)
    loss, _, unit, _ = torch.ops.rlhf_fast.policy_loss(*arguments, *options)
    before = unit.clone()
    torch.autograd.grad(loss, x["logprob"], two)
    assert_same_bits("a caller's", unit, before)


def test_gradcheck_of_the_reference():
    """In float64, at points away from every tie."""
    lp, old, A, v, old_v, R, h, ref = (
        randn(3, 4, seed=s, dtype=torch.float64) for s in range(50, 58)
    )
    mask = random_mask(3, 4, seed=5)
    lp, v, h = (x.requires_grad_() for x in (lp, v, h))
    for kind in ("ppo", "sapo", "reinforce"):
        assert torch.autograd.gradcheck(
            lambda x, a, kind=kind: rlhf_fast.policy_loss(x, old, a, mask, kind=kind).loss,
            (lp, A.requires_grad_(kind == "reinforce")),
        )
    assert torch.autograd.gradcheck(
        lambda lp, v, h: rlhf_fast.ppo_loss(
            lp, old, A, v, old_v, R, mask, entropy=h, entropy_coef=0.3, ref_logprob=ref,
            kl_coef=0.2, dual_clip=1.3, reduction="seq-mean-token-mean",
        ).loss,
        (lp, v, h),
    )  # fmt: skip


def test_errors_of_the_other_losses(backend):
    one = torch.ones(2, 3, device=device_of(backend))
    with pytest.raises(ValueError, match="returns: expected shape"):
        rlhf_fast.value_loss(one, one, one[:1], one)
    with pytest.raises(ValueError, match="clip: expected a finite number"):
        rlhf_fast.value_loss(one, one, one, one, clip=-1.0)
    for change, message in (
        ({"entropy_coef": 0.1}, "entropy: expected a tensor"),
        ({"kl_coef": 0.1}, "ref_logprob: expected a tensor"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of"),
        ({"value_coef": math.nan}, "value_coef: expected a finite number"),
        ({"value_clip": -1.0}, "value_clip: expected a finite number"),
        ({"entropy": one[0]}, "entropy: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            rlhf_fast.ppo_loss(one, one, one, one, one, one, one, **change)
