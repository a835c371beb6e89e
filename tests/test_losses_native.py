"""What the native CPU kernels of losses and advantages promise beyond their ops' tests:
instruction sets, sizes around a vector and a part, and the same bits on any number of threads."""

import math

import pytest
import torch

from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    poisoned_memory,
    randn,
    random_mask,
)

pytest.importorskip("rlhf_fast._C")

from rlhf_fast import _C
from rlhf_fast.kernels.advantages import _native as native_advantages
from rlhf_fast.kernels.advantages import reference as reference_advantages
from rlhf_fast.kernels.ppo_loss import _native as native_loss
from rlhf_fast.kernels.ppo_loss import reference as reference_loss
from rlhf_fast.kernels.ranking_loss import _native as native_ranking
from rlhf_fast.kernels.ranking_loss import reference as reference_ranking
from tests.loss_truth import KINDS, REDUCTIONS, batch, value_batch

# Around a vector of 4, 8 or 16 floats, and a part of 4096 tokens.
SHAPES = ((1, 1), (3, 3), (5, 15), (4, 16), (4, 17), (3, 33), (2, 4095), (2, 4097), (1, 9000))


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


def double(arguments):
    """The same arguments in float64."""
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]


def assert_right(native, reference, name, arguments):
    """All results against the reference in float64, by the package's tolerance rule."""
    with poisoned_memory():
        ours = getattr(native, name)(*arguments)
    plain = getattr(reference, name)(*arguments)
    truth = getattr(reference, name)(*double(arguments))
    for k, parts in enumerate(zip(ours, truth, plain, strict=True)):
        assert_accurate(f"{name} {k}", *parts)
    return ours


