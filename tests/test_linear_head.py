"""Log-prob, entropy and KL from hidden states against float64, on every backend that runs here."""

import contextlib
import math
from unittest import mock

import pytest
import torch

import rlhf_fast
from rlhf_fast.bench.memory import peak_bytes
from rlhf_fast.kernels.linear_head import _logits, _tiles
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    usable_backends,
)

INF = math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("hidden", "weight", "bias", "A", "B")


@pytest.fixture(params=usable_backends("linear_logprob"))
def device(request):
    with rlhf_fast.use_backend(request.param):
        yield device_of(request.param)


@pytest.fixture(params=["plain", "invariant"])
def mode(request):
    context = rlhf_fast.batch_invariant() if request.param == "invariant" else None
    with context or contextlib.nullcontext():
        yield request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Many slices, blocks and chunks at sizes that a test can afford."""
    monkeypatch.setattr(_tiles, "SLICE", 24)
    monkeypatch.setattr(_tiles, "ROWS", 5)
    monkeypatch.setattr(_logits, "MIN_ROWS", 5)
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", "1")


def make(n, size, vocabulary, dtype=torch.float32, rank=3):
    """hidden, weight, bias, A, B and ids; logits have a standard deviation of about 2."""
    tensors = (
        randn(n, size, seed=1),
        2 * randn(vocabulary, size, seed=2) / math.sqrt(size),
        randn(vocabulary, seed=3),
        randn(rank, size, seed=4) / math.sqrt(size),
        randn(vocabulary, rank, seed=5),
    )
    ids = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(6))
    return *(x.to(dtype) for x in tensors), ids


def logits_of(hidden, weight, bias=None, a=None, b=None, scale=1.0):
    z = hidden @ weight.t()
    if a is not None:
        z = z + 0.5 * ((hidden @ a.t()) @ b.t())
    return scale * z if bias is None else scale * z + bias


def formula(z, ids, temperature=1.0, softcap=None):
    """(logprob, entropy) as a trainer writes them, at z's dtype."""
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lp = torch.log_softmax(z / temperature, -1)
    return lp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(lp.exp() * lp).sum(-1)


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [x for x in tensors if x is not None])


def leaves(tensors, dtype=None, device=None):
    return [
        x.to(device=device, dtype=dtype or x.dtype, copy=True).requires_grad_() for x in tensors
    ]


