"""The sweeps of `linear_*` over chunks of rows: what they hold, what they skip, what they take."""

from unittest import mock

import pytest
import torch

import rlhf_fast
from rlhf_fast.bench.memory import peak_bytes
from rlhf_fast.kernels.linear_head import _collect, _gradients, _logits, _tiles
from rlhf_fast.testing import assert_accurate, assert_same_bits, poisoned_memory, randn

needs_cpu = pytest.mark.skipif(
    rlhf_fast.backends()["linear_logprob"]["cpu"] is not True, reason="rlhf_fast._C is not built"
)


def make(n, size, vocabulary):
    """hidden, weight and ids; logits have a standard deviation of about 1."""
    weight = randn(vocabulary, size, seed=2) / size**0.5
    ids = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(3))
    return randn(n, size, seed=1), weight, ids


def batch(n, vocabulary):
    """What `linear_ppo_loss` takes behind the ids."""
    old = randn(n, seed=4) * 0.3 - torch.log(torch.tensor(float(vocabulary)))
    return old, randn(n, seed=5), torch.rand(n, generator=torch.Generator().manual_seed(6)) < 0.8


@needs_cpu
@pytest.mark.parametrize("text", ["0", "-5", "64MiB", "1.5"])
def test_a_bad_size_of_chunks_is_named(text, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", text)
    with pytest.raises(ValueError, match="RLHF_FAST_CHUNK_BYTES: expected a positive number"):
        rlhf_fast.linear_logprob(*make(3, 4, 10))


@needs_cpu
@pytest.mark.parametrize("rows", [64, 100, 1000])
def test_chunks_hold_as_many_bytes_as_told(rows, monkeypatch):
    """Forward, with 32 columns of hidden states: everything else is small."""
    x, w, ids = make(1000, 32, 3000)
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", str(4 * 3000 * rows))
    small = 200 * 1000  # bytes of vectors per row
    assert peak_bytes(lambda: rlhf_fast.linear_logprob(x, w, ids), "cpu") < 12000 * rows + small


@needs_cpu
def test_only_tokens_with_a_gradient_reach_the_last_products(monkeypatch):
    """Masked tokens reach no product; clipped ones and those without advantage only the first."""
    x, w, ids = make(50, 8, 30)
    old, advantages, mask = batch(50, 30)
    advantages[::3] = 0.0
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", "1")
    monkeypatch.setattr(_logits, "MIN_ROWS", 20)
    first, last = [], []
    product, accumulate = _tiles.product, _gradients.accumulate
    leaf = w.clone().requires_grad_()

    def watch_product(a, *others):
        first.append(a.shape[0])
        return product(a, *others)

    def watch_accumulate(total, a, b, *others):
        last.append(b.shape[0])
        accumulate(total, a, b, *others)

    with (
        mock.patch.object(_tiles, "product", watch_product),
        mock.patch.object(_gradients, "accumulate", watch_accumulate),
    ):
        loss = rlhf_fast.linear_ppo_loss(x, leaf, ids, old, advantages, mask)
    lp = rlhf_fast.linear_logprob(x, w, ids).requires_grad_()
    rlhf_fast.policy_loss(lp, old, advantages, mask).loss.backward()
    assert sum(first) == int(mask.sum()) and len(first) > 1
    assert sum(last) == int((lp.grad != 0).sum()) < sum(first)
    loss.loss.backward()
    by_hand = w.clone().requires_grad_()
    lp = rlhf_fast.linear_logprob(x, by_hand, ids, mask=mask)
    rlhf_fast.policy_loss(lp, old, advantages, mask).loss.backward()
    assert_accurate("d weight", leaf.grad, by_hand.grad.double(), by_hand.grad)


@needs_cpu
def test_chunks_without_a_gradient(monkeypatch):
    """The memory of the gradient is not zeroed: its first chunk has to overwrite all of it."""
    x, w, ids = make(50, 8, 30)
    old, advantages, _ = batch(50, 30)
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", "1")
    monkeypatch.setattr(_logits, "MIN_ROWS", 20)
    for first in (30, 50):
        advantages[:first] = 0.0
        leaf = w.clone().requires_grad_()
        with poisoned_memory():
            rlhf_fast.linear_ppo_loss(x, leaf, ids, old, advantages, None).loss.backward()
        by_hand = w.clone().requires_grad_()
        lp = rlhf_fast.linear_logprob(x, by_hand, ids)
        rlhf_fast.policy_loss(lp, old, advantages, None).loss.backward()
        assert_accurate("d weight", leaf.grad, by_hand.grad.double(), by_hand.grad)


@needs_cpu
def test_the_size_of_a_chunk_changes_no_bit_of_invariant_rows(monkeypatch):
    x, w, ids = make(200, 16, 300)
    with rlhf_fast.batch_invariant():
        whole = rlhf_fast.linear_logprob_entropy(x, w, ids)
        monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", "1")
        parts = rlhf_fast.linear_logprob_entropy(x, w, ids)
    for name, a, b in zip(whole._fields, whole, parts, strict=True):
        assert_same_bits(name, a, b)


def _mm(a, b, out_dtype=None, out=None):
    """torch.mm with CUDA's `out_dtype`."""
    whole = a.to(out_dtype or a.dtype) @ b.to(out_dtype or b.dtype)
    return whole if out is None else out.copy_(whole)


def _addmm(total, a, b, *, out_dtype, alpha, beta, out):
    product = alpha * (a.to(out_dtype) @ b.to(out_dtype))
    return out.copy_(total + product if beta else product)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision(dtype, monkeypatch):
    """The way of tensor cores, with their products emulated: the gradient of the logits alone is
    rounded to half precision."""
    x, w, ids = make(40, 16, 60)
    monkeypatch.setattr(_tiles, "fits_tensor_cores", lambda t: t.dtype == dtype)
    monkeypatch.setattr(torch, "mm", _mm)
    monkeypatch.setattr(torch, "addmm", _addmm)
    lora = randn(3, 16, seed=7).to(dtype), randn(60, 3, seed=8).to(dtype), 0.25

    def run(kind):
        leaves = [t.to(dtype).to(kind).requires_grad_() for t in (x, w)]
        out = rlhf_fast.linear_logprob_entropy(*leaves, ids, lora=lora, logit_scale=0.5)
        return out, torch.autograd.grad((out.logprob + out.entropy).sum(), leaves)

    (ours, grads), (truth, true_grads) = run(dtype), run(torch.float64)
    for name, a, b in zip(ours._fields, ours, truth, strict=True):
        assert_accurate(name, a, b)
    for a, b in zip(grads, true_grads, strict=True):
        assert a.dtype == dtype
        # Each of the summed terms may be off by its rounding.
        bound = 4 * torch.finfo(dtype).eps * (b.abs() + b.abs().mean())
        assert ((a.double() - b).abs() <= bound).all()


@needs_cpu
@pytest.mark.parametrize("stack", ["all rows", "some chunks"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_only_active_rows_in_half_precision(backend, entropy_coef, stack, monkeypatch):
    """The collectors of tensor cores, with the products emulated; some of the rows are active."""
    if rlhf_fast.backends()["linear_ppo_loss"][backend] is not True:
        pytest.skip(f"{backend} does not serve here")
    monkeypatch.setattr(_tiles, "fits_tensor_cores", lambda t: t.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", _mm)
    monkeypatch.setattr(torch, "addmm", _addmm)
    monkeypatch.setattr(_logits, "MIN_ROWS", 7)
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", str(7 * 64 * 4))
    monkeypatch.setattr(_collect, "has_grouped_products", lambda x: True)
    monkeypatch.setattr(_collect, "_STACK", 100 if stack == "all rows" else 2)
    x, w, ids = make(50, 16, 64)
    old, advantages, mask = batch(50, 64)
    advantages[::3] = 0.0
    x[~mask] = torch.nan

    def run(dtype, advantages=advantages):
        leaves = [t.to(dtype).requires_grad_() for t in (x.nan_to_num(), w)]
        if dtype == torch.bfloat16:
            with torch.no_grad():
                leaves[0][~mask] = torch.nan
        options = {"entropy_coef": entropy_coef}
        with rlhf_fast.use_backend(backend if dtype == torch.bfloat16 else "reference"):
            loss = rlhf_fast.linear_ppo_loss(*leaves, ids, old, advantages, mask, **options)
        return loss.loss, torch.autograd.grad(loss.loss, leaves)

    with poisoned_memory():
        loss, grads = run(torch.bfloat16)
    rounded = x.nan_to_num().to(torch.bfloat16), w.to(torch.bfloat16)
    x, w = (t.double() for t in rounded)
    true_loss, true_grads = run(torch.float64)
    assert_accurate("loss", loss, true_loss.to(torch.float64))
    for a, b in zip(grads, true_grads, strict=True):
        bound = 6 * torch.finfo(torch.bfloat16).eps * (b.abs() + b.abs().mean())
        assert ((a.double() - b).abs() <= bound).all()
    nothing = run(torch.bfloat16, torch.zeros_like(advantages))[1] if not entropy_coef else ()
    assert all((grad == 0).all() for grad in nothing)


def counted_products(monkeypatch):
    """A list that gets (rows, inner size, columns) of every product of the package from now on."""
    seen = []
    product, accumulate = _tiles.product, _gradients.accumulate

    def watch_product(a, b, *others):
        seen.append((*a.shape, b.shape[1]))
        return product(a, b, *others)

    def watch_accumulate(total, a, b, *others):
        seen.append((*a.shape, b.shape[1]))
        accumulate(total, a, b, *others)

    monkeypatch.setattr(_tiles, "product", watch_product)
    monkeypatch.setattr(_gradients, "accumulate", watch_accumulate)
    return seen


@needs_cpu
@pytest.mark.parametrize("rows", [1000, 60, 25])
def test_kept_logits_are_not_computed_again(rows, monkeypatch):
    """Forward and backward take three products for the rows that are kept, four for the others."""
    n, size, vocabulary = 60, 8, 300
    x, w, ids = make(n, size, vocabulary)
    monkeypatch.setattr(_logits, "MIN_ROWS", 1)
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", str(4 * vocabulary * rows))
    x, w = x.requires_grad_(), w.requires_grad_()
    seen = counted_products(monkeypatch)
    torch.autograd.grad(rlhf_fast.linear_logprob(x, w, ids).sum(), (x, w))
    one = n * size * vocabulary
    assert sum(a * b * c for a, b, c in seen) == 4 * one - one * min(rows, n) // n
    seen.clear()
    with torch.no_grad():
        rlhf_fast.linear_logprob(x, w, ids)
    assert sum(a * b * c for a, b, c in seen) == one


@needs_cpu
@pytest.mark.parametrize("rows", [1000, 25, 7])
@pytest.mark.parametrize("op", ["linear_logprob_entropy", "linear_kl"])
def test_what_is_kept_changes_nothing(op, rows, monkeypatch):
    """Not even in a second backward pass, nor where its tokens are others than the first one's."""
    n, vocabulary = 60, 300
    x, w, ids = make(n, 8, vocabulary)
    ref = randn(n, 5, seed=11), randn(vocabulary, 5, seed=12)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(7)) < 0.8
    g, h = randn(n, seed=8), randn(n, seed=9)
    monkeypatch.setattr(_logits, "MIN_ROWS", 1)
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", str(4 * vocabulary * rows))

    def run(dtype, upstreams):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        if op == "linear_kl":
            out = rlhf_fast.linear_kl(*leaves, *(t.to(dtype) for t in ref), ids=ids, mask=mask)
            first = out.kl
        else:
            out = rlhf_fast.linear_logprob_entropy(*leaves, ids, mask=mask)
            first = out.logprob
        losses = [
            (first * g.to(dtype) + out.entropy * h.to(dtype)) @ u.to(dtype) for u in upstreams
        ]
        return [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]

    every = torch.ones(n)
    some, late = (every * keep for keep in (torch.arange(n) % 3 == 0, torch.arange(n) > 55))
    none = every * 0
    with poisoned_memory():
        ours = run(torch.float32, (every, some, late, none, every))
    truth = run(torch.float64, (every, some, late, none, every))
    with rlhf_fast.use_backend("reference"):
        rough = run(torch.float32, (every, some, late, none, every))
    for mine, true, plain in zip(ours, truth, rough, strict=True):
        for name, a, b, c in zip(("hidden", "weight"), mine, true, plain, strict=True):
            assert_accurate(name, a, b, c)
    for a, b in zip(ours[0], ours[-1], strict=True):
        assert_same_bits("second time", a, b)


@needs_cpu
def test_peak_memory_of_a_call_that_keeps_logits():
    """A kept chunk, the gradient of the head, a tile of a quarter of a chunk."""
    n, size, vocabulary = 256, 16, 16000
    x, w, ids = make(n, size, vocabulary)
    x, w = x.requires_grad_(), w.requires_grad_()
    chunk = 2**22

    def call():
        torch.autograd.grad(rlhf_fast.linear_logprob(x, w, ids).sum(), (x, w))

    with mock.patch.dict("os.environ", {"RLHF_FAST_CHUNK_BYTES": str(chunk)}):
        peak = peak_bytes(call, "cpu")
    assert peak < 1.25 * chunk + 4 * (vocabulary * size + 3 * n * size) + 2**17 < 4 * n * vocabulary
