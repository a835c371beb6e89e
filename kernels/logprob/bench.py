"""Benchmark cases of `logprob` and `logprob_entropy`."""

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


CASES = [
    _forward(shapes.LOGITS, devices=("cpu",)),
    _forward(shapes.LOGITS, torch.bfloat16, devices=("cpu",)),
    _forward(shapes.LOGITS_GPU, devices=("cuda",)),
    _forward(shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _entropy_and_gradient(shapes.LOGITS_BACKWARD, devices=("cpu",)),
    _entropy_and_gradient(shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _forward(shapes.LOGITS_QUICK, quick=True),
    _entropy_and_gradient(shapes.LOGITS_QUICK, torch.bfloat16, quick=True),
]
