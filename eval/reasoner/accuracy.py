"""Measure the dense accuracy of a trained reasoner: `python -m eval.reasoner.accuracy` writes its `accuracy.json`."""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eval.machine import with_versions
from eval.reasoner.encoding import IGNORED, PROMPT_ROOM, encode
from eval.reasoner.problems import KINDS, LINE_TOKENS, Puzzle, draw
from hardkv.files import check_writable, write_text
from hardkv.loading import load

MODEL = Path(__file__).parent / "model"
BATCH = 16  # problems


@torch.no_grad()
def exact(model: Any, tokenizer: Any, puzzles: Sequence[Puzzle]) -> Tensor:
    """Return bool `[puzzles]`: whether every token of the solution, end of text included, is the most likely one.

    Greedy decoding then writes exactly this solution, but this check needs one forward instead of thousands.
    """
    length = PROMPT_ROOM + LINE_TOKENS * max(puzzle.lines for puzzle in puzzles)
    ids, labels = (tensor.to(model.device) for tensor in encode(tokenizer, puzzles, length))
    guess = model(ids[:, :-1], use_cache=False).logits.argmax(-1)
    return ((guess == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(1).cpu()


@torch.no_grad()
def generated(model: Any, tokenizer: Any, puzzles: Sequence[Puzzle]) -> Tensor:
    """Return bool `[puzzles]`: whether greedy `generate` writes the whole solution, token by token, and stops."""
    prompts = [f"{puzzle.statement}\n" for puzzle in puzzles]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    room = LINE_TOKENS * max(puzzle.lines for puzzle in puzzles) + 8
    out = model.generate(**inputs, max_new_tokens=room, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    stopped = (out == tokenizer.eos_token_id).any(1).cpu()
    right = [text == puzzle.solve()[0] for text, puzzle in zip(texts, puzzles, strict=True)]
    return torch.tensor(right) & stopped


def evaluate(model: Any, tokenizer: Any, difficulties: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Run `exact` on test problems; return total and correct counts by difficulty and kind."""
    rows = []
    for lines in tqdm(difficulties, unit="difficulty"):
        rng = random.Random(f"evaluate-{lines}")
        puzzles = [draw(rng, lines, "test") for _ in range(count)]
        right = torch.cat([exact(model, tokenizer, puzzles[at : at + BATCH]) for at in range(0, count, BATCH)])
        for kind in KINDS:
            mine = torch.tensor([puzzle.kind == kind for puzzle in puzzles])
            rows.append(
                {"difficulty": lines, "kind": kind, "count": int(mine.sum()), "correct": int(right[mine].sum())}
            )
    return rows


def measure(folder: Path, difficulties: Sequence[int], count: int) -> dict[str, Any]:
    """Return the content of `accuracy.json`: `exact` on `count` problems per difficulty, `generated` on short ones."""
    model, tokenizer = load(folder)
    rows = evaluate(model, tokenizer, difficulties, count)
    rng = random.Random("generated")
    puzzles = [draw(rng, min(difficulties), "test") for _ in range(BATCH)]
    return {
        "exact": rows,
        "generated": {
            "difficulty": min(difficulties),
            "count": len(puzzles),
            "correct": int(generated(model, tokenizer, puzzles).sum()),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        **with_versions(model.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR", help="default: the committed one")
    parser.add_argument(
        "--difficulty",
        type=int,
        nargs="+",
        default=[21, 40, 80, 120, 157],
        metavar="LINES",
        help="lines of the solutions (default: 21 40 80 120 157)",
    )
    parser.add_argument("--count", type=int, default=128, help="problems a difficulty (default: %(default)s)")
    args = parser.parse_args()
    out = args.model / "accuracy.json"
    check_writable(out)
    report = measure(args.model, args.difficulty, args.count)
    write_text(out, json.dumps(report, indent=1) + "\n")
    for row in report["exact"]:
        print("{difficulty:4} lines  {kind:6} {correct:5} of {count:5} solutions exact".format(**row))
    print("generated, {difficulty} lines: {correct} of {count} exact".format(**report["generated"]))


if __name__ == "__main__":
    main()
