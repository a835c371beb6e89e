"""Benchmark cases of sampling and of its twin for the trainer."""

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case

TEMPERATURE, TOP_K = 0.7, 50


def _make(dtype, B, V):
    # Logits of a trained model are peaked: a few tokens hold most of the mass.
    return {"logits": inputs.normal(B, V, scale=3.0).to(dtype)}


def _make_replay(dtype, B, V):
    logits = inputs.normal(B, V, scale=3.0).to(dtype)
    return {"logits": logits, "ids": logits.float().argmax(-1)}


def _sample(sizes, top_p=1.0, **options) -> Case:
    rows, v = sizes["B"], sizes["V"]

    def ours(logits):
        return tuple(
            rlhf_fast.sample(
                logits, temperature=TEMPERATURE, top_k=TOP_K, top_p=top_p, seed=1, position=0
            )
        )

    def expected(made, outputs):
        """The ids that were drawn, and what plain PyTorch says about them."""
        ids = outputs[0]
        u, kept = eager.filtered(made["logits"], TEMPERATURE, TOP_K, top_p)
        return (ids, *eager.describe(u, kept, ids))

    return Case(
        op="sample",
        sizes=sizes,
        make=_make,
        ours=ours,
        eager=lambda logits: eager.sample(logits, TEMPERATURE, TOP_K, top_p),
        expected=expected,
        bytes=4 * rows * v + 20 * rows,
        flops=6 * rows * v,
        label=f"top-k {TOP_K}" + (f" top-p {top_p}" if top_p < 1 else ""),
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
    _sample(shapes.DECODE_GPU, devices=("cuda",)),
    _replay(shapes.DECODE[1]),
    _sample(shapes.DECODE_QUICK, quick=True),
    _sample(shapes.DECODE_QUICK, top_p=0.9, quick=True),
    _replay(shapes.DECODE_QUICK, quick=True),
]
