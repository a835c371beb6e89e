"""GAE, packed GAE and discounted returns against an independent float64 loop."""

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

BACKENDS = usable_backends("gae")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rlhf_fast.use_backend(request.param):
        yield request.param


def truth(
    rewards, values, gamma, lam, mask=None, mode="carry", bootstrap=None, dones=None, lam_value=None
):
    """Scalar Python in double precision, on the compressed row in "carry" mode."""
    advantages, returns = torch.zeros(2, *rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        kept = [t for t in range(rewards.shape[1]) if mask is None or bool(mask[b, t])]
        walk = kept if mode == "carry" else range(rewards.shape[1])
        for target, factor in (
            (advantages, lam),
            (returns, lam if lam_value is None else lam_value),
        ):
            next_value, trace = (0.0 if bootstrap is None else float(bootstrap[b])), 0.0
            for t in reversed(walk):
                r, v = (float(rewards[b, t]), float(values[b, t])) if t in kept else (0.0, 0.0)
                if dones is not None and bool(dones[b, t]) and t in kept:
                    next_value, trace = 0.0, 0.0
                trace = r + gamma * next_value - v + gamma * factor * trace
                next_value = v
                if t in kept:
                    target[b, t] = trace + (v if target is returns else 0.0)
    return advantages, returns


def on(backend, *tensors):
    return [None if x is None else x.to(device_of(backend)) for x in tensors]


@pytest.mark.parametrize("mode", ["carry", "zero"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 200), (17, 33)])
def test_equals_the_double_precision_loop(backend, shape, mode):
    rewards, values = randn(*shape, seed=1), randn(*shape, seed=2)
    mask, dones = random_mask(*shape, seed=3), random_mask(*shape, seed=4, keep=0.1)
    bootstrap = randn(shape[0], seed=5)
    options = {"gamma": 0.97, "lam": 0.9, "lam_value": 0.6}
    expected = truth(rewards, values, 0.97, 0.9, mask, mode, bootstrap, dones, options["lam_value"])
    rewards[~mask] = math.nan
    values[~mask] = math.inf
    r, v, m, d, b = on(backend, rewards, values, mask, dones, bootstrap)
    with poisoned_memory():
        out = rlhf_fast.gae(r, v, mask=m, mask_mode=mode, bootstrap_value=b, dones=d, **options)
    assert_accurate("advantages", out.advantages, expected[0])
    assert_accurate("returns", out.returns, expected[1])
    assert not out.advantages.cpu()[~mask].any() and not out.returns.cpu()[~mask].any()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_no_mask_and_numbers_for_the_bootstrap(backend, gamma, lam):
    rewards, values = randn(4, 50, seed=1), randn(4, 50, seed=2)
    expected = truth(rewards, values, gamma, lam, bootstrap=[0.25] * 4)
    r, v = on(backend, rewards, values)
    out = rlhf_fast.gae(r, v, gamma=gamma, lam=lam, bootstrap_value=0.25)
    assert_accurate("advantages", out.advantages, expected[0])
    assert_accurate("returns", out.returns, expected[1])


def test_long_rows(backend):
    length = 300 if backend == "triton" else 5000
    rewards, values = randn(2, length, seed=1), randn(2, length, seed=2)
    mask = random_mask(2, length, seed=3)
    double = [x.double() for x in (rewards, values)]
    with rlhf_fast.use_backend("reference"):
        expected = rlhf_fast.gae(*double, mask=mask, gamma=0.99)
        plain = rlhf_fast.gae(rewards, values, mask=mask, gamma=0.99)
    r, v, m = on(backend, rewards, values, mask)
    out = rlhf_fast.gae(r, v, mask=m, gamma=0.99)
    assert_accurate("advantages", out.advantages, expected.advantages, plain.advantages)
    assert_accurate("returns", out.returns, expected.returns, plain.returns)


