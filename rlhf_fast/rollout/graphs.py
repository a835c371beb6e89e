"""The decode step, replayed as a CUDA graph; called plainly on every other device."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch

logger = logging.getLogger("rlhf_fast")

# Steps at a width before it is captured: they compile and tune what is compiled and tuned at first
# use, and a width that occurs a few times only is not worth a capture.
WARM_UP = 4


class GraphedStep:
    """`step(width)` at powers of two, each captured once in a graph of its own.

    A model of small layers spends most of a step in launching kernels from Python; a replay
    launches them all at once. `step` must allow more slots than are live (up to `slots`), must not
    wait for the device, and must keep its state in the same tensors. A model that waits (a mixture
    of experts that counts tokens on the host) cannot be captured: then, after a warning, its steps
    run as before.
    """

    def __init__(self, step: Callable[[int], None], device: torch.device, slots: int):
        self.step, self.slots = step, slots
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.seen: Counter[int] = Counter()
        self.on = device.type == "cuda"
        # The graphs never run at the same time, so that they may share their scratch.
        self.pool = torch.cuda.graph_pool_handle() if self.on else None

    def __call__(self, live: int) -> None:
        """One step of at least the first `live` slots."""
        if not self.on:
            return self.step(live)
        width = min(1 << (live - 1).bit_length(), self.slots)
        self.seen[width] += 1
        if width not in self.graphs and self.seen[width] > WARM_UP:
            self._capture(width)
        if width in self.graphs:
            self.graphs[width].replay()
        else:
            self.step(width)

    def _capture(self, width: int) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(width)
        except RuntimeError as error:
            logger.warning("rollout: the decode step runs without CUDA graphs: %s", error)
            self.on = False
            return
        self.graphs[width] = graph
