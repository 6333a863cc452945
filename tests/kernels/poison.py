"""Memory that shows what a kernel did not write."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated within holds NaN, or the largest integers, until it is written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that are not deterministic, which is not asked here
            yield
    finally:
        torch.use_deterministic_algorithms(False)