def test_hand_computed_numbers_with_a_terminal_step(backend):
    """gamma 0.5, values 1, 2, 3, worked out on paper, with and without a cut."""
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    r, v = on(backend, rewards, values)
    out = rlhf_fast.gae(r, v, gamma=0.5, lam=0.5, bootstrap_value=4.0)
    # delta = 1 + 1 - 1, 0 + 1.5 - 2, 2 + 2 - 3 = 1, -0.5, 1; A = 1 - .0625, -.25, 1
    assert_accurate("A", out.advantages, torch.tensor([[0.9375, -0.25, 1.0]]))
    (d,) = on(backend, torch.tensor([[1, 0, 0]]))
    out = rlhf_fast.gae(r, v, gamma=0.5, lam=0.5, bootstrap_value=4.0, dones=d)
    assert_accurate("A", out.advantages, torch.tensor([[0.0, -0.25, 1.0]]))


RLAX = (  # lambda, (gamma 0.99, nothing terminal), (gamma 0.9, terminal after step 3)
    (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0, -4.9]),
    (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0, -4.9]),
    (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49], [1.7256, 1.46, 1.0, 0.0, -4.9]),
)


@pytest.mark.parametrize(("lam", "first", "second"), RLAX)
def test_published_table_of_rlax(backend, lam, first, second):
    """google-deepmind/rlax, multistep_test.py, truncated GAE: its inputs, numbers and 1e-3."""
    for gamma, r, v, dones, expected in (
        (0.99, [0.0, 0.0, 1.0, 0.0, -0.5], [1.0, 4.0, -3.0, -2.0, -1.0], [0, 0, 0, 0, 0], first),
        (0.9, [0.0, 0.0, 0.0, 0.0, 1.0], [-3.0, -2.0, -1.0, 0.0, 5.0], [0, 0, 0, 1, 0], second),
    ):
        rewards, values, cut = on(backend, *(torch.tensor([x]) for x in (r, v, dones)))
        out = rlhf_fast.gae(rewards, values, gamma=gamma, lam=lam, bootstrap_value=-1.0, dones=cut)
        published = torch.tensor([expected])
        torch.testing.assert_close(out.advantages.cpu(), published, atol=1e-3, rtol=0)


def test_published_returns_of_torchtune(backend):
    """pytorch/torchtune, test_rewards.py, estimate_advantages: one reward, decaying backwards."""
    x = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    out = rlhf_fast.gae(*on(backend, x, x), gamma=0.9, lam=0.95)
    expected = torch.tensor([[0.9**3 * 0.95**2, 0.9**2 * 0.95, 0.9, 1.0]], dtype=torch.float64)
    assert_accurate("returns", out.returns, expected)


def test_a_gap_is_as_if_its_tokens_were_not_there(backend):
    """Interior gaps, as in radixark/miles and NVIDIA-NeMo/RL: equal to the compressed row, the
    carry crosses undecayed, the terminal reward sits on the last token that counts."""
    rewards, values = randn(1, 12, seed=1), randn(1, 12, seed=2)
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0]]) != 0
    rewards[~mask], values[~mask] = 1e6, math.nan
    out = rlhf_fast.gae(*on(backend, rewards, values), mask=on(backend, mask)[0], gamma=0.9)
    short = rlhf_fast.gae(*on(backend, rewards[mask][None], values[mask][None]), gamma=0.9)
    for name, long, packed in zip(out._fields, out, short, strict=True):
        assert_accurate(name, long.cpu()[mask], packed.cpu()[0].double())
        assert not long.cpu()[~mask].any()


def test_lambda_one_is_monte_carlo_and_lambda_zero_is_one_step(backend):
    rewards, values = randn(3, 20, seed=1), randn(3, 20, seed=2)
    r, v = on(backend, rewards, values)
    returns = rlhf_fast.discounted_returns(r, gamma=0.9)
    assert_accurate("lambda 1", rlhf_fast.gae(r, v, gamma=0.9, lam=1.0).returns, returns.double())
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1).double()
    delta = rewards.double() + 0.9 * following - values.double()
    assert_accurate("lambda 0", rlhf_fast.gae(r, v, gamma=0.9, lam=0.0).advantages, delta)


