"""Write the tables of README.md and docs/ from the evaluation's JSON files: python -m docs.tables [--check].

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`. The text between them is rewritten, so no
number is copied by hand. `--check` writes nothing and fails if a file would change.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docs import bits_tables
from docs.table_parts import markdown, read
from eval import bits_report
from eval.budgets_report import Study
from eval.methods import Configuration
from eval.speed import generate_report, kernels_report

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NEEDLE = "needle-smollm2-1024"
REASONERS = ("reasoner-40", "reasoner-40-earlier")  # the committed model, and an earlier one
# Models of eval.speed.generate.
SHAPES = {"qwen3-8b": "Qwen3-8B", "llama-3.1-8b": "Llama-3.1-8B", "qwen3-4b": "Qwen3-4B"}
# Groups of the study of budgets: section, texts, length, scorer.
SHORT, LONG = ("main", "report", 2048, "attention"), ("long", "report", 6144, "attention")
SNAPKV, RKV = ("main", "report", 2048, "snapkv"), ("main", "report", 2048, "rkv")


def budgets() -> str:
    """Show the loss above the dense cache's as a fraction of TopK's: a table for `attention`, one for other scorers."""
    study = Study(read("budgets")["records"])
    return f"{shares(study, (SHORT, LONG))}\n{shares(study, (SNAPKV, RKV))}"


def shares(study: Study, groups: Sequence[tuple]) -> str:
    """Show every way to share a budget, best first, by groups of the study and tokens kept."""
    columns = [(group, n) for group in groups for n in sorted(study.cells[group]["TopK"])]
    names = list(dict.fromkeys(name for group in groups for name in study.cells[group] if name != "TopK"))
    found = {(name, column): study.ratio(column[0], name, column[1]) for name in names for column in columns}
    best = {column: min(ratio[1] for name in names if (ratio := found[name, column])) for column in columns}

    def cell(name: str, column: Any) -> str:
        ratio = found[name, column]
        if ratio is None:
            return ""
        return f"**{ratio[1]:.2f}**" if ratio[1] == best[column] else f"{ratio[1]:.2f}"

    rows = [[name, *(cell(name, column) for column in columns)] for name in names]
    rows.sort(key=lambda row: ratio[1] if (ratio := found[row[0], columns[1]]) else 1.0)
    return markdown(["mean tokens kept", *(f"{n:,} of {group[2]:,}, {group[3]}" for group, n in columns)], rows)


def scorers() -> str:
    """Show every scorer: its description, and its loss with an even split and with Risk."""
    study = Study(read("budgets")["records"])
    about = {
        "Attention": (
            "attention that the newest `window` queries pay to it",
            f"as in H2O, {arxiv('2306.14048')}, which sums over all queries",
            "texts that are given, and where time counts",
        ),
        "SnapKV": (
            "the same, pooled over its neighbours",
            arxiv("2404.14469"),
            "a question about a long text: answers are runs of tokens",
        ),
        "RKV": (
            "pooled attention minus redundancy among the keys",
            arxiv("2505.24133"),
            "long reasoning: the default; its events take longer",
        ),
    }
    rows = []
    for (name, (what, paper, when)), group in zip(about.items(), (SHORT, SNAPKV, RKV), strict=True):
        losses = [study.excess(group, budget, 256) for budget in ("TopK", "Risk")]
        rows.append([f"`{name}`", what, paper, *(f"{loss.mean():.3f}" for loss in losses if loss is not None), when])
    return markdown(["scorer", "ranks tokens by", "paper", "loss, `TopK`", "loss, `Risk`", "when"], rows)


def methods() -> str:
    """Show every budget: its description, its needs, and its measurements."""
    study = Study(read("budgets")["records"])
    found = {(row["method"], row["budget"]): row["accuracy"]["mean"] for row in read(NEEDLE)["configurations"]}
    about = {
        "Risk(n)": (
            "the same number at every event, by measured risk curves: least loss of the whole model; n on average",
            f"ours; idea shared with LU-KV, {arxiv('2602.08585')}: [what differs](#risk-and-lu-kv)",
            "a calibration",
            "whenever you can calibrate",
        ),
        "TopK(n)": ("n tokens", "", "nothing", "without a calibration"),
        "AdaKV(n, alpha)": (
            "its part in the layer's best tokens; n on average",
            arxiv("2407.11550"),
            "nothing",
            "to compare",
        ),
        "Pyramid(n, beta)": (
            "more in lower layers, fewer in higher ones; n on average; wraps another budget",
            arxiv("2406.02069"),
            "nothing",
            "to compare",
        ),
        "TopP(p, floor, cap)": (
            "the fewest tokens that hold probability mass p: bytes follow the text",
            f"HARD-KV, {arxiv('2606.28831')}",
            "nothing; takes temperatures",
            "the same mass of attention in every head, whatever it costs in bytes",
        ),
        "Adaptive(n)": (
            "Top-p at the one p at which heads keep n on average: fixed bytes",
            "after HARD-KV",
            "nothing; takes temperatures",
            "to compare",
        ),
    }
    rows = []
    for call, (what, paper, needs, when) in about.items():
        name = call.partition("(")[0]
        ratio = study.ratio(SHORT, name, 256)
        accuracy = found.get((name.lower(), "256"))
        measured = ["" if ratio is None else f"{ratio[1]:.2f}", "" if accuracy is None else f"{100 * accuracy:.0f} %"]
        rows.append([f"`{call}`", what, paper, needs, *measured, when])
    return markdown(["budget", "each head keeps", "paper", "needs", "loss", "needles", "when"], rows)


def arxiv(number: str) -> str:
    """Return a link to a paper."""
    return f"[{number}](https://arxiv.org/abs/{number})"


def needle() -> str:
    """Show the accuracy of every method at every budget, as in the report."""
    cells: dict[str, dict[str, str]] = {}
    for row in read(NEEDLE)["configurations"]:
        mean, low, high = (100 * row["accuracy"][key] for key in ("mean", "low", "high"))
        cells.setdefault(row["method"], {})[row["budget"] or ""] = f"{mean:.0f} [{low:.0f}, {high:.0f}]"
    counts = [budget for budget in dict.fromkeys(key for row in cells.values() for key in row) if budget.isdigit()]
    full = cells.pop("full")[""]
    rows = [["all tokens", *[full] * len(counts)]]
    rows += [[f"`{name}`", *(row[n] for n in counts)] for name, row in cells.items() if counts[0] in row]
    return markdown(["tokens kept, `snapkv`", *counts], rows)


def steps() -> str:
    """Time of a decode step at 2,048 tokens per head, and what a long context leaves room for."""
    long = {
        generate_report.NAMES[r["method"]]: f"{r['batch']} sequences, {r['tokens_per_s']:,.0f} tokens/s"
        for r in decode_records(generate_report.MODEL, generate_report.LONG)
        if r.get("largest")
    }
    batches, times = step_times(generate_report.MODEL)
    rows = [[name, *cells, long.get(name, "")] for name, cells in times.items()]
    gpu = read("generate")["machine"]["gpu"].removeprefix("NVIDIA ")
    shape = SHAPES[generate_report.MODEL]
    held = "HardKVCache and kvpress keep 2,048 tokens per head, events included"
    about = f"On one {gpu}: {shape}'s shape, random weights, bfloat16; {held}."
    columns = [f"2,048 tokens, batch {batch}" for batch in batches]
    return f"{about}\n\n" + markdown(["", *columns, f"{generate_report.LONG:,} tokens, as many as fit"], rows)


def shapes() -> str:
    """Show the time of a decode step for the shapes of the other models."""
    found = {name: step_times(model) for model, name in SHAPES.items() if model != generate_report.MODEL}
    (batches,) = {tuple(batches) for batches, _ in found.values()}
    rows = [[shape, name, *cells] for shape, (_, times) in found.items() for name, cells in times.items()]
    return markdown(["shape", "", *(f"2,048 tokens, batch {batch}" for batch in batches)], rows)


def step_times(model: str) -> tuple[list[int], dict[str, list[str]]]:
    """Return the batches and, by name, the step times at each: for every method, and for copying as many bytes."""
    records = decode_records(model, 2048)
    batches = sorted({r["batch"] for r in records})

    def cells(method: str, text: Callable[[dict[str, Any]], str]) -> list[str]:
        found = [generate_report.find(records, method=method, batch=batch) for batch in batches]
        return ["" if r is None else text(r) for r in found]

    times = {
        name: cells(method, lambda r: f"{r['step_ms']:.1f} ms, {r['tokens_per_s']:,.0f} tokens/s")
        for method, name in generate_report.NAMES.items()
        if any(r["method"] == method for r in records)
    }
    limits = cells("topk-compile", lambda r: f"{r['limit_ms']:.1f} ms")
    return batches, times | {"copying as many bytes as a step reads": limits}


def decode_records(model: str, context: int) -> list[dict[str, Any]]:
    """Return the measurements of a model's decoding that did not fail."""
    wanted = {"measure": "decode", "model": model, "context": context}
    return [r for r in read("generate")["records"] if "error" not in r and wanted.items() <= r.items()]


