"""The meter of the sampler's log-probs against the trainer's."""

import math

import pytest
import torch

from rlhf_fast.testing import randn
from rlhf_fast.train import mismatch


def meter(sampled, trained, mask):
    return mismatch.metrics(
        mismatch.sums(sampled, trained, mask).tolist(),
        mismatch.largest(sampled, trained, mask).item(),
    )


def test_equal_log_probs():
    x, mask = randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    assert meter(x, x, mask) == {
        "sampler_gap": 0.0, "sampler_max": 0.0, "sampler_k3": 0.0, "sampler_ess": 1.0
    }  # fmt: skip


def test_by_hand():
    sampled = torch.tensor([[-1.0, -2.0, torch.nan]])
    trained = torch.tensor([[-1.5, -1.0, 5.0]])
    found = meter(sampled, trained, torch.tensor([[True, True, False]]))
    r = math.exp(-0.5), math.exp(1.0)
    assert found["sampler_gap"] == pytest.approx(0.75)
    assert found["sampler_max"] == 1.0
    assert found["sampler_k3"] == pytest.approx((r[0] - 1 + 0.5 + r[1] - 1 - 1) / 2)
    assert found["sampler_ess"] == pytest.approx(sum(r) ** 2 / (2 * sum(x * x for x in r)))


def test_nothing_to_compare():
    for shape in ((2, 3), (0, 0)):
        x, mask = torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.bool)
        found = meter(x, x, mask)
        assert found["sampler_gap"] == found["sampler_max"] == found["sampler_k3"] == 0.0
        assert found["sampler_ess"] == 1.0


def test_ranks_add_up():
    sampled, trained, mask = randn(4, 5), randn(4, 5, seed=1), randn(4, 5, seed=2) > 0
    halves = [mismatch.sums(*(x[rows] for x in (sampled, trained, mask))) for rows in
              (slice(0, 1), slice(1, 4))]  # fmt: skip
    torch.testing.assert_close(sum(halves), mismatch.sums(sampled, trained, mask))


def test_a_truncated_sampler_loses_its_kept_mass():
    """The mean ratio of whole-vocabulary log-probs to those of the draw is the kept mass."""
    import rlhf_fast

    logits = 2 * randn(1, 50).expand(20000, 50)
    drawn = rlhf_fast.sample(logits, top_p=0.8, seed=1, position=torch.arange(20000))
    whole = rlhf_fast.logprob(logits, drawn.ids)
    mask = torch.ones(20000, dtype=torch.bool)
    mass = drawn.log_mass.exp().mean().item()
    assert 0.7 < mass < 0.95
    assert (whole - drawn.logprob).exp().mean().item() == pytest.approx(mass, abs=1e-4)
    assert meter(drawn.logprob, whole, mask)["sampler_gap"] == pytest.approx(
        -math.log(mass), abs=1e-4
    )
    corrected = meter(drawn.logprob + drawn.log_mass, whole, mask)
    assert corrected["sampler_max"] < 1e-5
