"""Check, then time: one row per case and backend.

A row is reported only if the results of that very run hold to the tolerance rule against float64
(`rlhf_fast.testing.assert_accurate`); a failure leaves nulls and a note, and the command exits
non-zero. The plain PyTorch, the same under torch.compile and every backend are timed in turns.
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast import _dispatch, testing
from rlhf_fast.bench import machine, rivals
from rlhf_fast.bench.case import Case, cases
from rlhf_fast.bench.memory import peak_bytes

ROW_KEYS = (
    "op", "shape", "dtype", "backend", "device", "direction", "median_ms", "reference_ms",
    "compile_ms", "speedup", "speedup_vs_compile", "bytes", "flops", "gbps", "floor_ms",
    "fraction_of_floor", "max_abs_err", "peak_bytes", "reference_peak_bytes", "note",
)  # fmt: skip

# (seconds, least number of calls) per candidate. A GPU is timed for less: its calls are short.
FULL, FULL_CUDA, QUICK = (1.0, 5), (0.3, 5), (0.05, 3)


@dataclass
class Report:
    """The file that is written, and the rows that failed their check."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]
    failures: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {"header": self.header, "rows": self.rows}


def served_by(op: str, device: str) -> dict[str, bool | str]:
    """Backend -> True, or why not, for the backends that serve tensors on `device`.

    Triton's interpreter is left out: its times say nothing about Triton.
    """
    names = ("reference", "cpu") if device == "cpu" else ("reference", "triton", "cuda")
    return {name: _dispatch.backends()[op][name] for name in names}


class Calls:
    """The callables of one case: forward, or forward and backward, and their results."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.inputs = case.inputs(device)
        self.upstream: list[torch.Tensor] = []

    def run(self, function: Callable[..., tuple], inputs: dict[str, Any]) -> tuple:
        """(outputs, gradients) of one call."""
        if not self.case.grad:
            with torch.no_grad():
                return tuple(function(**inputs)), ()
        outputs = tuple(function(**inputs))
        live = [out for out in outputs if out.requires_grad]
        if not self.upstream:
            self.upstream = [
                torch.ones_like(out)
                if out.ndim == 0
                else testing.randn(*out.shape, seed=seed).to(out)
                for seed, out in enumerate(live)
            ]
        upstream = [g.to(out.dtype) for g, out in zip(self.upstream, live, strict=True)]
        leaves = [inputs[name] for name in self.case.grad]
        return outputs, torch.autograd.grad(live, leaves, upstream)

    def timed(self, function: Callable[..., tuple]) -> Callable[[], tuple]:
        return lambda: self.run(function, self.inputs)

    def on(self, backend: str) -> Callable[[], tuple]:
        """Our op, served by `backend`."""

        def call() -> tuple:
            with _dispatch.use_backend(backend, op=self.case.op):
                return self.run(self.case.ours, self.inputs)

        return call

    def expected(self, outputs: tuple, *, double: bool) -> tuple:
        """(outputs, gradients) of plain PyTorch in float64, or at the inputs' dtype."""
        inputs = self.inputs
        if double:
            inputs = {
                name: value.detach().double()
                if isinstance(value, torch.Tensor) and value.is_floating_point()
                else value
                for name, value in inputs.items()
            }
            inputs = self.case.with_gradients(inputs)
        if self.case.expected is not None:
            with torch.no_grad():
                return self.case.expected(inputs, outputs), ()
        return self.run(self.case.eager, inputs)


def row_names(op: str, device: str) -> list[str]:
    """What the rows of one case are called: our backends, then other projects."""
    return [*served_by(op, device), *(rival.backend for rival in rivals.of(op))]


def assert_right(name: str, ours: tuple, truth: tuple, plain: tuple | None) -> None:
    """Hold outputs and gradients to the package's rule; raises AssertionError beyond it."""
    for part, i in (("output", 0), ("gradient", 1)):
        for k, value in enumerate(ours[i]):
            expected, other = truth[i][k], None if plain is None else plain[i][k]
            if value.is_floating_point():
                testing.assert_accurate(f"{name}: {part} {k}", value, expected, other)
            else:
                assert torch.equal(value, expected), f"{name}: {part} {k} differs"


