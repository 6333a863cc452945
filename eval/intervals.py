"""Accuracy over problems with bootstrap intervals, and paired differences.

The percentile bootstrap of Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

RESAMPLES = 10_000
# `separated` decides after every round: a strict level keeps chance from stopping a configuration that is as good.
FAR = 0.999
FEWEST = 20


def by_problem(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of right samples of every problem, by id."""
    found = defaultdict(list)
    for record in records:
        found[record["id"]].append(float(record["correct"]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def interval(values: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Mean of a figure over problems, with its percentile bootstrap interval; the interval of equal values is a point.

    Args:
        values: float `[problems]`, not empty. level: of the interval.
    """
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def paired(ours: Mapping[str, float], others: Mapping[str, float], level: float = 0.95) -> dict[str, float] | None:
    """Mean difference, ours minus theirs, over the problems that both have, with its interval; None without any."""
    both = [name for name in ours if name in others]
    if not both:
        return None
    difference = interval(np.array([ours[name] - others[name] for name in both]), level)
    return difference | {"problems": len(both)}


def separated(ours: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether the paired interval at level `FAR`, over at least `FEWEST` problems, excludes 0."""
    difference = paired(ours, others, FAR)
    return (
        difference is not None
        and difference["problems"] >= FEWEST
        and (difference["low"] > 0 or difference["high"] < 0)
    )
