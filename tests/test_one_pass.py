"""`logprob_entropy_and_grad` and `kl_divergence_and_grad`: values and gradient in one pass."""

import math

import pytest
import torch

import rlhf_fast
from rlhf_fast import _dispatch
from rlhf_fast.testing import (
    adversarial_logits,
    assert_accurate,
    assert_same_bits,
    device_of,
    poisoned_memory,
    randn,
    random_mask,
    usable_backends,
)

INF = math.inf
OPS = ("logprob_entropy_and_grad", "kl_divergence_and_grad")
CASES = [(op, backend) for op in OPS for backend in usable_backends(op)]
each = pytest.mark.parametrize(("op", "backend"), CASES)


def tokens_of(rows, vocabulary):
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(4))


def problem(op, rows=5, vocabulary=37, dtype=torch.float32, logits=None):
    """The arguments of one call, by name, on the CPU."""
    logits = 3 * randn(rows, vocabulary, seed=1) if logits is None else logits
    rows, vocabulary = logits.shape
    made = {
        "logits": logits.to(dtype),
        "ids": tokens_of(rows, vocabulary),
        "grad_logprob": randn(rows, seed=5),
        "grad_entropy": randn(rows, seed=6),
    }
    if op.startswith("kl"):
        made["ref_logits"] = (logits + randn(rows, vocabulary, seed=2)).to(dtype)
        made["grad_kl"] = randn(rows, seed=7)
    return made


def moved(arguments, change):
    return {name: change(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def call(op, backend, arguments, **options):
    """The results on the CPU."""
    device = device_of(backend)
    with rlhf_fast.use_backend(backend), poisoned_memory():
        out = getattr(rlhf_fast, op)(**moved(arguments | options, lambda x: x.to(device)))
    return type(out)(*(None if x is None else x.cpu() for x in out))


def assert_right(op, backend, arguments, **options):
    """All results against the two-step ops' gradient in float64, by the package's rule."""
    ours = call(op, backend, arguments, **options)
    plain = two_steps(op, arguments | options)
    truth = two_steps(op, moved(arguments | options, to_double))
    for name, got in zip(ours._fields, ours, strict=True):
        assert_accurate(name, got, truth[name], plain[name])
    assert ours.grad.dtype == arguments["logits"].dtype
    return ours


def to_double(x):
    return x.double() if x.is_floating_point() else x


def two_steps(op, arguments):
    """Values and autograd's gradient of the differentiable ops, by the reference."""
    arguments = dict(arguments)
    logits = arguments.pop("logits").detach().requires_grad_()
    grads = {n[5:]: arguments.pop(n) for n in list(arguments) if n.startswith("grad_")}
    separate = rlhf_fast.logprob_entropy if op in OPS[:1] else rlhf_fast.kl_divergence_full
    with rlhf_fast.use_backend("reference"):
        values = separate(logits, **arguments)._asdict()
        outputs = [values[n] for n, g in grads.items() if g is not None]
        upstream = [
            g.to(o.dtype)
            for g, o in zip((g for g in grads.values() if g is not None), outputs, strict=True)
        ]
        (grad,) = torch.autograd.grad(outputs, logits, upstream)
    return {name: x.detach() for name, x in values.items()} | {"grad": grad}


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 37, 1500])
def test_values_and_gradient(op, backend, dtype, vocabulary):
    assert_right(op, backend, problem(op, 5, vocabulary, dtype))


