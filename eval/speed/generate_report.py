"""Write tables and picture from `python -m eval.speed.generate`, and check the targets.

python -m eval.speed.generate_report eval/results/generate.json
"""

import argparse
import json
import math
from itertools import cycle
from pathlib import Path
from typing import Any

from eval.markdown import line, table
from hardkv.extras import require
from hardkv.files import write_text
from hardkv.viz.figures import COLOURS, MARKERS, save_figure

Record = dict[str, Any]

MODEL = "qwen3-8b"  # the model of the targets and the picture
# Graphed decoding with `torch.compile` and 2,048 tokens kept: at most this multiple of the limit, by batch.
LIMITS = {32: 1.30, 1: 1.60}
# Tokens per second at batch 32: at least this multiple; in the shortest of these contexts nothing is evicted.
SPEEDUPS = {"dynamic": 10.0, "static-compile": 4.0}
CONTEXTS = 2048, 8192
# At a context of 32,768, each method at the largest batch for its memory: multiple of the best dense method.
LONG, LONG_SPEEDUP = 32768, 8.0
FIRST_TOKEN, EVENTS, PLANNED = 1.05, 0.05, 1.03
NAMES = {
    "dynamic": "DynamicCache",
    "static-compile": "StaticCache, compiled",
    "topk-eager": "HardKVCache",
    "topk": "HardKVCache, graphed",
    "topk-compile": "HardKVCache, graphed and compiled",
    "topk-8bit": "HardKVCache of 8 bits, graphed",
    "topk-4bit": "HardKVCache of 4 bits, graphed",
    "topk-8bit-compile": "HardKVCache of 8 bits, graphed and compiled",
    "topk-4bit-compile": "HardKVCache of 4 bits, graphed and compiled",
    "risk": "HardKVCache with Risk, graphed",
    "risk-compile": "HardKVCache with Risk, graphed and compiled",
    "kvpress": "kvpress",
}


def find(records: list[Record], **what: Any) -> Record | None:
    """Return the first record that has these values and no error."""
    return next((r for r in records if "error" not in r and all(r.get(k) == v for k, v in what.items())), None)


def event_share(record: Record) -> float:
    """Return the share of time that events add to the decode steps."""
    return max(record["step_ms"] / record["median_ms"] - 1, 0.0)


def targets(records: list[Record]) -> list[tuple[str, str, float, bool]]:
    """Return the targets and their results: (what, wanted, found, met)."""
    rows: list[tuple[str, str, float, bool]] = []

    def at_most(what: str, wanted: float, found: float) -> None:
        rows.append((what, f"<= {wanted:.2f}", found, found <= wanted))

    def at_least(what: str, wanted: float, found: float) -> None:
        rows.append((what, f">= {wanted:.2f}", found, found >= wanted))

    records = [r for r in records if r.get("model") == MODEL]
    decode = {"measure": "decode"}
    for batch, wanted in LIMITS.items():
        ours = find(records, **decode, method="topk-compile", batch=batch, context=2048)
        if ours:
            at_most(
                f"step over the least that memory allows, batch {batch}", wanted, ours["step_ms"] / ours["limit_ms"]
            )
            if batch == 32:
                at_most("events in the decode time, snapkv, batch 32", EVENTS, event_share(ours))
                if "plan_bytes" in ours:
                    at_most("bytes of the cache over plan(), batch 32", PLANNED, ours["kv_bytes"] / ours["plan_bytes"])
    for context in CONTEXTS:
        ours = find(records, **decode, method="topk-compile", batch=32, context=context)
        for peer, times in SPEEDUPS.items():
            other = find(records, **decode, method=peer, batch=32, context=context)
            if ours and other:
                ratio = ours["tokens_per_s"] / other["tokens_per_s"]
                at_least(f"tokens/s over {NAMES[peer]}, batch 32, context {context:,}", times, ratio)
    long = [r for r in records if r.get("context") == LONG and r.get("largest") and "error" not in r]
    dense = [r["tokens_per_s"] for r in long if r["method"] in SPEEDUPS]
    ours_long = [r["tokens_per_s"] for r in long if r["method"] not in SPEEDUPS]
    if dense and ours_long:
        at_least(f"tokens/s over the best dense, context {LONG:,}", LONG_SPEEDUP, max(ours_long) / max(dense))
    for scorer in ("snapkv", "attention"):
        ours = find(records, measure="first token", scorer=scorer, context=8192)
        dense_first = find(records, measure="first token", method="dynamic", context=8192)
        if ours and dense_first:
            at_most(f"first token over dense, {scorer}, 8,192", FIRST_TOKEN, ours["seconds"] / dense_first["seconds"])
    return rows


