"""Benchmark cases of rewards, whitening and advantages."""

import torch

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case
from rlhf_fast.kernels.gae.bench import NO_LOOP

KL_COEF, GAMMA, LAM = 0.05, 1.0, 0.95


def _make(dtype, B, T):
    return inputs.reward_batch(B, T)


def _shaped(sizes, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="shaped_rewards",
        sizes=sizes,
        make=_make,
        ours=lambda **batch: tuple(rlhf_fast.shaped_rewards(**batch, kl_coef=KL_COEF)),
        eager=lambda **batch: eager.shaped_rewards(**batch, kl_coef=KL_COEF),
        bytes=17 * tokens,
        flops=2 * tokens,
        **options,
    )


def _whiten(sizes, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]

    def make(dtype, B, T):
        return {"x": inputs.normal(B, T), "mask": inputs.response_mask(B, T)}

    return Case(
        op="whiten",
        sizes=sizes,
        make=make,
        ours=lambda x, mask: (rlhf_fast.whiten(x, mask),),
        eager=lambda x, mask: (eager.whiten(x, mask),),
        # Every x is needed before the first result is known: two reads.
        bytes=14 * tokens,
        flops=6 * tokens,
        **options,
    )


def _make_ppo(dtype, B, T):
    return {**inputs.reward_batch(B, T), "values": inputs.normal(B, T, seed=6)}


def _trainer(gae):
    """The four steps of a trainer, with `gae` the loop over time or the scan."""

    def run(scores, logprob, ref_logprob, mask, values):
        rewards, kl = eager.shaped_rewards(scores, logprob, ref_logprob, mask, KL_COEF)
        advantages, returns = gae(rewards, values, GAMMA, LAM, mask)
        return eager.whiten(advantages, mask), returns, rewards, kl

    return run


def _ppo(sizes, *, loop=True, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="ppo_advantages",
        sizes=sizes,
        make=_make_ppo,
        ours=lambda scores, logprob, ref_logprob, mask, values: tuple(
            rlhf_fast.ppo_advantages(
                scores, logprob, ref_logprob, values, mask, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM
            )
        ),
        eager=_trainer(eager.gae_loop if loop else eager.gae_scan),
        compiled=_trainer(eager.gae_scan) if loop else None,
        # Three inputs and the mask in, four outputs out, the advantages rewritten by whitening.
        bytes=37 * tokens,
        flops=16 * tokens,
        **options,
    )


def _groups(sizes, **options) -> Case:
    rows, group = sizes["P"] * sizes["K"], sizes["K"]

    def make(dtype, P, K):
        return {
            "scores": inputs.normal(P * K),
            "group_ids": torch.arange(P).repeat_interleave(K),
        }

    return Case(
        op="group_advantages",
        sizes=sizes,
        make=make,
        ours=lambda scores, group_ids: (rlhf_fast.group_advantages(scores, group_ids),),
        eager=lambda scores, group_ids: (eager.group_advantages_loop(scores, group_ids),),
        compiled=lambda scores, group_ids: (eager.group_advantages_view(scores, group),),
        bytes=16 * rows,
        flops=6 * rows,
        **options,
    )


CASES = [
    _ppo(shapes.TOKENS),
    _ppo(shapes.TOKENS_GPU, devices=("cuda",), loop=False, **NO_LOOP),
    _ppo(shapes.TOKENS_GPU_MANY, devices=("cuda",), loop=False, **NO_LOOP),
    _shaped(shapes.TOKENS),
    _whiten(shapes.TOKENS),
    _groups(shapes.GROUPS),
    _ppo(shapes.TOKENS_QUICK, quick=True),
    _shaped(shapes.TOKENS_QUICK, quick=True),
    _whiten(shapes.TOKENS_QUICK, quick=True),
    _groups(shapes.RANKING_QUICK, quick=True),
]
