"""scripts/gpu_check.sh, as far as it goes without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def run(*arguments, script=SCRIPT, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def extensions():
    return {path: path.stat().st_mtime_ns for path in (ROOT / "rlhf_fast").glob("_C*.so")}


def newer_sources():
    """Sources of the native module that changed since it was built."""
    sources = [ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    built = max(extensions().values(), default=0)
    return [str(path) for path in sources if path.stat().st_mtime_ns > built]


@pytest.mark.skipif(newer_sources() != [], reason="rlhf_fast._C is missing or older than csrc/")
def test_cpu_run(tmp_path):
    before = extensions()
    result = run(tmp_path / "out", "--device", "cpu", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    status = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert summary["ok"] is True
    assert status == {"build": "ok", "test": "ok", "sanitize": "skipped", "bench": "ok"}
    for stage in summary["stages"]:
        assert (tmp_path / "out" / stage["log"]).exists()
    assert "GPU" in (tmp_path / "out" / "sanitize.log").read_text()
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert extensions() == before, "the module in place was rebuilt"


def test_a_failing_stage_does_not_stop_the_next(tmp_path):
    """Copied next to nothing, every stage fails; the summary says so for each."""
    script = tmp_path / "scripts" / "gpu_check.sh"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    result = run(tmp_path / "out", "--device", "cpu", "--quick", script=script, PYTHON="false")
    assert result.returncode == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    status = [stage["status"] for stage in summary["stages"]]
    assert summary["ok"] is False and status == ["failed", "failed", "skipped", "failed"]


def test_limits_leave_room_under_nine_minutes():
    line = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("LIMIT_build"))
    limits = dict(part.split("=") for part in line.split())
    assert set(limits) == {f"LIMIT_{name}" for name in ("build", "test", "sanitize", "bench")}
    assert sum(map(int, limits.values())) < 540


@pytest.mark.parametrize("arguments", [(), ("--device", "tpu", "out"), ("--what",), ("a", "b")])
def test_wrong_use(tmp_path, arguments):
    result = run(*arguments)
    assert result.returncode == 2 and "gpu_check.sh OUTDIR" in result.stdout
