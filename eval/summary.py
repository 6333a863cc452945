"""Summarise a run: figures of every configuration, from its finished samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.equal_bytes import NEAR_BYTES, SAME_BYTES, between
from eval.intervals import by_problem, interval, paired
from eval.methods import METHODS
from eval.store import Store

Records = Sequence[Mapping[str, Any]]


def summarise(store: Store) -> dict[str, Any]:
    """Return everything that the tables show, as JSON.

    Raises:
        FileNotFoundError: the folder holds no run. ValueError: the run has no results.
    """
    settings = store.settings()
    every = {label: records for label in store.labels() if (records := store.records(label))}
    if not every:
        raise ValueError(f"{store.folder} holds no results yet")
    rows = [_summary(label, records, settings["budgets"]) for label, records in every.items()]
    rows.sort(key=lambda row: (METHODS.index(row["method"]), row["scorer"] or "", row["bytes_mean"]))
    accuracies = {label: by_problem(records) for label, records in every.items()}
    for row in rows:
        ours = accuracies[row["label"]]
        if row["method"] != "full":
            row["versus_full"] = paired(ours, accuracies.get("full", {}))
        if row["method"] not in ("full", "topk") or row["bits"] != "16":
            uniform = [
                other
                for other in rows
                if (other["method"], other["bits"], other["scorer"]) == ("topk", "16", row["scorer"])
            ]
            nbytes, theirs = _at_bytes(uniform, accuracies, row["bytes_mean"])
            if (difference := paired(ours, theirs)) is not None:
                row["versus_topk"] = difference | {"more_bytes": row["bytes_mean"] / nbytes - 1}
            same = next((other["bytes_mean"] for other in uniform if other["budget"] == row["budget"]), None)
            if same is not None and row["bits"] == "16":
                row["more_bytes"] = row["bytes_mean"] / same - 1
    return {
        "kind": "harness",
        "settings": settings,
        "configurations": rows,
    }


def _summary(label: str, records: Records, budgets: Mapping[str, int]) -> dict[str, Any]:
    on_gpu = all(record["allocated_mean"] is not None for record in records)
    method, scorer, budget, bits = split(label)
    tokens = [np.array(record["tokens_per_head"]) for record in records]
    heads = np.mean(tokens, 0) if len({array.shape for array in tokens}) == 1 else tokens[0]
    return {
        "label": label,
        "method": method,
        "scorer": scorer,
        "budget": budget,
        "bits": bits,
        "tokens": budgets.get(budget) if budget else None,
        "problems": len({record["id"] for record in records}),
        "samples": len(records),
        "accuracy": interval(np.array(list(by_problem(records).values()))),
        "new_tokens": _mean(records, "new_tokens"),
        "truncated": _mean(records, "truncated"),
        "bytes_mean": _mean(records, "held_mean"),
        "bytes_peak": max(record["held_peak"] for record in records),
        # do not compare it: workspaces of libraries count for the first run of a process
        "allocated_mean": _mean(records, "allocated_mean") if on_gpu else None,
        "tokens_per_head": {"mean": float(heads.mean()), "min": float(heads.min()), "max": float(heads.max())}
        | {"heads": np.round(heads, 1).tolist()},
        "tokens_per_second": float(np.median([record["tokens_per_second"] for record in records])),
        "batch": max(record["rows"] for record in records),
    }


def split(label: str) -> tuple[str, str | None, str | None, str]:
    """Split a `Configuration.label` into method, scorer, budget and bits."""
    bits = "16"
    if label.endswith("bit"):
        label, _, bits = label.removesuffix("bit").rpartition("-")
    method = max((name for name in METHODS if label.split("-")[0] == name or label.startswith(f"{name}-")), key=len)
    rest = label.removeprefix(method).removeprefix("-")
    scorer, _, budget = rest.rpartition("-")
    return method, scorer or None, budget.replace("_", "/") or None, bits.replace("_", ":")


def _mean(records: Records, name: str) -> float:
    return float(np.mean([record[name] for record in records]))


def _at_bytes(
    uniform: Sequence[Mapping[str, Any]], accuracies: Mapping[str, Any], nbytes: float
) -> tuple[float, dict[str, float]]:
    """Return TopK's accuracy per problem at these bytes, or at the nearest available bytes, and the bytes used."""
    points = sorted(((row["bytes_mean"], accuracies[row["label"]]) for row in uniform), key=lambda point: point[0])
    nearest = min(points, key=lambda point: abs(point[0] - nbytes), default=(nbytes, {}))
    if abs(nearest[0] / nbytes - 1) <= SAME_BYTES:
        return nearest
    if (found := between([size for size, _ in points], nbytes)) is not None:
        place, share = found
        below, above = points[place][1], points[place + 1][1]
        return nbytes, {name: below[name] * (1 - share) + above[name] * share for name in below if name in above}
    return nearest if abs(nearest[0] / nbytes - 1) <= NEAR_BYTES else (nbytes, {})
