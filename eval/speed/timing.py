"""Measure time on a CUDA device."""

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

# Minimum calls per graph, unless they take longer than this in total; replays of it; calls between two CUDA events.
GRAPH_CALLS, GRAPH_US, REPLAYS, EAGER_CALLS = 16, 20_000, 20, 20
COPY_BYTES = 2 << 30


class CudaTimer:
    """Time calls on the current CUDA device, in microseconds; the calls of a list take turns."""

    def eager(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Time one call between two CUDA events: the median of 20, or of fewer within 0.3 s in all, but at least 5."""
        times: list[float] = []
        held: deque[Any] = deque(maxlen=len(calls))  # so that outputs rotate too
        while len(times) < 5 or (len(times) < EAGER_CALLS and sum(times) < 3e5):
            call = calls[len(times) % len(calls)]
            times.append(self._between(lambda call=call: held.append(call())))
        return median(times)

    def graph(self, calls: Sequence[Callable[[], Any]], estimate: float) -> float:
        """Time a call within a captured graph; the `estimate` of its time sets the number of calls per graph."""
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
        """Time from an idle device to an idle device, by the host's clock."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    def waits(self, call: Callable[[], Any]) -> list[str]:
        """Return the lines of Python at which the host waits for the device during a call."""
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
        """Return the free memory of the device, in bytes."""
        self.release()
        return torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Free the memory that the last operation's tensors left."""
        torch.cuda.empty_cache()

    def _between(self, call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def copy_bandwidth(timer: CudaTimer, setting: Setting, nbytes: int = COPY_BYTES) -> float:
    """Return the bytes per second that a large copy within the device reads and writes."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * nbytes / (timer.eager([copy]) * 1e-6)


def describe(error: Exception) -> str:
    """Describe an exception on one short line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