def study(part: Callable[[Any], list[str]]) -> Callable[[], str]:
    """Return a function that shows a part of the study of budgets."""
    return lambda: "\n".join([*part(read("budgets")["records"]), ""])


def presses() -> str:
    """Show kvpress beside HardKVCache, once it is measured."""
    found = read("presses") if (ROOT / "eval" / "results" / "presses.json").exists() else None
    return "\n".join([*bits_report.presses(found), ""])


def first() -> str:
    """Show the time to the first token."""
    records = [r for r in read("generate")["records"] if r["measure"] == "first token" and "error" not in r]
    names = {r["method"]: "DynamicCache" if r["method"] == "dynamic" else "HardKVCache" for r in records}
    cells = [[SHAPES[r["model"]], f"{r['context']:,}", names[r["method"]], r["scorer"]] for r in records]
    rows = [[*row, f"{r['seconds']:.2f} s"] for row, r in zip(cells, records, strict=True)]
    return markdown(["shape", "prompt, tokens", "cache", "scorer", "first token"], rows)


def prompts() -> str:
    """Show the time to the first token with every scorer, as a multiple of DynamicCache's."""
    found: dict[tuple[bool, str, int], dict[str, dict[str, Any]]] = {}
    for record in read("prompts")["records"]:
        place = "cpu" in record["machine"], record["model"], record["context"]
        found.setdefault(place, {})[record["scorer"]] = record
    scorers = list(dict.fromkeys(record["scorer"] for record in read("prompts")["records"] if record["scorer"]))
    rows = []
    for (on_cpu, model, context), records in sorted(found.items()):
        where = f"{SHAPES.get(model, model)}, {'CPU' if on_cpu else 'H200'}"
        row = [where, f"{context:,}", f"{records['']['seconds']:.2f} s"]
        rows.append([*row, *(f"{records[scorer]['ratio']:.2f}" for scorer in scorers)])
    return markdown(["model", "prompt, tokens", "DynamicCache", *(f"`{scorer}`" for scorer in scorers)], rows)