@pytest.mark.parametrize("sizes", [(7, 5, 3), (13, 32, 129), (3, 64, 5000)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", ["bare", "everything"])
def test_forward_and_backward(device, mode, sizes, dtype, options):
    *tensors, ids = make(*sizes, dtype)
    n = sizes[0]
    full = options == "everything"
    if not full:
        tensors = tensors[:2]
    temperature = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(8)) if full else 1.0
    softcap, scale = (5.0, 0.75) if full else (None, 1.0)
    g, h = randn(n, seed=9), randn(n, seed=10)

    def plain(dtype):
        x = leaves(tensors, dtype)
        t = temperature.to(dtype).unsqueeze(-1) if full else 1.0
        z = logits_of(*x, **({"scale": scale} if full else {}))
        lp, entropy = formula(z, ids, t, softcap)
        return lp, entropy, gradients((lp * g.to(dtype) + entropy * h.to(dtype)).sum(), x)

    ours = leaves(tensors, device=device)
    x, w, *more = ours
    kwargs = {}
    if full:
        kwargs = {
            "bias": more[0], "lora": (more[1], more[2], 0.5), "softcap": softcap,
            "logit_scale": scale, "temperature": temperature.to(device),
        }  # fmt: skip
    with poisoned_memory():
        out = rlhf_fast.linear_logprob_entropy(x, w, ids.to(device), **kwargs)
        grads = gradients((out.logprob * g.to(device) + out.entropy * h.to(device)).sum(), ours)
    true, naive = plain(torch.float64), plain(dtype)
    assert out.logprob.dtype == out.entropy.dtype == torch.float32
    assert_accurate("logprob", out.logprob, true[0], naive[0])
    assert_accurate("entropy", out.entropy, true[1], naive[1])
    for name, a, b, c in zip(NAMES, grads, true[2], naive[2], strict=False):
        assert a.dtype == dtype and a.is_contiguous()
        assert_accurate(f"d {name}", a, b, c)
    alone = rlhf_fast.linear_logprob(x, w, ids.to(device), **kwargs)
    assert_same_bits("logprob alone", alone, out.logprob)


def test_tiles_do_not_show(device, mode, small_tiles):
    *tensors, ids = make(17, 8, 101)
    ours = leaves(tensors, device=device)
    x, w, bias, a, b = ours
    g, h = randn(17, seed=9).to(device), randn(17, seed=10).to(device)
    kwargs = {"bias": bias, "lora": (a, b, 0.5), "softcap": 6.0, "temperature": 0.7}
    out = rlhf_fast.linear_logprob_entropy(x, w, ids.to(device), **kwargs)
    grads = gradients((out.logprob * g + out.entropy * h).sum(), ours)
    true = leaves(tensors, torch.float64)
    lp, entropy = formula(logits_of(*true), ids, 0.7, 6.0)
    expected = gradients((lp * g.double().cpu() + entropy * h.double().cpu()).sum(), true)
    naive = leaves(tensors)
    lp32, entropy32 = formula(logits_of(*naive), ids, 0.7, 6.0)
    rough = gradients((lp32 * g.cpu() + entropy32 * h.cpu()).sum(), naive)
    assert_accurate("logprob", out.logprob, lp, lp32)
    assert_accurate("entropy", out.entropy, entropy, entropy32)
    for name, value, truth, plain in zip(NAMES, grads, expected, rough, strict=True):
        assert_accurate(f"d {name}", value, truth, plain)


def test_weight_gradient_is_rounded_once(device, small_tiles):
    """Hundreds of row blocks: a bf16 accumulator would lose bits at each."""
    x, w, *_, ids = make(1000, 6, 40, torch.bfloat16)
    ours = leaves((x, w), device=device)
    rlhf_fast.linear_logprob(*ours, ids.to(device)).sum().backward()
    true = leaves((x, w), torch.float64)
    z = logits_of(*true)
    formula(z, ids)[0].sum().backward()
    error = (ours[1].grad.double().cpu() - true[1].grad).abs()
    allowed = 2**-8 * true[1].grad.abs() + 1e-3
    if ours[0].is_cuda:  # each gradient of a logit is rounded too, for its tensor-core product
        slopes = torch.nn.functional.one_hot(ids, 40) - z.detach().softmax(-1)
        allowed += 2**-8 * slopes.abs().t() @ true[0].detach().abs()
    assert (error <= allowed).all()


def test_logits_never_exist_at_once(device, monkeypatch):
    """600 x 6000 float32 logits are 14 MB; a chunk or tile of them is at most 4 MB."""
    monkeypatch.setenv("RLHF_FAST_CHUNK_BYTES", str(2**20))
    x, w, *_, ids = (t.to(device) for t in make(600, 1, 6000))
    leaf = x.clone().requires_grad_()

    def call():
        rlhf_fast.linear_logprob(leaf, w, ids).sum().backward()

    assert peak_bytes(call, torch.device(device).type) < 4 * 600 * 6000 / 2


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {3}, {4}, {0, 3, 4}, {0, 1}])
def test_only_needed_gradients(device, wanted):
    *tensors, ids = make(6, 8, 50)
    everything = leaves(tensors, device=device)
    x, w, bias, a, b = everything
    loss = rlhf_fast.linear_logprob(x, w, ids.to(device), bias=bias, lora=(a, b, 0.5)).sum()
    grads = gradients(loss, everything)
    some = [t.to(device).clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    x, w, bias, a, b = some
    rlhf_fast.linear_logprob(x, w, ids.to(device), bias=bias, lora=(a, b, 0.5)).sum().backward()
    for i, (leaf, grad) in enumerate(zip(some, grads, strict=True)):
        if i in wanted:
            assert_same_bits(NAMES[i], leaf.grad, grad)
        else:
            assert leaf.grad is None


def test_masked_rows_are_not_looked_at(device, mode):
    x, w, bias, *_, ids = make(6, 8, 50)
    clean = x.clone()
    x[1], x[3], ids[1], ids[4] = math.nan, INF, 10**6, -100
    bias[7] = 200.0  # exp of it overflows float32
    mask = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, -2.0])
    t = torch.tensor([1.0, 0.0, 1.0, math.nan, 1.0, 1.0])
    ours = leaves((x, w, bias), device=device)
    kwargs = {"bias": ours[2], "mask": mask.to(device), "temperature": t.to(device)}
    with poisoned_memory():
        out = rlhf_fast.linear_logprob_entropy(*ours[:2], ids.to(device), **kwargs)
        grads = gradients((out.logprob + out.entropy).sum(), ours)
    live = torch.tensor([True, False, True, False, False, True])
    true = leaves((clean[live], w, bias), torch.float64)
    naive = leaves((clean[live], w, bias))
    expected = formula(logits_of(*true), ids[live])
    rough = formula(logits_of(*naive), ids[live])
    assert_accurate("logprob", out.logprob[live.to(device)], expected[0], rough[0])
    assert_accurate("entropy", out.entropy[live.to(device)], expected[1], rough[1])
    assert not out.logprob[~live.to(device)].any() and not out.entropy[~live.to(device)].any()
    assert not grads[0][~live.to(device)].any()
    expected = gradients(sum(expected).sum(), true)
    rough = gradients(sum(rough).sum(), naive)
    assert_accurate("d hidden", grads[0][live.to(device)], expected[0], rough[0])
    for name, a, b, c in zip(NAMES[1:], grads[1:], expected[1:], rough[1:], strict=False):
        assert_accurate(f"d {name}", a, b, c)


