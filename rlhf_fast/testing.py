"""What tests and benchmarks share: the tolerance rule, input makers, timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from rlhf_fast import _dispatch

# "A few" float32 ulp of the tolerance rule, relative to the largest magnitude of the truth (or 1).
FEW_ULP = 8


def assert_accurate(
    name: str, ours: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor | None = None
) -> None:
    """Hold `ours` to the package's tolerance rule.

        max |ours - truth| <= 2 max |plain - truth| + 8 ulp

    `truth` is the float64 formula on the same inputs, `plain` what plain PyTorch gives at the
    inputs' dtype (None: the ulp term alone). One ulp is that of `ours`' dtype at the larger of 1
    and the largest finite |truth|. Infinities and NaN must stand in the same places.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)} != {tuple(truth.shape)}"
    ours, truth = ours.detach(), truth.detach()
    eps = torch.finfo(ours.dtype).eps
    ours64, truth64 = ours.double(), truth.to(ours.device).double()
    finite = truth64.isfinite()
    assert torch.equal(ours64.isnan(), truth64.isnan()), (
        f"{name}: NaN in other places than the truth"
    )
    assert torch.equal(ours64[~finite].nan_to_num(), truth64[~finite].nan_to_num()), (
        f"{name}: infinities in other places than the truth"
    )
    if not finite.any():
        return
    error = (ours64 - truth64)[finite].abs().max().item()
    allowed = FEW_ULP * eps * max(1.0, truth64[finite].abs().max().item())
    if plain is not None:
        deviation = (plain.detach().to(ours.device).double() - truth64)[finite].abs()
        # A plain formula may be NaN or infinite where the truth is finite; that allows nothing.
        deviation = deviation[deviation.isfinite()]
        allowed += 2 * deviation.max().item() if deviation.numel() else 0.0
    assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}"


def assert_same_bits(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Fail at the first element whose bits differ (NaN equals itself, 0.0 is not -0.0)."""
    assert a.shape == b.shape and a.dtype == b.dtype, (
        f"{name}: {a.shape} {a.dtype}, {b.shape} {b.dtype}"
    )
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = a.detach().contiguous().view(integer) != b.detach().contiguous().view(integer)
    if different.any():
        first = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: bits differ at {first}: {a[first].item()!r}, {b[first].item()!r}"
        )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty`, `empty_like` and `new_empty` return with NaN (or a large integer).

    An output that a kernel forgets to write then fails the test instead of passing by luck.
    """

    def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.device.type == "meta" or type(out) is not torch.Tensor:
                return out
            if out.is_floating_point():
                return out.fill_(torch.nan)
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty)),
    ):
        yield


def usable_backends(op: str) -> list[str]:
    """The backends that can serve `op` on this machine, for parametrised tests."""
    return [name for name, state in _dispatch.backends()[op].items() if state is True]


def device_of(backend: str) -> str:
    """The device whose tensors `backend` serves here."""
    gpu = backend == "cuda" or (backend == "triton" and not _dispatch.interpreting())
    return "cuda" if gpu else "cpu"


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator, so that inputs are the same on every device."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers that depend on `seed` and `shape` only."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_mask(*shape: int, seed: int = 0, keep: float = 0.7) -> torch.Tensor:
    """A bool mask in which each token counts with probability `keep`."""
    return torch.rand(*shape, generator=generator(seed)) < keep


def adversarial_logits(
    vocabulary: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Named [4, V] logits on which fused log-prob kernels are known to fail."""
    base = 3 * randn(4, vocabulary, seed=7)
    some = base.clone()
    some[:, ::2] = -torch.inf
    some[:, vocabulary // 2] = 0.5
    head = base.clone()
    head[:, : max(vocabulary - 3, 0)] = -torch.inf
    rows = base.clone()
    rows[1] = -torch.inf
    peaked = base.clone()
    peaked[:, 0] = 60.0
    cases = {
        "normal": base,
        "near -100": base - 100,
        "near -1000": base - 1000,
        "offset 1e4": base + 1e4,
        "offset -1e4": base - 1e4,
        "every other -inf": some,
        "all but the tail -inf": head,
        "a row of -inf": rows,
        "one certain token": peaked,
        "equal": torch.zeros(4, vocabulary),
    }
    return {name: logits.to(dtype) for name, logits in cases.items()}


def _wall_timer(function: Callable[[], object]) -> Callable[[], float]:
    """Wall time of a call in milliseconds, with warm caches."""

    def once() -> float:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)

    return once


def _cuda_timer(function: Callable[[], object]) -> Callable[[], float]:
    """Time of a call on the device in milliseconds, between two events, with a cold L2 cache.

    Each kernel that empties the cache takes about 0.1 ms. As many are queued before the call as the
    host needs for it, at most 50, so that the device does not wait for launches: it is the time of
    a training step whose host is ahead, or of a CUDA graph.
    """
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    function()
    torch.cuda.synchronize()
    host_ms = _wall_timer(function)()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        for _ in range(min(2 + int(host_ms / 0.07), 50)):
            cache.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return once


def time_ms(
    functions: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    minimum: int = 5,
) -> dict[str, list[float]]:
    """Times in milliseconds of each function, measured in turns so that all share the noise.

    On a CPU they are wall times, on "cuda" times on the device. Each function is called once or
    twice to warm up, then in rounds until it has used `seconds` in total or been called 1000 times,
    at least `minimum` times.
    """
    timer = _cuda_timer if device == "cuda" else _wall_timer
    once = {name: timer(function) for name, function in functions.items()}
    for call in once.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    open_names = set(functions)
    while open_names:
        for name in sorted(open_names):
            start = time.perf_counter()
            times[name].append(once[name]())
            spent[name] += time.perf_counter() - start
            enough = spent[name] > seconds or len(times[name]) >= 1000
            if enough and len(times[name]) >= minimum:
                open_names.discard(name)
    return times


def median_ms(function: Callable[[], object], *, seconds: float = 1.0) -> float:
    """The median wall time of `function` on the CPU in milliseconds."""
    return statistics.median(time_ms({"f": function}, seconds=seconds)["f"])