def test_values_under_the_mask_change_no_bit(backend):
    """A multi-turn row: what the environment wrote between two turns must not matter.

    The property of verl's test_multi_turn_compute_gae_advantage_return (test_core_algos_on_cpu.py).
    """
    rewards, values = randn(4, 40, seed=1), randn(4, 40, seed=2)
    mask = random_mask(4, 40, seed=3, keep=0.5)
    other = torch.where(mask, values, 100 * randn(4, 40, seed=9))
    for mode in ("carry", "zero"):
        r, v, o, m = on(backend, rewards, values, other, mask)
        a = rlhf_fast.gae(r, v, mask=m, mask_mode=mode)
        b = rlhf_fast.gae(r, o, mask=m, mask_mode=mode)
        assert_same_bits("advantages", a.advantages, b.advantages)
        assert_same_bits("returns", a.returns, b.returns)


def test_rows_do_not_depend_on_each_other(backend):
    rewards, values = randn(9, 37, seed=1), randn(9, 37, seed=2)
    mask = random_mask(9, 37, seed=3)
    r, v, m = on(backend, rewards, values, mask)
    whole = rlhf_fast.gae(r, v, mask=m).advantages
    order = torch.randperm(9)
    permuted = rlhf_fast.gae(r[order], v[order], mask=m[order]).advantages
    assert_same_bits("permuted", permuted, whole[order])
    for b in (0, 4, 8):
        alone = rlhf_fast.gae(r[b : b + 1], v[b : b + 1], mask=m[b : b + 1]).advantages
        assert_same_bits("alone", alone, whole[b : b + 1])


@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_packed_equals_row_by_row(backend, mode):
    lengths = [3, 0, 1, 17, 40, 0, 5]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    total = sum(lengths)
    rewards, values = randn(total, seed=1), randn(total, seed=2)
    mask, dones = random_mask(total, seed=3), random_mask(total, seed=4, keep=0.1)
    bootstrap = randn(len(lengths), seed=5)
    r, v, o, m, d, b = on(backend, rewards, values, offsets, mask, dones, bootstrap)
    options = {"gamma": 0.97, "lam": 0.9, "mask_mode": mode, "lam_value": 1.0}
    with poisoned_memory():
        packed = rlhf_fast.gae_packed(r, v, o, mask=m, dones=d, bootstrap_value=b, **options)
    for i, length in enumerate(lengths):
        part = slice(int(offsets[i]), int(offsets[i]) + length)
        row = [x[None, part] for x in (rewards, values)]
        expected = truth(
            *row, 0.97, 0.9, mask[None, part], mode, bootstrap[i : i + 1], dones[None, part], 1.0
        )
        assert_accurate("advantages", packed.advantages[None, part], expected[0])
        assert_accurate("returns", packed.returns[None, part], expected[1])


def test_all_masked_and_empty(backend):
    r, v = on(backend, torch.full((3, 4), math.nan), torch.full((3, 4), math.inf))
    (m,) = on(backend, torch.zeros(3, 4))
    for mode in ("carry", "zero"):
        out = rlhf_fast.gae(r, v, mask=m, mask_mode=mode, bootstrap_value=1.0)
        assert not out.advantages.any() and not out.returns.any()
    for shape in ((0, 4), (3, 0), (0, 0)):
        (empty,) = on(backend, torch.zeros(shape))
        assert rlhf_fast.gae(empty, empty).advantages.shape == shape
    nothing, offsets = on(backend, torch.zeros(0), torch.tensor([0, 0, 0]))
    assert rlhf_fast.gae_packed(nothing, nothing, offsets).returns.shape == (0,)


