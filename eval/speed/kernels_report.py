"""Write tables and picture from `python -m eval.speed.kernels`, and check the targets.

python -m eval.speed.kernels_report eval/results/kernels.json
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from eval.markdown import table
from hardkv.extras import require
from hardkv.files import write_text
from hardkv.viz.figures import MARKERS, save_figure

Record = dict[str, Any]

# Minimum fraction of the copy bandwidth, from this many bytes (inclusive) to this many (exclusive). Drawn lengths
# vary by a few percent around "70 MB", "260 MB" and "1 GB".
DECODE_FRACTIONS = ((0.95e9, float("inf"), 0.95), (200e6, 0.95e9, 0.85), (60e6, 200e6, 0.60))
# Minimum speed-up over the best flash_attn_varlen_func: from 64 MB on, and up to 260 MB.
DECODE_RATIOS = ((280e6, float("inf"), 1.1), (0.0, 280e6, 1.25))
COMPACTION_FRACTION = (256e6, 0.85)
EVENT_SHARES = {"snapkv": 0.05, "rkv": 0.10}
EVENT_BOUNDS = {"rkv": "unlike keys are all compared with one another, so work grows with the squares of the lengths"}


@dataclass(frozen=True)
class Target:
    """Hold a target of the project and its result."""

    what: str
    wanted: float
    found: float | None  # None if not measured or failed
    at_most: bool = False
    bound: str = ""  # the kind of bound

    @property
    def met(self) -> bool:
        return self.found is not None and (self.found <= self.wanted if self.at_most else self.found >= self.wanted)

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        if self.found is None:
            return f"| {self.what} | {sign} {self.wanted:.2f} | | not measured |"
        verdict = "met" if self.met else f"missed by {abs(self.found - self.wanted):.3f}"
        why = "" if self.met or not self.bound else f": {self.bound}"
        return f"| {self.what} | {sign} {self.wanted:.2f} | {self.found:.3f} | {verdict}{why} |"


def shape_name(record: Record) -> str:
    """Return rows x mean, and the distribution of lengths."""
    shape = record["shape"]
    return f"{shape['rows']}x{shape['mean']} {shape['lengths']}"


def best_us(record: Record) -> float | None:
    """Return the time within a graph if measured, else the eager time."""
    return record.get("graph_us", record.get("eager_us"))


def by_shape(records: list[Record], operation: str) -> dict[str, dict[str, Record]]:
    """Group the records of an operation by shape and then by backend."""
    found: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record["operation"] == operation:
            found[shape_name(record)][record["backend"]] = record
    return found


def peers(backends: dict[str, Record], time: str) -> dict[str, float]:
    """Return the times of the packages' attention, by backend."""
    others = {name: record for name, record in backends.items() if name not in ("triton", "torch")}
    return {name: record[time] for name, record in others.items() if time in record}


def targets(records: list[Record]) -> list[Target]:
    """Return the project's targets for kernels and events."""
    found = []
    for shape, backends in by_shape(records, "attention").items():
        ours = backends.get("triton", {})
        bound = latency(ours)
        nbytes = next((record["bytes"] for record in backends.values() if "bytes" in record), None)
        if nbytes is None:
            found.append(Target(f"decode {shape}", DECODE_FRACTIONS[0][2], None))
            continue
        for low, high, wanted in DECODE_FRACTIONS:
            if low <= nbytes < high:
                share = ours.get("fraction") if "graph_us" in ours else None
                what = f"decode {shape}, {nbytes / 1e6:,.0f} MB: of copy bandwidth"
                found.append(Target(what, wanted, share, bound=bound))
        others = peers(backends, "graph_us")
        for low, high, wanted in DECODE_RATIOS:
            if low <= nbytes < high:
                ratio = min(others.values()) / ours["graph_us"] if others and "graph_us" in ours else None
                name = f" ({min(others, key=others.__getitem__)})" if others else ""
                what = f"decode {shape}, {nbytes / 1e6:,.0f} MB: times as fast as the best package{name}"
                found.append(Target(what, wanted, ratio, bound=bound))
    for shape, backends in by_shape(records, "compaction").items():
        record = backends.get("triton", {})
        if record.get("bytes", 0) >= COMPACTION_FRACTION[0]:
            what = f"compaction {shape}, {record['bytes'] / 1e6:,.0f} MB: of copy bandwidth"
            share = record.get("fraction") if "graph_us" in record else None
            found.append(Target(what, COMPACTION_FRACTION[1], share))
    for record in records:
        if record["operation"] == "event" and record["scorer"] in EVENT_SHARES and record["shape"]["batch"] > 1:
            what = f"event, {event_name(record)}: of an interval's decode steps"
            bound = EVENT_BOUNDS.get(record["scorer"], "")
            found.append(Target(what, EVENT_SHARES[record["scorer"]], record.get("share"), at_most=True, bound=bound))
    return found