def test_masked_tokens_reach_no_product_on_the_cpu():
    """Nor do, in the backward pass, tokens without an upstream gradient."""
    x, w, *_, ids = make(10, 8, 50)
    mask = torch.arange(10) < 6
    rows = []

    def watched(a, *others):
        rows.append(a.shape[0])
        return real(a, *others)

    real = _tiles.product
    leaf = w.clone().requires_grad_()
    with rlhf_fast.use_backend("reference"), mock.patch.object(_tiles, "product", watched):
        out = rlhf_fast.linear_logprob(x, leaf, ids, mask=mask)
        out[:4].sum().backward()
    assert rows == [6, 4]


def test_everything_masked_and_empty_batches(device, mode):
    w = randn(9, 4).to(device).requires_grad_()
    x = torch.full((2, 3, 4), math.nan, device=device, requires_grad=True)
    ids = torch.full((2, 3), 77, device=device, dtype=torch.int32)
    out = rlhf_fast.linear_logprob_entropy(x, w, ids, mask=torch.zeros(2, 3, device=device))
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert not out.logprob.any() and not x.grad.any() and not w.grad.any()
    for shape in ((0,), (2, 0)):
        x = torch.zeros(*shape, 4, device=device, requires_grad=True)
        out = rlhf_fast.linear_logprob(x, w, torch.zeros(shape, dtype=torch.int64, device=device))
        out.sum().backward()
        assert out.shape == shape and x.grad.shape == x.shape
        assert rlhf_fast.linear_kl(x, w, x, w).kl.shape == shape


def test_banned_tokens_and_extreme_logits(device, mode, small_tiles):
    """A bias of -inf removes tokens, whole slices of them too; offsets change nothing."""
    x, w, bias, *_, ids = make(6, 8, 100)
    bias[:60:2] = -INF
    bias[60:90] = -INF
    ids = torch.tensor([1, 99, 3, 62, 95, 0])
    for offset in (0.0, 1e4, -1e4, -1000.0):
        ours = leaves((x, w, bias + offset), device=device)
        out = rlhf_fast.linear_logprob_entropy(*ours[:2], ids.to(device), bias=ours[2])
        truth = leaves((x, w, bias + offset), torch.float64)
        z = logits_of(*truth)
        lp = torch.log_softmax(z, -1)
        entropy = -torch.where(z == -INF, 0.0, lp.exp() * lp).sum(-1)
        rough = torch.log_softmax(logits_of(x, w, bias + offset), -1)
        picked = lp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        rough_picked = rough.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        assert_accurate("logprob", out.logprob, picked, rough_picked)
        rough_entropy = -torch.where(rough == -INF, 0.0, rough.exp() * rough).sum(-1)
        assert_accurate("entropy", out.entropy, entropy, rough_entropy)
        (grad,) = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), ours[2])
        assert grad.isfinite().all() and not grad[bias == -INF].any()
    dead = torch.full((100,), -INF, device=device)
    ours = leaves((x, w), device=device)
    out = rlhf_fast.linear_logprob_entropy(*ours, ids.to(device), bias=dead)
    assert (out.logprob == -INF).all() and not out.entropy.any()
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert not ours[0].grad.any() and not ours[1].grad.any()


