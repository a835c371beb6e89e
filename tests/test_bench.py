"""The benchmark: its rows, its refusals, the page made of them. No time is asserted."""

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from rlhf_fast import _dispatch
from rlhf_fast.bench import case as bench_case
from rlhf_fast.bench import machine, rivals, runner
from rlhf_fast.bench.memory import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "op", "shape", "dtype", "backend", "device", "direction", "median_ms", "reference_ms",
    "compile_ms", "speedup", "speedup_vs_compile", "bytes", "flops", "gbps", "floor_ms",
    "fraction_of_floor", "max_abs_err", "peak_bytes", "reference_peak_bytes", "note",
}  # fmt: skip
QUICK = bench_case.cases(quick=True)
HEADER = {
    "device_type": "cpu", "quick": True, "read_gbps": 10.0, "copy_gbps": 8.0,
    "matmul_gflops": {"float32": 100.0},
}  # fmt: skip


def rows_of(case, failures=None, **options):
    failures = [] if failures is None else failures
    options = {"quick": True, "no_compile": "a test", **options}
    return runner.run_case(case, "cpu", HEADER, failures=failures, **options)


@pytest.fixture(scope="module")
def report():
    return runner.run("gae", quick=True)


def test_header(report):
    for key in ("commit", "date", "device", "torch", "triton", "threads", "read_gbps", "copy_gbps"):
        assert key in report.header
    assert report.header["read_gbps"] > 0 and report.header["matmul_gflops"]["float32"] > 0


def test_rows_have_the_keys_of_the_contract(report):
    assert report.rows and not report.failures
    for row in report.rows:
        assert set(row) == KEYS
        assert row["op"] == "gae" and row["device"] == "cpu"
        if row["median_ms"] is None:
            assert row["note"]
        else:
            assert row["speedup"] == pytest.approx(row["reference_ms"] / row["median_ms"], rel=1e-2)
            assert row["gbps"] == pytest.approx(1e-6 * row["bytes"] / row["median_ms"], rel=1e-2)
            assert row["peak_bytes"] >= 2 * 4 * 8 * 64  # the two outputs
            assert row["compile_ms"] is None and "compile" in row["note"]
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert "gae 8x64" in runner.as_text(report)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_every_quick_case_is_right(case):
    for backend, state in runner.served_by(case.op, "cpu").items():
        if state is True:
            assert runner.check(case, "cpu", backend) < 1


@pytest.mark.parametrize("room", bench_case.rooms())
def test_declared_traffic_covers_inputs_and_outputs(room):
    """The declared bytes are at least those of the inputs that are read and the results."""
    for case in bench_case.room_cases(room):
        if case.quick and case.op in _dispatch.backends():
            assert case.bytes > 0 and case.flops > 0
            assert case.devices and case.shape


def test_wrong_result_is_refused():
    case = next(case for case in QUICK if case.op == "logprob")

    def slightly_off(**inputs):
        return (case.ours(**inputs)[0] + 1e-3,)

    failures = []
    rows = rows_of(dataclasses.replace(case, ours=slightly_off), failures)
    assert failures
    for row in rows:
        assert row["median_ms"] is None and row["speedup"] is None and row["peak_bytes"] is None
        assert row["note"]
    assert any("check failed" in row["note"] for row in rows)


def test_wrong_gradient_is_refused():
    case = next(case for case in QUICK if case.op == "logprob_entropy")

    def doubled(logits, ids):
        logprob, entropy = case.ours(logits=logits, ids=ids)
        return 2 * logprob - logprob.detach(), entropy

    failures = []
    rows_of(dataclasses.replace(case, ours=doubled), failures)
    assert failures and "gradient" in failures[0]