def profile() -> str:
    """Show how the device spends its time."""
    head, *rows = generate_report.profiles(read("generate")["records"])
    return markdown(head, rows)


def targets() -> str:
    """Show the targets of both reports."""
    rows = [
        [what, wanted, f"{found:.2f}", "met" if met else "missed"]
        for what, wanted, found, met in generate_report.targets(read("generate")["records"])
    ]
    for target in kernels_report.targets(read("kernels")["records"]):
        sign = "<=" if target.at_most else ">="
        found = "" if target.found is None else f"{target.found:.2f}"
        verdict = "not measured" if target.found is None else "met" if target.met else "missed"
        rows.append([target.what, f"{sign} {target.wanted:.2f}", found, verdict])
    return markdown(["target", "wanted", "found", ""], rows)


def kernels() -> str:
    """Compare the attention of a decode step with the best package."""
    rows = []
    for shape, backends in kernels_report.by_shape(read("kernels")["records"], "attention").items():
        ours, others = backends["triton"], kernels_report.peers(backends, "graph_us")
        if "graph_us" not in ours or not others:
            continue
        best = min(others, key=others.__getitem__)
        ratio = others[best] / ours["graph_us"]
        rows.append([shape, f"{ours['bytes'] / 1e6:,.0f} MB", f"{ours['fraction']:.2f}", f"{ratio:.2f} ({best})"])
    return markdown(["rows x mean length, lengths", "keys and values", "of copy bandwidth", "times as fast as"], rows)


