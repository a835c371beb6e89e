"""Gradients, broadcasting and errors of `sample` and `replay_logprob`."""

import math

import pytest
import torch

import rlhf_fast
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    usable_backends,
)
from tests.sample_truth import FLOATS, INF, PARAMETERS, quick_backends, replay_all


@pytest.fixture(params=usable_backends("replay_logprob"))
def replayer(request):
    with rlhf_fast.use_backend(request.param, op="replay_logprob"):
        yield device_of(request.param)


@pytest.fixture(params=quick_backends("replay_logprob"))
def quick_replayer(request):
    with rlhf_fast.use_backend(request.param, op="replay_logprob"):
        yield device_of(request.param)


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_replay(quick_replayer, parameters, dtype):
    device = quick_replayer
    logits = (2 * randn(3, 4, 50, seed=9)).to(dtype)
    flat = logits.flatten(0, 1)
    kept = replay_all(flat, **parameters)[0] > -INF
    ids = torch.where(kept, torch.rand(kept.shape), -1.0).argmax(-1)
    g, h = randn(3, 4, seed=1), randn(3, 4, seed=2)
    x = logits.clone().to(device).requires_grad_()
    with poisoned_memory():
        logprob, log_mass = rlhf_fast.replay_logprob(x, ids.view(3, 4).to(device), **parameters)
        ((logprob * g.to(device)).sum() + (log_mass * h.to(device)).sum()).backward()

    def through_autograd(z):
        u = z / parameters.get("temperature", 1.0)
        inside = u.masked_fill(~kept, -INF)
        mass = inside.logsumexp(-1) - u.logsumexp(-1)
        lp = inside.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        ((lp * g.flatten()).sum() + (mass * h.flatten()).sum()).backward()
        return z.grad.view(logits.shape)

    true = through_autograd(flat.double().requires_grad_())
    plain = through_autograd(flat.float().requires_grad_())
    assert x.grad.dtype == dtype
    assert_accurate("gradient", x.grad, true.to(dtype).double(), plain.to(dtype))


def test_gradcheck_of_the_reference():
    logits = randn(2, 3, 7, seed=10, dtype=torch.float64).requires_grad_()
    ids = logits.detach().argsort(-1, descending=True)[..., 1]
    for parameters in PARAMETERS[:-1]:
        assert torch.autograd.gradcheck(
            lambda x, p=parameters: rlhf_fast.replay_logprob(x, ids, **p), (logits,)
        )


def test_no_gradient_outside_the_kept_set(replayer):
    logits = torch.tensor(
        [[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, -INF, 0.0], [-INF] * 4], device=replayer
    ).requires_grad_()
    ids = torch.tensor([3, 2, 0], device=replayer)
    logprob, log_mass = rlhf_fast.replay_logprob(logits, ids, top_k=2)
    assert (logprob == -INF).all()
    logprob.backward(torch.tensor([1.0, math.nan, INF], device=replayer), retain_graph=True)
    assert not logits.grad.any()
    log_mass.sum().backward()
    assert logits.grad[:2].any(-1).all() and not logits.grad[2].any()
    assert logits.grad.isfinite().all() and logits.grad[1, 2] == 0