def latency(record: Record) -> str:
    """Return a kernel's time beyond moving its bytes at the copy bandwidth."""
    if "graph_us" not in record or "fraction" not in record:
        return ""
    moving = record["graph_us"] * record["fraction"]
    return f"{record['graph_us'] - moving:.0f} us of latency on {moving:.0f} us for the bytes"


def event_name(record: Record) -> str:
    """Return scorer, budget, batch, and kind of keys."""
    name = f"{record['scorer']}, {record['budget']}, batch {record['shape']['batch']}"
    return name + (", keys alike" if record["alike"] else "")


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def ratio_rows(records: list[Record]) -> list[list[str]]:
    """Compare Triton with the best package at decoding, on both tiers and on one, in graphs and eager."""
    rows = []
    for operation in ("attention", "attention-chunk"):
        for shape, backends in by_shape(records, operation).items():
            ours, cells = backends.get("triton", {}), []
            for time in ("graph_us", "eager_us"):
                found = peers(backends, time)
                for one_tier in (False, True):
                    group = {name: us for name, us in found.items() if name.endswith("one tier") == one_tier}
                    if not group or time not in ours:
                        cells.append("")
                        continue
                    name = min(group, key=group.__getitem__)
                    cells.append(f"{group[name] / ours[time]:.2f} ({name.removesuffix(', one tier')})")
            nbytes = next((record["bytes"] for record in backends.values() if "bytes" in record), None)
            rows.append([operation, shape, number(nbytes and nbytes / 1e6, 0), *cells])
    return rows


def reference_rows(records: list[Record]) -> list[list[str]]:
    """Compare Triton with the PyTorch reference, eager."""
    rows = []
    for operation in dict.fromkeys(record["operation"] for record in records):
        cells = []
        for shape, backends in by_shape(records, operation).items():
            ours, theirs = (backends.get(name, {}).get("eager_us") for name in ("triton", "torch"))
            if ours and theirs:
                cells.append(f"{theirs / ours:.1f} ({shape})")
        if cells:
            rows.append([operation, ", ".join(cells)])
    return rows


def event_rows(records: list[Record]) -> list[list[str]]:
    rows = []
    for record in records:
        if record["operation"] != "event":
            continue
        if "error" in record:
            rows.append([event_name(record), record["error"], "", "", "", "", ""])
            continue
        layers, of, waits = record["layers"], record["shape"]["layers"], record["waits"]
        scaled = "" if layers == of else f" (scaled from {layers} of {of} layers)"
        rows.append(
            [
                event_name(record),
                number(record["eager_us"] / 1e3, 2) + scaled,
                number(record["step_us"] / 1e3, 3),
                number(record["attention_us"] / 1e3, 3),
                f"{record['share']:.2%}",
                f"{len(waits)}" + (f" ({', '.join(dict.fromkeys(waits))})" if waits else ""),
                f"{record['relative_error']:.1e}",
            ]
        )
    return rows


def record_rows(records: list[Record], operation: str) -> list[list[str]]:
    rows = []
    for shape, backends in by_shape(records, operation).items():
        for backend, record in backends.items():
            nbytes, flops, us = record.get("bytes"), record.get("flops"), best_us(record)
            rows.append(
                [
                    shape,
                    backend,
                    number(nbytes and nbytes / 1e6),
                    number(record.get("eager_us")),
                    number(record.get("graph_us")),
                    number(record.get("fraction"), 3),
                    number(flops / us / 1e6) if flops and us else "",
                    f"{record['relative_error']:.1e}" if "relative_error" in record else "",
                    record.get("error", ""),
                ]
            )
    return rows


