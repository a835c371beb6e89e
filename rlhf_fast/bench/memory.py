"""The most memory that a call holds beyond its inputs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def _no_profiler_chatter() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: torch's profiler writes two lines there at each use."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Largest number of bytes that `function` has allocated at any moment of one call.

    On CUDA the caching allocator's own maximum. On CPU the profiler's record of every allocation
    through torch; what a native kernel takes from the stack or from malloc is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with (
        _no_profiler_chatter(),
        torch.autograd.profiler.profile(profile_memory=True) as profile,
    ):
        result = function()
        del result
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
