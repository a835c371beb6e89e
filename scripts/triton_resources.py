"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU and report what it uses.

    python scripts/triton_resources.py            # print the table of the installed Triton
    python scripts/triton_resources.py --write    # and store it in tests/data/triton_resources.json

A room joins by defining `AOT_SIGNATURES` in its `_triton.py`: a list of (kernel, types, constants,
warps), where `types` maps an argument to a Triton type ("*bf16:16" is a 16-byte aligned pointer,
"i32:16" a multiple of 16), `constants` maps a constexpr to its value, and an argument in neither is
None. The file holds one table per Triton version, since registers change with the compiler.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "data" / "triton_resources.json"
ARCHITECTURES = (80, 90, 100)


def rooms() -> Iterator[tuple[str, list]]:
    """(room, its AOT_SIGNATURES) of every `rlhf_fast.kernels.*._triton` that has some."""
    package = importlib.import_module("rlhf_fast.kernels")
    files = (file for folder in package.__path__ for file in Path(folder).glob("*/_triton.py"))
    for room in sorted({file.parent.name for file in files}):
        module = importlib.import_module(f"rlhf_fast.kernels.{room}._triton")
        if hasattr(module, "AOT_SIGNATURES"):
            yield room, module.AOT_SIGNATURES


def key_of(room: str, kernel, types: dict, constants: dict, warps: int) -> str:
    """A readable name of one kernel variant: types in the order of the arguments, "-" for None."""
    kinds = [types.get(name, "-") for name in kernel.arg_names if name not in constants]
    fixed = [f"{name}={value}" for name, value in constants.items()]
    return f"{room}.{kernel.__name__}({' '.join(kinds)}; {' '.join(fixed)}; {warps} warps)"


def resources(
    kernel, types: dict, constants: dict, warps: int, architecture: int
) -> dict[str, int]:
    """Registers per thread, stack bytes per thread (spills live there), shared bytes per block."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes, fixed = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in types:
            signature[name], aligned, _ = types[name].partition(":16")
            if aligned:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            fixed[name] = constants.get(name)
    compiled = triton.compile(
        ASTSource(kernel, signature, fixed, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def measure() -> dict[str, dict[str, dict[str, int]]]:
    """Kernel variant -> architecture -> resources, of everything there is."""
    return {
        key_of(room, *entry): {f"sm_{a}": resources(*entry, a) for a in ARCHITECTURES}
        for room, entries in rooms()
        for entry in entries
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"store the table in {TABLE.name}")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    table = measure()
    if arguments.write:
        tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        tables[triton.__version__] = table
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")
    json.dump({"triton": triton.__version__, "kernels": table}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