def test_layout_dtypes_and_detachment(backend):
    wide = randn(6, 40, seed=1)
    r, v = on(backend, wide[:, ::2], wide.t()[:20].t())
    r.requires_grad_()
    out = rlhf_fast.gae(r, v)
    expected = truth(wide[:, ::2], wide[:, :20], 1.0, 0.95)
    assert_accurate("strided", out.advantages, expected[0])
    assert not out.advantages.requires_grad and out.advantages.dtype == torch.float32
    half = rlhf_fast.gae(r.detach().bfloat16(), v.half())
    assert half.advantages.dtype == torch.float32
    exact = truth(r.detach().bfloat16().cpu(), v.half().cpu(), 1.0, 0.95)
    assert_accurate("half", half.advantages, exact[0])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from(["carry", "zero"]),
)
def test_any_mask_and_dones(seed, rows, length, mode):
    rewards, values = randn(rows, length, seed=seed), randn(rows, length, seed=seed + 1)
    mask = random_mask(rows, length, seed=seed, keep=0.5)
    dones = random_mask(rows, length, seed=seed + 2, keep=0.3)
    expected = truth(rewards, values, 0.9, 0.8, mask, mode, [0.5] * rows, dones)
    for backend in BACKENDS:
        if backend == "triton":
            continue  # the interpreter takes 10 ms a call; the cases above cover it
        with rlhf_fast.use_backend(backend):
            r, v, m, d = on(backend, rewards, values, mask, dones)
            out = rlhf_fast.gae(
                r, v, gamma=0.9, lam=0.8, mask=m, mask_mode=mode, bootstrap_value=0.5, dones=d
            )
        assert_accurate("advantages", out.advantages, expected[0])
        assert_accurate("returns", out.returns, expected[1])


def test_discounted_returns(backend):
    (r,) = on(backend, torch.tensor([[[1.0, 1.0, 1.0], [math.nan, 2.0, 4.0]]]))
    (m,) = on(backend, torch.tensor([[[1, 1, 1], [0, 1, 1]]]))
    out = rlhf_fast.discounted_returns(r, gamma=0.5, mask=m)
    assert out.tolist() == [[[1.75, 1.5, 1.0], [0.0, 4.0, 4.0]]]
    (r, m) = on(backend, torch.tensor([1.0, math.nan, 1.0]), torch.tensor([True, False, True]))
    assert rlhf_fast.discounted_returns(r, gamma=0.5, mask=m).tolist() == [1.5, 0.0, 1.0]


def test_float64_is_served_by_the_reference():
    rewards, values = randn(3, 9, dtype=torch.float64), randn(3, 9, seed=1, dtype=torch.float64)
    out = rlhf_fast.gae(rewards, values, gamma=0.9)
    assert out.advantages.dtype == torch.float64
    assert_accurate("float64", out.advantages, truth(rewards, values, 0.9, 0.95)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 4)}, ValueError, "values: expected shape"),
        ({"rewards": torch.zeros(6)}, ValueError, r"rewards: expected shape \[B, T\]"),
        ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "rewards: expected float64"),
        ({"mask": torch.ones(2, 4)}, ValueError, "mask: expected shape"),
        ({"dones": torch.ones(3)}, ValueError, "dones: expected shape"),
        ({"mask_mode": "skip"}, ValueError, "mask_mode: expected one of carry, zero, got 'skip'"),
        ({"gamma": math.nan}, ValueError, "gamma: expected a finite number"),
        ({"lam": "1"}, TypeError, "lam: expected a number"),
        ({"bootstrap_value": torch.zeros(3)}, ValueError, "bootstrap_value: expected shape"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=message):
        rlhf_fast.gae(arguments.pop("rewards"), arguments.pop("values"), **arguments)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 4, 3], [0, 2, 1, 3]])
def test_bad_offsets(offsets):
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing offsets"):
        rlhf_fast.gae_packed(torch.zeros(3), torch.zeros(3), torch.tensor(offsets))