def profiles(records: list[Record]) -> list[list[str]]:
    """Return a table of where the time goes: headings and one line per profile; empty without profiles."""
    found = [r for r in records if r["measure"] == "profile" and "error" not in r]
    if not found:
        return []
    kinds = list(found[0]["kinds"])
    lines = [["", "context", "batch", "method", *kinds, "no kernel runs", "all, ms", "kernels"]]
    for r in found:
        method = f"HardKVCache, {r['scorer']}" if r.get("scorer") else NAMES[r["method"]]
        times = [f"{each:.2f}" for each in (*(r["kinds"][kind] for kind in kinds), r["idle"], r["total"])]
        lines.append([r["of"], f"{r['context']:,}", str(r["batch"]), method, *times, f"{r['kernels']:,}"])
    return lines


def markdown(found: dict[str, Any]) -> str:
    """Return the results page."""
    records, machine = found["records"], found["machine"]
    where = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "gpu")
    lines = [
        "# Decoding end to end",
        "",
        f"By `python -m eval.speed.generate` on one {machine['gpu']} ({where}); copies within the device move "
        f"{found['copy_bytes_per_s'] / 1e12:.2f} TB/s. Models have random weights; contexts are filled in with random "
        'keys and values, and only decoding is timed. Each line is the run of median time of those under "runs", in '
        "their order: transformers launches every operation by itself, and in the first generation of a process, which "
        "lines without runs are, that took the host up to three times as long. Median: of the run's steps, so without "
        "events. Limit: the time in which a copy moves what a step reads, by the copies of the line's own session. "
        "What is not listed was not measured.",
        *_about_kvpress(records),
        "",
    ]
    rows = [[what, wanted, f"{value:.2f}", "met" if met else "missed"] for what, wanted, value, met in targets(records)]
    lines += [*table("| target | wanted | found | |", rows), ""]
    columns = ("model", "context", "batch", "method", "step, ms", "median, ms", "limit, ms", "over limit", "tokens/s")
    columns += ("cache, GB", "peak, GB", "captures", "runs, ms")
    decoded, rows = [r for r in records if r["measure"] == "decode"], []
    for r in sorted(decoded, key=_order):
        case = [r["model"], f"{r['context']:,}", str(r.get("batch") or "largest"), NAMES[r["method"]]]
        if "error" in r:
            rows.append([*case, r["error"], *[""] * 8])
            continue
        times = [r["step_ms"], r["median_ms"], r["limit_ms"], r["step_ms"] / r["limit_ms"]]
        cells = [*(f"{value:.2f}" for value in times), f"{r['tokens_per_s']:,.0f}"]
        cells += [f"{r['kv_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.1f}", str(r.get("captures", ""))]
        cells.append(", ".join(f"{value:.1f}" for value in r.get("all_step_ms", ())))
        rows.append([*case, *cells])
    lines += [*table(line(columns), rows), ""]
    rows = []
    for r in (r for r in records if r["measure"] == "first token" and "error" not in r):
        name = "DynamicCache" if r["method"] == "dynamic" else "HardKVCache"
        peak = r["peak_bytes"] / 1e9
        rows.append([r["model"], f"{r['context']:,}", name, r["scorer"], f"{r['seconds']:.3f}", f"{peak:.1f}"])
    lines += table("| model | prompt | method | scorer | first token, s | peak, GB |", rows)
    if columns_and_rows := profiles(records):
        headings, *rows = columns_and_rows
        lines += [
            "",
            "Where the time of a step, without an event, and of a prompt, with its events, goes on the device, in "
            "milliseconds, in a few steps of their own. Where kernels are launched one by one, the device waits for "
            "the host most of the time, and how long differs from run to run: compare the kernels there, and the times "
            'above. "Selection" are hardkv\'s own kernels of an event; what else belongs to one is among "other".',
            "",
            *table(line(headings), rows),
        ]
    return "\n".join(lines) + "\n"