def largest_error(ours: tuple, truth: tuple) -> float:
    """The largest finite error of outputs and gradients."""
    worst = 0.0
    for i in (0, 1):
        for value, expected in zip(ours[i], truth[i], strict=False):  # eager may return more
            if value.is_floating_point():
                error = (value.double() - expected).abs()
                error = error[error.isfinite()]
                worst = max(worst, error.max().item() if error.numel() else 0.0)
    return worst


def check(case: Case, device: str, backend: str) -> float:
    """The largest error of `backend` on this case; raises AssertionError beyond the rule."""
    calls = Calls(case, device)
    ours = calls.on(backend)()
    truth = calls.expected(ours[0], double=True)
    assert_right(case.name, ours, truth, calls.expected(ours[0], double=False))
    return largest_error(ours, truth)


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _compiled(case: Case, calls: Calls) -> tuple[Callable[[], tuple] | None, str | None]:
    """(the baseline under torch.compile, warmed up, or None; why not)."""
    torch._dynamo.reset()
    try:
        call = calls.timed(torch.compile(case.compiled or case.eager, dynamic=False))
        call()
        call()
    except Exception as error:  # any failure of a compiler is a missing number, not our error
        return None, f"torch.compile: {_sentence(error)}"
    return call, None


def _checked(case: Case, calls: Calls, device: str, notes: dict, failures: list) -> tuple:
    """(candidate -> its call, candidate -> its largest error) of what may be timed.

    The others get a note. Other projects' functions are compared too, and never fail the run.
    """
    errors: dict[str, float] = {}
    truth: tuple = ()
    plain: tuple = ()
    for backend, state in served_by(case.op, device).items():
        if state is not True or backend in case.left_out:
            notes[backend] = "not timed: too slow at this size" if state is True else str(state)
            continue
        try:
            ours = calls.on(backend)()
            if not truth or case.expected is not None:
                truth = calls.expected(ours[0], double=True)
                plain = calls.expected(ours[0], double=False)
            assert_right(case.name, ours, truth, plain)
            errors[backend] = largest_error(ours, truth)
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            notes[backend] = _sentence(error)
        except Exception as error:  # one broken backend must not hide the others' rows
            notes[backend] = f"refused, the check failed: {_sentence(error)}"
            failures.append(f"{case.name} {backend}: {_sentence(error)}")
    candidates = {backend: calls.on(backend) for backend in errors}
    for rival in rivals.of(case.op):
        function, notes[rival.backend] = rival.loaded()
        if function is None or not errors:
            continue
        call = calls.timed(function)
        try:
            theirs = call()
            errors[rival.backend] = largest_error(theirs, truth)
            candidates[rival.backend] = call
            assert_right(rival.function, theirs, truth, plain)
        except AssertionError as error:
            notes[rival.backend] += f", beyond our tolerance: {_sentence(error)}"
        except Exception as error:  # their failure is a missing number, not our error
            notes[rival.backend] += f", failed: {_sentence(error)}"
    return candidates, errors


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else float(f"{a / b:.4g}")


def _floor_ms(case: Case, header: dict[str, Any]) -> float:
    bandwidth = max(header["read_gbps"], header["copy_gbps"])
    rates = header["matmul_gflops"]
    rate = rates.get(case.dtype_name) or max(rates.values())
    return float(f"{1e-6 * max(case.bytes / bandwidth, case.flops / rate):.4g}")


def run_case(
    case: Case,
    device: str,
    header: dict[str, Any],
    *,
    quick: bool,
    failures: list[str],
    no_compile: str = "",
) -> list[dict[str, Any]]:
    """The rows of one case. `no_compile` is the reason why torch.compile is left out, if it is."""
    calls = Calls(case, device)
    notes: dict[str, str] = {}
    checked, errors = _checked(case, calls, device, notes, failures)
    gc.collect()
    candidates: dict[str, Callable[[], object]] = {"eager": calls.timed(case.eager), **checked}
    common = [case.note] if case.note else []
    if case.compiled is not None and not quick:
        candidates["vectorised"] = calls.timed(case.compiled)
    if no_compile:
        common.append(f"no torch.compile: {no_compile}")
    elif errors:
        compiled, why = _compiled(case, calls)
        if compiled is not None:
            candidates["compile"] = compiled
        common += [why] if why else []
    seconds, minimum = QUICK if quick else FULL_CUDA if device == "cuda" else FULL
    times = (
        testing.time_ms(candidates, device=device, seconds=seconds, minimum=minimum)
        if errors
        else {}
    )
    ms = {name: float(f"{statistics.median(t):.4g}") for name, t in times.items()}
    peaks = {name: peak_bytes(candidates[name], device) for name in ("eager", *errors) if errors}
    if "vectorised" in ms:
        common.append(
            f"compile_ms is that of a version without the loop, which takes {ms['vectorised']} ms "
            "in eager mode"
        )
    return _rows(case, device, header, ms, errors, peaks, notes, common)


