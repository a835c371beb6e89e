"""Every Triton kernel compiles for real GPUs, without spills, on a machine that has none.

The committed table (one per Triton version) is rewritten by `scripts/triton_resources.py --write`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
COMMITTED = json.loads((ROOT / "tests" / "data" / "triton_resources.json").read_text())


@pytest.fixture(scope="module")
def measured():
    """The table of the installed Triton, from a process whose kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "scripts" / "triton_resources.py"
    out = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


def test_nothing_spills(measured):
    for name, row in measured["kernels"].items():
        for architecture, used in row.items():
            assert used["stack"] == 0, f"{name} on {architecture}: {used['stack']} bytes of stack"


def test_a_block_fits_on_a_multiprocessor(measured):
    for name, row in measured["kernels"].items():
        warps = int(name.rsplit(";", 1)[1].split()[0])
        for architecture, used in row.items():
            assert used["registers"] * 32 * warps <= 65536, f"{name} on {architecture}"
            assert used["shared"] <= 99 * 1024, f"{name} on {architecture}: {used['shared']} bytes"


def test_no_kernel_uses_more_than_the_committed_table(measured):
    table = COMMITTED.get(measured["triton"])
    if table is None:
        version = measured["triton"]
        pytest.skip(f"no table for Triton {version} (scripts/triton_resources.py --write)")
    assert sorted(measured["kernels"]) == sorted(table), "run scripts/triton_resources.py --write"
    for name, row in measured["kernels"].items():
        for architecture, used in row.items():
            before = table[name][architecture]
            for what in ("registers", "shared"):
                assert used[what] <= 1.1 * before[what], (
                    f"{name} on {architecture}: {used[what]} {what}, committed {before[what]}"
                )
