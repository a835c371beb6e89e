"""Rows that CUDA splits over blocks and Triton over programs, losses of many tokens."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    generator,
    poisoned_memory,
    randn,
    random_mask,
    usable_backends,
)

BACKENDS = [b for b in usable_backends("gae") if b != "reference"]
INTERPRETED = "triton" in BACKENDS and _dispatch.interpreting()


def long_rows(*lengths: int, interpreted: tuple[int, ...]) -> list[tuple[str, int]]:
    """(backend, length). The interpreter takes 0.1 ms per element: short rows are split there."""
    return [
        (b, length)
        for b in BACKENDS
        for length in (interpreted if b == "triton" and INTERPRETED else lengths)
    ]


@pytest.fixture
def backend(request, monkeypatch):
    """The backend of the case, in use; the interpreter splits rows of more than 128 tokens."""
    if request.param == "triton" and INTERPRETED:
        monkeypatch.setattr("rlhf_fast.kernels._common.chunks.SPLIT_FROM", 128)
    with rlhf_fast.use_backend(request.param):
        yield request.param


def response_mask(rows: int, length: int) -> torch.Tensor:
    """Single gaps, a gap longer than what a block takes at once, an early end, an empty row."""
    mask = random_mask(rows, length, seed=7, keep=0.9)
    mask[0, length // 4 : length // 4 + min(6000, length // 3)] = False
    mask[1, length // 3 :] = False
    mask[2:3] = False
    return mask


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element further on in memory, where 16 bytes are never aligned."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


def trace(rewards, values, mask, gamma, lam, carry=True, dones=None, bootstrap=None):
    """Advantages [B, T] in float64, token by token."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        r, v, live = rewards[b].tolist(), values[b].tolist(), mask[b].tolist()
        done = [False] * len(r) if dones is None else dones[b].tolist()
        following, a, row = 0.0 if bootstrap is None else float(bootstrap[b]), 0.0, [0.0] * len(r)
        for t in reversed(range(len(r))):
            if live[t]:
                crosses = not done[t]
                row[t] = a = r[t] + crosses * gamma * (following + lam * a) - v[t]
                following = v[t]
            elif not carry:
                a, following = gamma * (following + lam * a), 0.0
        out[b] = torch.tensor(row, dtype=torch.float64)
    return out


@functools.cache
def gae_case(length: int, mode: str):
    rewards, values = randn(3, length, seed=1), randn(3, length, seed=2)
    mask = response_mask(3, length)
    tensors = {
        "mask": mask,
        "dones": torch.rand(3, length, generator=generator(3)) < max(1e-3, 3 / length),
        "bootstrap_value": randn(3, seed=4),
    }
    options = {"gamma": 0.99, "lam": 0.97, "lam_value": 0.9, "mask_mode": mode}
    advantages, returns = (
        trace(rewards, values, mask, 0.99, lam, mode == "carry", *list(tensors.values())[1:])
        for lam in (0.97, 0.9)
    )
    returns = torch.where(mask, returns + values, 0.0)
    rewards[~mask], values[~mask] = math.nan, math.inf
    return (rewards, values), tensors, options, (advantages, returns)


@pytest.mark.parametrize("mode", ["carry", "zero"])
# The longest row of one block or program, ragged and whole ones of several, one of several steps.
@pytest.mark.parametrize(
    ("backend", "length"),
    long_rows(16384, 16385, 16400, 34001, interpreted=(128, 129, 192, 270)),
    indirect=["backend"],
)
def test_gae(backend, length, mode):
    device = device_of(backend)
    inputs, tensors, options, truth = gae_case(length, mode)

    def run(rows, place=lambda x: x):
        moved = [place(x.to(device)[rows].contiguous()) for x in inputs]
        more = {k: place(x.to(device)[rows].contiguous()) for k, x in tensors.items()}
        with poisoned_memory():
            return rlhf_fast.gae(*moved, **more, **options)

    out = run(slice(None))
    for name, ours, exact in zip(out._fields, out, truth, strict=True):
        assert_accurate(name, ours, exact)
    for name, whole, again in zip(out._fields, out, run(slice(None), shifted), strict=True):
        assert_same_bits(f"{name}, not aligned", whole, again)
    for row in range(3):
        alone = run(slice(row, row + 1))
        for name, whole, again in zip(out._fields, out, alone, strict=True):
            assert_same_bits(f"{name}, row {row} alone", whole[row : row + 1], again)


