"""Decode attention against float64, PyTorch's own attention, and itself in other batches."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.kernels.decode_attention import Prefix
from rlhf_fast.testing import (
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    usable_backends,
)

BACKENDS = usable_backends("decode_attention")
KERNELS = [b for b in BACKENDS if b != "reference"]
HALF = (torch.bfloat16, torch.float16)


def cache(B=3, heads=4, key_heads=2, C=300, D=16, *, dtype=torch.float32, seed=0, scale=1.0):
    """(query, keys, values), as a layer of a model would hand them over."""
    query = scale * randn(B, heads, D, seed=seed)
    keys, values = (randn(B, key_heads, C, D, seed=seed + i) for i in (1, 2))
    return tuple(x.to(dtype) for x in (query, keys, values))


def attend(backend, query, keys, values, lengths, **options):
    device = device_of(backend)
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    with rlhf_fast.use_backend(backend, op="decode_attention"):
        out = rlhf_fast.decode_attention(
            *(x.to(device) for x in (query, keys, values, lengths)), **options
        )
    return out.cpu()


def by_sdpa(query, keys, values, lengths, *, scale=None, window=None, softcap=None):
    """What PyTorch's attention (or, with a softcap, its definition) gives, slot by slot."""
    rows = []
    for q, k, v, n in zip(query, keys, values, lengths, strict=True):
        if n == 0:
            rows.append(torch.zeros_like(q))
            continue
        first = 0 if window is None else max(0, n - window)
        k, v = (x[:, first:n].repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        if softcap is None:
            rows.append(scaled_dot_product_attention(q[:, None], k, v, scale=scale)[:, 0])
        else:
            s = (k @ q[..., None])[..., 0] * (q.shape[-1] ** -0.5 if scale is None else scale)
            p = (softcap * torch.tanh(s / softcap)).softmax(-1)
            rows.append((p[:, None] @ v)[:, 0])
    return torch.stack(rows)


def check(backend, tensors, lengths, **options):
    ours = attend(backend, *tensors, lengths, **options)
    truth = by_sdpa(*(x.double() for x in tensors), lengths, **options)
    plain = by_sdpa(*tensors, lengths, **options)
    assert ours.dtype == tensors[0].dtype
    assert_accurate(backend, ours, truth, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (5, 1), (8, 1)], ids=str)
def test_grouped_queries(backend, heads):
    check(backend, cache(2, *heads, C=70, D=16), [70, 33])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 3, 8, 17, 64, 80, 96, 128])
def test_head_sizes(backend, size):
    check(backend, cache(2, 4, 2, C=40, D=size), [1, 40])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lengths",
    [(1, 2, 3), (15, 16, 17), (63, 64, 65), (255, 256, 257), (511, 513, 700), (0, 700, 0)],
)
def test_lengths(backend, lengths):
    check(backend, cache(C=700), lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [8, 64, 80])