def test_layouts_and_inputs(device):
    x, w, bias, *_, ids = (t.to(device) for t in make(24, 8, 50))
    x, ids = x.view(2, 3, 4, 8), ids.view(2, 3, 4)
    version = x._version
    out = rlhf_fast.linear_logprob(x, w, ids, bias=bias)
    assert out.shape == (2, 3, 4) and x._version == version
    strided = rlhf_fast.linear_logprob(
        x.transpose(0, 2), w.t().contiguous().t(), ids.transpose(0, 2).int(), bias=bias
    )
    assert_accurate("transposed", strided, out.transpose(0, 2))
    shifted = rlhf_fast.linear_logprob(x[:, :-1], w, ids[:, 1:], bias=bias)
    again = rlhf_fast.linear_logprob(x[:, :-1].contiguous(), w, ids[:, 1:].clone(), bias=bias)
    assert_same_bits("shifted", shifted, again)
    one = rlhf_fast.linear_logprob(x[0, 0, 0], w, ids[0, 0, 0], bias=bias)
    assert_accurate("one row", one, out[0, 0, 0])
    leaf = x.clone().requires_grad_()
    out = rlhf_fast.linear_logprob(leaf, w, ids, bias=bias)
    out.sum().backward(retain_graph=True)  # the upstream gradient has stride 0
    first = leaf.grad.clone()
    out.sum().backward()
    assert_same_bits("second backward", leaf.grad, 2 * first)


@pytest.mark.parametrize("sizes", [(7, 5), (33, 50), (64, 200), (100, 2100)])
def test_a_row_does_not_depend_on_the_others(device, sizes):
    x, w, bias, a, b, ids = (t.to(device) for t in make(70, *sizes))
    t = 0.5 + torch.rand(70, generator=torch.Generator().manual_seed(8)).to(device)

    def run(rows):
        leaf = x[rows].clone().requires_grad_()
        with rlhf_fast.batch_invariant():
            out = rlhf_fast.linear_logprob_entropy(
                leaf, w, ids[rows], bias=bias, lora=(a, b, 0.5), temperature=t[rows]
            )
            kl = rlhf_fast.linear_kl(leaf, w, x[rows].flip(-1), w, ids=ids[rows])
        # The choice holds for a backward pass outside the block.
        (grad,) = torch.autograd.grad(
            out.logprob.sum() + 0.5 * out.entropy.sum() + kl.kl.sum(), leaf
        )
        return out.logprob, out.entropy, kl.kl, kl.ref_logprob, grad

    everything = run(torch.arange(70))
    permuted = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    for rows in (permuted, torch.tensor([3]), torch.tensor([69, 0]), torch.arange(1, 70, 2)):
        for part, whole in zip(run(rows), everything, strict=True):
            assert_same_bits("row", part, whole[rows])


def test_run_to_run(device, mode):
    *tensors, ids = make(40, 16, 300)

    def run():
        ours = leaves(tensors, device=device)
        x, w, bias, a, b = ours
        out = rlhf_fast.linear_logprob(x, w, ids.to(device), bias=bias, lora=(a, b, 0.5))
        return out, *gradients(out.sum(), ours)

    for first, second in zip(run(), run(), strict=True):
        assert_same_bits("run to run", first, second)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_ids", [False, True])
def test_linear_kl(device, mode, small_tiles, dtype, with_ids):
    x, w, *_, ids = make(9, 8, 101, dtype)
    ref_x, ref_w = 1.3 * randn(9, 5, seed=21), randn(101, 5, seed=22)
    ref_x, ref_w = ref_x.to(dtype), ref_w.to(dtype)
    t = 0.5 + torch.rand(9, generator=torch.Generator().manual_seed(8))
    mask = torch.ones(9)
    mask[4] = 0
    dirty = x.clone()
    dirty[4] = math.nan
    f, g, h = (randn(9, seed=s) * mask for s in (9, 10, 11))
    if not with_ids:
        g = torch.zeros(9)

    def plain(dtype):
        ours = leaves((x, w), dtype)
        z = logits_of(*ours) / t.to(dtype).unsqueeze(-1)
        r = (ref_x.to(dtype) @ ref_w.to(dtype).t()) / t.to(dtype).unsqueeze(-1)
        log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(r, -1)
        values = (
            (log_p.exp() * (log_p - log_q)).sum(-1),
            log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
            log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
            -(log_p.exp() * log_p).sum(-1),
        )
        loss = (f.to(dtype) * values[0] + g.to(dtype) * values[1] + h.to(dtype) * values[3]).sum()
        return [v * mask.to(dtype) for v in values], gradients(loss, ours)

    ours = leaves((dirty, w, ref_x, ref_w), device=device)
    out = rlhf_fast.linear_kl(
        *ours, ids=ids.to(device) if with_ids else None, temperature=t.to(device),
        mask=mask.to(device),
    )  # fmt: skip
    loss = (f.to(device) * out.kl).sum() + (h.to(device) * out.entropy).sum()
    if with_ids:
        loss = loss + (g.to(device) * out.logprob).sum()
    loss.backward()
    true, naive = plain(torch.float64), plain(dtype)
    for name, value, a, b in zip(out._fields, out, *(p[0] for p in (true, naive)), strict=True):
        if value is None:
            assert not with_ids and name in ("logprob", "ref_logprob")
        else:
            assert_accurate(name, value, a, b)
    assert_accurate("d hidden", ours[0].grad, true[1][0], naive[1][0])
    assert_accurate("d weight", ours[1].grad, true[1][1], naive[1][1])
    assert ours[2].grad is None and ours[3].grad is None
    assert not with_ids or not out.ref_logprob.requires_grad


