"""Define what a timed operation is."""

from abc import ABC, abstractmethod
from typing import Any

from eval.speed.inputs import Setting, Shape


class Operation(ABC):
    """Hold one copy of an operation's inputs; the same shape and seed give the same copy."""

    name: str
    most_shapes: int | None = None  # maximum number of the given shapes, None for all
    reference_tokens = 1 << 23  # the PyTorch reference runs on shapes of at most this many tokens
    nbytes: int  # bytes that must be moved
    flops = 0  # floating-point operations; 0 if they depend on the numbers, or are not the limit

    @abstractmethod
    def __init__(self, shape: Shape, seed: int, setting: Setting): ...

    @classmethod
    def backends(cls) -> tuple[str, ...]:
        return "triton", "torch"

    @abstractmethod
    def run(self, backend: str) -> Any:
        """Run one call; "torch" must run within `reference_kernels()`."""

    @abstractmethod
    def error(self, found: Any) -> float:
        """Return the relative error of the result of `run`."""
