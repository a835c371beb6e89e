"""The linear layer for few rows against float64, PyTorch's, and itself among other rows."""

import pytest
import torch
from torch.nn.functional import linear

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import (
    assert_accurate,
    poisoned_memory,
    randn,
    usable_backends,
)

BACKENDS = usable_backends("decode_linear")
_C = _dispatch.native_module()
needs_native = pytest.mark.skipif(_C is None, reason="the native module is not built")


def layer(rows=3, size=40, outputs=10, *, dtype=torch.float32, bias=True):
    tensors = (randn(rows, size), randn(outputs, size, seed=1) * max(size, 1) ** -0.5)
    tensors += (randn(outputs, seed=2),) if bias else ()
    return tuple(x.to(dtype) for x in tensors)


def apply(backend, *tensors):
    with rlhf_fast.use_backend(backend, op="decode_linear"), poisoned_memory():
        return rlhf_fast.decode_linear(*tensors)


def check(backend, *tensors):
    ours = apply(backend, *tensors)
    assert ours.dtype == tensors[0].dtype
    assert_accurate(backend, ours, linear(*(x.double() for x in tensors)), linear(*tensors))


# Fewer than a vector, whole ones, one more, and several groups of them.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 64, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_rows(backend, rows, bias):
    check(backend, *layer(rows, 100, 21, bias=bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 1000])
def test_sizes(backend, size, outputs):
    check(backend, *layer(3, size, outputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    check(backend, *layer(dtype=dtype))


def test_float64_is_the_reference():
    tensors = layer(dtype=torch.float64)
    torch.testing.assert_close(rlhf_fast.decode_linear(*tensors), linear(*tensors))


@needs_native
def test_leading_dimensions_and_layouts():
    x, weight, bias = layer(12, 40, 10)
    expected = apply("cpu", x, weight, bias)
    assert torch.equal(apply("cpu", x.view(2, 3, 2, 40), weight, bias), expected.view(2, 3, 2, 10))
    assert torch.equal(apply("cpu", x[0], weight, bias), expected[0])
    columns = (x.T.contiguous().T, weight.T.contiguous().T, bias[:, None].expand(10, 2)[:, 0])
    assert torch.equal(apply("cpu", *columns), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    x, weight, bias = layer()
    assert apply(backend, x[:0], weight, bias).shape == (0, 10)
    assert apply(backend, x, weight[:0], bias[:0]).shape == (3, 0)
    assert torch.equal(apply(backend, x[:, :0], weight[:, :0], bias), bias.expand(3, 10))
    assert torch.equal(apply(backend, x[:, :0], weight[:, :0]), torch.zeros(3, 10))


@pytest.fixture(params=_C.isas() if _C else [])
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield
    _C.set_isa(before)


def stored(weight, transposed):
    """The same weight, laid out as [O, H] or, as transformers' Conv1D keeps it, as [H, O]."""
    return weight.t().contiguous().t() if transposed else weight


@pytest.mark.parametrize("rows", [1, 4, 7, 16, 17, 33])
@pytest.mark.parametrize("outputs", [1, 15, 16, 21, 70])
@pytest.mark.parametrize("transposed", [False, True])
def test_instruction_sets(isa, rows, outputs, transposed):
    x, weight, bias = layer(rows, 300, outputs)
    check("cpu", x, stored(weight, transposed), bias)
    check("cpu", x, stored(weight, transposed))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_depends_on_no_other(isa, transposed):
    x, weight, bias = layer(70, 700, 50)
    weight = stored(weight, transposed)
    whole = apply("cpu", x, weight, bias)
    for rows in (1, 3, 8, 9, 16, 17, 32, 33, 64):
        assert torch.equal(apply("cpu", x[:rows], weight, bias), whole[:rows])
        assert torch.equal(apply("cpu", x[-rows:], weight, bias), whole[-rows:])
    bad = x.clone()
    bad[1::2] = torch.nan
    assert torch.equal(apply("cpu", bad, weight, bias)[::2], whole[::2])


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_change_no_bit(isa, transposed):
    x, weight, bias = layer(9, 600, 3000)
    tensors = x, stored(weight, transposed), bias
    expected, threads = apply("cpu", *tensors), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(apply("cpu", *tensors), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite(backend):
    """Infinities and NaN go where a plain product takes them."""
    x, weight, bias = layer(3, 40, 10)
    weight[4, 7], weight[5, 8], bias[6] = torch.inf, torch.nan, -torch.inf
    assert torch.equal(
        torch.isfinite(apply(backend, x, weight, bias)), torch.isfinite(linear(x, weight, bias))
    )


def test_detached():
    x, weight, bias = (t.requires_grad_() for t in layer())
    assert not rlhf_fast.decode_linear(x, weight, bias).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(3, 40, dtype=torch.int64)}, TypeError, "x: expected float64"),
        ({"x": torch.ones(3, 41)}, ValueError, r"weight: expected shape \[O, H\] with the H of x"),
        ({"x": torch.tensor(1.0)}, ValueError, "weight: expected shape"),
        ({"weight": torch.ones(40)}, ValueError, "weight: expected shape"),
        ({"weight": torch.ones(10, 40).double()}, TypeError, "weight: expected float32"),
        ({"bias": torch.ones(11)}, ValueError, r"bias: expected shape \(10,\)"),
        ({"bias": torch.ones(10).double()}, TypeError, "bias: expected float32"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    arguments = dict(zip(("x", "weight", "bias"), layer(), strict=True)) | change
    with pytest.raises(error, match=message):
        rlhf_fast.decode_linear(**arguments)