@each
@pytest.mark.parametrize("left_out", ["grad_logprob", "grad_entropy"])
def test_a_gradient_that_is_left_out_is_zero(op, backend, left_out):
    arguments = problem(op)
    whole = call(op, backend, arguments | {left_out: torch.zeros(5)})
    none = 0.0 if left_out == "grad_logprob" and op == OPS[0] else None
    out = call(op, backend, arguments | {left_out: none})
    for name, a, b in zip(out._fields, out, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


@each
def test_numbers_stand_for_every_token(op, backend):
    arguments = problem(op)
    numbers = {name: 0.25 for name in arguments if name.startswith("grad_")}
    tensors = {name: torch.full((5,), 0.25) for name in numbers}
    expanded = {name: torch.tensor(0.25).expand(5) for name in numbers}
    results = [call(op, backend, arguments | given) for given in (numbers, tensors, expanded)]
    for a, b, c in zip(*results, strict=True):
        assert_same_bits("number", a, b)
        assert_same_bits("stride 0", a, c)


@each
@pytest.mark.parametrize("temperature", [0.3, torch.linspace(0.5, 2.0, 5)])
def test_temperature_and_mask(op, backend, temperature):
    arguments = problem(op)
    mask = torch.tensor([1, 1, 0, 1, 1])
    poisoned = arguments | {"logits": arguments["logits"].clone()}
    poisoned["logits"][2] = torch.nan
    out = assert_right(op, backend, poisoned, temperature=temperature, mask=mask)
    assert all((x[2] == 0).all() for x in out)


def test_softcap_and_ignore_index():
    op = OPS[0]
    for backend in usable_backends(op):
        arguments = problem(op)
        arguments["ids"][1] = -1
        out = assert_right(op, backend, arguments, softcap=5.0, ignore_index=-1)
        assert all((x[1] == 0).all() for x in out)


@each
def test_a_batch_that_is_all_masked_or_empty(op, backend):
    arguments = problem(op)
    arguments["logits"].fill_(torch.nan)
    arguments["ids"].fill_(-100)
    for inplace in (False, True):
        out = call(op, backend, arguments, inplace=inplace)
        assert all((x == 0).all() for x in out)
    empty = {name: x[:0] for name, x in arguments.items()}
    for inplace in (False, True):
        out = call(op, backend, empty, inplace=inplace)
        assert out.grad.shape == (0, 37) and out.entropy.shape == (0,)


@each
@pytest.mark.parametrize("name", adversarial_logits(8))
def test_adversarial_rows(op, backend, name):
    logits = adversarial_logits(8)[name]
    assert_right(op, backend, problem(op, logits=logits.reshape(-1, logits.shape[-1])))


@each
def test_minus_infinity_gets_no_gradient(op, backend):
    arguments = problem(op)
    arguments["logits"][0] = -INF
    arguments["logits"][1, ::2] = -INF
    arguments["ids"][1] = 0  # an impossible token
    out = assert_right(op, backend, arguments)
    assert (out.grad[0] == 0).all() and (out.grad[1, ::2] == 0).all()
    assert out.logprob[1] == -INF and not out.grad.isnan().any()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_has_the_same_bits(op, backend, dtype):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is served by the reference")
    arguments = problem(op, 7, 1500, dtype)
    arguments["logits"][1, arguments["ids"][1]] = -INF
    before = moved(arguments, torch.clone)
    apart = call(op, backend, arguments, mask=random_mask(7, seed=8))
    for name, x in arguments.items():
        assert_same_bits(f"input {name}", x, before[name])
    with rlhf_fast.use_backend(backend):
        given = moved(
            arguments | {"mask": random_mask(7, seed=8)}, lambda x: x.to(device_of(backend))
        )
        version = given["logits"]._version
        inside = getattr(rlhf_fast, op)(**given, inplace=True)
    assert inside.grad is given["logits"] and inside.grad._version > version
    for name, a, b in zip(apart._fields, apart, inside, strict=True):
        assert_same_bits(name, a, b.cpu())


@each
def test_a_row_is_the_same_alone_and_in_any_layout(op, backend):
    arguments = problem(op, 6, 1500)
    whole = call(op, backend, arguments)
    alone = call(op, backend, {name: x[2:3] for name, x in arguments.items()})
    logits = arguments["logits"].view(2, 3, 1500)
    padded = torch.cat([logits, torch.full((2, 1, 1500), torch.nan)], 1)[:, :-1]
    shaped = {n: x.view(2, 3, *x.shape[1:]) for n, x in arguments.items()} | {"logits": padded}
    view = call(op, backend, shaped)
    for name, a, b, c in zip(whole._fields, whole, alone, view, strict=True):
        assert_same_bits(f"{name} alone", a[2:3], b)
        assert_same_bits(f"{name} of a view", a, c.reshape(a.shape))


@each
def test_nothing_is_differentiable(op, backend):
    arguments = problem(op)
    arguments["logits"].requires_grad_()
    arguments["grad_entropy"].requires_grad_()
    out = call(op, backend, arguments)
    assert not any(x.requires_grad for x in out)


@pytest.mark.parametrize("op", OPS)
def test_autograd_notices_that_the_logits_were_overwritten(op):
    weight = torch.ones(37, requires_grad=True)
    arguments = problem(op)
    product = (arguments["logits"] * weight).exp()  # saves its result
    getattr(rlhf_fast, op)(**arguments | {"logits": product.detach()}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_goes_on_through_what_computed_the_logits(op):
    arguments = problem(op)
    hidden, weight = randn(5, 4, seed=8), randn(37, 4, seed=9).requires_grad_()
    logits = hidden @ weight.T
    out = getattr(rlhf_fast, op)(**arguments | {"logits": logits.detach()}, inplace=True)
    logits.backward(out.grad)
    expected = two_steps(op, arguments | {"logits": hidden @ weight.detach().T})["grad"].T @ hidden
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("op", OPS)
def test_logits_that_cannot_be_overwritten_are_refused(op):
    arguments = problem(op)
    function = getattr(rlhf_fast, op)
    leaf = arguments["logits"].clone().requires_grad_()
    for logits, message in (
        (leaf, "requires a gradient"),
        (leaf * 1, "requires a gradient"),
        (randn(37, 5).T, "contiguous"),
        (randn(5, 40)[:, :37], "contiguous"),
        (randn(37).expand(5, 37), "contiguous"),
    ):
        with pytest.raises(ValueError, match=f"logits: expected .*{message}"):
            function(**arguments | {"logits": logits}, inplace=True)


def test_a_reference_in_float64_decides_the_arithmetic():
    arguments = problem(OPS[1])
    arguments["ref_logits"] = arguments["ref_logits"].double()
    out = rlhf_fast.kl_divergence_and_grad(**arguments)
    assert out.kl.dtype == torch.float64 and out.grad.dtype == torch.float32
    with pytest.raises(TypeError, match="logits: expected float64"):
        rlhf_fast.kl_divergence_and_grad(**arguments, inplace=True)


@pytest.mark.parametrize("op", OPS)
def test_wrong_gradients_are_refused(op):
    arguments = problem(op)
    function = getattr(rlhf_fast, op)
    for wrong, error in (
        (torch.ones(4), ValueError),
        (torch.ones(5, dtype=torch.int64), TypeError),
        ("1", TypeError),
        (INF, ValueError),
    ):
        for name in (n for n in arguments if n.startswith("grad_")):
            with pytest.raises(error, match=f"{name}: expected"):
                function(**arguments | {name: wrong})


def test_kl_without_ids():
    for backend in usable_backends(OPS[1]):
        arguments = problem(OPS[1])
        ids = arguments.pop("ids")
        with pytest.raises(ValueError, match="grad_logprob: expected ids beside it"):
            call(OPS[1], backend, arguments)
        del arguments["grad_logprob"]
        out = call(OPS[1], backend, arguments)
        with_ids = call(OPS[1], backend, arguments | {"ids": ids})
        assert out.logprob is None and out.ref_logprob is None
        for name in ("kl", "entropy", "grad"):
            assert_same_bits(name, getattr(out, name), getattr(with_ids, name))


@pytest.mark.parametrize("op", OPS)
def test_an_id_out_of_range_is_refused(op):
    arguments = problem(op)
    arguments["ids"][3] = 37
    for inplace in (False, True):
        with pytest.raises(IndexError, match="37"):
            getattr(rlhf_fast, op)(**arguments, inplace=inplace)


def torch_arguments(op):
    """Arguments of the torch op, in its order."""
    x = problem(op)
    grads = x["grad_logprob"], x["grad_entropy"]
    if op == OPS[0]:
        return x["logits"], x["ids"], *grads, None, 0.7, None, 5.0, -100, ""
    return x["logits"], x["ref_logits"], x["ids"], x["grad_kl"], *grads, None, 0.7, None, ""


@pytest.mark.parametrize("op", OPS)
def test_the_in_place_op_is_a_torch_op(op):
    function = getattr(torch.ops.rlhf_fast, f"{op}_inplace").default
    torch.library.opcheck(function, torch_arguments(op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_in_place_compiles_without_a_graph_break(op, backend):
    torch._dynamo.reset()
    function = getattr(rlhf_fast, op)

    def step(arguments):
        out = function(**arguments, inplace=True)
        return out, out.grad * 2

    plain, compiled = problem(op), problem(op)
    expected, double = step(plain)
    got, twice = torch.compile(step, fullgraph=True, backend=backend)(compiled)
    assert_same_bits("the logits themselves", plain["logits"], compiled["logits"])
    for name, a, b in zip(expected._fields, expected, got, strict=True):
        assert_same_bits(name, a, b)
    assert_same_bits("what follows", double, twice)


def test_every_instruction_set_and_any_number_of_threads_agrees_with_the_two_steps():
    if "cpu" not in usable_backends(OPS[0]):
        pytest.skip("the native module is not built")
    native = _dispatch.native_module()
    before = native.isa(), torch.get_num_threads()
    try:
        for isa in native.isas():
            native.set_isa(isa)
            for threads, rows in ((1, 1), (1, 9), (3, 5), (3, 9)):
                torch.set_num_threads(threads)
                for op in OPS:
                    check_same_as_two_steps(op, rows)
    finally:
        native.set_isa(before[0])
        torch.set_num_threads(before[1])


def check_same_as_two_steps(op, rows):
    for vocabulary in (1500, 40_000):
        arguments = problem(op, rows, vocabulary)
        out = call(op, "cpu", arguments)
        logits = arguments.pop("logits").requires_grad_()
        grads = [arguments.pop(n) for n in sorted(arguments) if n.startswith("grad_")]
        separate = rlhf_fast.logprob_entropy if op == OPS[0] else rlhf_fast.kl_divergence_full
        values = separate(logits, **arguments)
        wanted = [getattr(values, n) for n in ("entropy", "kl", "logprob") if hasattr(values, n)]
        (grad,) = torch.autograd.grad(wanted, logits, grads)
        for name, a, b in zip(out._fields, out, (*values, grad), strict=True):
            assert_same_bits(name, a, b)
