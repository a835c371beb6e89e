"""Benchmark cases of the ops that go from hidden states to log-probs without the logits."""

import dataclasses
import functools

import torch

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case


def _make(dtype, N, H, V):
    return {
        "hidden": inputs.normal(N, H).to(dtype),
        "weight": inputs.normal(V, H, seed=1, scale=H**-0.5).to(dtype),
        "ids": inputs.token_ids(N, vocabulary=V),
    }


def _make_kl(dtype, N, H, V):
    made = _make(dtype, N, H, V)
    noise = inputs.normal(V, H, seed=2, scale=0.1 * H**-0.5)
    return {
        **made,
        "ref_hidden": (made["hidden"] + inputs.normal(N, H, seed=3, scale=0.1)).to(dtype),
        "ref_weight": (made["weight"] + noise).to(dtype),
    }


def _make_loss(dtype, N, H, V, only=""):
    """With `only` "mask" or "advantages" that is non-zero at two tokens of five, all else full."""
    batch = inputs.policy_batch(1, N)
    made = _make(dtype, N, H, V)
    logits = (made["hidden"][:, None] * made["weight"][made["ids"]][:, None]).float().sum(-1)[:, 0]
    # log V is close to the log-sum-exp of these logits, so the ratios lie around 1.
    old = logits - torch.log(torch.tensor(float(V))) - 0.5 + inputs.normal(N, seed=4, scale=0.1)
    advantages, mask = batch["advantages"][0], batch["mask"][0]
    some = torch.arange(N) % 5 < 2
    if only:
        mask = some if only == "mask" else torch.ones_like(mask)
    if only == "advantages":
        advantages = advantages * some
    return {**made, "old_logprob": old, "advantages": advantages, "mask": mask}


def _logits(hidden, weight):
    return eager.upcast(hidden @ weight.T)


def _ours_kl(hidden, weight, ids, ref_hidden, ref_weight):
    out = rlhf_fast.linear_kl(hidden, weight, ref_hidden, ref_weight, ids=ids)
    return out.kl, out.logprob, out.ref_logprob, out.entropy


def _eager_kl(hidden, weight, ids, ref_hidden, ref_weight):
    kl, logprob, ref_logprob, entropy = eager.kl_full(
        _logits(hidden, weight), _logits(ref_hidden, ref_weight), ids
    )
    return kl, logprob, ref_logprob.detach(), entropy


def _eager_loss(hidden, weight, ids, old_logprob, advantages, mask):
    logprob = eager.logprob(_logits(hidden, weight), ids)
    return eager.policy_loss(logprob, old_logprob, advantages, mask)


# op -> (input maker, ours, plain PyTorch, heads multiplied with)
_OPS = {
    "linear_logprob": (
        _make,
        lambda hidden, weight, ids: (rlhf_fast.linear_logprob(hidden, weight, ids),),
        lambda hidden, weight, ids: (eager.logprob(_logits(hidden, weight), ids),),
        1,
    ),
    "linear_logprob_entropy": (
        _make,
        lambda hidden, weight, ids: tuple(rlhf_fast.linear_logprob_entropy(hidden, weight, ids)),
        lambda hidden, weight, ids: eager.logprob_entropy(_logits(hidden, weight), ids),
        1,
    ),
    "linear_kl": (_make_kl, _ours_kl, _eager_kl, 2),
    "linear_ppo_loss": (
        _make_loss,
        lambda **batch: (rlhf_fast.linear_ppo_loss(**batch).loss,),
        _eager_loss,
        1,
    ),
}


def _active(sizes, dtype, **options) -> list[Case]:
    """`linear_ppo_loss` with all tokens, or two fifths of them, in the products of the gradient."""
    case = _linear("linear_ppo_loss", sizes, dtype, **options)
    product = 2 * sizes["N"] * sizes["H"] * sizes["V"]
    return [
        dataclasses.replace(
            case,
            make=functools.partial(_make_loss, only=only),
            label=label,
            flops=product * (first + 2 * part) // 5,
            note="",
        )
        for only, first, part, label in (
            ("all", 5, 5, "all tokens"),
            ("mask", 2, 2, "40 % of the mask"),
            ("advantages", 5, 2, "40 % of the advantages"),
        )
    ]


def _linear(op, sizes, dtype=torch.float32, **options) -> Case:
    n, h, v = sizes["N"], sizes["H"], sizes["V"]
    make, ours, plain, heads = _OPS[op]
    # Masked tokens need no product.
    live = int(inputs.response_mask(1, n).sum()) if op == "linear_ppo_loss" else n
    inputs_once = heads * (n * h + v * h) * dtype.itemsize
    return Case(
        op=op,
        sizes=sizes,
        dtype=dtype,
        make=make,
        ours=ours,
        eager=plain,
        grad=("hidden", "weight"),
        # The policy's hidden states and head again for the backward pass, and their gradients.
        bytes=inputs_once + 2 * (n * h + v * h) * dtype.itemsize + 24 * n,
        # One product per head forward; the two products of the gradient, logits recomputed by none.
        flops=2 * live * h * v * (heads + 2),
        note=f"{live} of {n} tokens count" if live < n else "",
        **options,
    )


def _forward(op: str) -> Case:
    """Without gradients, as for the log-probs of the old policy and of the reference."""
    n, h, v = (shapes.HEAD_GPU[name] for name in "NHV")
    heads = _OPS[op][3]
    return dataclasses.replace(
        _linear(op, shapes.HEAD_GPU, torch.bfloat16, **GPU),
        grad=(),
        bytes=2 * heads * (n * h + v * h) + 24 * n,
        flops=2 * n * h * v * heads,
    )


GPU = {"devices": ("cuda",), "left_out": ("reference",)}
CASES = [
    *(
        _linear(op, shapes.HEAD, devices=("cpu",))
        for op in ("linear_logprob_entropy", "linear_ppo_loss")
    ),
    *_active(shapes.HEAD, torch.float32, devices=("cpu",)),
    *(_linear(op, shapes.HEAD_SHORT, devices=("cpu",)) for op in ("linear_logprob", "linear_kl")),
    *(_linear(op, shapes.HEAD_GPU, torch.bfloat16, **GPU) for op in _OPS),
    *(_forward(op) for op in ("linear_logprob_entropy", "linear_kl")),
    *_active(shapes.HEAD_GPU, torch.bfloat16, **GPU),
    *(_linear(op, shapes.HEAD_QUICK, quick=True) for op in _OPS),
]
