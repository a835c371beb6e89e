"""Benchmark cases of sampling and of its twin for the trainer."""

import torch

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case

TEMPERATURE, TOP_K = 0.7, 50
# Standard deviations of logits. Those of a trained model are peaked: a few tokens hold most of the
# mass; a kernel that draws and rejects takes longer where they are flat.
PEAKED, USUAL, FLAT = 5.0, 3.0, 1.0


def _make_replay(dtype, B, V):
    logits = inputs.normal(B, V, scale=3.0).to(dtype)
    return {"logits": logits, "ids": logits.float().argmax(-1)}


def _sample(
    sizes, top_k=TOP_K, top_p=1.0, scale=USUAL, dtype=torch.float32, label="", **options
) -> Case:
    rows, v = sizes["B"], sizes["V"]
    filters = [f"top-k {top_k}"] * (top_k > 0) + [f"top-p {top_p}"] * (top_p < 1)

    def make(dtype, B, V):
        return {"logits": inputs.normal(B, V, scale=scale).to(dtype)}

    def ours(logits):
        return tuple(
            rlhf_fast.sample(
                logits, temperature=TEMPERATURE, top_k=top_k, top_p=top_p, seed=1, position=0
            )
        )

    def expected(made, outputs):
        """The ids that were drawn, and what plain PyTorch says about them."""
        ids = outputs[0]
        u, kept = eager.filtered(made["logits"], TEMPERATURE, top_k, top_p)
        return (ids, *eager.describe(u, kept, ids))

    return Case(
        op="sample",
        sizes=sizes,
        dtype=dtype,
        make=make,
        ours=ours,
        eager=lambda logits: eager.sample(logits, TEMPERATURE, top_k, top_p),
        expected=expected,
        bytes=dtype.itemsize * rows * v + 20 * rows,
        flops=6 * rows * v,
        label=" ".join(filters + [label] * (label != "")),
        **options,
    )


def _replay(sizes, **options) -> Case:
    rows, v = sizes["B"], sizes["V"]

    def plain(logits, ids):
        u, kept = eager.filtered(logits, TEMPERATURE, TOP_K, 1.0)
        return eager.describe(u, kept, ids)[:2]

    return Case(
        op="replay_logprob",
        sizes=sizes,
        make=_make_replay,
        ours=lambda logits, ids: tuple(
            rlhf_fast.replay_logprob(
                logits, ids, temperature=TEMPERATURE, top_k=TOP_K, top_p=1.0, min_p=0.0
            )
        ),
        eager=plain,
        grad=("logits",),
        bytes=3 * 4 * rows * v + 24 * rows,
        flops=10 * rows * v,
        label=f"top-k {TOP_K}",
        **options,
    )


CASES = [
    *(_sample(sizes, devices=("cpu",)) for sizes in shapes.DECODE),
    _sample(shapes.DECODE[1], top_p=0.95, devices=("cpu",)),
    *(
        _sample(shapes.DECODE_GPU, top_k, top_p, scale, dtype, label, devices=("cuda",))
        for dtype, top_k, top_p in (
            (torch.bfloat16, TOP_K, 0.95),
            (torch.bfloat16, 0, 1.0),
            (torch.float32, TOP_K, 0.95),
        )
        for scale, label in ((PEAKED, "peaked"), (FLAT, "flat"))
    ),
    _replay(shapes.DECODE[1]),
    _sample(shapes.DECODE_QUICK, quick=True),
    _sample(shapes.DECODE_QUICK, top_p=0.9, quick=True),
    _replay(shapes.DECODE_QUICK, quick=True),
]
