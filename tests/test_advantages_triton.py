"""Triton's advantages beyond their ops' tests: long rows, many programs, alignment, ranks."""

import math

import pytest
import torch
import torch.distributed as dist

import rlhf_fast
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    random_mask,
)

pytest.importorskip("triton")
if rlhf_fast.backends()["whiten"]["triton"] is not True:
    pytest.skip(str(rlhf_fast.backends()["whiten"]["triton"]), allow_module_level=True)

from rlhf_fast.kernels.advantages import _triton, _triton_whiten, reference
from rlhf_fast.kernels.ranking_loss import _triton as _triton_ranking
from rlhf_fast.kernels.ranking_loss import reference as reference_ranking

DEVICE = device_of("triton")


def long_batch(B=4, T=200):
    """Rows of several blocks (the interpreter's hold 64 tokens), NaN wherever nothing counts."""
    mask = random_mask(B, T, seed=1)
    mask[1, 70:] = False  # the row's end is blocks away from its last token
    mask[2] = False
    mask[3, :130] = False
    lp, values = -randn(B, T, seed=2).abs(), randn(B, T, seed=3)
    ref = lp + randn(B, T, seed=4)
    for x in (lp, ref, values):
        x[~mask] = math.nan
    return randn(B, seed=5), lp, ref, values, mask


def arguments(batch, at=None):
    scores, lp, ref, values, mask = batch
    return (scores, lp, ref, values, mask, at, 0.1, "k3", 5.0, 2.0, 0.99, 0.95)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("place", ["last", "index"])
def test_rows_of_several_blocks(carry, whitened, place):
    batch = long_batch()
    at = torch.tensor([100, 3, 0, 199]) if place == "index" else None
    options = (carry, whitened, True, 1e-8)
    wide = [x.double() if x.is_floating_point() else x for x in batch]
    truth = reference.ppo_advantages(*arguments(wide, at), *options)
    plain = reference.ppo_advantages(*arguments(batch, at), *options)
    moved = [x.to(DEVICE) for x in batch]
    with poisoned_memory():
        out = _triton.ppo_advantages(
            *arguments(moved, at if at is None else at.to(DEVICE)), *options
        )
    for name, ours, true, near in zip(
        ("advantages", "returns", "rewards", "kl"), out, truth, plain, strict=True
    ):
        assert_accurate(name, ours, true, near)
        assert not ours[~moved[-1]].any()


def test_a_row_has_the_same_bits_wherever_it_stands():
    batch = [x.to(DEVICE) for x in long_batch()]
    options = (True, False, True, 1e-8)
    whole = _triton.ppo_advantages(*arguments(batch), *options)
    order = torch.tensor([3, 1, 0], device=DEVICE)
    some = _triton.ppo_advantages(*arguments([x[order] for x in batch]), *options)
    for a, b in zip(some, whole, strict=True):
        assert_same_bits("permuted", a, b[order])
    # One element behind an aligned address.
    shifted = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for x in batch]
    for a, b in zip(_triton.ppo_advantages(*arguments(shifted), *options), whole, strict=True):
        assert_same_bits("shifted", a, b)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_whitening_by_more_blocks_than_programs(monkeypatch, offset):
    """Blocks of 64 numbers, three programs, and four parts merged at a time."""
    monkeypatch.setattr(_triton_whiten, "LOG2_BLOCK", 6)
    monkeypatch.setattr(_triton_whiten, "LOG2_LANES", 2)
    x, mask = offset + 0.01 * randn(1000, seed=1), random_mask(1000, seed=2)
    mask[64:320] = False
    x[~mask] = math.nan
    truth = reference.whiten(x.double(), mask, True, True, 1e-8, "")
    for programs in (3, 9):
        monkeypatch.setattr(_triton_whiten, "_programs", lambda size, n=programs: n)
        out = _triton_whiten.whiten(x.to(DEVICE), mask.to(DEVICE), True, True, 1e-8, "")
        assert_accurate("whiten", out, truth)
        equal = torch.full((1000,), 0.1, device=DEVICE)
        assert not _triton_whiten.whiten(equal, None, True, True, 0.0, "").any()
        kept = _triton_whiten.whiten(equal, None, False, True, 0.0, "")
        assert_same_bits("the mean of equal numbers", kept, equal)


def test_a_nan_that_counts_is_not_hidden():
    x = randn(300, seed=1).to(DEVICE)
    x[7] = math.nan
    assert _triton_whiten.whiten(x, None, True, True, 1e-8, "").isnan().all()
    ids = torch.arange(300, device=DEVICE) % 3
    out = _triton.group_advantages(x, ids, "grpo", 1e-4)
    assert torch.equal(out.isnan(), ids == 1)
    ranks = torch.arange(300, device=DEVICE).view(2, 150)
    loss, grad = _triton_ranking.ranking_loss(x.view(2, 150), ranks, None, 0.0)
    assert loss.isnan() and grad[0].isnan().all() and grad[1].isfinite().all()


def test_whitening_over_a_group_of_ranks(tmp_path):
    """One rank: its moments go through float64 and come back; the merge is the reference's."""
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, mask = 1e4 + randn(5, 40, seed=1), random_mask(5, 40, seed=2)
        with rlhf_fast.use_backend("triton"):
            for options in ({}, {"shift_mean": False, "unbiased": False}):
                out = rlhf_fast.whiten(
                    x.to(DEVICE), mask.to(DEVICE), group=dist.group.WORLD, **options
                )
                alone = reference.whiten(
                    x.double(), mask, *({"shift_mean": True, "unbiased": True} | options).values(),
                    1e-8, "",
                )  # fmt: skip
                assert_accurate("whiten", out, alone)
            nothing = rlhf_fast.whiten(x[:0].to(DEVICE), group=dist.group.WORLD)
        assert nothing.shape == (0, 40)
    finally:
        dist.destroy_process_group()


def test_group_scores_far_from_zero_keep_their_digits():
    scores, ids = 1e4 + 0.1 * randn(150, seed=1), torch.arange(150) % 4
    scores[::11] -= 1e3
    for kind in ("grpo", "dr_grpo", "rloo"):
        truth = reference.group_advantages(scores.double(), ids, kind, 1e-4)
        out = _triton.group_advantages(scores.to(DEVICE), ids.to(DEVICE), kind, 1e-4)
        assert_accurate(kind, out, truth)


@pytest.mark.parametrize("shape", [(1, 150), (60, 3)])
def test_ranking_of_more_than_a_block(monkeypatch, shape):
    """150 completions are two blocks of lanes; 180 gradients twelve blocks of two programs."""
    monkeypatch.setattr(_triton_ranking, "LOG2_BLOCK", 4)
    scores, ranks = 2 * randn(*shape, seed=1), randn(*shape, seed=2)
    ranks[0, 0] = ranks[0, 1]
    mask = random_mask(*shape, seed=3, keep=0.9)
    scores[~mask] = math.nan
    truth = reference_ranking.ranking_loss(scores.double(), ranks, mask, 0.3)
    out = _triton_ranking.ranking_loss(*(x.to(DEVICE) for x in (scores, ranks, mask)), 0.3)
    assert_accurate("loss", out[0], truth[0])
    assert_accurate("gradient", out[1] * shape[0], truth[1] * shape[0])
