"""Poison memory, to show what a kernel did not write."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory allocated in this context with NaN, or with the largest integers."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operators that are not deterministic, which does not matter here
            yield
    finally:
        torch.use_deterministic_algorithms(False)