def test_compiler_that_fails_leaves_null_and_a_note(monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    case = next(case for case in QUICK if case.op == "logprob")
    row = rows_of(case, no_compile="")[0]
    assert row["median_ms"] > 0 and row["compile_ms"] is None and "C++ compiler" in row["note"]


def install_trl(monkeypatch, **functions):
    """A stub `trl.trainer.utils` with these functions; {} stands for a package that is absent."""
    monkeypatch.setattr(machine, "version_of", lambda package: "0.1" if functions else None)
    for name in ("trl", "trl.trainer", "trl.trainer.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules["trl.trainer.utils"]).update(functions)


def selective(logits, ids):
    return torch.log_softmax(logits, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


LOGPROB = next(case for case in QUICK if case.op == "logprob")


def rival_row(rows):
    assert [row["backend"] for row in rows][-1:] == ["trl"]
    assert all(set(row) == KEYS for row in rows)
    return rows[-1]


def test_a_rival_that_is_not_installed_leaves_nulls_and_a_note(monkeypatch):
    install_trl(monkeypatch)
    rows = rows_of(LOGPROB)
    row = rival_row(rows)
    assert row["note"] == "trl is not installed" and row["reference_ms"] > 0
    assert all(row[key] is None for key in ("median_ms", "speedup", "max_abs_err", "peak_bytes"))
    assert rows[0]["median_ms"] > 0


def test_a_rival_is_timed_and_checked_with_the_others(monkeypatch):
    install_trl(monkeypatch, selective_log_softmax=selective)
    row = rival_row(rows_of(LOGPROB))
    assert row["median_ms"] > 0 and row["peak_bytes"] > 0 and 0 < row["max_abs_err"] < 1e-4
    assert row["speedup"] == pytest.approx(row["reference_ms"] / row["median_ms"], rel=1e-2)
    assert row["note"] == "trl 0.1: selective_log_softmax; no torch.compile: a test"


def test_a_rival_that_is_wrong_is_noted_and_fails_nothing(monkeypatch):
    install_trl(monkeypatch, selective_log_softmax=lambda logits, ids: selective(logits, ids) + 1)
    failures = []
    row = rival_row(rows_of(LOGPROB, failures))
    assert not failures and row["median_ms"] > 0
    assert row["max_abs_err"] == pytest.approx(1, rel=1e-3)
    assert "beyond our tolerance" in row["note"]


def test_a_rival_that_raises_or_has_other_names_is_noted(monkeypatch):
    def refuses(logits, ids):
        raise TypeError("another signature")

    failures = []
    install_trl(monkeypatch, selective_log_softmax=refuses)
    row = rival_row(rows_of(LOGPROB, failures))
    assert row["median_ms"] is None and "failed: TypeError: another signature" in row["note"]
    install_trl(monkeypatch, entropy_from_logits=selective)
    row = rival_row(rows_of(LOGPROB, failures))
    assert row["median_ms"] is None and "ImportError" in row["note"]
    assert not failures


@pytest.mark.parametrize("op", sorted(rivals.RIVALS))
def test_a_rival_that_is_installed_is_right(op):
    """Of each op's quick case, where the package is there: the call means what ours means."""
    for rival in rivals.of(op):
        if rival.loaded()[0] is None:
            pytest.skip(rival.loaded()[1])
    case = next(case for case in QUICK if case.op == op)
    row = rows_of(dataclasses.replace(case, dtype=torch.float32))[-1]
    assert row["median_ms"] > 0 and row["max_abs_err"] < 1e-3


def test_budget_leaves_rows_that_say_so():
    saved = []
    report = runner.run("logprob", quick=True, budget=0.0, save=lambda r: saved.append(len(r.rows)))
    assert saved and not report.failures
    assert all(row["median_ms"] is None and "used up" in row["note"] for row in report.rows)


def test_unavailable_device_and_op():
    with pytest.raises(ValueError, match="device"):
        runner.run(device="tpu")
    with pytest.raises(ValueError, match="gae"):
        runner.run("no_such_op")


def test_peak_bytes_counts_what_lives_at_once():
    x = torch.zeros(1000)
    few = 64  # torch keeps scalars of its own
    assert 4000 <= peak_bytes(lambda: x + 1, "cpu") < 4000 + few
    assert 8000 <= peak_bytes(lambda: (x + 1) + 1, "cpu") < 8000 + few
    assert peak_bytes(lambda: x.add_(1), "cpu") < few


def load_report_script():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_shows_the_newest_and_lists_the_older(tmp_path, report, monkeypatch):
    script = load_report_script()
    monkeypatch.setattr(script, "SHOWN_BYTES", 0)
    folder = tmp_path / "results"
    folder.mkdir()
    for name, date in (("old", "2025-01-01T00:00:00"), ("new", "2025-02-01T00:00:00")):
        header = {**report.header, "date": date, "commit": name * 4, "quick": False}
        content = {"header": header, "rows": report.rows}
        (folder / f"{name}.json").write_text(json.dumps(content))
    target = tmp_path / "RESULTS.md"
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- results:begin -->\nold\n<!-- results:end -->\n"
        "<!-- backends:begin -->\nold\n<!-- backends:end -->\nbehind\n"
    )
    arguments = ["--results", str(folder), "--output", str(target), "--readme", str(readme)]
    assert script.main(arguments) == 0
    text = target.read_text()
    assert "Generated by" in text and "newnewnew" in text and "oldoldold" not in text
    assert "- old.json" in text
    assert text.count("| gae | 8x64 |") >= 1
    assert "Slower than" not in text or "gae" in text
    filled = readme.read_text()
    assert filled.startswith("before\n") and filled.endswith("behind\n") and "old" not in filled
    shown = {row["backend"] for row in report.rows if row["median_ms"]} - {"reference"}
    assert filled.count("| gae | ") == bool(shown)
    assert script.main(arguments) == 0 and readme.read_text() == filled


def test_page_compares_rivals_with_the_fastest_backend_and_nowhere_else(report):
    script = load_report_script()
    row = {**report.rows[0], "speedup": 0.5, "speedup_vs_compile": None, "max_abs_err": 0.01}
    rows = [
        {**row, "backend": backend, "median_ms": ms, "note": note}
        for backend, ms, note in (
            ("reference", 9.0, None), ("cpu", 2.0, None), ("trl", 5.0, "trl 0.1: f"),
            ("liger", None, "liger-kernel is not installed"),
        )
    ]  # fmt: skip
    header = {**report.header, "commit": "abc"}
    text = "\n".join(script.section(Path("x.json"), {"header": header, "rows": rows}))
    ours, theirs = text.split("Against functions of other projects:")
    assert "| trl |" not in ours and "| cpu |" in ours
    lines = [line for line in theirs.splitlines() if line.startswith("| gae")]
    assert len(lines) == 1 and "| trl | 5 | cpu | 2 | 2.5x |" in lines[0]
    assert "Slower than plain or compiled PyTorch: gae 8x64 float32 (cpu)." in theirs
    assert "- trl 0.1: f: gae 8x64 trl." in theirs
    assert "- liger-kernel is not installed: gae 8x64 liger." in theirs
    only = [{**rows[2], "median_ms": 0.1}]
    assert "trl" not in script.summary([(Path("x.json"), {"header": header, "rows": only})])
    assert script.against_others(only) == []


def test_page_refuses_quick_runs_and_runs_without_commit(tmp_path, report):
    script = load_report_script()
    for change, word in (({"quick": True}, "quick"), ({"quick": False, "commit": None}, "commit")):
        header = {**report.header, "commit": "abc", **change}
        (tmp_path / "x.json").write_text(json.dumps({"header": header, "rows": []}))
        with pytest.raises(ValueError, match=word):
            script.load(tmp_path)


def test_readme_shows_the_largest_case_on_the_fastest_backend_and_no_reference(report):
    script = load_report_script()
    row = {**report.rows[0], "bytes": script.SHOWN_BYTES}
    rows = [
        {**row, "backend": backend, "median_ms": ms, "op": op}
        for op, backend, ms in (
            ("gae", "reference", 0.1), ("gae", "triton", 3.0), ("gae", "cpu", 2.0),
            ("whiten", "reference", 1.0), ("logprob", "cpu", None),
        )
    ]  # fmt: skip
    rows.append({**rows[1], "bytes": rows[1]["bytes"] // 2, "median_ms": 0.5})
    rows.append({**row, "op": "ranking_loss", "backend": "cpu", "bytes": 100, "median_ms": 0.1})
    header = {**report.header, "commit": "abc"}
    text = script.summary([(Path("x.json"), {"header": header, "rows": rows})])
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 2 and "| cpu | 2 |" in table[1]
    assert script.summary([]) == "No results yet."
    with pytest.raises(ValueError, match="markers"):
        script.fill("no markers", "results", text)