def test_linear_kl_equals_that_of_logits(device, small_tiles):
    """Identity of the two rooms, with ids of -100, and offsets of 1e4 between the heads."""
    x, w, *_, ids = make(9, 8, 101)
    ref = randn(9, 8, seed=31)
    x[:, 0], w[:, 0] = 100.0, 100.0
    ids[2] = -100
    out = rlhf_fast.linear_kl(*(t.to(device) for t in (x, w, ref, w)), ids=ids.to(device))
    with rlhf_fast.use_backend("reference"):
        wide = rlhf_fast.kl_divergence_full(*(t.double() @ w.double().t() for t in (x, ref)), ids)
        plain = rlhf_fast.kl_divergence_full(x @ w.t(), ref @ w.t(), ids)
    for name, a, b, c in zip(out._fields, out, wide, plain, strict=True):
        assert_accurate(name, a, b, c)
        assert a[2] == 0


def test_autocast_does_not_reach_the_head(device):
    x, w, *_, ids = (t.to(device) for t in make(9, 8, 50))
    leaf = x.clone().requires_grad_()
    alone = rlhf_fast.linear_logprob(leaf, w, ids)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        inside = rlhf_fast.linear_logprob(leaf, w, ids)
        kl = rlhf_fast.linear_kl(leaf, w, x, w.flip(0)).kl
        grads = [torch.autograd.grad(y.sum(), leaf)[0] for y in (inside, kl)]
    assert_same_bits("logprob", inside, alone)
    assert_same_bits("d logprob", grads[0], torch.autograd.grad(alone.sum(), leaf)[0])
    kl = rlhf_fast.linear_kl(leaf, w, x, w.flip(0)).kl
    assert_same_bits("d kl", grads[1], torch.autograd.grad(kl.sum(), leaf)[0])


def test_double_backward_raises(device):
    x, w, *_, ids = (t.to(device) for t in make(3, 4, 7))
    leaf = x.clone().requires_grad_()
    for loss in (
        rlhf_fast.linear_logprob(leaf, w, ids).sum(),
        rlhf_fast.linear_kl(leaf, w, x, w).kl.sum(),
    ):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_gradcheck_of_the_reference():
    tensors = [t.double().requires_grad_() for t in make(3, 4, 6)[:-1]]
    ids, t = torch.tensor([0, 5, 2]), torch.tensor([0.5, 1.0, 2.0])

    def function(x, w, bias, a, b):
        return rlhf_fast.linear_logprob_entropy(
            x, w, ids, bias=bias, temperature=t, softcap=3.0, logit_scale=0.7, lora=(a, b, 0.5)
        )

    assert torch.autograd.gradcheck(function, tensors)
    ref, ref_w = (randn(n, 2, seed=n, dtype=torch.float64) for n in (3, 6))

    def divergence(x, w):
        out = rlhf_fast.linear_kl(x, w, ref, ref_w, ids=ids, temperature=t)
        return out.kl, out.logprob, out.entropy

    assert torch.autograd.gradcheck(divergence, tensors[:2])


