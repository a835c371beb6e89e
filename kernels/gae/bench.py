"""Benchmark cases of GAE and discounted returns."""

import torch
import torch.nn.functional as F

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case

GAMMA, LAM = 0.99, 0.95


def _make(dtype, B, T):
    return {
        "rewards": inputs.normal(B, T, seed=1, scale=0.1),
        "values": inputs.normal(B, T, seed=2),
    }


def _make_masked(dtype, B, T):
    return {**_make(dtype, B, T), "mask": inputs.response_mask(B, T)}


def _make_packed(dtype, B, T):
    padded = _make_masked(dtype, B, T)
    mask = padded["mask"]
    return {
        "rewards": padded["rewards"][mask],
        "values": padded["values"][mask],
        "cu_seqlens": F.pad(mask.sum(1).cumsum(0), (1, 0)),
        "mask": mask,
    }


def _scan(rewards, values, **mask):
    return eager.gae_scan(rewards, values, GAMMA, LAM, **mask)


def _loop(rewards, values, **mask):
    return eager.gae_loop(rewards, values, GAMMA, LAM, **mask)


# Of rows that a loop takes seconds for on a GPU.
NO_LOOP = {"left_out": ("reference",), "note": "plain PyTorch is the scan, not the loop over time"}


def _gae(sizes, *, masked=False, loop=True, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="gae",
        sizes=sizes,
        make=_make_masked if masked else _make,
        ours=lambda rewards, values, **mask: tuple(
            rlhf_fast.gae(rewards, values, gamma=GAMMA, lam=LAM, **mask)
        ),
        eager=_loop if loop else _scan,
        compiled=_scan if loop else None,
        bytes=(17 if masked else 16) * tokens,
        flops=6 * tokens,
        label="masked" if masked else "",
        **options,
    )


def _unpacked(loop):
    """Pad, run `loop` over time, pack: what a trainer with padded GAE code does."""

    def run(rewards, values, cu_seqlens, mask):
        padded = [torch.zeros_like(mask, dtype=x.dtype) for x in (rewards, values)]
        for target, source in zip(padded, (rewards, values), strict=True):
            target[mask] = source
        advantages, returns = loop(*padded, GAMMA, LAM, mask)
        return advantages[mask], returns[mask]

    return run


def _packed(sizes, **options) -> Case:
    tokens = int(inputs.response_mask(**sizes).sum())
    return Case(
        op="gae_packed",
        sizes=sizes,
        make=_make_packed,
        ours=lambda rewards, values, cu_seqlens, mask: tuple(
            rlhf_fast.gae_packed(rewards, values, cu_seqlens, gamma=GAMMA, lam=LAM)
        ),
        eager=_unpacked(eager.gae_loop),
        compiled=_unpacked(eager.gae_scan),
        bytes=16 * tokens,
        flops=6 * tokens,
        label="packed",
        note=f"{tokens} tokens in all; plain PyTorch pads, loops and packs again",
        **options,
    )


def _discounted(sizes, **options) -> Case:
    tokens = sizes["B"] * sizes["T"]
    return Case(
        op="discounted_returns",
        sizes=sizes,
        make=_make,
        ours=lambda rewards, values: (rlhf_fast.discounted_returns(rewards, gamma=GAMMA),),
        eager=lambda rewards, values: (eager.discounted_loop(rewards, GAMMA),),
        compiled=lambda rewards, values: (eager.discounted_scan(rewards, GAMMA),),
        bytes=8 * tokens,
        flops=2 * tokens,
        **options,
    )


CASES = [
    _gae(shapes.TOKENS),
    _gae(shapes.TOKENS, masked=True),
    _gae(shapes.TOKENS_LONG, devices=("cpu",)),
    _gae(shapes.TOKENS_GPU, devices=("cuda",), loop=False, **NO_LOOP),
    _gae(shapes.TOKENS_GPU_LONG, devices=("cuda",), loop=False, **NO_LOOP),
    _packed(shapes.TOKENS),
    _discounted(shapes.TOKENS),
    _gae(shapes.TOKENS_QUICK, quick=True),
    _gae(shapes.TOKENS_QUICK, masked=True, quick=True),
    _packed(shapes.TOKENS_QUICK, quick=True),
    _discounted(shapes.TOKENS_QUICK, quick=True),
]
