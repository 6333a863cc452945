"""Tables and picture of what `python -m eval.speed.generate` measured, and how far the targets are met.

python -m eval.speed.generate_report eval/results/generate.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hardkv.extras import require

Record = dict[str, Any]

# Of graphed decoding with `torch.compile`: at most so many times the limit, by batch, with 2,048 tokens kept.
LIMITS = {32: 1.30, 1: 1.60}
# At least so many times as many tokens a second, batch 32.
SPEEDUPS = {"dynamic": 10.0, "static-compile": 4.0}
# At a context of 32,768, each at the largest batch for its memory: times the best dense method.
LONG, LONG_SPEEDUP = 32768, 8.0
FIRST_TOKEN, EVENTS = 1.05, 0.05
NAMES = {
    "dynamic": "DynamicCache",
    "static-compile": "StaticCache, compiled",
    "topk-eager": "HardKVCache",
    "topk": "HardKVCache, graphed",
    "topk-compile": "HardKVCache, graphed and compiled",
    "risk": "HardKVCache with Risk, graphed",
    "risk-compile": "HardKVCache with Risk, graphed and compiled",
}


def find(records: list[Record], **what: Any) -> Record | None:
    """The first record that has these values and no error."""
    return next((r for r in records if "error" not in r and all(r.get(k) == v for k, v in what.items())), None)


def event_share(record: Record) -> float:
    """What events add to the decode steps."""
    return max(record["step_ms"] / record["median_ms"] - 1, 0.0)


def targets(records: list[Record]) -> list[tuple[str, str, float, bool]]:
    """What was wanted, and what was found of it: (what, wanted, found, met)."""
    rows: list[tuple[str, str, float, bool]] = []

    def at_most(what: str, wanted: float, found: float) -> None:
        rows.append((what, f"<= {wanted:.2f}", found, found <= wanted))

    def at_least(what: str, wanted: float, found: float) -> None:
        rows.append((what, f">= {wanted:.2f}", found, found >= wanted))

    decode = {"measure": "decode", "model": "qwen3-8b"}
    for batch, wanted in LIMITS.items():
        ours = find(records, **decode, method="topk-compile", batch=batch, context=2048)
        if ours:
            at_most(
                f"step over the least that memory allows, batch {batch}", wanted, ours["step_ms"] / ours["limit_ms"]
            )
            if batch == 32:
                at_most("events in the decode time, snapkv, batch 32", EVENTS, event_share(ours))
                for peer, times in SPEEDUPS.items():
                    other = find(records, **decode, method=peer, batch=batch, context=2048)
                    if other:
                        ratio = ours["tokens_per_s"] / other["tokens_per_s"]
                        at_least(f"tokens/s over {NAMES[peer]}, batch 32, context 2,048", times, ratio)
    long = [r for r in records if r.get("context") == LONG and r["measure"] == "decode" and "error" not in r]
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


def markdown(found: dict[str, Any]) -> str:
    """The results page."""
    records, machine = found["records"], found["machine"]
    where = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "gpu")
    lines = [
        "# Decoding end to end",
        "",
        f"By `python -m eval.speed.generate` on one {machine['gpu']} ({where}); copies within the device move "
        f"{found['copy_bytes_per_s'] / 1e12:.2f} TB/s. Models have random weights; contexts are filled in with random "
        "keys and values, and only decoding is timed. Limit: the time in which a copy moves what a step reads. What is "
        "not listed was not measured.",
        "",
        "| target | wanted | found | |",
        "| --- | --- | --- | --- |",
    ]
    for what, wanted, value, met in targets(records):
        lines.append(f"| {what} | {wanted} | {value:.2f} | {'met' if met else 'missed'} |")
    columns = ("context", "batch", "method", "step, ms", "median, ms", "limit, ms", "over limit", "tokens/s")
    columns += ("cache, GB", "peak, GB", "captures")
    lines += ["", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for r in (r for r in records if r["measure"] == "decode"):
        head = f"| {r['context']:,} | {r.get('batch') or 'largest'} | {NAMES[r['method']]} |"
        if "error" in r:
            lines.append(f"{head} {r['error']} | | | | | | | |")
            continue
        times = [r["step_ms"], r["median_ms"], r["limit_ms"], r["step_ms"] / r["limit_ms"]]
        cells = [*(f"{value:.2f}" for value in times), f"{r['tokens_per_s']:,.0f}"]
        cells += [f"{r['kv_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.1f}", str(r.get("captures", ""))]
        lines.append(f"{head} {' | '.join(cells)} |")
    lines += ["", "| prompt | method | scorer | first token, s | peak, GB |", "| --- | --- | --- | --- | --- |"]
    for r in (r for r in records if r["measure"] == "first token" and "error" not in r):
        name = "DynamicCache" if r["method"] == "dynamic" else "HardKVCache"
        peak = r["peak_bytes"] / 1e9
        lines.append(f"| {r['context']:,} | {name} | {r['scorer']} | {r['seconds']:.3f} | {peak:.1f} |")
    for r in (r for r in records if r["measure"] == "trace" and "error" not in r):
        total = sum(kernel["ms"] for kernel in r["kernels"])
        lines += [
            "",
            f"Where a step goes: {NAMES[r['method']]}, batch {r['batch']}: {r['replay_ms']:.2f} ms, of which no kernel "
            f"runs for {r['replay_ms'] - total:.2f}.",
            "",
            "| kernel | calls | ms |",
            "| --- | --- | --- |",
            *(f"| `{k['name'][:80]}` | {k['calls']} | {k['ms']:.3f} |" for k in r["kernels"][:12]),
        ]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens a second, by method and case."""
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    cases = [r for r in found["records"] if r["measure"] == "decode" and "error" not in r]
    names = list(dict.fromkeys((r["context"], r["batch"] if r["context"] < LONG else 0) for r in cases))
    methods = list(dict.fromkeys(r["method"] for r in cases))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        rows = [r for r in cases if r["method"] == method]
        at = [names.index((r["context"], r["batch"] if r["context"] < LONG else 0)) + i * width for r in rows]
        bars = axes.bar(at, [r["tokens_per_s"] for r in rows], width, label=NAMES[method], color=f"C{i}")
        axes.bar_label(bars, [f"{r['tokens_per_s']:,.0f}" for r in rows], fontsize=7, rotation=90, padding=2)
    labels = [f"{context:,} tokens\n{f'batch {batch}' if batch else 'largest batch'}" for context, batch in names]
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], labels)
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.generate_report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    found = json.loads(results.read_text())
    results.with_suffix(".md").write_text(markdown(found))
    plot(found, results.with_suffix(".png"))
    print(f"wrote {results.with_suffix('.md')} and {results.with_suffix('.png')}")


if __name__ == "__main__":
    main()