def summary(data: dict[str, Any]) -> str:
    """Return Markdown: the machine, ratios, targets and events."""
    records = data["records"]
    found = targets(records)
    versions = ", ".join(
        f"{name} {version}" if " " not in version else version for name, version in data["versions"].items()
    )
    lines = [
        f"{data['machine']}; {versions}. Copies within the device move {data['copy_bandwidth'] / 1e12:.3f} TB/s, read "
        f"and written.{' Quick run: fewer shapes.' if data['quick'] else ''}"
    ]
    if rows := ratio_rows(records):
        head = "| operation | shape | MB | graph, both tiers | graph, one tier | eager, both tiers | eager, one tier |"
        lines += ["\n## Times as fast as the best package\n", *table(head, rows)]
    if rows := reference_rows(records):
        lines += ["\n## Times as fast as the PyTorch reference, eager\n", *table("| operation | by shape |", rows)]
    if found:
        met = sum(target.met for target in found)
        lines += [f"\n## Targets: {met} of {len(found)} met\n", *table("|  | wanted | found |  |", [])]
        lines += [str(target) for target in found]
    if rows := event_rows(records):
        head = "| event | ms | decode step, ms | its attention, ms | share of an interval | host waits "
        lines += ["\n## Events\n", *table(f"{head}| differs from the reference |", rows)]
    return "\n".join(lines)


def details(records: list[Record]) -> str:
    """Return Markdown: every record of an operation."""
    head = "| shape | backend | MB | eager, us | graph, us | of copy bandwidth | TFLOP/s | error | failed |"
    lines: list[str] = []
    for operation in dict.fromkeys(record["operation"] for record in records):
        if operation != "event":
            lines += [f"\n## {operation}\n", *table(head, record_rows(records, operation))]
    return "\n".join(lines)


def draw(records: list[Record], path: Path) -> None:
    """Draw the fraction of the copy bandwidth against bytes: decoding by backend, and hardkv's other operations."""
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    groups: tuple[dict[str, list[Record]], ...] = (defaultdict(list), defaultdict(list))
    for record in records:
        if "fraction" not in record:
            continue
        if record["operation"] == "attention":
            groups[0][record["backend"]].append(record)
        elif record["backend"] in ("triton", "primitives"):
            groups[1][record["operation"]].append(record)
    for axis, group, title in zip(axes, groups, ("decode attention", "other operations of hardkv"), strict=True):
        ordered = sorted(group.items(), key=lambda item: item[0] != "triton")
        for (name, found), marker in zip(ordered, cycle(MARKERS), strict=False):
            found = sorted(found, key=lambda record: record["bytes"])
            axis.plot(
                [record["bytes"] / 1e6 for record in found],
                [record["fraction"] for record in found],
                label=name,
                marker=marker,
                markersize=5,
                linewidth=2.4 if name == "triton" else 1.2,
                linestyle="--" if name.endswith("one tier") else "-",
            )
        axis.set_xscale("log")
        axis.set_xlabel("MB that must be moved")
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.25)
        if group:
            axis.legend(fontsize=8)
    axes[0].set_ylim(0)
    axes[0].set_ylabel("fraction of the copy bandwidth")
    save_figure(figure, path)
    plt.close(figure)


def report(path: Path) -> None:
    """Print the tables; write tables and picture beside the JSON."""
    data = json.loads(path.read_text())
    text = (
        "# Kernels and events: time\n\n"
        f"Written by `python -m eval.speed.kernels_report`, from {path.name}. {summary(data)}\n"
        f"{details(data['records'])}\n\n"
        "MB: bytes that must be moved, each input read once and each output written once; scoring reads its keys "
        "twice. Graph: a call within a CUDA graph; eager: between two events, the host included where it is slower. "
        "One tier: the package alone, on the same tokens in one contiguous tier. Error: relative, against float64. "
        "Operations may come from several runs on the machine, and each fraction is of its own run's copy "
        "bandwidth.\n"
    )
    write_text(path.with_suffix(".md"), text)
    draw(data["records"], path.with_suffix(".png"))
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.kernels_report", description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    report(parser.parse_args().json)


if __name__ == "__main__":
    main()
