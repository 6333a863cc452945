"""Intervals: against their formulas and by how often they hold the truth."""

import numpy as np
import pytest

from eval.intervals import FEWEST, by_problem, interval, paired, separated


def records(values, samples=1):
    return [{"id": str(i), "sample": s, "correct": bool(v)} for i, v in enumerate(values) for s in range(samples)]


def test_samples_of_a_problem_are_averaged_first():
    found = by_problem([*records([1, 0]), {"id": "0", "sample": 1, "correct": False}])
    assert found == {"0": 0.5, "1": 0.0}


def test_the_interval_is_that_of_the_normal_law_for_many_problems():
    values = np.random.default_rng(1).binomial(1, 0.3, 500).astype(float)
    found = interval(values)
    error = 1.96 * values.std() / 500**0.5
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - error, abs=0.004)
    assert found["high"] == pytest.approx(values.mean() + error, abs=0.004)


def test_about_95_of_100_intervals_hold_the_truth():
    rng = np.random.default_rng(2)
    found = [interval(rng.binomial(1, 0.5, 60).astype(float)) for _ in range(120)]
    held = np.mean([each["low"] <= 0.5 <= each["high"] for each in found])
    assert 0.90 <= held <= 0.99


def test_a_paired_difference_is_tighter_than_its_parts():
    full = {str(i): float(i % 2) for i in range(100)}
    ours = full | {"1": 0.0, "3": 0.0, "5": 0.0}
    found = paired(ours, full)
    assert found["mean"] == pytest.approx(-0.03)
    assert found["high"] - found["low"] < 0.08 < interval(np.array(list(full.values())))["high"] - 0.5
    assert found["problems"] == 100


def test_only_problems_that_both_have_are_compared():
    assert paired({"a": 1.0, "b": 0.0}, {"a": 0.0, "c": 1.0}) == {"mean": 1.0, "low": 1.0, "high": 1.0, "problems": 1}
    assert paired({"a": 1.0}, {"b": 1.0}) is None


def test_what_stops_a_configuration_is_beyond_doubt():
    full = dict.fromkeys(map(str, range(100)), 1.0)
    worse = full | {str(i): 0.0 for i in range(50)}
    slightly = full | {str(i): 0.0 for i in range(4)}
    assert separated(worse, full)
    assert separated(full, worse)
    assert not separated(slightly, full)
    assert not separated(full, full)
    assert not separated({str(i): 0.0 for i in range(FEWEST - 1)}, full)