def test_upstream_gradients_and_double_backward(replayer):
    logits = randn(4, 20, seed=11).to(replayer).requires_grad_()
    ids = logits.argmax(-1).int()
    options = {"top_k": torch.tensor(5), "temperature": torch.ones(1).requires_grad_()}
    logprob, log_mass = rlhf_fast.replay_logprob(logits[:, :19], ids.clamp(max=18), **options)
    logprob.sum().backward(retain_graph=True)  # a stride-0 upstream gradient
    first = logits.grad.clone()
    logprob.backward(torch.ones_like(logprob), retain_graph=True)
    assert_same_bits("twice", logits.grad, 2 * first)
    (grad,) = torch.autograd.grad(log_mass.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_parameters_broadcast_to_ids(replayer):
    logits = randn(3, 4, 20, seed=12).to(replayer)
    ids = logits.argmax(-1)
    per_row = torch.tensor([0.5, 1.0, 2.0], device=replayer).view(3, 1)
    per_column = torch.tensor([0, 3, 5, 50], device=replayer)
    logprob, log_mass = rlhf_fast.replay_logprob(
        logits, ids, temperature=per_row, top_k=per_column, min_p=torch.tensor(0.25)
    )
    for i in range(3):
        for j in range(4):
            alone = rlhf_fast.replay_logprob(
                logits[i, j], ids[i, j], temperature=per_row[i].item(),
                top_k=per_column[j].item(), min_p=0.25,
            )  # fmt: skip
            assert_same_bits("logprob", logprob[i, j], alone[0])
            assert_same_bits("log_mass", log_mass[i, j], alone[1])
    empty = rlhf_fast.replay_logprob(logits[:0], ids[:0], temperature=torch.ones(1, 4), top_k=3)
    assert [x.shape for x in empty] == [(0, 4)] * 2


def test_replay_lets_nan_through(replayer):
    logits = torch.tensor([[0.0, math.nan], [INF, 0.0], [0.0, 1.0]], device=replayer)
    for top_k in (0, 1):
        logprob, log_mass = rlhf_fast.replay_logprob(logits, torch.ones(3).long(), top_k=top_k)
        assert logprob.isnan().tolist() == log_mass.isnan().tolist() == [True, True, False]


def test_compiled_without_a_graph_break():
    """Ints that change from call to call, tensors, and a loss that uses one of the two results."""

    def step(logits, seed, position):
        ids = rlhf_fast.sample(logits, seed=seed, position=position, top_k=5).ids
        return rlhf_fast.replay_logprob(logits, ids, top_k=5)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    logits = randn(4, 20, seed=13).requires_grad_()
    rows = torch.arange(4)
    for seed, position in ((1, 0), (2, 1), (2**64 - 1, 2), (rows, 3), (rows, rows)):
        for used in (0, 1):
            outputs, gradients = [], []
            for function in (step, compiled):
                outputs += function(logits, seed, position)
                gradients += torch.autograd.grad(outputs[-2 + used].sum(), logits)
            assert_same_bits("logprob", outputs[2], outputs[0])
            assert_same_bits("log_mass", outputs[3], outputs[1])
            assert_same_bits("gradient", *gradients)


# ---------------------------------------------------------------------------------------- errors


def draw(logits=None, **options):
    logits = torch.zeros(2, 3) if logits is None else logits
    return rlhf_fast.sample(logits, **{"seed": 0, "position": 0, **options})


def replay(ids=(0, 1), **options):
    return rlhf_fast.replay_logprob(torch.zeros(2, 3), torch.tensor(ids), **options)


BAD_PARAMETERS = [
    ("temperature", -0.5, ValueError),
    ("temperature", math.nan, ValueError),
    ("temperature", math.inf, ValueError),
    ("temperature", "hot", TypeError),
    ("temperature", True, TypeError),
    ("temperature", torch.tensor([1.0, -1.0]), ValueError),
    ("temperature", torch.tensor([1.0, math.nan]), ValueError),
    ("temperature", torch.ones(2, dtype=torch.bool), TypeError),
    ("top_k", -1, ValueError),
    ("top_k", 2.0, TypeError),
    ("top_k", True, TypeError),
    ("top_k", torch.tensor([1, -1]), ValueError),
    ("top_k", torch.tensor([1.0, 2.0]), TypeError),
    ("top_p", 0.0, ValueError),
    ("top_p", 1.1, ValueError),
    ("top_p", None, TypeError),
    ("top_p", torch.tensor([0.5, 0.0]), ValueError),
    ("top_p", torch.tensor([0.5, math.nan]), ValueError),
    ("min_p", -0.1, ValueError),
    ("min_p", 1.5, ValueError),
    ("min_p", torch.tensor([0.5, 1.5]), ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_PARAMETERS)
def test_bad_parameters(name, value, error):
    for call in (draw, replay):
        with pytest.raises(error, match=f"^{name}: expected .*got"):
            call(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
def test_parameters_of_another_shape(name):
    for value in (torch.ones(3), torch.ones(2, 1), torch.ones(1), torch.tensor(1)):
        value = value.int() if name == "top_k" else value
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            draw(**{name: value})
        if (value.ndim == 1 and len(value) == 3) or value.ndim == 2:
            with pytest.raises(ValueError, match=f"^{name}: expected a shape that broadcasts"):
                replay(**{name: value})


@pytest.mark.parametrize("name", ["seed", "position"])
def test_bad_seeds_and_positions(name):
    for value, error in (
        (1.0, TypeError),
        (None, TypeError),
        (True, TypeError),
        (2**64, ValueError),
        (-(2**63) - 1, ValueError),
        (torch.zeros(2), TypeError),
        (torch.zeros(2, dtype=torch.bool), TypeError),
        (torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.tensor(1), ValueError),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            draw(**{name: value})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: draw([[0.0]]), TypeError, "logits: expected a tensor"),
        (lambda: draw(torch.zeros(2, 3).long()), TypeError, "logits: expected float64"),
        (lambda: draw(torch.zeros(3)), ValueError, r"logits: expected shape \[B, V\]"),
        (lambda: draw(torch.zeros(1, 2, 3)), ValueError, r"logits: expected shape \[B, V\]"),
        (lambda: draw(torch.zeros(2, 0)), ValueError, "V >= 1"),
        (lambda: draw(torch.tensor([[0, 1], [0, math.nan]])), ValueError, "logits.* NaN in row 1"),
        (lambda: draw(torch.tensor([[INF, 1.0]])), ValueError, r"logits.* \+inf in row 0"),
        (lambda: draw(torch.tensor([[0, 1], [-INF, -INF]])), ValueError, "logits.* in row 1"),
        (lambda: draw(logit_mask=torch.tensor([[1, 0, 0], [0] * 3])), ValueError, "in row 1"),
        (lambda: draw(temperature=0, logit_mask=torch.zeros(3)), ValueError, "in row 0"),
        (lambda: draw(logit_mask=torch.ones(2)), ValueError, "logit_mask: expected shape"),
        (lambda: draw(logit_mask=torch.ones(3, 3)), ValueError, "logit_mask: expected shape"),
        (lambda: draw(logit_mask=[1, 1, 1]), TypeError, "logit_mask: expected a tensor"),
        (lambda: replay((0, 3)), IndexError, r"ids: expected values in \[0, 3\), got 3"),
        (lambda: replay((0, -100)), IndexError, r"ids: expected values in \[0, 3\), got -100"),
        (lambda: replay((0, 1, 2)), ValueError, "ids: expected shape"),
        (lambda: replay((0.0, 1.0)), TypeError, "ids: expected int32 or int64"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_seed_and_position_must_be_given():
    with pytest.raises(TypeError, match="position"):
        rlhf_fast.sample(torch.zeros(1, 2), seed=0)
    with pytest.raises(TypeError, match="seed"):
        rlhf_fast.sample(torch.zeros(1, 2), position=0)
