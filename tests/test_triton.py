"""What the Triton kernels promise beyond their ops' tests: layouts, helpers, GPU rounding."""

import math

import numpy as np
import pytest
import torch

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import assert_accurate, assert_same_bits, device_of, randn

pytest.importorskip("triton")
if rlhf_fast.backends()["logprob"]["triton"] is not True:
    pytest.skip(str(rlhf_fast.backends()["logprob"]["triton"]), allow_module_level=True)

import triton
import triton.language as tl

from rlhf_fast.kernels._common import device_math
from rlhf_fast.kernels._common.launch import rows_of
from rlhf_fast.kernels.logprob import _triton, reference

DEVICE = device_of("triton")
INTERPRETED = _dispatch.interpreting()


@triton.jit
def _apply(x_ptr, y_ptr, slope_ptr, c, WHICH: tl.constexpr, N: tl.constexpr, LOG2_N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if WHICH == 0:
        y, slope = device_math.softcapped(x, c)
        tl.store(slope_ptr + i, slope)
    elif WHICH == 1:
        y = device_math.expm1(x)
    elif WHICH == 2:
        y = device_math.accurate_exp2(x)
    else:
        y = x + device_math.tree_sum(x, LOG2_N)
    tl.store(y_ptr + i, y)


def apply(which, x, c=1.0):
    x = x.to(DEVICE)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    size = x.numel()
    _apply[(1,)](x, y, slope, c, which, size, size.bit_length() - 1, enable_fp_fusion=False)
    return y.cpu(), slope.cpu()


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcapped(cap):
    x = torch.linspace(-10 * cap, 10 * cap, 4096)
    x[:4] = torch.tensor([-math.inf, math.inf, 3e38, -0.0])
    y, slope = apply(0, x, cap)
    truth = cap * torch.tanh(x.double() / cap)
    truth[0] = -math.inf
    assert_accurate("value", y / cap, truth / cap, (cap * torch.tanh(x / cap)) / cap)
    assert_accurate("slope", slope, 1 - torch.tanh(x.double() / cap) ** 2)


def test_expm1_and_exp2_are_accurate_relative_to_their_value():
    x = -torch.logspace(-20, 1.9, 2048)
    y, _ = apply(1, x)
    assert_accurate("expm1", y / torch.expm1(x.double()).float(), torch.ones(2048).double())
    x = torch.linspace(-125, 0, 2048)
    y, _ = apply(2, x)
    ulp = (y.double() / torch.exp2(x.double()) - 1).abs().max() / 2**-23
    assert ulp < 1
    assert apply(2, torch.tensor([-math.inf, -1e30]))[0].tolist() == [2.0**-126] * 2
    # The bits of the NaN that GPUs make: a shift of the exponent would turn them into 3.4e38.
    nan = torch.tensor([0x7FFFFFFF] * 2, dtype=torch.int32).view(torch.float32)
    assert apply(2, nan)[0].isnan().all() and apply(0, nan)[0].isnan().all()


def test_tree_sum_pairs_neighbours():
    x = randn(64, seed=3)
    pairs = x
    while pairs.numel() > 1:
        pairs = pairs[0::2] + pairs[1::2]
    assert_same_bits("sum", apply(3, x)[0], x + pairs)


def test_rows_are_addressed_in_place():
    x = torch.zeros(4, 6, 5, 8)
    for view, copied in (
        (x, False),
        (x[:, :, :-1], False),
        (x[:, 2:3, 1:], False),
        (x.transpose(1, 2)[1:2], False),
        (x[0, 0, 0], False),
        (x[:1].expand(4, 6, 5, 8), False),
        (x[:, :, :-1][:, ::2], False),
        (x[:, :2, :3], True),
        (x[..., ::2], True),
    ):
        rows, inner, outer_stride, inner_stride = rows_of(view)
        assert (rows.data_ptr() != view.data_ptr()) == copied
        start = view.storage_offset() if not copied else 0
        count = view.shape[:-1].numel()
        index = torch.arange(count)
        offsets = (index // inner) * outer_stride + (index % inner) * inner_stride + start
        flat = torch.arange(rows.untyped_storage().nbytes() // 4)
        expected = flat.as_strided(rows.shape, rows.stride(), start)[..., 0].reshape(-1)
        assert torch.equal(flat[offsets], expected)


def test_rows_more_than_two_to_the_31_elements_apart():
    """Only the pages of two short rows of the 4.3 GB buffer are ever touched."""
    buffer = torch.empty(2**31 + 100, dtype=torch.bfloat16, device=DEVICE)
    z = buffer.as_strided((2, 100), (2**31, 1))
    z.copy_(randn(2, 100, seed=1).bfloat16())
    ids = torch.tensor([3, 99], device=DEVICE)
    with rlhf_fast.use_backend("triton"):
        far, near = rlhf_fast.logprob(z, ids), rlhf_fast.logprob(z.clone(), ids)
    assert_same_bits("logprob", far, near)


def arguments(logits, ids):
    return logits.to(DEVICE), ids.to(DEVICE), None, 1.0, None, None, -100


def test_an_unchecked_id_out_of_range_gives_nan():
    logits, ids = randn(4, 10, seed=1), torch.tensor([-1, 3, 10, 2**40])
    out, *saved = _triton.logprob(*arguments(logits, ids))
    assert out.cpu().isnan().tolist() == [True, False, True, True]
    grad = _triton.logprob_backward(
        torch.ones_like(out), None, *arguments(logits, ids), *saved, None
    ).cpu()
    assert grad[0].isnan().all() and grad[1].isfinite().all()


def test_the_gradient_may_be_written_over_the_logits():
    logits, ids = arguments(randn(3, 1500, seed=1), torch.tensor([0, 1499, 700]))[:2]
    logits[1, 1499] = -math.inf
    call = ids, None, 0.7, None, 20.0, -100
    g, h = randn(3, seed=2).to(DEVICE), randn(3, seed=3).to(DEVICE)
    _, entropy, *saved = _triton.logprob_entropy(logits, *call)
    apart = _triton.logprob_backward(g, h, logits, *call, *saved, entropy)
    inside = logits.clone()
    assert _triton.logprob_backward(g, h, inside, *call, *saved, entropy, out=inside) is inside
    assert_same_bits("gradient", inside, apart)


@pytest.mark.parametrize("column", [0, 700, 1499])
def test_a_nan_in_a_row_that_counts_is_not_hidden(column):
    logits = randn(2, 1500, seed=1)
    logits[1, column] = math.nan
    out = _triton.logprob_entropy(*arguments(logits, torch.tensor([5, 5])))
    for x in out[:2]:
        assert x.cpu().isnan().tolist() == [False, True]


def test_an_offset_costs_nothing_at_any_temperature():
    """The maximum is subtracted before the temperature divides."""
    logits, ids = randn(3, 50, seed=1).bfloat16().float(), torch.tensor([1, 2, 3])
    call = (torch.tensor([0.0, 4096.0])[:, None, None] + logits).round(decimals=2)
    base = call[1] - 4096
    results = [
        _triton.logprob(z.to(DEVICE), ids.to(DEVICE), None, 0.7, None, None, -100)[0]
        for z in (base, call[1])
    ]
    assert_same_bits("logprob", *results)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the op's own tests see its rounding")
def test_the_tolerance_holds_with_the_rounding_of_a_gpu(monkeypatch):
    """PTX allows `ex2.approx` and `div.full` an error of 2 ulp, where NumPy's are exact."""
    from triton.runtime.interpreter import InterpreterBuilder

    noise = np.random.default_rng(0)

    def inexact(method):
        def wrapper(self, *args):
            out = method(self, *args)
            factor = 1 + 2.0**-22 * noise.uniform(-1, 1, out.data.shape)
            out.data = (out.data * factor).astype(out.data.dtype)
            return out

        return wrapper

    for name in ("create_exp2", "create_fdiv"):
        monkeypatch.setattr(InterpreterBuilder, name, inexact(getattr(InterpreterBuilder, name)))
    for scale, temperature, softcap in ((3, 1.0, None), (8, 0.7, 30.0), (8, 0.3, 5.0)):
        logits, ids = scale * randn(4, 3000, seed=2), torch.tensor([0, 7, 1500, 2999])
        call = (ids, None, temperature, None, softcap, -100)
        plain, truth = (reference.logprob_entropy(z, *call) for z in (logits, logits.double()))
        out = _triton.logprob_entropy(logits, *call)
        assert_accurate("logprob", out[0], truth[0], plain[0])
        assert_accurate("entropy", out[1], truth[1], plain[1])
        ones = torch.ones(4)
        grad, plain_grad, true_grad = (
            module.logprob_backward(
                ones.to(z.dtype), ones.to(z.dtype), z, *call, saved[2], saved[3], saved[1]
            )
            for module, z, saved in (
                (_triton, logits, out),
                (reference, logits, plain),
                (reference, logits.double(), truth),
            )
        )
        assert_accurate("gradient", grad, true_grad, plain_grad)
