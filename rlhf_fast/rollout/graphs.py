"""The decode step, replayed as a CUDA graph; called plainly on every other device."""

from __future__ import annotations

import gc
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger("rlhf_fast")

# Steps at a width before it is captured: they compile and tune what is compiled and tuned at first
# use, and a width that occurs a few times only is not worth a capture.
WARM_UP = 4

Step = Callable[[int], None]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, which may meet an older graph: none may be destroyed
    while another is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class GraphedSteps:
    """Decode steps at powers of two of the slots, each width captured once in a graph of its own.

    A model of small layers spends most of a step in launching kernels from Python; a replay
    launches them all at once. A step must allow more slots than are live (up to `slots`), must not
    wait for the device, and must keep its state in the same tensors. A model that waits (a mixture
    of experts that counts tokens on the host) cannot be captured: then, after a warning, its steps
    run as before.

    The step is an argument of each call and not kept: an object that owns this one and whose method
    the step is would be freed, with its graphs, by the garbage collector only.
    """

    def __init__(self, device: torch.device, slots: int):
        self.device, self.slots = device, slots
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.seen: Counter[int] = Counter()
        self.on = device.type == "cuda"
        # The graphs never run at the same time, so that they may share their scratch.
        self.pool = torch.cuda.graph_pool_handle() if self.on else None

    def run(self, step: Step, live: int) -> None:
        """`step(width)` for at least the first `live` slots."""
        if not self.on:
            return step(live)
        width = min(1 << (live - 1).bit_length(), self.slots)
        self.seen[width] += 1
        # Graphs belong to the current device.
        with torch.cuda.device(self.device):
            if width not in self.graphs and self.seen[width] > WARM_UP:
                self._capture(step, width)
            if width in self.graphs:
                self.graphs[width].replay()
            elif self.seen[width] == WARM_UP:
                self._watched(step, width)
            else:
                step(width)

    def _give_up(self, error: RuntimeError) -> None:
        logger.warning("rollout: the decode step runs without CUDA graphs: %s", error)
        self.on = False

    def _watched(self, step: Step, width: int) -> None:
        """A step in which torch raises where the host waits for the device.

        Better found here than by a capture that fails. The model is what may wait, and it comes
        before a step changes any state: the step can be run anew.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            return step(width)
        except RuntimeError as error:
            self._give_up(error)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        step(width)

    def _capture(self, step: Step, width: int) -> None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        spare = generator.clone_state()
        try:
            with (
                _no_collection(),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                step(width)
        except RuntimeError as error:
            # A capture that fails leaves its stream behind as the current one, and a generator
            # that takes itself to be captured and refuses to serve.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(spare)
            self._give_up(error)
            return
        self.graphs[width] = graph
