"""Compute figures over problems or texts with bootstrap intervals, and paired differences.

This is the percentile bootstrap of Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

RESAMPLES = 10_000
# `separated` decides after every round, so a strict level keeps chance from stopping an equally good configuration.
FAR = 0.999
FEWEST = 20


def by_problem(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of right samples per problem, by id."""
    found = defaultdict(list)
    for record in records:
        found[record["id"]].append(float(record["correct"]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def bootstrap(figure: Callable[[np.ndarray], np.ndarray], count: int, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of a figure's percentile interval.

    Args:
        figure: function from the places that each resample picks, int64 `[resamples, count]`, to float `[resamples]`.
        count: number of problems or texts to resample.
        level: confidence level of the interval.
    """
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.quantile(figure(picks), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(values: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Return the mean over problems with its percentile bootstrap interval; equal values give an interval of one point.

    Args:
        values: float `[problems]`, not empty. level: confidence level of the interval.
    """
    low, high = bootstrap(lambda picks: values[picks].mean(1), len(values), level)
    return {"mean": float(values.mean()), "low": low, "high": high}


def paired(ours: Mapping[str, float], others: Mapping[str, float], level: float = 0.95) -> dict[str, float] | None:
    """Return the mean difference, ours minus theirs, over shared problems, with its interval; None without any."""
    both = [name for name in ours if name in others]
    if not both:
        return None
    difference = interval(np.array([ours[name] - others[name] for name in both]), level)
    return difference | {"problems": len(both)}


def separated(ours: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Return whether the paired interval at level `FAR`, over at least `FEWEST` problems, excludes 0."""
    difference = paired(ours, others, FAR)
    return (
        difference is not None
        and difference["problems"] >= FEWEST
        and (difference["low"] > 0 or difference["high"] < 0)
    )
