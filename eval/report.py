"""Write tables and picture of a run of `python -m eval.run`: python -m eval.report OUT [--to eval/results/NAME]."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.equal_bytes import SAME_BYTES
from eval.markdown import table
from eval.methods import METHODS, Configuration
from eval.store import Store
from eval.summary import summarise
from hardkv.cache.record.stats import format_bytes
from hardkv.extras import require
from hardkv.files import write_text
from hardkv.viz.figures import MARKERS, save_figure


def markdown(summary: Mapping[str, Any], picture: str) -> str:
    """Return the text of the report."""
    settings, rows = summary["settings"], summary["configurations"]
    return "\n".join(
        [
            f"# {settings['task']}: {settings['model']}",
            "",
            "Written by `python -m eval.report`.",
            "",
            *_conditions(summary),
            "",
            "## Accuracy by budget",
            "",
            *budget_table(rows),
            "",
            "Each cell: accuracy in %, with its 95 % interval over problems, by the bootstrap (of equal values "
            "it is a point, however few they are). **+x % bytes**: so much more than `topk` "
            "held at this budget, so the cell is no comparison at equal bytes.",
            "",
            "## All configurations",
            "",
            *_detail_table(rows),
            "",
            "Differences are in percentage points, paired over the problems that both have, with 95 % intervals; those "
            "to `topk` are taken at the bytes that the method really used, between two of its budgets where needed, or "
            "at the nearest within 5 %, which is then said. "
            "Bytes (the cache's tensors) are a sequence's share of its batch, while it lived: mean, and the highest; "
            "allocated: the mean of what the CUDA allocator had given out beyond the weights, with all else. "
            "Tokens a head: mean over time and heads (fewest–most of a head). Tokens/s: of a batch, prompts included; "
            "the median.",
            "",
            f"![accuracy against bytes]({picture})",
            "",
        ]
    )


def _conditions(summary: Mapping[str, Any]) -> list[str]:
    settings = summary["settings"]
    sampling = {name: value for name, value in settings["sampling"].items() if value is not None}
    drawn = ", ".join(f"{name} {value}" for name, value in sampling.items() if name != "do_sample") or "greedy"
    extra = [
        f"{name} {settings[name]}"
        for name in ("length", "needles", "asked", "difficulty", "data")
        if settings.get(name)
    ]
    lines = [
        f"- {'; '.join(settings['machines'])}",
        f"- {drawn}; at most {settings['max_new_tokens']:,} new tokens; seed {settings['seed']}; window "
        f"{settings['window']}, sinks {settings['sinks']}, interval {settings['interval']}",
    ]
    if (source := calibrated(summary)) is not None:
        lines.append(f"- {source}")
    if extra:
        lines.append(f"- {', '.join(extra)}")
    if (told := too_hard(summary)) is not None:
        lines.append(f"- {told}")
    return lines


def too_hard(summary: Mapping[str, Any]) -> str | None:
    """Return a note that the full cache itself fails, so that nothing was compared; None otherwise."""
    least = summary["settings"]["least_dense"]
    for row in summary["configurations"]:
        if row["method"] == "full" and row["accuracy"]["mean"] < least:
            return f"The full cache solves {row['accuracy']['mean']:.0%}, below {least:.0%}: other methods were not run"
    return None


def calibrated(summary: Mapping[str, Any]) -> str | None:
    """Return a note on the data of the calibrations; None if no method has one."""
    if not any(Configuration(row["method"]).needs_calibration for row in summary["configurations"]):
        return None
    source = summary["settings"]["calibration"]
    source = source.replace("on problems", "on other problems of the task and the full cache's answers")
    return f"calibrated {source.replace('on texts', 'on the texts that come with hardkv')}"


def budget_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of methods by budgets, as papers in the field show it."""
    columns = list(dict.fromkeys(row["budget"] for row in rows if row["budget"] and row["budget"][0] != "p"))
    columns.sort(key=lambda budget: min(row["bytes_mean"] for row in rows if row["budget"] == budget))
    names = list(dict.fromkeys(_name(row) for row in rows if row["budget"] in (None, *columns)))
    lines = []
    for name in names:
        cells = {row["budget"]: _cell(row) for row in rows if _name(row) == name}
        lines.append([name, *(cells.get(column, cells.get(None, "")) for column in columns or [None])])
    return table(f"| | {' | '.join(columns or ['all tokens'])} |", lines, "---")


def _name(row: Mapping[str, Any]) -> str:
    return _method(row) + (f" ({row['scorer']})" if row["scorer"] else "")


def _method(row: Mapping[str, Any]) -> str:
    bits = row.get("bits", "16")
    return row["method"] if bits == "16" else f"{row['method']}, {bits} bits"


def percent(value: Mapping[str, float] | None, sign: str = "") -> str:
    """Format `{"mean", "low", "high"}` in percent."""
    if value is None:
        return ""
    return f"{value['mean'] * 100:{sign}.1f} [{value['low'] * 100:{sign}.1f}, {value['high'] * 100:{sign}.1f}]"


def _cell(row: Mapping[str, Any]) -> str:
    return percent(row["accuracy"]) + more_bytes(row)