def _about_kvpress(records: list[Record]) -> list[str]:
    """Describe the runs of kvpress."""
    ours = find(records, method="kvpress", measure="decode")
    if ours is None:
        return ["", "kvpress is a method of the program too (`--kvpress-site`), and has not been measured yet."]
    versions = ours["versions"]
    return [
        "",
        f"[kvpress](https://github.com/NVIDIA/kvpress) {versions['kvpress']} (Apache-2.0) was run with transformers "
        f"{versions['transformers']} in a process of its own: its `DecodingPress` brings a DynamicCache back to as "
        "many tokens, the same in every head, by its `SnapKVPress`, at the same interval and window. It decodes by the "
        "loop of its own pipeline, without `generate()`.",
    ]


def _order(record: Record) -> tuple[Any, ...]:
    """Return the sort key of a table line, with the targets' model first."""
    model = record["model"]
    return model != MODEL, model, record["context"], -(record.get("batch") or 0), list(NAMES).index(record["method"])


def _place(record: Record) -> tuple[int, int]:
    """Return context and batch; 0 means the largest batch."""
    return record["context"], 0 if record.get("largest") else record["batch"]


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw for the targets' model: tokens per second by method and case, and bytes per sequence's cache by context."""
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    cases = [r for r in found["records"] if r["measure"] == "decode" and r["model"] == MODEL and "error" not in r]
    names = sorted(dict.fromkeys(map(_place, cases)), key=lambda place: (place[0], place[1] or math.inf))
    methods = [name for name in NAMES if any(r["method"] == name for r in cases)]
    figure, (axes, memory) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained", width_ratios=(2, 1))
    width = 0.8 / len(methods)
    for i, (method, colour, marker) in enumerate(zip(methods, cycle(COLOURS), cycle(MARKERS), strict=False)):
        rows = [r for r in cases if r["method"] == method]
        at = [names.index(_place(r)) + i * width for r in rows]
        bars = axes.bar(at, [r["tokens_per_s"] for r in rows], width, label=NAMES[method], color=colour)
        axes.bar_label(bars, [f"{r['tokens_per_s']:,.0f}" for r in rows], fontsize=7, rotation=90, padding=2)
        points = sorted({r["context"]: r["kv_bytes"] / r["batch"] / 1e9 for r in rows}.items())
        memory.plot(*zip(*points, strict=True), linestyle="-", marker=marker, color=colour, markersize=5)
    labels = [f"{context:,} tokens\n{f'batch {batch}' if batch else 'largest batch'}" for context, batch in names]
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], labels)
    axes.set_xlim(-width, len(names) - 1 + len(methods) * width)
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.set_ylabel("tokens/s")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    memory.set_xscale("log", base=2)
    memory.set_ylim(bottom=0)
    contexts = sorted({r["context"] for r in cases})
    memory.set_xticks(contexts, [f"{context:,}" for context in contexts])
    memory.set_xlabel("context, tokens")
    memory.set_ylabel("cache of a sequence, GB")
    for each in (axes, memory):
        each.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.generate_report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    found = json.loads(results.read_text())
    write_text(results.with_suffix(".md"), markdown(found))
    plot(found, results.with_suffix(".png"))
    print(f"wrote {results.with_suffix('.md')} and {results.with_suffix('.png')}")


if __name__ == "__main__":
    main()
