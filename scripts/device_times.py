"""Time on the device alone of advantages and losses, without what a launch costs the host.

    python scripts/device_times.py [--json FILE]

A call is captured in a CUDA graph ten times over and replayed; a row is the median of replays over
ten, at the shapes of the GPU targets. What fits in the second-level cache is found there by the
next replay, as in a training step that has just made it.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

import rlhf_fast
from rlhf_fast.bench import shapes
from rlhf_fast.bench.case import Case, room_cases
from rlhf_fast.testing import usable_backends

CALLS, REPLAYS = 10, 20
# (room, op, sizes, microseconds hoped for)
TARGETS = (
    ("gae", "gae", shapes.TOKENS_GPU_LONG, 20),
    ("gae", "gae", shapes.TOKENS_GPU, None),
    ("advantages", "ppo_advantages", shapes.TOKENS_GPU, 30),
    ("advantages", "ppo_advantages", shapes.TOKENS_GPU_MANY, 300),
    ("ppo_loss", "ppo_loss", shapes.TOKENS_GPU_LOSS, 20),
    ("ppo_loss", "ppo_loss", shapes.TOKENS_GPU_MANY, 320),
)


def case_of(room: str, op: str, sizes: dict[str, int]) -> Case:
    return next(c for c in room_cases(room) if c.op == op and c.sizes == sizes and not c.label)


def microseconds(case: Case, inputs: dict, backend: str) -> float:
    """The device's time of one call, with its backward pass if the case has one."""

    def call() -> None:
        outputs = case.ours(**inputs)
        if case.grad:
            torch.autograd.grad(outputs[0], [inputs[name] for name in case.grad])

    with rlhf_fast.use_backend(backend, op=case.op):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="store the rows in this file")
    file = parser.parse_args().json
    rows = []
    for room, op, sizes, target in TARGETS:
        case = case_of(room, op, sizes)
        inputs = case.inputs("cuda")
        for backend in ("cuda", "triton"):
            if backend not in usable_backends(op):
                continue
            time = microseconds(case, inputs, backend)
            row = {
                "op": op, "shape": case.shape, "direction": case.direction, "backend": backend,
                "us": round(time, 2), "target_us": target,
                "gbps": round(1e-3 * case.bytes / time, 1),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            rows.append(row)
    if file:
        header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        with open(file, "w") as out:
            json.dump({"header": header, "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
