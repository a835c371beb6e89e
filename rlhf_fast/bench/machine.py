"""The machine of a benchmark: what it is called, and how fast it reads, copies and multiplies."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rlhf_fast
from rlhf_fast import _dispatch, testing

# A buffer of 2048 x 50257 floats, as big as the logits of the main case: it fits in no cache.
BUFFER_FLOATS = 2048 * 50257
# Seconds spent on each probe; the best time counts, since a floor must not be too high.
PROBE_SECONDS = 0.5
PROTOCOL = {
    "cpu": "wall times with warm caches",
    "cuda": "times on the device between events, host ahead, L2 cache cold",
}


def version_of(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """The processor's or the GPU's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set() -> str:
    """What the CPU kernels use: the native module's choice, or else what torch sees."""
    native = _dispatch.native_module()
    isa = getattr(native, "isa", None)
    if callable(isa):
        return str(isa())
    return str(isa or torch.backends.cpu.get_cpu_capability())


def commit() -> tuple[str | None, bool | None]:
    """(commit of the checkout that is imported, whether it has uncommitted changes)."""
    root = Path(rlhf_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _best_seconds(function, device: str, seconds: float) -> float:
    return min(testing.time_ms({"f": function}, device=device, seconds=seconds)["f"]) / 1e3


def bandwidths(device: str, *, quick: bool) -> dict[str, float]:
    """Bytes per nanosecond (GB/s): of `torch.sum` reading, of `copy_` reading and writing."""
    floats = BUFFER_FLOATS // 8 if quick else BUFFER_FLOATS
    seconds = PROBE_SECONDS / 5 if quick else PROBE_SECONDS
    source = torch.ones(floats, device=device)
    target = torch.empty_like(source)
    read = 4e-9 * floats / _best_seconds(source.sum, device, seconds)
    copy = 8e-9 * floats / _best_seconds(lambda: target.copy_(source), device, seconds)
    return {"read_gbps": round(read, 2), "copy_gbps": round(copy, 2)}


def matmul_gflops(device: str, dtype: torch.dtype, *, quick: bool) -> float:
    """10^9 multiply and add operations per second of a square matrix product."""
    n = (512 if quick else 1024) if device == "cpu" else 8192
    # Ones or zeros would be multiplied faster: they switch fewer transistors.
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = PROBE_SECONDS / 5 if quick else PROBE_SECONDS
    return round(2e-9 * n**3 / _best_seconds(lambda: a @ a, device, seconds), 1)


def header(device: str, dtypes: list[torch.dtype], *, quick: bool) -> dict[str, Any]:
    """Everything that a row needs to be understood later."""
    sha, dirty = commit()
    rates = {str(d)[6:]: matmul_gflops(device, d, quick=quick) for d in dtypes}
    return {
        "commit": sha,
        "uncommitted_changes": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device,
        "version": rlhf_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "quick": quick,
        **bandwidths(device, quick=quick),
        "matmul_gflops": rates,
        "protocol": f"medians of {PROTOCOL[device]}, all candidates of a row measured in turns; "
        "floor_ms = max(bytes / the higher of the two bandwidths, flops / matmul rate)",
    }