def test_torch_library_and_compile():
    *tensors, ids = make(4, 5, 9)
    x, w, bias, a, b = leaves(tensors)
    mask = torch.tensor([True, True, False, True])
    ops = torch.ops.rlhf_fast
    everything = (x, w, ids, bias, a, b, mask, 0.7, None, 5.0, 0.9, 0.5, -100, "", False, 0, "")
    bare = (
        x, w, ids, None, None, None, None, 1.0, mask + 0.5, None, 1.0, 1.0, -100, "", True, 0, "",
    )  # fmt: skip
    for arguments in (everything, bare):
        torch.library.opcheck(ops.linear_logprob.default, arguments)
        torch.library.opcheck(ops.linear_logprob_entropy.default, arguments)
    pair = (x, w, x.detach().clone(), w.detach().clone())
    torch.library.opcheck(ops.linear_kl.default, (*pair, ids, mask, 0.7, None, False, 0, ""))
    torch.library.opcheck(ops.linear_kl.default, (*pair, None, None, 1.0, mask + 0.5, False, 0, ""))

    def function(x, w, bias, a, b):
        out = rlhf_fast.linear_logprob_entropy(x, w, ids, bias=bias, lora=(a, b, 0.5), mask=mask)
        kl = rlhf_fast.linear_kl(x, w, pair[2], pair[3], ids=ids)
        alone = rlhf_fast.linear_logprob(x, w, ids, temperature=0.5)
        return out.logprob + 2 * out.entropy + 3 * kl.kl + alone

    eager = function(x, w, bias, a, b)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x, w, bias, a, b)
    assert_same_bits("compiled", compiled, eager)
    for name, p, q in zip(
        NAMES,
        gradients(compiled.sum(), (x, w, bias, a, b)),
        gradients(eager.sum(), (x, w, bias, a, b)),
        strict=True,
    ):
        assert_accurate(name, p, q)


def test_batch_invariance_from_the_environment(monkeypatch):
    x, w, *_, ids = make(70, 33, 50)
    monkeypatch.setenv("RLHF_FAST_BATCH_INVARIANT", "1")
    by_variable = rlhf_fast.linear_logprob(x, w, ids)
    monkeypatch.delenv("RLHF_FAST_BATCH_INVARIANT")
    with rlhf_fast.batch_invariant():
        by_context = rlhf_fast.linear_logprob(x, w, ids)
    assert_same_bits("environment", by_variable, by_context)


X, W, IDS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
LORA = (torch.zeros(2, 3), torch.zeros(5, 2), 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.tensor([0, 5])}, IndexError, r"ids: expected values in \[0, 5\), got 5"),
        ({"ids": torch.tensor([0, -1])}, IndexError, "got -1"),
        ({"ids": torch.tensor([0])}, ValueError, r"ids: expected shape \(2,\)"),
        ({"ids": torch.tensor([0.0, 1.0])}, TypeError, "ids: expected int32 or int64"),
        ({"hidden": X.int()}, TypeError, "hidden: expected float64"),
        ({"hidden": torch.zeros(2, 4)}, ValueError, r"weight: expected shape \[V, 4\]"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "V >= 1"),
        ({"weight": W.double()}, TypeError, "weight: expected float32 .that of hidden."),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\)"),
        ({"bias": torch.zeros(5).int()}, TypeError, "bias: expected float64"),
        ({"mask": torch.ones(3)}, ValueError, "mask: expected shape"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature: expected positive"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale"),
        ({"lora": LORA[:2]}, ValueError, "lora: expected three entries"),
        ({"lora": 3.0}, TypeError, "lora: expected a tuple"),
        ({"lora": (LORA[0].t(), *LORA[1:])}, ValueError, "lora A: expected shape"),
        ({"lora": (LORA[0], LORA[1].t(), 1.0)}, ValueError, "lora B: expected shape"),
        ({"group": "world"}, TypeError, "group: expected None or a torch.distributed.ProcessGroup"),
    ],
)
def test_errors_name_the_argument(device, change, error, message, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_DEBUG", "1")  # a GPU's values are looked at only then
    arguments = {"hidden": X, "weight": W, "ids": IDS} | change
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), arguments)
    with pytest.raises(error, match=message):
        rlhf_fast.linear_logprob_entropy(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.tensor([0, 5])}, IndexError, "ids: expected values in"),
        ({"ref_weight": torch.zeros(4, 3)}, ValueError, "ref_weight: expected shape"),
        ({"ref_weight": torch.zeros(5, 2)}, ValueError, "ref_weight: expected shape"),
        ({"ref_hidden": torch.zeros(3, 3)}, ValueError, "ref_hidden: expected shape"),
        ({"mask": torch.ones(3)}, ValueError, "mask: expected shape"),
        ({"temperature": -1.0}, ValueError, "temperature"),
    ],
)
def test_errors_of_linear_kl(change, error, message):
    arguments = {"hidden": X, "weight": W, "ref_hidden": X, "ref_weight": W} | change
    with pytest.raises(error, match=message):
        rlhf_fast.linear_kl(**arguments)
