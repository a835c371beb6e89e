"""Benchmark cases of the KL estimators and of the exact KL."""

import torch

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case


def _make_logits(dtype, N, V):
    logits = inputs.normal(N, V, scale=2.0)
    return {
        "logits": logits.to(dtype),
        "ref_logits": (logits + inputs.normal(N, V, seed=1, scale=0.3)).to(dtype),
        "ids": inputs.token_ids(N, vocabulary=V),
    }


def _exact(op, sizes, dtype=torch.float32, **options) -> Case:
    n, v = sizes["N"], sizes["V"]

    def full(logits, ref_logits, ids):
        return tuple(rlhf_fast.kl_divergence_full(logits, ref_logits, ids=ids))

    def divergence(logits, ref_logits, ids):
        return (rlhf_fast.kl_divergence(logits, ref_logits),)

    def eager_full(logits, ref_logits, ids):
        kl, logprob, ref_logprob, entropy = eager.kl_full(logits, ref_logits, ids)
        return kl, logprob, ref_logprob.detach(), entropy

    def eager_divergence(logits, ref_logits, ids):
        return (eager.kl_full(logits, ref_logits, ids)[0],)

    return Case(
        op=op,
        sizes=sizes,
        dtype=dtype,
        make=_make_logits,
        ours=full if op == "kl_divergence_full" else divergence,
        eager=eager_full if op == "kl_divergence_full" else eager_divergence,
        grad=("logits",),
        # Both models' logits twice, the gradient of one once.
        bytes=5 * n * v * dtype.itemsize + 32 * n,
        flops=20 * n * v,
        **options,
    )


KL_COEF, ENTROPY_COEF = 0.1, -0.01


def _make_one_pass(dtype, N, V):
    return {**_make_logits(dtype, N, V), "grad_logprob": inputs.normal(N, seed=2)}


def _ours_one_pass(logits, ref_logits, ids, grad_logprob):
    return tuple(
        rlhf_fast.kl_divergence_and_grad(
            logits, ref_logits, KL_COEF, ids=ids, grad_logprob=grad_logprob,
            grad_entropy=ENTROPY_COEF,
        )
    )  # fmt: skip


def _eager_one_pass(logits, ref_logits, ids, grad_logprob):
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        kl, logprob, ref_logprob, entropy = eager.kl_full(z, ref_logits, ids)
        loss = (KL_COEF * kl + grad_logprob * logprob + ENTROPY_COEF * entropy).sum()
        (grad,) = torch.autograd.grad(loss, z)
    return *(x.detach() for x in (kl, logprob, ref_logprob, entropy)), grad


def _one_pass(sizes, dtype=torch.float32, **options) -> Case:
    n, v = sizes["N"], sizes["V"]
    return Case(
        op="kl_divergence_and_grad",
        sizes=sizes,
        dtype=dtype,
        make=_make_one_pass,
        ours=_ours_one_pass,
        eager=_eager_one_pass,
        bytes=3 * n * v * dtype.itemsize + 48 * n,
        flops=20 * n * v,
        note="plain PyTorch runs forward and backward",
        **options,
    )


def _make_estimate(dtype, B, T):
    batch = inputs.reward_batch(B, T)
    return {name: batch[name] for name in ("logprob", "ref_logprob", "mask")}


def _eager_k3(logprob, ref_logprob, mask):
    d = logprob - ref_logprob
    # expm1, since exp(-d) - 1 loses all digits of a small KL in float32.
    return ((torch.expm1(-d) + d) * mask,)


def _estimate(sizes, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="kl_estimate",
        sizes=sizes,
        make=_make_estimate,
        ours=lambda logprob, ref_logprob, mask: (
            rlhf_fast.kl_estimate(logprob, ref_logprob, estimator="k3", mask=mask),
        ),
        eager=_eager_k3,
        grad=("logprob",),
        bytes=26 * tokens,
        flops=12 * tokens,
        label="k3",
        **options,
    )


CASES = [
    _exact("kl_divergence", shapes.LOGITS_KL, devices=("cpu",)),
    _exact("kl_divergence_full", shapes.LOGITS_KL, devices=("cpu",)),
    _exact("kl_divergence", shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _exact("kl_divergence_full", shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _one_pass(shapes.LOGITS_KL, devices=("cpu",)),
    _one_pass(shapes.LOGITS_GPU, torch.bfloat16, devices=("cuda",)),
    _estimate(shapes.TOKENS),
    _exact("kl_divergence", shapes.LOGITS_QUICK, quick=True),
    _exact("kl_divergence_full", shapes.LOGITS_QUICK, quick=True),
    _one_pass(shapes.LOGITS_QUICK, quick=True),
    _estimate(shapes.TOKENS_QUICK, quick=True),
]