def _rows(
    case: Case,
    device: str,
    header: dict[str, Any],
    ms: dict[str, float],
    errors: dict[str, float],
    peaks: dict[str, int],
    notes: dict[str, str],
    common: list[str],
) -> list[dict[str, Any]]:
    """One row per backend and rival; `notes` are their own, `common` those of all with a time."""
    floor = _floor_ms(case, header)
    rows = []
    for backend in row_names(case.op, device):
        median = ms.get(backend)
        own = [notes[backend]] if backend in notes else []
        own += [] if median is None else common
        values = (
            case.op, case.shape, case.dtype_name, backend, device, case.direction, median,
            ms.get("eager"), ms.get("compile"), _ratio(ms.get("eager"), median),
            _ratio(ms.get("compile"), median), case.bytes, case.flops,
            None if median is None else float(f"{1e-6 * case.bytes / median:.4g}"), floor,
            _ratio(floor, median), errors.get(backend), peaks.get(backend), peaks.get("eager"),
            "; ".join(own) or None,
        )  # fmt: skip
        rows.append(dict(zip(ROW_KEYS, values, strict=True)))
    return rows


@contextlib.contextmanager
def _clean_slate() -> Iterator[None]:
    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run(
    op: str | None = None,
    *,
    device: str = "cpu",
    quick: bool = False,
    budget: float = math.inf,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measure the machine, then every case of `op` (None: of every op).

    `save` is called after every case. After half of `budget` seconds torch.compile is left out,
    after all of it the remaining cases get rows without numbers.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device visible to torch, found none")
    chosen = cases(op, device=device, quick=quick)
    if not chosen:
        raise ValueError(f"op: no {'quick ' if quick else ''}case of {op or 'any op'} on {device}")
    dtypes = sorted({case.dtype for case in chosen}, key=str)
    start = time.perf_counter()
    report = Report(machine.header(device, dtypes, quick=quick), [], [])
    for number, case in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
        report.rows += _within_budget(case, report, budget - (time.perf_counter() - start), budget)
        report.header["seconds"] = round(time.perf_counter() - start, 1)
        save(report)
    return report


def _within_budget(case: Case, report: Report, left: float, budget: float) -> list[dict[str, Any]]:
    device, quick = report.header["device_type"], report.header["quick"]
    if left <= 0:
        why = f"not measured: the {budget:.0f} s of this run were used up"
        notes = dict.fromkeys(row_names(case.op, device), why)
        return _rows(case, device, report.header, {}, {}, {}, notes, [])
    no_compile = "this is a --quick run" if quick else ""
    if left < 0.5 * budget:
        no_compile = no_compile or f"half of this run's {budget:.0f} s were used up"
    with _clean_slate():
        return run_case(
            case,
            device,
            report.header,
            quick=quick,
            failures=report.failures,
            no_compile=no_compile,
        )


def file_name(header: dict[str, Any]) -> str:
    """`<date>-<device>-<commit>.json`, the name of a result that is kept."""
    device = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return f"{header['date'][:10]}-{device}-{(header['commit'] or 'unknown')[:10]}.json"


def as_text(report: Report) -> str:
    """The rows that have a time, as a table."""

    def cell(value: Any, unit: str = "") -> str:
        return "-" if value is None else f"{value:.4g}{unit}"

    title = ("case", "backend", "ms", "plain ms", "compile ms", "speed-up", "GB/s", "of floor")
    lines = [title]
    for row in report.rows:
        case = f"{row['op']} {row['shape']} {row['dtype']} {row['direction']}"
        if row["median_ms"] is None:
            lines.append((case, row["backend"], *"------"))
            continue
        lines.append(
            (
                case, row["backend"], cell(row["median_ms"]), cell(row["reference_ms"]),
                cell(row["compile_ms"]), cell(row["speedup"], "x"), cell(row["gbps"]),
                cell(row["fraction_of_floor"]),
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(title))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