def ppo_arguments(B, T, estimator="k3", reduction="token-mean"):
    data, values = batch(B, T, seed=T), value_batch(B, T, seed=T)
    ref = data["logprob"] + 0.3 * randn(B, T, seed=1)
    entropy = torch.where(data["mask"], randn(B, T, seed=2).abs(), math.nan)
    tokens = [data[name] for name in ("logprob", "old_logprob", "advantages")]
    return [
        *tokens, *values.values(), data["mask"], entropy, ref, None, None, 0.1, 0.3, 1.5, 0.2, 0.7,
        0.03, 0.2, estimator, reduction,
    ]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_losses(isa, shape):
    for kind, reduction in zip(KINDS, (*REDUCTIONS, *REDUCTIONS), strict=False):
        data = batch(*shape, seed=3, spread=2.0)
        tokens = [data[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
        weights = randn(*shape, seed=4).abs()
        options = (weights, None, None, kind, 0.2, None, 2.0, reduction)
        assert_right(native_loss, reference_loss, "policy_loss", [*tokens, *options])
    for estimator, reduction in zip(("k1", "abs", "k2", "k3"), REDUCTIONS, strict=True):
        arguments = ppo_arguments(*shape, estimator, reduction)
        assert_right(native_loss, reference_loss, "ppo_loss", arguments)


def test_extreme_log_ratios_and_references(isa):
    lp = torch.tensor([[0.0, -100.0, -1e4, 19.0, -math.inf, -math.inf, 300.0, -1.0, -90.0]])
    old = torch.tensor([[-100.0, 0.0, 0.0, 0.0, 0.0, -math.inf, 0.0, -1.0, -1.0]])
    for kind in KINDS:
        for A in (torch.ones_like(lp), -torch.ones_like(lp), 0 * lp.nan_to_num()):
            options = (None, None, None, None, kind, 0.2, None, None, "token-sum")
            assert_right(native_loss, reference_loss, "policy_loss", [lp, old, A, *options])
    scores = torch.ones(1)
    # d = -88.5: exp(-d) is one of the last floats.
    near = torch.tensor([[0.0, 1e-6, -1e-3, 0.2499, 0.2501, -0.25, -87.5, 88.5, -88.5, 0.0]])
    for estimator in ("k1", "abs", "k2", "k3"):
        for clamp in ((20.0, 10.0), (0.25, None), (None, 0.03)):
            arguments = [scores, lp, old, None, None, 0.1, estimator, *clamp]
            assert_right(native_advantages, reference_advantages, "shaped_rewards", arguments)
        arguments = [scores, near, 0 * near, None, None, 0.1, estimator, None, None]
        assert_right(native_advantages, reference_advantages, "shaped_rewards", arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_advantages(isa, shape):
    B, T = shape
    mask = random_mask(*shape, seed=1)
    lp = torch.where(mask, -randn(*shape, seed=2).abs(), math.nan)
    ref, values = lp + 0.1 * randn(*shape, seed=3), randn(*shape, seed=4)
    at = torch.randint(T, (B,), generator=torch.Generator().manual_seed(1))
    for place, counted in ((None, mask), (at, mask), (at, None)):
        x = lp if counted is not None else lp.nan_to_num()
        tokens = [randn(B, seed=5), x, ref.nan_to_num(), values, counted, place]
        for carry, whitened in ((True, True), (False, True), (True, False)):
            options = (0.05, "k3", 5.0, 2.0, 0.99, 0.9, carry, whitened, True, 1e-8)
            assert_right(
                native_advantages, reference_advantages, "ppo_advantages", [*tokens, *options]
            )
    for offset in (0.0, 1e4):
        x = torch.where(mask, offset + values, math.nan)
        for options in ((True, True), (False, False)):
            arguments = [x, mask, *options, 1e-8, ""]
            ours = native_advantages.whiten(*arguments)
            plain, truth = (
                reference_advantages.whiten(*form) for form in (arguments, double(arguments))
            )
            assert_accurate("whiten", ours, truth, plain)


@pytest.mark.parametrize("size", [1, 2, 9, 16, 17, 40])
def test_ranking(isa, size):
    scores, mask = 3 * randn(5, size, seed=1), random_mask(5, size, seed=2)
    ranks = torch.randint(max(size // 2, 1), (5, size), generator=torch.Generator().manual_seed(1))
    for kept in (None, mask):
        for form in (ranks, ranks.double() / 7, ranks.half(), ranks + 2**60, ranks.to(torch.uint8)):
            arguments = [scores, form, kept, 0.25]
            ours = native_ranking.ranking_loss(*arguments)
            truth = reference_ranking.ranking_loss(scores.double(), form, kept, 0.25)
            plain = reference_ranking.ranking_loss(*arguments)
            for name, *parts in zip(("loss", "gradient"), ours, truth, plain, strict=True):
                assert_accurate(name, *parts)


def test_threads_change_no_bit(threads):
    data, ppo = batch(40, 700, seed=7), ppo_arguments(40, 700)
    tokens = [data[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
    gspo = [*tokens, None, None, None, "gspo", 0.2, None, None, "seq-mean-token-mean"]
    lp, mask = tokens[0].nan_to_num(), tokens[3]
    options = (0.05, "k1", None, None, 1.0, 0.95, True, True, True, 1e-8)
    rows = [randn(40, seed=1), lp, lp + 0.1, randn(40, 700), mask, None, *options]
    ranking = [randn(900, 9), torch.randint(9, (900, 9)), None, 0.0]
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(
            [
                *native_loss.policy_loss(*gspo),
                *native_loss.ppo_loss(*ppo),
                *native_advantages.ppo_advantages(*rows),
                native_advantages.whiten(lp, mask, True, True, 1e-8, ""),
                *native_ranking.ranking_loss(*ranking),
            ]
        )
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits("threads", a, b)


def test_rows_do_not_depend_on_each_other():
    """What is not a mean over the batch: rewards, KL, advantages before whitening."""
    mask = random_mask(9, 37, seed=1)
    lp, values, scores = randn(9, 37, seed=2), randn(9, 37, seed=3), randn(9, seed=4)
    options = (0.05, "k3", None, None, 0.99, 0.9, True, False, True, 1e-8)

    def call(rows):
        tokens = (x[rows] for x in (scores, lp, lp + 0.2, values, mask))
        return native_advantages.ppo_advantages(*tokens, None, *options)

    order = torch.tensor([4, 0, 8, 1, 7, 3, 2, 6, 5])
    whole = call(torch.arange(9))
    for a, b in zip(call(order), whole, strict=True):
        assert_same_bits("permuted", a, b[order])
    for row in range(9):
        for a, b in zip(call([row]), whole, strict=True):
            assert_same_bits("alone", a, b[[row]])


def test_nan_reaches_the_statistics():
    """A NaN that counts is not passed over by the minimum and the maximum."""
    lp = torch.tensor([[0.0, math.nan, 0.0]])
    one = torch.ones_like(lp)
    options = (None, None, None, None, "ppo", 0.2, None, None, "token-mean")
    stats = native_loss.policy_loss(lp, 0 * one, one, *options)[1]
    named = dict(zip(reference_loss.STATS, stats.tolist(), strict=True))
    assert all(math.isnan(named[f"ratio_{name}"]) for name in ("mean", "min", "max"))
