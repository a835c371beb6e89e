"""Known traps of log-prob and KL kernels that the ops' own tests leave out, on every backend.

What is tested beside it: -inf, rows near -1000, offsets, masks, gradients, bits and the first real
vocabularies in test_logprob.py, test_kl.py and test_linear_head.py; instruction sets, alignments
and rows 2^31 elements apart in test_native.py, test_kl_native.py and test_triton.py.
"""

import importlib
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import rlhf_fast
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    randn,
    usable_backends,
)

INF = math.inf
LOGITS_OPS = ("logprob_entropy", "kl_divergence_full")
EVERY_OP = (*LOGITS_OPS, "linear_logprob_entropy", "linear_kl", "linear_ppo_loss")


def over_backends(*ops):
    """Parametrise by every (op, backend) pair that can run here."""
    pairs = [(op, backend) for op in ops for backend in usable_backends(op)]
    return pytest.mark.parametrize(("op", "backend"), pairs)


def pick_ids(rows, vocabulary):
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(11))


def parts(op, logits, ids, ref=None, **options):
    """The differentiable outputs of a logits op, and those of the reference model."""
    if op == "logprob_entropy":
        return tuple(rlhf_fast.logprob_entropy(logits, ids, **options))
    out = rlhf_fast.kl_divergence_full(logits, ref, ids, **options)
    return out.logprob, out.entropy, out.kl


def formula(op, logits, ids, ref=None, temperature=1.0, softcap=None):
    """The same with `torch.log_softmax`, for finite logits, at their dtype."""
    if torch.is_tensor(temperature):
        temperature = temperature.to(logits.dtype).unsqueeze(-1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lp = torch.log_softmax(logits / temperature, -1)
    picked, p = lp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), lp.exp()
    out = picked, -(p * lp).sum(-1)
    if op == "logprob_entropy":
        return out
    lq = torch.log_softmax(ref.to(logits.dtype) / temperature, -1)
    return *out, torch.where(p > 0, p * (lp - lq), 0.0).sum(-1)


def assert_right(op, backend, logits, ids, ref=None, **options):
    """Outputs, and the gradient of their weighted sum, against float64."""

    def run(function, z, device="cpu"):
        leaf = z.detach().to(device, copy=True).requires_grad_()
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
        other = None if ref is None else ref.to(device)
        out = function(op, leaf, ids.to(device), other, **moved)
        weights = [randn(len(ids), seed=20 + i).to(x) for i, x in enumerate(out)]
        loss = sum((w * x).sum() for w, x in zip(weights, out, strict=True))
        return (*out, *torch.autograd.grad(loss, leaf))

    with rlhf_fast.use_backend(backend):
        ours = run(parts, logits, device_of(backend))
    truth, plain = run(formula, logits.double()), run(formula, logits.float())
    for i, found in enumerate(zip(ours, truth, plain, strict=True)):
        assert_accurate(f"{op}: {i}", *found)


# ---------------------------------------------------------------------- sizes and magnitudes


@over_backends("kl_divergence_full")
@pytest.mark.parametrize("vocabulary", [50257, 151935, 151936, 151937])
def test_kl_over_vocabularies_of_real_models(op, backend, vocabulary):
    ids = torch.tensor([vocabulary - 1])
    logits, ref = (2 * randn(1, vocabulary, seed=s) for s in (1, 2))
    assert_right(op, backend, logits, ids, ref)


@over_backends("linear_logprob_entropy")
@pytest.mark.parametrize("vocabulary", [1, 50257, 151935, 151936, 151937])
def test_heads_of_real_models(op, backend, vocabulary):
    x, w = randn(2, 4, seed=1), randn(vocabulary, 4, seed=2)
    ids = torch.tensor([vocabulary - 1, 0])

    def run(function, dtype, device="cpu"):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, w)]
        out = function(*leaves, ids.to(device))
        return *out, *torch.autograd.grad(sum(out).sum(), leaves)

    def plain(x, w, ids):
        return formula("logprob_entropy", x @ w.t(), ids)

    with rlhf_fast.use_backend(backend):
        ours = run(rlhf_fast.linear_logprob_entropy, torch.float32, device_of(backend))
    found = zip(ours, run(plain, torch.float64), run(plain, torch.float32), strict=True)
    for i, values in enumerate(found):
        assert_accurate(f"{op}: {i}", *values)


