"""Write tables and picture from the measurements of `python -m eval.budgets run`."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from eval import bits_report
from eval.equal_bytes import between
from eval.intervals import bootstrap
from eval.markdown import table
from hardkv.extras import require
from hardkv.files import write_text
from hardkv.viz.figures import MARKERS, save_figure

# The picture shows these in this order; the others appear only in the tables.
DRAWN = ("TopK", "AdaKV", "Pyramid", "Adaptive", "TopP, calibrated", "DuoAttention style", "HeadKV style", "Risk")


class Study:
    """Group the records that are compared: by section, texts, length and scorer, then label, then n."""

    def __init__(self, records: list[dict[str, Any]]):
        self.cells: dict[tuple, dict[str, dict[int, list[dict[str, Any]]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        for record in records:
            group = (record["section"], record["texts"], record["length"], record["scorer"])
            self.cells[group][label(record)][record["n"]].append(record)

    def excess(self, group: tuple, name: str, n: int) -> np.ndarray | None:
        """Return the excess NLL of every text, mean over seeds; for TopP, interpolated at the bytes of TopK(n)."""
        cell = self.cells[group].get(name)
        if cell is None:
            return None
        if not name.startswith("TopP"):
            return np.mean([record["excess"] for record in cell[n]], 0) if n in cell else None
        base = self.topk(group, n)
        if base is None:
            return None
        points = sorted((record["nbytes"], record["excess"]) for records in cell.values() for record in records)
        found = between([nbytes for nbytes, _ in points], base["nbytes"])
        if found is None:
            return None
        place, share = found
        below, above = (np.array(excess) for _, excess in points[place : place + 2])
        return below * (1 - share) + above * share

    def topk(self, group: tuple, n: int) -> dict[str, Any] | None:
        """Return TopK's record for the same texts, length, scorer and n, from any section."""
        for other, labels in self.cells.items():
            if other[1:] == group[1:] and n in labels.get("TopK", {}):
                return labels["TopK"][n][0]
        return None

    def ratio(self, group: tuple, name: str, n: int) -> tuple[float, float, float, float] | None:
        """Return mean excess NLL, and its ratio to TopK's: value and 95 % interval over texts (paired bootstrap)."""
        ours, base = self.excess(group, name, n), self.topk(group, n)
        if ours is None or base is None:
            return None
        reference = np.array(base["excess"])
        low, high = bootstrap(lambda picks: ours[picks].mean(1) / reference[picks].mean(1), len(ours))
        return float(ours.mean()), float(ours.mean() / reference.mean()), low, high


def label(record: dict[str, Any]) -> str:
    """Return the label of a record in tables."""
    name, options = record["label"], record["options"]
    if options.get("scope") == "layer" and record["section"] != "shares":
        name += ", per layer"
    if options.get("bits", "auto") != "auto":
        name += f", {str(options['bits']).strip('[]')} bits"
    return name + (f", calibrated at {options['from']:,}" if "from" in options else "")


def tables(study: Study) -> str:
    """Return Markdown: one table per section, set of texts, length and scorer."""
    lines = []
    for group, labels in study.cells.items():
        section, texts, length, scorer = group
        counts = sorted({n for name, cell in labels.items() if not name.startswith("TopP") for n in cell})
        lines += [f"\n### {section}: {scorer}, {length:,} tokens, set {texts}\n"]
        rows = []
        for name in labels:
            row = [name]
            for n in counts:
                found, excess = study.ratio(group, name, n), study.excess(group, name, n)
                if found is not None:
                    mean, ratio, low, high = found
                    row.append(f"{mean:.4f} = {ratio:.2f} [{low:.2f}, {high:.2f}]")
                else:
                    row.append("" if excess is None else f"{excess.mean():.4f}")
            rows.append(row)
        lines += table(f"| | {' | '.join(f'n = {n}' for n in counts)} |", rows, "---")
    return "\n".join(lines)


def at_bytes(study: Study, section: str) -> str:
    """Show the losses of a section beside the bytes that its caches really held."""
    rows = []
    for group, labels in study.cells.items():
        if group[0] == section:
            for name, cell in labels.items():
                for n, (record, *_) in sorted(cell.items()):
                    share = record["nbytes"] / record["dense_nbytes"]
                    rows.append([name, str(n), f"{share:.3f}", f"{np.mean(record['excess']):.4f}"])
    lines = table("| | n | bytes of dense | excess NLL |", rows, "---")
    return "\n".join([f"\n### {section}, at the bytes held\n", *lines]) if rows else ""


