"""Benchmark cases of `logprob`, `logprob_entropy` and `logprob_entropy_and_grad`."""

import torch

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case


def _make(dtype, N, V):
    return {
        "logits": inputs.normal(N, V, scale=2.0).to(dtype),
        "ids": inputs.token_ids(N, vocabulary=V),
    }


def _forward(sizes, dtype=torch.float32, **options) -> Case:
    n, v = sizes["N"], sizes["V"]
    return Case(
        op="logprob",
        sizes=sizes,
        dtype=dtype,
        make=_make,
        ours=lambda logits, ids: (rlhf_fast.logprob(logits, ids),),
        eager=lambda logits, ids: (eager.logprob(logits, ids),),
        bytes=n * v * dtype.itemsize + 12 * n,
        flops=4 * n * v,
        **options,
    )


def _entropy_and_gradient(sizes, dtype=torch.float32, **options) -> Case:
    n, v = sizes["N"], sizes["V"]
    return Case(
        op="logprob_entropy",
        sizes=sizes,
        dtype=dtype,
        make=_make,
        ours=lambda logits, ids: tuple(rlhf_fast.logprob_entropy(logits, ids)),
        eager=lambda logits, ids: eager.logprob_entropy(logits, ids),
        grad=("logits",),
        bytes=3 * n * v * dtype.itemsize + 40 * n,
        flops=14 * n * v,
        **options,
    )


ENTROPY_COEF = -0.01


def _make_one_pass(dtype, N, V):
    return {**_make(dtype, N, V), "grad_logprob": inputs.normal(N, seed=2)}


def _eager_one_pass(logits, ids, grad_logprob):
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        logprob, entropy = eager.logprob_entropy(z, ids)
        loss = (grad_logprob * logprob + ENTROPY_COEF * entropy).sum()
        (grad,) = torch.autograd.grad(loss, z)
    return logprob.detach(), entropy.detach(), grad


def _one_pass(sizes, dtype=torch.float32, **options) -> Case:
    n, v = sizes["N"], sizes["V"]
    return Case(
        op="logprob_entropy_and_grad",
        sizes=sizes,
        dtype=dtype,
        make=_make_one_pass,
        ours=lambda logits, ids, grad_logprob: tuple(
            rlhf_fast.logprob_entropy_and_grad(logits, ids, grad_logprob, grad_entropy=ENTROPY_COEF)
        ),
        eager=_eager_one_pass,
        bytes=2 * n * v * dtype.itemsize + 24 * n,
        flops=14 * n * v,
        note="plain PyTorch runs forward and backward",
        **options,
    )


CASES = [
    _forward(shapes.LOGITS, devices=("cpu",)),
    _forward(shapes.LOGITS, torch.bfloat16, devices=("cpu",)),
    _forward(shapes.LOGITS_GPU, devices=("cuda",)),
    _forward(shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _entropy_and_gradient(shapes.LOGITS_BACKWARD, devices=("cpu",)),
    _entropy_and_gradient(shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _one_pass(shapes.LOGITS_BACKWARD, devices=("cpu",)),
    _one_pass(shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _forward(shapes.LOGITS_QUICK, quick=True),
    _entropy_and_gradient(shapes.LOGITS_QUICK, torch.bfloat16, quick=True),
    _one_pass(shapes.LOGITS_QUICK, torch.bfloat16, quick=True),
]