@over_backends(*LOGITS_OPS)
@pytest.mark.parametrize("largest", [7e4, 1e9, 3e38])
def test_logits_beyond_half_precision(op, backend, largest):
    """Beyond float16, and so far apart that their difference overflows float32: 0 times -inf."""
    logits, ref = 2 * randn(4, 300, seed=1), 2 * randn(4, 300, seed=2)
    logits[0, 7], logits[1, 299], logits[2, 0] = largest, -largest, largest
    logits[2, 1] = -largest
    logits[3] = logits[3].clamp(-1, 1) * largest / 3
    ids = torch.tensor([7, 5, 0, int(logits[3].argmax())])
    assert_right(op, backend, logits, ids, ref)
    if op == "logprob_entropy":
        assert_right(op, backend, logits, ids, softcap=5.0, temperature=0.7)


@over_backends("kl_divergence_full")
def test_a_finite_kl_however_far_the_reference(op, backend):
    """1e38 nats are not the infinite KL of a reference that excludes the token."""
    ref = torch.tensor([[1e38, -1e38], [0.0, -3e38]])
    assert_right(op, backend, torch.zeros(2, 2), torch.tensor([0, 0]), ref)


@over_backends(*LOGITS_OPS)
@pytest.mark.parametrize("temperature", [1e-3, 1e4, 1e30])
def test_temperatures_far_from_one(op, backend, temperature):
    logits, ref = 3 * randn(3, 200, seed=1), 3 * randn(3, 200, seed=2)
    if temperature < 1:
        ref *= temperature  # else a KL of 1e4 hides what else is wrong
    best = logits.argmax(-1)
    assert_right(op, backend, logits, best, ref, temperature=temperature)
    assert_right(op, backend, logits, best, ref, temperature=torch.full((3,), temperature))


@over_backends("kl_divergence_full")
def test_an_offset_costs_kl_no_digits_at_any_temperature(op, backend):
    z, ref = ((16 * randn(4, 50, seed=s)).round() / 16 for s in (1, 2))  # exact with an offset
    z, ref, ids = (x.to(device_of(backend)) for x in (z, ref, torch.tensor([0, 1, 2, 49])))
    with rlhf_fast.use_backend(backend):
        base = rlhf_fast.kl_divergence_full(z, ref, ids, temperature=0.7)
        for a, b in ((-1000, 0), (0, -1e4), (1e4, -100)):
            out = rlhf_fast.kl_divergence_full(z + a, ref + b, ids, temperature=0.7)
            for name, x, y in zip(out._fields, out, base, strict=True):
                assert_same_bits(name, x, y)


