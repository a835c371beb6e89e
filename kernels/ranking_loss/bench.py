"""Benchmark cases of the reward model's ranking loss."""

import torch

import rlhf_fast
from rlhf_fast.bench import eager, inputs, shapes
from rlhf_fast.bench.case import Case


def _make(dtype, P, K):
    return {
        "scores": inputs.normal(P, K),
        "ranks": inputs.normal(P, K, seed=1).argsort(1).to(torch.int64),
    }


def _ranking(sizes, **options) -> Case:
    scores = sizes["P"] * sizes["K"]
    pairs = scores * (sizes["K"] - 1) // 2
    return Case(
        op="ranking_loss",
        sizes=sizes,
        make=_make,
        ours=lambda scores, ranks: (rlhf_fast.ranking_loss(scores, ranks),),
        eager=lambda scores, ranks: (eager.ranking_loss(scores, ranks),),
        grad=("scores",),
        bytes=16 * scores,
        flops=10 * pairs,
        **options,
    )


CASES = [_ranking(shapes.RANKING), _ranking(shapes.RANKING_QUICK, quick=True)]
