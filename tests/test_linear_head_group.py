"""The vocabulary split over processes against one process, forward and backward."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import rlhf_fast
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    randn,
    usable_backends,
)

N, H, V, R = 11, 8, 100, 3
# The processes of a test have CPU tensors.
BACKENDS = [b for b in usable_backends("linear_logprob") if device_of(b) == "cpu"]


def inputs():
    tensors = (randn(N, H, seed=1), randn(V, H, seed=2), randn(V, seed=3), randn(R, H, seed=4))
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(6))
    ids[0], ids[1], ids[2] = 0, V - 1, -100
    bias = tensors[2]
    bias[40:60:2] = -math.inf
    return *tensors, randn(V, R, seed=5), ids


def head(x, w, bias, a, b, ids, **kwargs):
    mask = torch.arange(N) != 4
    temperature = 0.5 + torch.arange(N) / N
    out = rlhf_fast.linear_logprob_entropy(
        x, w, ids, bias=bias, lora=(a, b, 0.5), softcap=8.0, mask=mask, temperature=temperature,
        **kwargs,
    )  # fmt: skip
    g, h = randn(N, seed=9), randn(N, seed=10)
    loss = (torch.where(out.logprob == -math.inf, 0.0, out.logprob) * g + out.entropy * h).sum()
    return out, torch.autograd.grad(loss, (x, w, bias, a, b))


def both(x, w, ids, group):
    return rlhf_fast.linear_logprob_entropy(x, w, ids, group=group).logprob


def assert_compiles(x, w, ids, group):
    def function(x, w):
        return rlhf_fast.linear_logprob(x, w, ids, group=group)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits("compiled", compiled(x, w), function(x, w))


def work(rank, sizes, store, results, backend):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes))
    group = dist.new_group(list(range(len(sizes))))
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, w, bias, a, b, ids = inputs()
    local = [t.clone().requires_grad_() for t in (x, w[mine], bias[mine], a, b[mine])]
    with rlhf_fast.use_backend(backend):
        outcomes = [head(*local, ids, group=group)]
        with rlhf_fast.batch_invariant():
            outcomes.append(head(*local, ids, group=group))
        bad = ids.clone()
        bad[3] = V
        with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {V}\), got {V}"):
            rlhf_fast.linear_logprob(*local[:2], bad, group=group)
        alone = rlhf_fast.linear_logprob(*local[:2], ids, group=group)
        assert_same_bits("with entropy", alone, both(*local[:2], ids, group))

        if sizes == (50, 50):  # once: every process pays for its own compiler
            assert_compiles(*local[:2], ids.clamp(min=0), group)
    detached = [([y.detach() for y in out], [g.detach() for g in grads]) for out, grads in outcomes]
    torch.save(detached, f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(50, 50), (1, 70, 29), (0, 100)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_over_processes(tmp_path, sizes, backend):
    mp.spawn(work, (sizes, tmp_path / "store", tmp_path, backend), nprocs=len(sizes))
    x, w, bias, a, b, ids = inputs()
    one = [t.double().requires_grad_() for t in (x, w, bias, a, b)]
    truth, true_grads = head(*one, ids)
    alone, rough_grads = head(*[t.clone().requires_grad_() for t in (x, w, bias, a, b)], ids)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    for mode in range(2):
        outs, grads = zip(*(rank[mode] for rank in ranks), strict=True)
        for out in outs:
            for name, value, true, rough in zip(truth._fields, out, truth, alone, strict=True):
                assert_accurate(name, value, true, rough)
        for i in (0, 3):  # hidden and A: the full gradient, the same on every rank
            for grad in grads:
                assert_accurate(f"gradient {i}", grad[i], true_grads[i], rough_grads[i])
                assert_same_bits(f"gradient {i}", grad[i], grads[0][i])
        for i in (1, 2, 4):  # weight, bias and B: this rank's slice
            whole = torch.cat([grad[i] for grad in grads])
            assert_accurate(f"gradient {i}", whole, true_grads[i], rough_grads[i])