@over_backends(*LOGITS_OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_nearly_certain_token_is_rounded_last(op, backend, dtype):
    """p - 1 for p near 1: rounding p first would leave 0 or 2^-8 of a true 1e-2 to 1e-4."""
    logits = torch.zeros(6, 64)
    logits[:, 5] = torch.tensor([8.0, 9.0, 10.0, 11.0, 12.0, 13.0])
    leaf = logits.to(dtype).to(device_of(backend)).requires_grad_()
    ids = torch.full((6,), 5, device=leaf.device)
    with rlhf_fast.use_backend(backend):
        out = parts(op, leaf, ids, leaf.detach())[0]
        out.sum().backward()
    z = logits.double()
    rest = 63 / (63 + z[:, 5].exp())
    assert rest.max() < 0.03 and rest.min() > 1e-4
    ratio = leaf.grad[:, 5].cpu().double() / rest
    assert_accurate("1 - p, relative", ratio.to(dtype), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("backend", usable_backends("linear_logprob"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_temperature_does_not_round_hidden_states(backend, dtype):
    """Held to float32 arithmetic on the half-precision inputs, not to half precision."""
    x, w = randn(5, 64, seed=1).to(dtype), randn(300, 64, seed=2).to(dtype)
    ids, t = pick_ids(5, 300), 0.5 + torch.arange(5) / 7
    with rlhf_fast.use_backend(backend):
        device = device_of(backend)
        out = rlhf_fast.linear_logprob_entropy(
            x.to(device), w.to(device), ids.to(device), temperature=t.to(device), logit_scale=0.3
        )
    truth, plain = (
        formula("logprob_entropy", 0.3 * (x.to(kind) @ w.to(kind).t()), ids, temperature=t)
        for kind in (torch.float64, torch.float32)
    )
    assert_accurate("logprob", out.logprob, truth[0], plain[0])
    assert_accurate("entropy", out.entropy, truth[1], plain[1])


@pytest.mark.parametrize("backend", usable_backends("linear_logprob"))
def test_hidden_states_more_than_two_to_the_31_elements_apart(backend):
    """Only the pages of two short rows of the 4.3 GB buffer are ever touched."""
    device = device_of(backend)
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device)
    far = far.as_strided((2, 8), (2**31, 1))
    far.copy_(randn(2, 8, seed=1))
    w, ids = randn(30, 8, seed=2).bfloat16().to(device), torch.tensor([3, 29], device=device)
    with rlhf_fast.use_backend(backend):
        out = rlhf_fast.linear_logprob(far, w, ids)
        assert_same_bits("logprob", out, rlhf_fast.linear_logprob(far.clone(), w, ids))


# ------------------------------------------------------------------------------- every op


def inputs_of(op, backend, rows=4, vocabulary=40):
    """(leaves, data) on the device of `backend`: logits, or hidden states and a head."""
    device = device_of(backend)
    data = {"ids": pick_ids(rows, vocabulary), "old": -3 - randn(rows, seed=5).abs()}
    if op in LOGITS_OPS:
        leaves = [2 * randn(rows, vocabulary, seed=1)]
        data["ref"] = 2 * randn(rows, vocabulary, seed=2)
    else:
        leaves = [randn(rows, 8, seed=1), randn(vocabulary, 8, seed=2)]
        data |= {"ref": randn(rows, 8, seed=3), "head": randn(vocabulary, 8, seed=4)}
    leaves = [x.to(device).requires_grad_() for x in leaves]
    return leaves, {name: x.to(device) for name, x in data.items()}


def outputs_of(op, leaves, data, temperature=0.7, **options):
    """The differentiable outputs of any of the ops."""
    ids = data["ids"]
    options = {**options, "temperature": temperature}
    if op in LOGITS_OPS:
        return parts(op, *leaves, ids, data["ref"], **options)
    if op == "linear_logprob_entropy":
        return tuple(rlhf_fast.linear_logprob_entropy(*leaves, ids, **options))
    if op == "linear_kl":
        out = rlhf_fast.linear_kl(*leaves, data["ref"], data["head"], ids=ids, **options)
        return out.logprob, out.entropy, out.kl
    old = data["old"]
    options |= {"clip_low": None}
    return (rlhf_fast.linear_ppo_loss(*leaves, ids, old, -old, old != 0, **options).loss,)


def weight_of(out, i):
    return randn(*out.shape, seed=9 + i).to(out)


def gradients(out, leaves):
    return torch.autograd.grad(sum((weight_of(x, i) * x).sum() for i, x in enumerate(out)), leaves)


@over_backends(*EVERY_OP[2:])
def test_a_head_of_one_token(op, backend):
    with rlhf_fast.use_backend(backend):
        leaves, data = inputs_of(op, backend, vocabulary=1)
        out = outputs_of(op, leaves, {**data, "old": torch.full_like(data["old"], -1e-30)})
        found = (*out, *gradients(out, leaves))
    for x in found:
        assert_accurate(op, x, torch.zeros_like(x, dtype=torch.float64))


@over_backends(*EVERY_OP)
def test_an_output_that_is_not_used_takes_no_part(op, backend):
    """Gradients of single outputs add up to that of all of them: none is taken for another."""
    with rlhf_fast.use_backend(backend):
        leaves, data = inputs_of(op, backend)
        out = outputs_of(op, leaves, data)
        singles = [
            torch.autograd.grad((weight_of(x, i) * x).sum(), leaves, retain_graph=True)
            for i, x in enumerate(out)
        ]
        whole = gradients(out, leaves)
    for a, *b in zip(whole, *singles, strict=True):
        assert_accurate("gradient", a, sum(x.double() for x in b))


@over_backends(*EVERY_OP)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(op, backend, reentrant):
    with rlhf_fast.use_backend(backend):
        leaves, data = inputs_of(op, backend)
        plain = gradients(outputs_of(op, leaves, data), leaves)

        def loss(*x):
            return sum((weight_of(y, i) * y).sum() for i, y in enumerate(outputs_of(op, x, data)))

        checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, b in zip(leaves, plain, strict=True):
        assert_same_bits("gradient", leaf.grad, b)


@over_backends(*EVERY_OP)
def test_autocast_changes_no_bit(op, backend):
    """A float32 head stays one, and a backward pass outside the block is the same."""
    with rlhf_fast.use_backend(backend):
        leaves, data = inputs_of(op, backend)
        plain = outputs_of(op, leaves, data)
        with torch.autocast(device_of(backend), dtype=torch.bfloat16):
            inside = outputs_of(op, leaves, data)
        grads = [gradients(out, leaves) for out in (inside, plain)]
    for a, b in zip((*inside, *grads[0]), (*plain, *grads[1]), strict=True):
        assert_same_bits(op, a, b)


@over_backends(*EVERY_OP[:-1])
def test_views_and_stride_0_gradients(op, backend):
    """`[:, :-1]` of a batch, and an upstream gradient that is one number expanded."""
    with rlhf_fast.use_backend(backend):
        leaves, data = inputs_of(op, backend, rows=6)
        batch = leaves[0].detach().view(2, 3, -1)
        view = batch[:, :-1].detach().requires_grad_()
        assert not view.is_contiguous()
        dense = batch[:, :-1].flatten(0, 1).requires_grad_()
        for name in data.keys() - {"head"}:
            data[name] = data[name].view(2, 3, *data[name].shape[1:])[:, :-1]
        flat = {k: x if k == "head" else x.flatten(0, 1) for k, x in data.items()}
        a = sum(outputs_of(op, [view, *leaves[1:]], data))
        b = sum(outputs_of(op, [dense, *leaves[1:]], flat))
        grads = [torch.autograd.grad(x.sum(), z)[0] for x, z in ((a, view), (b, dense))]
    assert_same_bits(op, a.flatten(), b)
    assert_same_bits("gradient", grads[0].flatten(0, 1), grads[1])


@over_backends(*EVERY_OP[:-1])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_broken_row_stays_alone(op, backend, bad):
    """NaN or infinite logits in a row that counts: the other rows keep every bit."""
    with rlhf_fast.use_backend(backend), rlhf_fast.batch_invariant():
        leaves, data = inputs_of(op, backend)
        clean = outputs_of(op, leaves, data)
        before = gradients(clean, leaves)[0]
        leaves[0].data[1, 3] = bad
        broken = outputs_of(op, leaves, data)
        after = gradients(broken, leaves)[0]
    assert broken[0][1].isnan() or not broken[0][1].isfinite()
    rows = [0, 2, 3]
    for a, b in zip((*broken, after), (*clean, before), strict=True):
        assert_same_bits(op, a[rows], b[rows])


@over_backends("logprob_entropy", "linear_logprob_entropy", "linear_ppo_loss")
@pytest.mark.parametrize("index", [3, -1, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_number_may_be_the_ignored_id(op, backend, index, dtype):
    """Inside the vocabulary too; the usual -100 is then an id out of range."""
    with rlhf_fast.use_backend(backend):
        leaves, data = inputs_of(op, backend)
        data["ids"] = torch.tensor([index, 5, 39, index], dtype=dtype, device=data["ids"].device)
        out = outputs_of(op, leaves, data, ignore_index=index)
        got = gradients(out, leaves)
        live = {name: x[1:3] for name, x in data.items()}
        expected = outputs_of(op, [leaves[0][1:3], *leaves[1:]], live)
        if op != "linear_ppo_loss":
            for a, b in zip(out, expected, strict=True):
                assert not a[[0, 3]].any()
                assert_accurate(op, a[1:3], b.double())
        assert not got[0][[0, 3]].any() and got[0][1:3].all()
        if not torch.cuda.is_available():
            data["ids"][1] = -100
            with pytest.raises(IndexError, match="got -100"):
                outputs_of(op, leaves, data, ignore_index=index)


@pytest.mark.parametrize("backend", usable_backends("linear_ppo_loss"))
@pytest.mark.parametrize("kind", ["ppo", "cispo", "gspo", "sapo", "reinforce"])
def test_no_advantage_times_a_huge_ratio_is_nothing(backend, kind):
    """0 times an infinite ratio; log-ratios of 100 and 1000, of -100, and infinite ones."""
    with rlhf_fast.use_backend(backend):
        leaves, data = inputs_of("linear_ppo_loss", backend, rows=6)
        old = torch.tensor([-100.0, -1000.0, 100.0, -INF, INF, -3.0], device=data["ids"].device)
        zero = torch.zeros_like(old)
        out = rlhf_fast.linear_ppo_loss(*leaves, data["ids"], old, zero, zero == 0, kind=kind)
        grads = torch.autograd.grad(out.loss, leaves)
    assert out.loss == 0
    assert not any(g.any() for g in grads)


# ------------------------------------------------------------------------------- compilers


@pytest.mark.parametrize("op", EVERY_OP)
def test_no_recompilation_for_another_size_or_temperature(op):
    """The graph after the first change of size serves every later one. A temperature that changes
    is given as a tensor: torch.compile makes a graph per value of a number that an op takes."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(outputs_of, fullgraph=True, backend=counter)
    counts = []
    for rows, number in ((4, 0.7), (5, 0.8), (6, 0.9), (7, 1.1), (9, 2.0)):
        leaves, data = inputs_of(op, "reference", rows, vocabulary=38 + rows)
        temperature = torch.tensor(number)
        got = compiled(op, leaves, data, temperature=temperature)
        expected = outputs_of(op, leaves, data, temperature=temperature)
        for x, y in zip(got, expected, strict=True):
            assert_same_bits(op, x, y)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("room", ["logprob", "kl"])
def test_no_triton_kernel_is_compiled_for_a_size_or_a_temperature(room):
    """Fixed when they are compiled: blocks, and which formula. Nothing is tuned by trial."""
    pytest.importorskip("triton")
    module = importlib.import_module(f"rlhf_fast.kernels.{room}._triton")
    kernels = [x for x in vars(module).values() if hasattr(x, "arg_names") and hasattr(x, "fn")]
    assert kernels
    for kernel in kernels:
        fixed = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in kind}
        assert fixed <= {"HAS_SOFTCAP", "WEIGHTED", "ESTIMATOR", "LOG2_LANES", "BLOCK", "BLOCK_V"}
        assert not hasattr(kernel, "configs")


def test_a_head_in_two_roles_compiles_right():
    """Tied and transposed weights, and a tensor passed twice: compilers have lost gradients."""
    ids = pick_ids(4, 8)

    def function(x, w):
        tied = rlhf_fast.linear_logprob(x @ w.t(), w.t().contiguous().t(), ids)
        return tied + rlhf_fast.linear_kl(x, w, x, w, ids=ids).logprob + (x @ w).sum(-1)

    torch._dynamo.reset()
    leaves = [randn(4, 8, seed=1).requires_grad_(), randn(8, 8, seed=2).requires_grad_()]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outs = compiled(*leaves), function(*leaves)
    grads = [torch.autograd.grad(out.sum(), leaves) for out in outs]
    for x, y in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert_accurate("compiled", x, y.double())
