"""The command line: `rlhf-fast demo | sft | reward | ppo | sample | eval | bench | doctor | info`.

Training stages parse their own arguments (`rlhf_fast.train.<stage>.main`); this file finds them,
and turns a user's error into one line and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# command -> (module with main(argv), what it does)
STAGES = {
    "demo": ("rlhf_fast.train.demo", "the whole pipeline on text that every Python carries"),
    "sft": ("rlhf_fast.train.sft", "supervised fine-tuning"),
    "reward": ("rlhf_fast.train.reward", "train a reward model on ranked completions"),
    "ppo": ("rlhf_fast.train.ppo", "PPO, A2C or REINFORCE against a reward model"),
    "sample": ("rlhf_fast.train.sample", "generate completions"),
    "eval": ("rlhf_fast.train.evaluate", "score completions"),
}
ENVIRONMENT = (
    "RLHF_FAST_BACKEND",
    "RLHF_FAST_BATCH_INVARIANT",
    "RLHF_FAST_DEBUG",
    "TRITON_INTERPRET",
)
# What the user can put right; anything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, NotImplementedError, ImportError, IndexError)


def info_text() -> str:
    """Versions, machine, and for each op and backend whether it serves, or why it does not."""
    import torch

    import rlhf_fast
    from rlhf_fast import _dispatch
    from rlhf_fast.bench import machine

    native = _dispatch.native_module()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    extension = getattr(native, "__file__", "not built (pip install . builds it)")
    cuda_build = "yes" if getattr(native, "WITH_CUDA", False) else "no"
    facts = {
        "rlhf_fast": f"{rlhf_fast.__version__} ({Path(rlhf_fast.__file__).parent})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version_of("triton") or "not installed",
        "transformers": machine.version_of("transformers") or "not installed",
        "native module": f"{extension}, CUDA: {cuda_build}",
        "cpu": f"{machine.device_name('cpu')}, {os.cpu_count()} logical",
        "threads": str(torch.get_num_threads()),
        "instruction set": machine.instruction_set(),
        "gpu": ", ".join(gpus) or "none visible to torch",
        "environment": " ".join(f"{k}={os.environ[k]}" for k in ENVIRONMENT if k in os.environ)
        or "none of " + ", ".join(ENVIRONMENT),
    }
    lines = [f"{name:<16} {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", *_backend_table(_dispatch.backends(), _dispatch.BACKENDS)])


def _backend_table(table: dict[str, dict[str, bool | str]], backends: Sequence[str]) -> list[str]:
    """The table op x backend; reasons are numbered and listed below it."""
    numbers: dict[str, int] = {}
    width = max((len(op) for op in table), default=2) + 2
    rows = ["op".ljust(width) + "".join(b.ljust(12) for b in backends).rstrip()]
    for op, states in table.items():
        cells = []
        for backend in backends:
            state = states[backend]
            reason = "" if state is True else str(state)
            number = numbers.setdefault(reason, len(numbers) + 1) if reason else 0
            cells.append((f"no [{number}]" if reason else "yes").ljust(12))
        rows.append(op.ljust(width) + "".join(cells).rstrip())
    return [*rows, "", *(f"[{n}] {reason}" for reason, n in numbers.items())]


def _info(arguments: argparse.Namespace) -> int:
    print(info_text())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from rlhf_fast import doctor

    if arguments.file is None:
        return doctor.report(doctor.self_check(arguments.backend))
    batch = doctor.load(arguments.file)
    return doctor.report(doctor.examine(batch, eos_id=arguments.eos_id, pad_id=arguments.pad_id))


def _bench(arguments: argparse.Namespace) -> int:
    from rlhf_fast.bench import runner

    target: Path | None = arguments.json
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)

    def save(report: runner.Report) -> None:
        if arguments.commit:
            report.header["commit"] = arguments.commit
        if target is not None:
            folder = target.is_dir()
            path = target / runner.file_name(report.header) if folder else target
            path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")

    report = runner.run(
        arguments.op,
        device=arguments.device,
        quick=arguments.quick,
        budget=arguments.seconds,
        save=save,
    )
    print(runner.as_text(report))
    for failure in report.failures:
        print(f"rlhf-fast bench: refused: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def _stage(name: str) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        return importlib.import_module(STAGES[name][0]).main(argv) or 0

    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf-fast",
        description="Fused kernels for RLHF, and a thin training loop on top of them.",
        epilog="A stage lists its own options: rlhf-fast ppo --help. --debug anywhere shows the "
        "traceback of an error.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, help_text) in STAGES.items():
        commands.add_parser(name, help=help_text, add_help=False)

    bench = commands.add_parser("bench", help="time every op against plain PyTorch")
    bench.add_argument("--op", help="one op only")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    bench.add_argument("--quick", action="store_true", help="small shapes, without torch.compile")
    bench.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write header and rows here (in a folder: <date>-<device>-<commit>.json)",
    )
    bench.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        metavar="N",
        help="plan to end after N seconds; what is left out says so",
    )
    bench.add_argument("--commit", help="the commit that is measured, where git cannot say")
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="examine a saved batch, or this installation")
    doctor.add_argument("file", nargs="?", type=Path, help=".pt or .safetensors; none: self-check")
    doctor.add_argument("--eos-id", type=int, help="the id that ends a response")
    doctor.add_argument("--pad-id", type=int, help="the id that fills a row")
    doctor.add_argument("--backend", help="self-check of one backend only")
    doctor.set_defaults(run=_doctor)

    info = commands.add_parser("info", help="versions, machine, and which backend serves which op")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (a finding) or 2 (wrong use)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    name = arguments[0] if arguments else ""
    try:
        if name in STAGES:
            return _stage(name)(arguments[1:])
        parsed = _parser().parse_args(arguments)
        return parsed.run(parsed)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # `rlhf-fast info | head` is no error
        return 0
    except KeyboardInterrupt:
        print(f"rlhf-fast {name}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        missing = str(getattr(error, "name", None) or "")
        if isinstance(error, ModuleNotFoundError) and not missing.startswith("rlhf_fast"):
            text += " (pip install 'rlhf_fast[train]' installs what training needs)"
        print(f"rlhf-fast {name}: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
