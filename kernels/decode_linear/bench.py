"""Benchmark cases of the linear layer: a layer of a decode step, and a head."""

import torch
from torch.nn.functional import linear

import rlhf_fast
from rlhf_fast.bench import inputs, shapes
from rlhf_fast.bench.case import Case


def _make(dtype, N, H, O):
    return {
        "x": inputs.normal(N, H).to(dtype),
        "weight": inputs.normal(O, H, seed=1).to(dtype) * H**-0.5,
    }


def _linear(sizes, **options) -> Case:
    rows, size, outputs = sizes.values()
    return Case(
        op="decode_linear",
        sizes=sizes,
        make=_make,
        ours=lambda x, weight: (rlhf_fast.decode_linear(x, weight),),
        eager=lambda x, weight: (linear(x, weight),),
        dtype=torch.float32,
        bytes=4 * (rows * size + outputs * size + rows * outputs),
        flops=2 * rows * size * outputs,
        **options,
    )


CASES = [
    _linear(shapes.LINEAR_LAYER),
    _linear(shapes.LINEAR_HEAD),
    _linear(shapes.LINEAR_QUICK, quick=True),
]
