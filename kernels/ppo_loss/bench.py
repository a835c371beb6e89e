"""Benchmark cases of the losses; each with the statistics that a trainer logs."""

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case

VALUE_COEF = 0.1


def _make_policy(dtype, B, T):
    return inputs.policy_batch(B, T)


def _policy(sizes, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="policy_loss",
        sizes=sizes,
        make=_make_policy,
        ours=lambda **batch: (rlhf_fast.policy_loss(**batch).loss,),
        eager=lambda **batch: eager.policy_loss(**batch),
        grad=("logprob",),
        bytes=17 * tokens,
        flops=20 * tokens,
        **options,
    )


def _make_value(dtype, B, T):
    return {**inputs.value_batch(B, T), "mask": inputs.response_mask(B, T)}


def _value(sizes, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="value_loss",
        sizes=sizes,
        make=_make_value,
        ours=lambda **batch: (rlhf_fast.value_loss(**batch).loss,),
        eager=lambda **batch: eager.value_loss(**batch),
        grad=("values",),
        bytes=17 * tokens,
        flops=12 * tokens,
        **options,
    )


def _make_ppo(dtype, B, T):
    return {**inputs.policy_batch(B, T), **inputs.value_batch(B, T)}


def _eager_ppo(logprob, old_logprob, advantages, mask, values, old_values, returns):
    policy, logged = eager.policy_loss(logprob, old_logprob, advantages, mask)
    value, clipped = eager.value_loss(values, old_values, returns, mask)
    return policy + VALUE_COEF * value, logged, clipped


def _ppo(sizes, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="ppo_loss",
        sizes=sizes,
        make=_make_ppo,
        ours=lambda **batch: (rlhf_fast.ppo_loss(**batch, value_coef=VALUE_COEF).loss,),
        eager=_eager_ppo,
        grad=("logprob", "values"),
        bytes=33 * tokens,
        flops=32 * tokens,
        **options,
    )


CASES = [
    _ppo(shapes.TOKENS),
    _ppo(shapes.TOKENS_GPU_LOSS, devices=("cuda",)),
    _ppo(shapes.TOKENS_GPU_MANY, devices=("cuda",)),
    _policy(shapes.TOKENS),
    _value(shapes.TOKENS),
    _ppo(shapes.TOKENS_QUICK, quick=True),
    _policy(shapes.TOKENS_QUICK, quick=True),
    _value(shapes.TOKENS_QUICK, quick=True),
]
