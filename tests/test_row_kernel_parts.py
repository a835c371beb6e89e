"""What the linear head asks of the row kernels beyond their ops: a part of a vocabulary at a time,
gradients of float32 logits in half precision, and rows that go to other places or nowhere."""

import importlib

import pytest
import torch

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.kernels._common.launch import ELSEWHERE
from rlhf_fast.testing import assert_same_bits, device_of, poisoned_memory, randn, usable_backends

N, V = 9, 2600
ROWS = [name for name in usable_backends("logprob") if name != "reference"]


@pytest.fixture(params=ROWS)
def backend(request):
    return request.param


def kernels(room, backend):
    name = "_triton" if backend == "triton" else "_native"
    return importlib.import_module(f"rlhf_fast.kernels.{room}.{name}")


def rows(backend):
    """(logits, ids, mask) with a masked row, and vectors for the upstream gradients."""
    device = device_of(backend)
    logits = 3 * randn(N, V, seed=1)
    logits[2, 100:300] = -torch.inf
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(N) != 4
    tensors = logits, ids, mask, randn(N, seed=3), randn(N, seed=4)
    return [x.to(device) for x in tensors]


def part_of(ids, columns):
    among = (ids >= columns.start) & (ids < columns.stop)
    return torch.where(among, ids - columns.start, ELSEWHERE)


def assert_rounded(name, ours, exact):
    """`ours` is `exact` in its dtype; Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    if ours.dtype == torch.bfloat16 and _dispatch.interpreting():
        assert ((ours.float() - exact).abs() <= 2**-7 * exact.abs()).all(), name
    else:
        assert_same_bits(name, ours, exact.to(ours.dtype))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_logprob_gradient_of_a_part(backend, softcap, with_entropy):
    """Slices of the gradient, from slices of the logits, have the bits of the whole."""
    module = kernels("logprob", backend)
    logits, ids, mask, g, h = rows(backend)
    h = h if with_entropy else None
    options = mask, 0.7, None, softcap, -100
    _, entropy, row_max, log_sum = module.logprob_entropy(logits, ids, *options)
    saved = row_max, log_sum, entropy if with_entropy else None
    whole = module.logprob_backward(g, h, logits, ids, *options, *saved)
    for columns in (slice(0, 1), slice(1, 1024), slice(1024, 2049), slice(2049, V)):
        here = part_of(ids, columns)
        with poisoned_memory():
            part = module.logprob_backward(g, h, logits[:, columns], here, *options, *saved)
        assert_same_bits(f"{columns}", part, whole[:, columns].contiguous())


@pytest.mark.parametrize("sides", [("logprob",), ("entropy",), ("logprob", "entropy")])
def test_kl_gradient_of_a_part(backend, sides):
    module = kernels("kl", backend)
    logits, ids, mask, g, h = rows(backend)
    ref = logits + randn(N, V, seed=5).to(logits.device)
    k = randn(N, seed=6).to(logits.device)
    options = mask, 0.7, None
    out = module.kl_divergence_full(logits, ref, ids, *options)
    kl, _, _, entropy, *stats = out
    g = g if "logprob" in sides else None
    h = h if "entropy" in sides else None
    saved = *stats, kl, entropy if h is not None else None
    whole = module.kl_divergence_backward(k, g, h, logits, ref, ids, *options, *saved)
    for columns in (slice(0, 1), slice(1, 1024), slice(1024, 2049), slice(2049, V)):
        here = part_of(ids, columns)
        part = module.kl_divergence_backward(
            k, g, h, logits[:, columns], ref[:, columns], here, *options, *saved
        )
        assert_same_bits(f"{columns}", part, whole[:, columns].contiguous())


def test_another_id_out_of_range_still_gives_nan(backend):
    module = kernels("logprob", backend)
    logits, ids, mask, g, _ = rows(backend)
    for bad in (-1, V, ELSEWHERE + 1, -(2**63)):
        ids[0] = bad
        options = mask, 1.0, None, None, -100
        logprob, row_max, log_sum = module.logprob(logits, ids, *options)
        out = module.logprob_backward(g, None, logits, ids, *options, row_max, log_sum, None)
        assert logprob[0].isnan() and out[0].isnan().all()
        assert logprob[1:].isfinite().all() and out[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 5, 17, 1003, V])
def test_gradient_in_half_precision(backend, dtype, vocabulary):
    """The float32 gradient, rounded once."""
    module = kernels("logprob", backend)
    logits, ids, mask, g, h = rows(backend)
    logits, ids = logits[:, :vocabulary], ids % vocabulary
    options = mask, 1.3, None, None, -100
    _, entropy, row_max, log_sum = module.logprob_entropy(logits, ids, *options)
    arguments = g, h, logits, ids, *options, row_max, log_sum, entropy
    exact = module.logprob_backward(*arguments)
    out = torch.full((N, vocabulary), torch.nan, dtype=dtype, device=logits.device)
    assert module.logprob_backward(*arguments, out=out) is out
    assert_rounded("gradient", out, exact)


def test_rows_go_to_their_places(backend):
    module = kernels("logprob", backend)
    logits, ids, mask, g, _ = rows(backend)
    options = mask, 1.0, None, None, -100
    _, row_max, log_sum = module.logprob(logits, ids, *options)
    arguments = g, None, logits, ids, *options, row_max, log_sum, None
    whole = module.logprob_backward(*arguments)
    places = torch.tensor([3, -1, 0, 6, 2, -1, 5, -1, 1], device=logits.device)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((8, V), 7.0, dtype=dtype, device=logits.device)
        module.logprob_backward(*arguments, out=out, places=places)
        for row, place in enumerate(places.tolist()):
            if place >= 0:
                assert_rounded(f"row {row}", out[place], whole[row])
        untouched = sorted(set(range(8)) - set(places.tolist()))
        assert (out[untouched] == 7.0).all()


def test_a_wrong_target_is_named(backend):
    module = kernels("logprob", backend)
    logits, ids, mask, g, _ = rows(backend)
    options = mask, 1.0, None, None, -100
    arguments = g, None, logits, ids, *options, g, g, None
    for out in (logits.double(), logits[:-1].clone(), logits.t().contiguous().t()):
        with pytest.raises(ValueError, match="out: expected a contiguous float32 tensor"):
            module.logprob_backward(*arguments, out=out)
    with pytest.raises(ValueError, match="out: expected a contiguous bfloat16 tensor"):
        module.logprob_backward(
            g, None, logits.bfloat16(), ids, *options, g, g, None, out=torch.empty_like(logits)
        )


def test_backends_are_tested():
    assert ROWS or rlhf_fast.backends()["logprob"]["cpu"] is not True
