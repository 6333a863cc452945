"""Time on a CUDA device."""

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eval.speed.inputs import Setting

# Calls of a graph at least, unless they take longer than this together; replays of it; calls between two events.
GRAPH_CALLS, GRAPH_US, REPLAYS, EAGER_CALLS = 16, 20_000, 20, 20
COPY_BYTES = 2 << 30


class CudaTimer:
    """Times calls on the current CUDA device, in microseconds; the calls of a list take turns."""

    def eager(self, calls: Sequence[Callable[[], Any]]) -> float:
        """One call between two events: the median of 20, or of fewer that take 0.3 s together, but of 5 at least."""
        times: list[float] = []
        held: deque[Any] = deque(maxlen=len(calls))  # so that outputs take turns as well
        while len(times) < 5 or (len(times) < EAGER_CALLS and sum(times) < 3e5):
            call = calls[len(times) % len(calls)]
            times.append(self._between(lambda call=call: held.append(call())))
        return median(times)

    def graph(self, calls: Sequence[Callable[[], Any]], estimate: float) -> float:
        """A call within a captured graph; `estimate` of its time decides how many the graph gets."""
        rounds = min(math.ceil(GRAPH_CALLS / len(calls)), int(GRAPH_US / (estimate * len(calls))))
        rounds = max(rounds, 1)
        graph, held = torch.cuda.CUDAGraph(), deque(maxlen=len(calls))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    held.append(call())
        for _ in range(2):
            graph.replay()
        return median(self._between(graph.replay) for _ in range(REPLAYS)) / (rounds * len(calls))

    def wall(self, call: Callable[[], Any]) -> float:
        """From an idle device to an idle device, by the host's clock."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    def waits(self, call: Callable[[], Any]) -> list[str]:
        """The lines of Python at which the host waits for the device during a call."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
        return [f"{Path(w.filename).name}:{w.lineno}" for w in found]

    def free_bytes(self) -> int:
        """Memory of the device that can still be had."""
        self.release()
        return torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Give back what the last operation's tensors left."""
        torch.cuda.empty_cache()

    def _between(self, call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def copy_bandwidth(timer: CudaTimer, setting: Setting, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second that a large copy within the device reads and writes."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * nbytes / (timer.eager([copy]) * 1e-6)


def describe(error: Exception) -> str:
    """An exception on one short line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
