"""Triton's losses beyond their ops' tests: which launches a call needs, and who adds the sums."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    random_mask,
)

pytest.importorskip("triton")
if rlhf_fast.backends()["ppo_loss"]["triton"] is not True:
    pytest.skip(str(rlhf_fast.backends()["ppo_loss"]["triton"]), allow_module_level=True)

from rlhf_fast.kernels.ppo_loss import _triton

DEVICE = device_of("triton")
SHAPE = (5, 150)  # ten parts of the interpreter, whose programs read four at once


def loss_of(kind="ppo", dtype=torch.float32, device=DEVICE, **options):
    """(loss, stats, gradient) of a batch whose last row is masked out."""
    lp, old = -randn(*SHAPE, seed=1).abs(), -randn(*SHAPE, seed=2).abs()
    mask = random_mask(*SHAPE, seed=4)
    mask[-1] = False
    lp[~mask] = torch.nan
    lp, old, advantages = (x.to(device, dtype) for x in (lp, old, randn(*SHAPE, seed=3)))
    lp.requires_grad_()
    loss, stats = rlhf_fast.policy_loss(lp, old, advantages, mask.to(device), kind=kind, **options)
    (grad,) = torch.autograd.grad(loss, lp)
    return loss.detach(), stats, grad


class Launches:
    """Stands in for a kernel, and counts its launches."""

    def __init__(self, kernel) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    """The number of launches of each kernel of a call."""
    kernels = {}
    for name in ("count_kernel", "loss_kernel", "finish_kernel"):
        kernels[name] = Launches(getattr(_triton, name))
        monkeypatch.setattr(_triton, name, kernels[name])

    def counted(**options):
        for kernel in kernels.values():
            kernel.count = 0
        with rlhf_fast.use_backend("triton"), poisoned_memory():
            out = loss_of(**options)
        return out, tuple(kernel.count for kernel in kernels.values())

    return counted


COUNTED, GIVEN = (1, 1, 0), (0, 1, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, COUNTED),
        ({"normalizer": 37.0}, GIVEN),
        ({"normalizer": torch.tensor(37.0)}, GIVEN),
        ({"reduction": "token-sum"}, GIVEN),
        ({"reduction": "seq-mean-token-sum"}, COUNTED),
        ({"reduction": "seq-mean-token-sum", "normalizer": 4.0}, GIVEN),
        ({"reduction": "seq-mean-token-mean", "normalizer": 4.0}, COUNTED),
        ({"kind": "gspo", "normalizer": 37.0}, COUNTED),
    ],
)
def test_two_launches(launches, options, expected):
    """Tokens are counted beforehand where they divide something; statistics always have them."""
    out, count = launches(**options)
    assert count == expected
    with rlhf_fast.use_backend("reference"):
        truth, plain = (
            loss_of(dtype=d, device="cpu", **options) for d in (torch.float64, torch.float32)
        )
    for name, *three in zip(("loss", "stats", "grad"), out, truth, plain, strict=True):
        assert_accurate(name, *three)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_the_last_program_adds_as_a_launch_of_its_own_does(launches, monkeypatch, reduction):
    folded, count = launches(reduction=reduction)
    assert count == COUNTED
    monkeypatch.setattr(_triton, "READS", 0)
    apart, count = launches(reduction=reduction)
    assert count == (1, 1, 1)
    for name, a, b in zip(("loss", "stats", "grad"), folded, apart, strict=True):
        if _dispatch.interpreting():  # on a GPU they read in groups of different sizes
            assert_same_bits(name, a, b)
        else:
            assert_accurate(name, a, b.double())


_PTX = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlhf_fast.kernels.ppo_loss import _triton

out = []
for kernel, types, constants, warps in _triton.AOT_SIGNATURES:
    if "loss_ptr" in types and kernel.__name__ == "loss_kernel":
        signature = {k: types.get(k, "constexpr").split(":")[0] for k in kernel.arg_names}
        fixed = {k: constants.get(k) for k, kind in signature.items() if kind == "constexpr"}
        options = {"num_warps": warps, "enable_fp_fusion": False}
        target = GPUTarget("cuda", 90, 32)
        source = ASTSource(kernel, signature, fixed)
        out.append(triton.compile(source, target=target, options=options).asm["ptx"])
print(json.dumps(out))
"""


def test_the_last_program_acquires_what_the_others_stored():
    """What makes it safe without a launch in between, in the words of the PTX memory model.

    Stores of a program's sums, a barrier of its threads, a release of the device's scope by one of
    them; its acquire, a barrier again, then plain loads, none of them through the read-only cache.
    """
    root = Path(__file__).resolve().parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _PTX], cwd=root, env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for ptx in json.loads(run.stdout):
        order = re.findall(r"st\.global|ld\.global|atom\.\S+|bar\.(?:warp\.)?sync", ptx)
        (place,) = (i for i, what in enumerate(order) if what.startswith("atom"))
        assert order[place].startswith("atom.global.gpu.acq_rel.add")
        kinds = [what.partition(".")[0] for what in order]
        before, behind = kinds[:place][::-1], kinds[place + 1 :]
        assert before.index("bar") < before.index("st")
        assert behind.index("bar") < behind.index("ld")
        assert ".nc" not in ptx
