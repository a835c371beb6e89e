"""Compile every CUDA source for sm_80, sm_90 and sm_100 without a GPU and report what it uses.

    python scripts/cuda_resources.py            # print the table of the installed nvcc
    python scripts/cuda_resources.py --write    # and store it in tests/data/cuda_resources.json

The file holds one table per release of nvcc, since registers change with the compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "data" / "cuda_resources.json"
ARCHITECTURES = (80, 90, 100)
# As CMakeLists.txt compiles them.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "--resource-usage", "-cubin")

# What ptxas says of a kernel, over four lines.
REPORT = re.compile(
    r"entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spills>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def release() -> str:
    """The release of nvcc, such as "13.0"."""
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"release ([\d.]+)", text)[0]


def readable(names: list[str]) -> list[str]:
    """`gae_kernel<256>` instead of the linker's name."""
    text = "\n".join(names)
    out = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout
    return [
        re.search(r"(\w+(?:<.*?>)?)\(", line.replace("(anonymous namespace)::", ""))[1].replace(
            "rlhf::", ""
        )
        for line in out.splitlines()
    ]


def resources(source: Path, architecture: int) -> dict[str, dict[str, int]]:
    """Kernel -> registers, stack and spilled bytes per thread, shared bytes per block."""
    command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", str(source)]
    out = subprocess.run([*command, "-o", "/dev/null"], check=False, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{out.stdout}{out.stderr}")
    found = list(REPORT.finditer(out.stdout + out.stderr))
    return {
        name: {k: int(match[k] or 0) for k in ("registers", "stack", "spills", "shared")}
        for name, match in zip(readable([m["name"] for m in found]), found, strict=True)
    }


def measure() -> dict[str, dict[str, dict[str, int]]]:
    """Source and kernel -> architecture -> what it uses."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        for architecture in ARCHITECTURES:
            for name, used in resources(source, architecture).items():
                table.setdefault(f"{source.stem}: {name}", {})[f"sm_{architecture}"] = used
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the table")
    write = parser.parse_args().write
    table = measure()
    print(json.dumps({"nvcc": release(), "kernels": table}, indent=1))
    if write:
        stored = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        stored[release()] = table
        TABLE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
