"""Every CUDA kernel compiles for real GPUs, without spills, on a machine that has none.

The committed table (one per release of nvcc) is rewritten by `scripts/cuda_resources.py --write`.
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = json.loads((ROOT / "tests" / "data" / "cuda_resources.json").read_text())

_spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "scripts/cuda_resources.py")
assert _spec is not None and _spec.loader is not None
cuda_resources = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_resources)


@pytest.fixture(scope="module")
def measured():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    return cuda_resources.measure()


def test_every_source_has_kernels_in_the_table():
    sources = {path.stem for path in (ROOT / "csrc").glob("*/*.cu")}
    assert sources, "csrc/*/*.cu"
    for table in COMMITTED.values():
        assert {name.split(":")[0] for name in table} == sources


def test_the_flags_are_those_of_the_build():
    build = (ROOT / "CMakeLists.txt").read_text()
    for flag in ("-fmad=false", "--resource-usage"):
        assert flag in build and flag in cuda_resources.FLAGS


def test_nothing_spills(measured):
    for name, row in measured.items():
        for architecture, used in row.items():
            assert used["spills"] == used["stack"] == 0, f"{name} on {architecture}: {used}"


def test_a_block_fits_on_a_multiprocessor(measured):
    """At most 64 registers keep two of the largest blocks, of 512 threads, on one."""
    for name, row in measured.items():
        threads = int(match[1]) if (match := re.search(r"<(\d+)[,>]", name)) else 512
        for architecture, used in row.items():
            assert 2 * used["registers"] * threads <= 65536, f"{name} on {architecture}"
            assert 2 * used["shared"] <= 99 * 1024, f"{name} on {architecture}"


def test_no_kernel_uses_more_than_the_committed_table(measured):
    table = COMMITTED.get(cuda_resources.release())
    if table is None:
        release = cuda_resources.release()
        pytest.skip(f"no table for nvcc {release} (scripts/cuda_resources.py --write)")
    assert sorted(measured) == sorted(table), "run scripts/cuda_resources.py --write"
    for name, row in measured.items():
        for architecture, used in row.items():
            before = table[name][architecture]
            for what in ("registers", "shared"):
                assert used[what] <= 1.1 * before[what], (
                    f"{name} on {architecture}: {used[what]} {what}, committed {before[what]}"
                )