def more_bytes(row: Mapping[str, Any] | None) -> str:
    """Return the note on a figure when the method used more bytes than the one compared with."""
    more = 0.0 if row is None else row.get("more_bytes", 0.0)
    return f" **+{more:.0%} bytes**" if more > SAME_BYTES else ""


def _detail_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = (
        "| configuration | problems × samples | accuracy | against full | against topk, equal bytes | new tokens "
        "| truncated | bytes | peak | allocated | tokens a head | tokens/s |"
    )
    lines = []
    for row in rows:
        heads = row["tokens_per_head"]
        asked = f" ({row['tokens']})" if row["tokens"] else ""
        cells = (
            row["label"].replace("_", "/") + asked,
            f"{row['problems']} × {row['samples'] / row['problems']:.3g}",
            percent(row["accuracy"]),
            percent(row.get("versus_full"), "+"),
            percent(row.get("versus_topk"), "+") + more_bytes(row.get("versus_topk")),
            f"{row['new_tokens']:,.0f}",
            f"{row['truncated']:.1%}",
            format_bytes(row["bytes_mean"]),
            format_bytes(row["bytes_peak"]),
            format_bytes(row["allocated_mean"]) if row.get("allocated_mean") else "–",
            f"{heads['mean']:,.0f} ({heads['min']:,.0f}–{heads['max']:,.0f})",
            f"{row['tokens_per_second']:,.1f}, batch {row['batch']}",
        )
        lines.append(cells)
    return table(head, lines, "---")


# ---------------------------------------------------------------------- picture


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against mean bytes: one panel per scorer, one line per method; the band is the full cache."""
    require("eval", "matplotlib")
    import matplotlib.pyplot as plt

    rows = summary["configurations"]
    full = [row for row in rows if row["method"] == "full"]
    scorers = sorted({row["scorer"] for row in rows if row["scorer"]}) or [None]
    size = (3.0 + 3.9 * len(scorers), 4.6)
    figure, axes = plt.subplots(
        1, len(scorers), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, scorer in zip(axes[0], scorers, strict=True):
        _panel(axis, full, [row for row in rows if row["scorer"] == scorer and row["method"] != "full"])
        if len(scorers) > 1:
            axis.set_title(scorer, fontsize=10)
    sizes = [row["bytes_mean"] for row in rows]
    low, high = np.log2(min(sizes)), np.log2(max(sizes))
    axes[0, 0].set_xticks(2 ** np.linspace(low, high, 5) if high > low else sizes[:1])
    axes[0, 0].set_ylabel("accuracy (%), 95 % interval over problems")
    figure.supxlabel("mean bytes of a sequence's cache", fontsize=10)
    figure.suptitle(f"{summary['settings']['task']}: {summary['settings']['model']}", fontsize=11)
    # methods may differ between scorers
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    save_figure(figure, path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, full: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    # all colours but grey, which marks the full cache
    colours = [colour for place, colour in enumerate(plt.get_cmap("tab10").colors) if place != 7]
    for row in full:
        axis.axhspan(100 * row["accuracy"]["low"], 100 * row["accuracy"]["high"], color="0.92", zorder=0)
        axis.axhline(100 * row["accuracy"]["mean"], color="0.5", linewidth=1)
        axis.plot(row["bytes_mean"], 100 * row["accuracy"]["mean"], "s", color="0.3", label="full")
    for name in dict.fromkeys(_method(row) for row in rows):
        points = sorted((row for row in rows if _method(row) == name), key=lambda row: row["bytes_mean"])
        method, bits = points[0]["method"], points[0].get("bits", "16")
        low, mean, high = (np.array([100 * row["accuracy"][end] for row in points]) for end in ("low", "mean", "high"))
        axis.errorbar(
            [row["bytes_mean"] for row in points],
            mean,
            [mean - low, high - mean],
            label=name,
            color=colours[METHODS.index(method)],
            linestyle="--" if method.endswith("-calibrated") else "-" if bits == "16" else ":",
            linewidth=2.2 if method == "risk" else 1.2,
            marker=MARKERS[METHODS.index(method)],
            markersize=5,
            capsize=2,
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, place: format_bytes(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.25)


def report(folder: Path, to: Path | None = None) -> str:
    """Write JSON, Markdown and picture; return the Markdown.

    Args:
        folder: the output of `python -m eval.run --out`. to: path of the three files without suffix, by default
            `folder/report`.
    """
    to = to or folder / "report"
    summary = summarise(Store(folder))
    head = json.dumps({name: value for name, value in summary.items() if name != "configurations"})
    lines = ",\n".join(json.dumps(row) for row in summary["configurations"])
    paths = {suffix: to.with_name(f"{to.name}.{suffix}") for suffix in ("json", "md", "png")}  # names may have dots
    write_text(paths["json"], f'{head[:-1]},\n"configurations": [\n{lines}\n]}}\n')
    draw(summary, paths["png"])
    text = markdown(summary, paths["png"].name)
    write_text(paths["md"], text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT", help="what python -m eval.run --out wrote")
    parser.add_argument("--to", type=Path, metavar="PATH", help="of the files, without suffix (default: OUT/report)")
    args = parser.parse_args(argv)
    try:
        print(report(args.folder, args.to))
    except (OSError, ValueError) as error:
        raise SystemExit(f"eval.report: {error}") from error


if __name__ == "__main__":
    main()