def bits(records: list[dict[str, Any]]) -> str:
    """Show the sections `bits` and `peers` at the bytes of a model of 16 bits; the bytes held are those of float32."""
    if all(record["section"] not in ("bits", "peers") for record in records):
        return ""
    parts = (bits_report.all_tokens, bits_report.equal_bytes, bits_report.fewer_tokens)
    lines = [line for part in parts for line in (*part(records), "")]
    return "\n".join(["\n### bits and peers, at the bytes of 16 bits\n", *lines])


def draw(study: Study, path: Path) -> None:
    """Draw excess NLL against n, with one panel per scorer and length of the sections `main` and `long`."""
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    groups = [group for group in study.cells if group[0] in ("main", "long") and group[3] != "rkv"]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(4.6 * len(groups), 4.4), squeeze=False, sharey=True, layout="constrained"
    )
    colours = plt.get_cmap("tab10")
    for axis, group in zip(axes[0], groups, strict=True):
        counts = sorted(study.cells[group]["TopK"])
        for place, name in enumerate(DRAWN):
            values = [(n, excess) for n in counts if (excess := study.excess(group, name, n)) is not None]
            if not values:
                continue
            means = [excess.mean() for _, excess in values]
            errors = [1.96 * excess.std(ddof=1) / len(excess) ** 0.5 for _, excess in values]
            axis.errorbar(
                [n * 1.02 ** (place - 3.5) for n, _ in values],
                means,
                errors,
                label=name,
                color=colours(place),
                marker=MARKERS[place],
                markersize=5,
                linewidth=2.4 if name == "Risk" else 1.2,
                capsize=2,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.minorticks_off()
        axis.set_yscale("log")
        axis.grid(axis="y", which="both", alpha=0.25)
        axis.set_title(f"scorer {group[3]}, {group[2]:,} tokens", fontsize=11)
        axis.set_xlabel("mean tokens kept per KV head")
    axes[0, 0].set_ylabel("NLL above the dense cache (nats a token)")
    # not every panel has every method
    found = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = [name for name in DRAWN if name in found]
    figure.legend([found[name] for name in shown], shown, fontsize=8, loc="outside right upper")
    save_figure(figure, path)
    plt.close(figure)


def draw_settings(study: Study, path: Path) -> None:
    """Draw excess NLL as a fraction of TopK's for every setting tried on `choose`, one panel per section, at one n."""
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    groups = [group for group in study.cells if group[1] == "choose" and group[0] != "patience"]
    rows = -(-len(groups) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(16, 2.6 * rows), squeeze=False, sharex=True, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, group in zip(axes.flat, groups, strict=False):
        counts = sorted({n for cell in study.cells[group].values() for n in cell})
        n = 256 if 256 in counts else counts[0]
        found = {name: study.ratio(group, name, n) for name in study.cells[group] if name != "TopK"}
        found = {name: ratio for name, ratio in found.items() if ratio is not None}
        for place, (_, ratio, low, high) in enumerate(found.values()):
            axis.plot([low, high], [place, place], color="tab:blue", linewidth=1.5)
            axis.plot(ratio, place, "o", color="tab:blue", markersize=5)
        axis.set_yticks(range(len(found)), list(found), fontsize=8)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{group[0]}: n = {n} of {group[2]:,}", fontsize=10)
    figure.supxlabel("NLL above the dense cache, as a fraction of TopK's, with 95 % interval over texts", fontsize=10)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def report(path: Path) -> None:
    """Print the tables; write tables and pictures beside the JSON."""
    data = json.loads(path.read_text())
    study = Study(data["records"])
    machines = "; ".join(sorted({record["machine"] for record in data["records"]}))
    head = f"{data['model']}, on {machines}"
    text = (
        "# Ways to share a budget between heads\n\n"
        f"Written by `python -m eval.budgets report`, from {path.name}. {head}.\n\n"
        "Each cell: mean excess NLL over the dense cache = fraction of TopK's [95 % interval over texts]. TopP stands "
        f"at TopK's bytes.\n{tables(study)}\n{at_bytes(study, 'patience')}\n{bits(data['records'])}\n"
    )
    write_text(path.with_suffix(".md"), text)
    if any(group[0] in ("main", "long") for group in study.cells):
        draw(study, path.with_suffix(".png"))
    if any(group[1] == "choose" and group[0] != "patience" for group in study.cells):
        draw_settings(study, path.with_name(f"{path.stem}_settings.png"))
    print(text)