@pytest.mark.parametrize("place", ["last", "index"])
@pytest.mark.parametrize(
    ("backend", "length"),
    long_rows(16400, 33001, interpreted=(144, 270)),
    indirect=["backend"],
)
def test_ppo_advantages(backend, length, place):
    scores, lp, ref = randn(3, seed=5), -randn(3, length, seed=1).abs(), -randn(3, length, seed=2)
    values, mask = randn(3, length, seed=3), response_mask(3, length)
    mask[0, -1] = mask[1, 5] = True
    at = "last" if place == "last" else torch.tensor([length - 1, 5, 3])
    options = {"kl_coef": 0.1, "estimator": "k3", "gamma": 0.99}
    d = torch.where(mask, lp.double() - ref.double(), 0.0)
    kl = torch.expm1(-d) + d
    rewards = -0.1 * kl
    rewards[0, at[0] if place == "index" else mask[0].nonzero()[-1]] += scores[0]
    rewards[1, 5 if place == "index" else mask[1].nonzero()[-1]] += scores[1]
    raw = trace(rewards, values, mask, 0.99, 0.95)
    kept = raw[mask]
    whitened = torch.where(mask, (raw - kept.mean()) / (kept.var() + 1e-8).sqrt(), 0.0)
    truth = whitened, torch.where(mask, raw + values, 0.0), rewards, kl
    for x in (lp, ref, values):
        x[~mask] = math.nan
    moved = [x.to(device_of(backend)) for x in (scores, lp, ref, values, mask)]
    at = at if place == "last" else at.to(device_of(backend))
    with poisoned_memory():
        out = rlhf_fast.ppo_advantages(*moved, at=at, **options)
    for name, ours, exact in zip(out._fields, out, truth, strict=True):
        assert_accurate(name, ours, exact)
    again = rlhf_fast.ppo_advantages(*map(shifted, moved), at=at, **options)
    for name, ours, other in zip(out._fields, out, again, strict=True):
        assert_same_bits(f"{name}, not aligned", ours, other)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_what_triton_chunks_hand_over(backend, mode, masked):
    """All that can stand behind a chunk, and more chunks than are folded at once.

    An infinity that no trace may carry across: it stands behind a token that ends one.
    """
    length, device = 203 if INTERPRETED else 33001, device_of(backend)
    rewards, values = randn(3, length, seed=1), randn(3, length, seed=2)
    mask = response_mask(3, length) if masked else torch.ones(3, length, dtype=torch.bool)
    mask[0, 100:103] = True
    dones = torch.zeros(3, length, dtype=torch.bool)
    dones[0, 101] = True
    rewards[0, 102] = math.inf
    for with_dones, bootstrap, lam_value in ((True, 3, 0.9), (True, None, None), (False, 3, None)):
        options = {"gamma": 0.999, "lam": 0.995, "mask_mode": mode, "lam_value": lam_value}
        options |= {"mask": mask} if masked else {}
        options |= {"dones": dones} if with_dones else {}
        options |= {} if bootstrap is None else {"bootstrap_value": randn(3, seed=bootstrap)}

        def run(device, dtype, options=options):
            def moved(x):
                is_tensor = isinstance(x, torch.Tensor)
                return x.to(device, dtype if x.is_floating_point() else x.dtype) if is_tensor else x

            tensors = map(moved, (rewards, values))
            return rlhf_fast.gae(*tensors, **{k: moved(x) for k, x in options.items()})

        with rlhf_fast.use_backend("reference"):
            truth, plain = run("cpu", torch.float64), run("cpu", torch.float32)
        with poisoned_memory():
            out = run(device, torch.float32)
        for name, *three in zip(out._fields, out, truth, plain, strict=True):
            assert_accurate(f"{name}, {options.keys()}", *three)
    undiscounted = rlhf_fast.discounted_returns(values.to(device), gamma=0.9, mask=mask.to(device))
    with rlhf_fast.use_backend("reference"):
        truth = rlhf_fast.discounted_returns(values.double(), gamma=0.9, mask=mask)
    assert_accurate("discounted returns", undiscounted, truth)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_shaped_rewards_of_triton_chunks(backend):
    """The score's place is found from the chunk that has it, across one where nothing counts."""
    length, device = 203 if INTERPRETED else 33001, device_of(backend)
    scores, lp, ref = randn(3, seed=5), -randn(3, length, seed=1).abs(), -randn(3, length, seed=2)
    for mask in (response_mask(3, length), None):
        moved = [x if x is None else x.to(device) for x in (scores, lp, ref, mask)]
        rewards, kl = rlhf_fast.shaped_rewards(*moved, kl_coef=0.1)
        with rlhf_fast.use_backend("reference"):
            truth = rlhf_fast.shaped_rewards(
                *(x.double() for x in (scores, lp, ref)), mask, kl_coef=0.1
            )
        assert_accurate("rewards", rewards, truth[0])
        assert_accurate("kl", kl, truth[1])


@pytest.mark.parametrize("kind", ["ppo", "gspo", "sapo"])
@pytest.mark.parametrize("shape", [(3, 9001), (2, 8192), (2500, 130), (3000, 5)])
@pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b != "triton" or not INTERPRETED], indirect=True
)
def test_policy_loss(backend, kind, shape):
    """Rows of several parts, and more rows than warps: each thread has several turns."""
    lp, old = -randn(*shape, seed=1).abs(), -randn(*shape, seed=1).abs() + 0.1 * randn(*shape)
    batch = {"old_logprob": old, "advantages": randn(*shape, seed=3)}
    mask = random_mask(*shape, seed=4, keep=0.8)
    mask[:, -shape[1] // 3 :] &= mask[:, :1]  # some rows end early
    options = {"kind": kind, "reduction": "seq-mean-token-mean"}

    def run(device, dtype, move=lambda x: x):
        leaf = move(lp.to(device, dtype)).requires_grad_()
        data = {k: move(x.to(device, dtype)) for k, x in batch.items()}
        loss, stats = rlhf_fast.policy_loss(leaf, **data, mask=move(mask.to(device)), **options)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), stats, grad

    with rlhf_fast.use_backend("reference"):
        truth, plain = (run("cpu", dtype) for dtype in (torch.float64, torch.float32))
    device = device_of(backend)
    ours = run(device, torch.float32)
    for name, a, b, c in zip(("loss", "stats", "grad"), ours, truth, plain, strict=True):
        assert_accurate(name, a, b, c)
    for name, a, b in zip(("loss", "stats", "grad"), ours, run(device, torch.float32), strict=True):
        assert_same_bits(f"{name}, again", a, b)
    other = run(device, torch.float32, shifted)
    for name, a, b in zip(("loss", "stats", "grad"), ours, other, strict=True):
        assert_same_bits(f"{name}, not aligned", a, b)
