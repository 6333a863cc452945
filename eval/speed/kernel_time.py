"""Summarise a device's time: kernels by kind, and the time without a running kernel."""

import re
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first match with a kernel's name counts; names of hardkv's own kernels begin with an underscore.
KINDS = {
    "attention": r"^_attend|^_ragged_attention|^rotate_queries|^combine|flash|fmha|sdpa|attention",
    "selection": r"^_(layout|assign|denominator|received|pool|gather|compact|cut|sums|spare|column)",
    "matrix products": r"nvjet|gemm|gemv|cutlass|cublas|splitK|dot_kernel|_mm_|_addmm_",
}
OTHER = "other"


def kind_of(name: str) -> str:
    """Return a key of `KINDS`, or `OTHER`."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def summarise(kernels: Iterable[tuple[str, float, float]], elapsed: float, steps: int = 1) -> dict[str, Any]:
    """Summarise one of `steps` steps.

    Args:
        kernels: name, begin and end of each kernel, in any unit. elapsed: time of all steps, in the same unit.

    Returns:
        `total`, `idle` (no kernel runs) and `kinds` (kernel time by kind), all in that unit; kernels
        that run in parallel count separately. `kernels`: the number of kernels.
    """
    found = sorted(kernels, key=lambda kernel: kernel[1])
    kinds = dict.fromkeys([*KINDS, OTHER], 0.0)
    busy = last = 0.0
    for i, (name, begin, end) in enumerate(found):
        kinds[kind_of(name)] += (end - begin) / steps
        last = begin if i == 0 else last
        busy += max(end - max(begin, last), 0.0)
        last = max(last, end)
    idle = max(elapsed - busy, 0.0) / steps
    return {"total": elapsed / steps, "idle": idle, "kinds": kinds, "kernels": round(len(found) / steps)}


class Profiler:
    """Record the kernels of the current CUDA device between `start` and `stop`."""

    def start(self) -> None:
        """Wait for the device, and start recording."""
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()
        torch.cuda.synchronize()
        self._begun = time.perf_counter()

    def stop(self, steps: int = 1) -> dict[str, Any]:
        """Wait for the device; return `summarise` of the kernels, in milliseconds."""
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - self._begun
        self._profile.stop()
        kernels = [
            (event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
            for event in self._profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        return summarise(kernels, elapsed * 1e3, steps)