def test_half_precision(backend, dtype, size):
    check(backend, cache(C=300, D=size, dtype=dtype), (300, 31, 257))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1}, {"window": 5}, {"window": 256}, {"window": 300}, {"window": 10**12},
        {"softcap": 5.0}, {"softcap": 0.3}, {"softcap": 5.0, "window": 7}, {"scale": 0.7},
        {"scale": -2.0}, {"scale": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_options(backend, options):
    check(backend, cache(C=600), (600, 9, 513), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_peaked_scores(backend, scale):
    """Scores of several hundred: exponentials of all columns but a few vanish."""
    check(backend, cache(C=600, scale=scale), (600, 40, 300))


# --------------------------------------------------------------------------- a prefix


def prefixed(rows, before, own, *, P=3, Cp=300, C=300, dtype=torch.float32, **sizes):
    """((query, keys, values), lengths, prefix, and each slot's whole keys and values)."""
    query, keys, values = cache(len(rows), C=C, dtype=dtype, **sizes)
    _, *shared = cache(P, C=Cp, dtype=dtype, seed=7, **sizes)
    whole = [
        [
            torch.cat((p[r, :, :n], x[b, :, :m]), 1)
            for p, x in zip(shared, (keys, values), strict=True)
        ]
        for b, (r, n, m) in enumerate(zip(rows, before, own, strict=True))
    ]
    prefix = Prefix(*shared, torch.tensor(rows), torch.tensor(before))
    return (query, keys, values), own, prefix, whole


def check_prefix(backend, given, **options):
    tensors, own, prefix, whole = given
    device = device_of(backend)
    with poisoned_memory():
        ours = attend(
            backend, *tensors, own, prefix=Prefix(*(x.to(device) for x in prefix)), **options
        )

    def expected(dtype):
        return torch.cat(
            [
                by_sdpa(
                    q[None].to(dtype), k[None].to(dtype), v[None].to(dtype), [k.shape[1]], **options
                )
                for q, (k, v) in zip(tensors[0], whole, strict=True)
            ]
        )

    assert_accurate(backend, ours, expected(torch.float64), expected(tensors[0].dtype))
    return ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "before", "own"),
    [
        ((0, 0, 2, 1), (5, 5, 300, 256), (1, 7, 300, 2)),
        ((1, 1, 1), (257, 257, 257), (1, 256, 257)),
        ((2, 0, 1), (0, 4, 0), (3, 0, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 260}, {"softcap": 5.0}], ids=str)
def test_prefix(backend, rows, before, own, options):
    check_prefix(backend, prefixed(rows, before, own), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_prefix_in_half_precision(backend, dtype):
    check_prefix(backend, prefixed((1, 1, 0), (280, 280, 3), (1, 5, 300), dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_behind_a_prefix_is_never_looked_at(backend):
    given = prefixed((0, 0, 2), (5, 5, 290), (1, 7, 30))
    expected = check_prefix(backend, given)
    tensors, own, prefix, _ = given
    for x in prefix[:2]:
        x[0, :, 5:], x[1], x[2, :, 290:] = torch.nan, torch.inf, torch.nan
    for x in tensors[1:]:
        for b, n in enumerate(own):
            x[b, :, n:] = torch.nan
    assert_same_bits(backend, check_prefix(backend, given), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_slots_of_a_prefix_do_not_depend_on_each_other(backend):
    tensors, own, prefix, _ = prefixed((0, 0, 2, 0), (270, 270, 30, 270), (1, 7, 300, 40))
    device = device_of(backend)
    prefix = Prefix(*(x.to(device) for x in prefix))
    whole = attend(backend, *tensors, own, prefix=prefix)
    for b in range(4):
        one = Prefix(prefix.keys, prefix.values, prefix.rows[b : b + 1], prefix.lengths[b : b + 1])
        alone = attend(backend, *(x[b : b + 1] for x in tensors), own[b : b + 1], prefix=one)
        assert_same_bits(backend, alone[0], whole[b])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(3, 2, 5)}, ValueError, "prefix.keys: expected shape"),
        ({"keys": torch.zeros(0, 2, 5, 8)}, ValueError, "P > 0"),
        ({"keys": torch.zeros(3, 1, 5, 8)}, ValueError, "prefix.values: expected shape"),
        ({"values": torch.zeros(3, 2, 5, 8).half()}, TypeError, "prefix.values: expected float32"),
        ({"rows": torch.tensor([0])}, ValueError, "prefix.rows: expected shape"),
        (
            {"rows": torch.tensor([0, 3])},
            ValueError,
            r"prefix.rows: expected values in \[0, 2\], got 3",
        ),
        ({"lengths": torch.tensor([6, 0])}, ValueError, r"prefix.lengths: .*\[0, 5\], got 6"),
        ({"lengths": torch.tensor([0.0, 1.0])}, TypeError, "prefix.lengths: expected int32"),
    ],
    ids=str,
)
def test_bad_prefixes(change, error, message):
    good = Prefix(
        CACHE[:1].expand(3, -1, -1, -1), CACHE[:1].expand(3, -1, -1, -1), LENGTHS, LENGTHS
    )
    with pytest.raises(error, match=message):
        rlhf_fast.decode_attention(QUERY, CACHE, CACHE, LENGTHS, prefix=good._replace(**change))


def test_a_prefix_has_names():
    with pytest.raises(TypeError, match="prefix: expected a Prefix or None, got tuple"):
        prefix = (CACHE, CACHE, LENGTHS, LENGTHS)
        rlhf_fast.decode_attention(QUERY, CACHE, CACHE, LENGTHS, prefix=prefix)


def test_heads_of_a_prefix():
    other = torch.zeros(3, 1, 5, 8)
    with pytest.raises(ValueError, match=r"prefix.keys: expected the 2 heads of keys, got 1"):
        prefix = Prefix(other, other, LENGTHS, LENGTHS)
        rlhf_fast.decode_attention(QUERY, CACHE, CACHE, LENGTHS, prefix=prefix)


def test_float64_is_the_reference():
    tensors = cache(C=50, dtype=torch.float64)
    lengths = torch.tensor([50, 1, 7])
    out = rlhf_fast.decode_attention(*tensors, lengths)
    torch.testing.assert_close(out, by_sdpa(*tensors, lengths.tolist()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_lies_outside_is_never_looked_at(backend, bad):
    query, keys, values = cache(C=600)
    lengths, window = (300, 0, 17), 40
    expected = attend(backend, query, keys, values, lengths, window=window)
    for b, n in enumerate(lengths):
        for x in (keys, values):
            x[b, :, n:] = bad
            x[b, :, : max(0, n - window)] = bad
    with poisoned_memory():
        out = attend(backend, query, keys, values, lengths, window=window)
    assert_same_bits(backend, out, expected)
    assert not out[1].any() and out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_and_nan_inside(backend):
    query, keys, values = cache(2, 2, 1, C=300, D=8)
    query[0] = query[0].abs()
    keys[0, :, 5:290] = -torch.inf
    keys[1, :, 3] = torch.nan
    out = attend(backend, query, keys, values, (300, 300))
    kept = torch.cat((torch.arange(5), torch.arange(290, 300)))
    truth = by_sdpa(
        query[:1].double(), keys[:1, :, kept].double(), values[:1, :, kept].double(), [15]
    )
    assert_accurate(backend, out[:1], truth)
    assert out[1].isnan().all()
    keys[0] = -torch.inf
    assert not attend(backend, query, keys, values, (300, 300))[0].any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other(backend, dtype):
    """Alone, permuted, and in a larger cache that is a view: the same bits."""
    lengths = [700, 3, 256, 513, 0]
    tensors = cache(5, 6, 2, C=700, D=24, dtype=dtype)
    whole = attend(backend, *tensors, lengths, window=600)
    for b, n in enumerate(lengths):
        alone = attend(backend, *(x[b : b + 1] for x in tensors), [n], window=600)
        assert_same_bits(f"{backend} alone", alone[0], whole[b])
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = attend(backend, *(x[order] for x in tensors), [lengths[i] for i in order], window=600)
    assert_same_bits(f"{backend} permuted", turned, whole[order])
    query, keys, values = tensors
    wide = [torch.full((7, 2, 900, 24), torch.nan, dtype=dtype) for _ in range(2)]
    for large, x in zip(wide, (keys, values), strict=True):
        large[:5, :, :700] = x
    inside = attend(backend, query, *(x[:5] for x in wide), lengths, window=600)
    assert_same_bits(f"{backend} wide", inside, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Strided caches are read in place; a last axis that is not dense is copied."""
    query, keys, values = cache(C=90, D=32)
    lengths = (90, 4, 33)
    expected = attend(backend, query, keys, values, lengths)
    columns_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (keys, values)]
    queries = query.transpose(0, 1).contiguous().transpose(0, 1)
    for k, v in (columns_first, last, (columns_first[0], last[1])):
        out = attend(backend, queries, k, v, lengths)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 10, 8), (2, 4, 2, 0, 8), (2, 0, 2, 10, 8)], ids=str)
def test_empty(backend, shape):
    B, heads, key_heads, C, D = shape
    tensors = randn(B, heads, D), randn(B, key_heads, C, D), randn(B, key_heads, C, D)
    out = attend(backend, *tensors, [0] * B)
    assert out.shape == (B, heads, D) and not out.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_lengths_and_no_gradient(backend):
    device = device_of(backend)
    tensors = [x.to(device).requires_grad_() for x in cache(C=20)]
    lengths = torch.tensor([20, 3, 0], device=device)
    with rlhf_fast.use_backend(backend, op="decode_attention"):
        out = rlhf_fast.decode_attention(*tensors, lengths.int())
        assert_same_bits(backend, out, rlhf_fast.decode_attention(*tensors, lengths))
    assert not out.requires_grad


@pytest.mark.skipif(_dispatch.native_module() is None, reason="the native module is not built")
def test_instruction_sets_and_threads_agree(monkeypatch):
    from rlhf_fast import _C

    tensors, lengths = cache(4, 6, 2, C=600, D=40, scale=3.0), [600, 17, 256, 300]
    before, threads = _C.isa(), torch.get_num_threads()
    expected = attend("cpu", *tensors, lengths, softcap=20.0)
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert_same_bits("threads", attend("cpu", *tensors, lengths, softcap=20.0), expected)
        for name in _C.isas():
            _C.set_isa(name)
            check("cpu", tensors, lengths)
            check("cpu", tensors, lengths, softcap=20.0)
            check("cpu", cache(C=300, D=37, dtype=torch.bfloat16), (300, 31, 257))
    finally:
        _C.set_isa(before)
        torch.set_num_threads(threads)


QUERY, CACHE = torch.zeros(2, 4, 8), torch.zeros(2, 2, 5, 8)
LENGTHS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((QUERY.int(), CACHE, CACHE, LENGTHS), {}, TypeError, "query"),
        ((QUERY[0], CACHE, CACHE, LENGTHS), {}, ValueError, "query"),
        ((QUERY, CACHE.double(), CACHE, LENGTHS), {}, TypeError, "keys"),
        ((QUERY, CACHE[:1], CACHE, LENGTHS), {}, ValueError, "keys"),
        ((QUERY, CACHE, CACHE[:, :, :3], LENGTHS), {}, ValueError, "values"),
        ((QUERY, CACHE[..., :7], CACHE, LENGTHS), {}, ValueError, "keys"),
        ((QUERY[:, :3], CACHE, CACHE, LENGTHS), {}, ValueError, "multiple"),
        ((QUERY, CACHE, CACHE, LENGTHS.float()), {}, TypeError, "lengths"),
        ((QUERY, CACHE, CACHE, LENGTHS[:1]), {}, ValueError, "lengths"),
        ((QUERY, CACHE, CACHE, torch.tensor([1, 6])), {}, ValueError, "lengths.* 6"),
        ((QUERY, CACHE, CACHE, torch.tensor([-1, 5])), {}, ValueError, "lengths.* -1"),
        ((QUERY, CACHE, CACHE, LENGTHS), {"window": 0}, ValueError, "window"),
        ((QUERY, CACHE, CACHE, LENGTHS), {"window": 2.0}, TypeError, "window"),
        ((QUERY, CACHE, CACHE, LENGTHS), {"softcap": 0.0}, ValueError, "softcap"),
        ((QUERY, CACHE, CACHE, LENGTHS), {"scale": torch.inf}, ValueError, "scale"),
    ],
)
def test_bad_arguments(arguments, options, error, text):
    with pytest.raises(error, match=text):
        rlhf_fast.decode_attention(*arguments, **options)
