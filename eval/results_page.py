"""Write docs/results.md from the committed results: python -m eval.results_page.

Read every report of `python -m eval.run` in eval/results (`python -m eval.report OUT --to eval/results/NAME`) and the
study of budgets, budgets.json. The intervals decide what helps and what does not; no verdict is written by hand.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.budgets_report import Study
from eval.intervals import FEWEST
from eval.report import budget_table, calibrated, more_bytes, percent, too_hard
from hardkv.files import file_to_write, write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results"
PAGE = ROOT / "docs" / "results.md"
# Sections of the study of budgets that compare on texts never used to choose settings.
SECTIONS = ("main", "long")
# Accuracies this close to 0 or to 1 cannot differ.
EDGE = 0.05

# Note for a page with results of the committed reasoner.
REASONER = """\
- The reasoner with other lengths, windows and intervals. We did not run the empty cells of its tables; most lie below
  budgets at which a method already solves next to nothing. These commands make the calibrations and results of the
  committed model. Then `python -m eval.report eval-runs/reasoner --to eval/results/reasoner-40` writes the file that
  this page reads:

```bash
for scorer in attention snapkv rkv; do python -m eval.reasoner.calibrate --scorer $scorer --count 6; done
python -m eval.run --task reasoner --difficulty 40 --limit 200 --batch-size 200 --max-new-tokens 976 --interval 32 \\
    --method full,topk,adakv,adaptive,adaptive-calibrated,risk,topp,topp-calibrated --scorer attention,snapkv,rkv \\
    --budget 1/16,1/8,1/4,5/16,3/8,1/2 --mass 0.8,0.9,0.95 \\
    --calibration 'eval/reasoner/model/calibration-{scorer}.safetensors'
```

- The runs with bits have a calibration of 4 problems, which also holds the means that centre codes:

```bash
python -m eval.reasoner.calibrate --scorer rkv --out calibration-rkv.safetensors
python -m eval.run --task reasoner --difficulty 40 --limit 200 --batch-size 200 --max-new-tokens 976 --interval 32 \\
    --method full,topk,risk --scorer rkv --budget 248,372,495,1200 --bits 16,8,4,3,2,3:2,4:2 \\
    --calibration 'calibration-{scorer}.safetensors' --out eval-runs/reasoner-40-bits
python -m eval.run --task reasoner --difficulty 157 --limit 100 --batch-size 200 --max-new-tokens 3840 --interval 32 \\
    --method full,topk --scorer rkv --budget 4096 --bits 4,3,2,4:2,3:2,2:3 \\
    --calibration 'calibration-{scorer}.safetensors' --out eval-runs/reasoner-157-bits
```
"""

PAPER = """\
We have not run any checkpoint of several billion parameters. These commands make the table of the paper (HARD-KV,
[2606.28831](https://arxiv.org/abs/2606.28831)) for Qwen3-8B, with budgets of 1,024, 2,048 and 4,096 tokens. If a
command is interrupted, start it again and it continues:

```bash
pip install -e '.[eval]'
for task in aime24 aime25 math500 umath; do
    accelerate launch -m eval.run --model Qwen/Qwen3-8B --task $task --out eval-runs/qwen3-8b-$task \\
        --method full,topk,adakv,pyramid,adaptive,adaptive-calibrated,risk,topp,topp-calibrated \\
        --scorer attention,snapkv,rkv --budget 1024,2048,4096 --mass 0.9,0.95,0.99 \\
        --samples $([ ${task#aime} = $task ] && echo 1 || echo 8) --batch-size 8 --stop-when-separated
    python -m eval.report eval-runs/qwen3-8b-$task --to eval/results/qwen3-8b-$task
done
python -m eval.results_page
```
"""


def verdict(difference: Mapping[str, float]) -> str:
    """Return `helps`, `does not` or `open`, depending on whether the interval of a gain excludes 0."""
    if difference["low"] > 0:
        return "helps"
    return "does not" if difference["high"] < 0 else "open"


def common(verdicts: Iterable[str]) -> str:
    """Return the verdict that all budgets share; `open` if they differ."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "open"


def can_differ(row: Mapping[str, Any]) -> bool:
    """Return False if, at the compared bytes, a method and TopK both nearly always fail, or both nearly never."""
    ours = row["accuracy"]["mean"]
    both = (ours, ours - row["versus_topk"]["mean"])
    return max(both) >= EDGE and min(both) <= 1 - EDGE


def read_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the reports of the harness, by name."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: data for name, data in found.items() if data.get("kind") == "harness"}


def harness_findings(reports: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Return (verdict, sentence) for every method compared with TopK at equal bytes.

    The verdict covers all budgets at which the two can differ.
    """
    for name, report in reports.items():
        methods: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for row in report["configurations"]:
            difference = row.get("versus_topk")
            # a win with more bytes shows nothing
            if difference is not None and not (difference["low"] > 0 and more_bytes(difference)):
                methods[row["method"], row["scorer"]].append(row)
        for (method, scorer), rows in methods.items():
            cells = ", ".join(f"{percent(row['versus_topk'], '+')} at {row['budget']}" for row in rows)
            said = f"`{method}` ({scorer}) in [{name}](#{name}): {cells}, in points of accuracy above `topk`"
            # with few problems the bootstrap interval is too narrow
            enough = all(row["versus_topk"]["problems"] >= FEWEST for row in rows)
            yield common(verdict(row["versus_topk"]) for row in rows if can_differ(row)) if enough else "open", said


def study_findings(study: Study) -> Iterable[tuple[str, str]]:
    """Return (verdict, sentence) for every way to share a budget, over all budgets of one scorer and length."""
    for group, labels in study.cells.items():
        section, _, length, scorer = group
        if section not in SECTIONS:
            continue
        for name in labels:
            counts = sorted(n for n in labels["TopK"] if study.ratio(group, name, n) is not None)
            if name == "TopK" or not counts:
                continue
            found = {n: study.ratio(group, name, n) for n in counts}
            ratios = {n: ratio[1:] for n, ratio in found.items() if ratio is not None}
            # the loss above the dense cache's, so lower is better
            gains = [verdict({"low": 1 - high, "high": 1 - low}) for _, low, high in ratios.values()]
            cells = ", ".join(f"{ratio:.2f} [{low:.2f}, {high:.2f}] at {n}" for n, (ratio, low, high) in ratios.items())
            said = f"{name} ({scorer}, {length:,} tokens): {cells} of `TopK`'s loss"
            yield common(gains), said


def page(reports: Mapping[str, Mapping[str, Any]], study: Study, model: str) -> str:
    """Return the Markdown of the page; `model` is the model of the study."""
    findings = [*harness_findings(reports), *study_findings(study)]
    lines = [
        "# Results",
        "",
        "`python -m eval.results_page` writes this page from the JSON files in [eval/results](../eval/results).",
        "",
        "There are two kinds of measurement:",
        "",
        "- the accuracy of whole answers (`python -m eval.run`);",
        f"- the loss on given texts, teacher-forced, above the dense cache's (`python -m eval.budgets`, {model}).",
        "",
        "Both compare a method with `TopK`, an even split, at equal bytes. Intervals are 95 % intervals over problems "
        "or texts, paired.",
        "",
        "A method helps if its whole interval is better than no difference at every measured budget. It does not help "
        "if its whole interval is worse at every measured budget. All other methods are open. A budget does not count "
        "if `TopK` and the method both fail, or both succeed, in more than 95 of 100 problems. Accuracy on fewer than "
        f"{FEWEST} problems stays open. Nothing is corrected for the number of comparisons.",
        "",
    ]
    for title, kind in (("What helps", "helps"), ("What does not", "does not"), ("Open", "open")):
        found = [f"- {text}" for key, text in findings if key == kind]
        lines += [f"## {title}", "", *(found or ["Nothing so far."]), ""]
    lines += ["## Accuracy", ""]
    for name, report in reports.items():
        lines += _section(name, report)
    if not reports:
        lines += ["Not measured yet.", ""]
    lines += ["## Loss on given texts", "", "All tables: [eval/results/budgets.md](../eval/results/budgets.md).", ""]
    lines += ["Bits, transformers' QuantizedCache and kvpress are [by themselves](methods.md#bits).", ""]
    lines += ["![loss against budget](../eval/results/budgets.png)", "", "## Not tested", ""]
    hard = {name: told for name, report in reports.items() if (told := too_hard(report)) is not None}
    lines += [f"- [{name}](#{name}): {told}." for name, told in hard.items()]
    if any(report["settings"]["task"] == "reasoner" for report in reports.values()):
        lines += [REASONER]
    lines += ["", PAPER] if hard else [PAPER]
    return "\n".join(lines)


def _section(name: str, report: Mapping[str, Any]) -> list[str]:
    settings, rows = report["settings"], report["configurations"]
    extra = [f"{key} {settings[key]}" for key in ("length", "needles", "asked", "difficulty") if settings.get(key)]
    told = ", ".join([settings["task"], *extra, *filter(None, [calibrated(report)])])
    return [
        f"### {name}",
        "",
        f"{settings['model']}, {told}; {max(row['problems'] for row in rows)} problems; "
        f"{'; '.join(settings['machines'])}. All figures: "
        f"[{name}.md](../eval/results/{name}.md).",
        "",
        *budget_table(rows),
        "",
        f"![accuracy against bytes](../eval/results/{name}.png)",
        "",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.results_page", description=str(__doc__).splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="with the JSON files")
    parser.add_argument("--to", type=file_to_write, default=PAGE, metavar="FILE", help="of the page")
    args = parser.parse_args(argv)
    data = json.loads((args.results / "budgets.json").read_text())
    write_text(args.to, page(read_reports(args.results), Study(data["records"]), data["model"]))


if __name__ == "__main__":
    main()