def reasoner() -> str:
    """Show the reasoner's exact solutions with the dense cache, over all kinds of problem."""
    found = json.loads((ROOT / "eval" / "reasoner" / "model" / "accuracy.json").read_text())["exact"]
    lines = sorted({row["difficulty"] for row in found})
    of = {n: [row for row in found if row["difficulty"] == n] for n in lines}
    exact = [f"{sum(r['correct'] for r in of[n])} of {sum(r['count'] for r in of[n])}" for n in lines]
    return markdown(["lines", *map(str, lines)], [["exact", *exact]])


def solved() -> str:
    """Show the reasoner's problems solved with compressed caches, for scorers run with several methods and two
    trainings of the model."""
    now, before = ({row["label"]: row for row in read(name)["configurations"]} for name in REASONERS)
    full = now["full"]["bytes_mean"]
    budgets = ("1/4", "5/16", "3/8", "1/2")
    columns = [f"{budget}, {now[label(budget)]['bytes_mean'] / full:.2f}" for budget in budgets]
    rows = []
    for scorer in ("rkv", "snapkv"):
        for method in ("topk", "risk", "adaptive", "adaptive-calibrated", "adakv"):
            labels = [label(budget, method, scorer) for budget in budgets]
            cells = [f"{_solved(now[each])}, {_solved(before[each])} %" if each in now else "" for each in labels]
            rows.append([f"`{scorer}`, `{method}`", *cells])
    return markdown(["budget, bytes of the full cache's", *columns], rows)


def _solved(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']['mean']:.0f}"


def label(budget: str, method: str = "topk", scorer: str = "rkv") -> str:
    """Return the label of a configuration in a report of the harness."""
    return Configuration(method, scorer, budget).label


def results() -> str:
    """Show README's results: the cost of a dense cache, an even split and Risk."""
    needles = read(NEEDLE)["configurations"]
    rows = []
    for n in ("128", "256"):
        by_method = {row["method"]: row for row in needles if row["method"] == "full" or row["budget"] == n}
        accuracy = [f"{100 * by_method[name]['accuracy']['mean']:.0f} %" for name in ("full", "topk", "risk")]
        rows.append([f"needles found in 1,024 tokens, {n} kept per head", *accuracy])
    study = Study(read("budgets")["records"])
    for group, n in ((SHORT, 256), (LONG, 512)):
        even, risk = study.excess(group, "TopK", n), study.excess(group, "Risk", n)
        assert even is not None
        assert risk is not None
        what = f"loss above dense, {n:,} of {group[2]:,} tokens kept, nats per token"
        rows.append([what, "0", f"{even.mean():.3f}", f"{risk.mean():.3f}"])
    accuracy_table = markdown(["SmolLM2-135M", "dense", "even split", "hardkv, calibrated"], rows)
    return f"{accuracy_table}\n{steps()}"


TABLES: dict[str, Callable[[], str]] = {
    "bits": bits_tables.step,
    "bits-attention": bits_tables.attention,
    "bits-solved": bits_tables.solved,
    "bits-all-tokens": study(bits_report.all_tokens),
    "bits-equal-bytes": study(bits_report.equal_bytes),
    "bits-fewer-tokens": study(bits_report.fewer_tokens),
    "budgets": budgets,
    "first": first,
    "kernels": kernels,
    "lukv": study(bits_report.lukv),
    "methods": methods,
    "needle": needle,
    "presses": presses,
    "profile": profile,
    "prompts": prompts,
    "reasoner": reasoner,
    "results": results,
    "scorers": scorers,
    "shapes": shapes,
    "solved": solved,
    "steps": steps,
    "targets": targets,
}


def written(text: str) -> str:
    """Return a page with its tables rewritten from the JSON files."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[4]}", text)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.tables", description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file would change")
    check = parser.parse_args(argv).check
    stale = False
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = written(old)
        if new == old:
            continue
        stale = True
        name = path.relative_to(ROOT).as_posix()
        if check:
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, name))
        else:
            path.write_text(new)
            print(f"written: {name}")
    if check and stale:
        sys.exit("tables differ from the JSON files in eval/results: run python -m docs.tables")


if __name__ == "__main__":
    main()
