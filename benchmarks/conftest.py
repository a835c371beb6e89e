"""pytest-benchmark over the cases of the rooms, which `rlhf-fast bench` uses too.

    pytest benchmarks/bench_logprob.py                 # small shapes
    pytest benchmarks/bench_logprob.py --full          # the real ones, torch.compile included
    pytest benchmarks/bench_*.py --device cuda --full

A benchmark runs only after its results have passed the check against float64.
"""

import pytest
import torch

from rlhf_fast.bench import machine, runner
from rlhf_fast.bench.case import room_cases


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--full", action="store_true", help="real shapes, and torch.compile")


def pytest_generate_tests(metafunc):
    device, full = metafunc.config.getoption("device"), metafunc.config.getoption("full")
    pairs = []
    for case in room_cases(metafunc.module.ROOM):
        if case.quick == full or device not in case.devices:
            continue
        served = runner.served_by(case.op, device)
        names = ["eager", *(["compile"] if full else [])]
        names += [backend for backend, state in served.items() if state is True]
        pairs += [pytest.param(case, name, id=f"{case.name}-{name}") for name in names]
    metafunc.parametrize(("case", "candidate"), pairs)


@pytest.fixture(scope="session")
def provenance(request):
    sha, dirty = machine.commit()
    return {
        "commit": sha,
        "uncommitted_changes": dirty,
        "device": machine.device_name(request.config.getoption("device")),
        "torch": torch.__version__,
        "triton": machine.version_of("triton"),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def measure(benchmark, request, provenance):
    """Check, then time one candidate of a case; candidates of a case form a group."""

    def run(case, candidate):
        device = request.config.getoption("device")
        calls = runner.Calls(case, device)
        if candidate == "eager":
            call = calls.timed(case.eager)
        elif candidate == "compile":
            torch._dynamo.reset()
            call = calls.timed(torch.compile(case.compiled or case.eager, dynamic=False))
        else:
            benchmark.extra_info["max_abs_err"] = runner.check(case, device, candidate)
            call = calls.on(candidate)
        call()

        def synchronised():
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark.extra_info |= {**provenance, "backend": candidate, "bytes": case.bytes}
        benchmark.extra_info |= {"flops": case.flops, "direction": case.direction}
        benchmark(synchronised)

    return run
