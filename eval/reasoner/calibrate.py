"""Calibrate the reasoner on solved training problems: `python -m eval.reasoner.calibrate`, minutes on a CPU."""

import argparse
import random
from pathlib import Path

import torch

from eval.reasoner.problems import draw
from hardkv import Calibration, calibrate
from hardkv.files import check_writable
from hardkv.loading import load
from hardkv.selectors import SCORERS

MODEL = Path(__file__).parent / "model"


def calibrate_reasoner(folder: Path, scorer: str, interval: int, lines: int, count: int, seed: int = 0) -> Calibration:
    """Calibrate on `count` solved training problems of `lines` lines each; see `hardkv.calibrate`."""
    model, tokenizer = load(folder)
    model.float()
    rng = random.Random(f"calibrate-{seed}")
    puzzles = [draw(rng, lines, "train") for _ in range(count)]
    ids = [
        torch.tensor(tokenizer(f"{puzzle.statement}\n{puzzle.solve()[0]}{tokenizer.eos_token}").input_ids)
        for puzzle in puzzles
    ]
    calibration = calibrate(model, ids, scorer=scorer, interval=interval)
    calibration.provenance["name"] = "eval/reasoner/model"  # do not store a path of this machine
    return calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR", help="default: the committed one")
    parser.add_argument("--scorer", choices=sorted(SCORERS), default="rkv", help="default: %(default)s")
    parser.add_argument("--interval", type=int, default=32, help="tokens between two selections (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=60, help="of each problem (default: %(default)s)")
    parser.add_argument("--count", type=int, default=4, help="problems (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: calibration-SCORER.safetensors in the model")
    args = parser.parse_args()
    out = args.out or args.model / f"calibration-{args.scorer}.safetensors"
    check_writable(out)
    calibration = calibrate_reasoner(args.model, args.scorer, args.interval, args.lines, args.count)
    calibration.save(out)
    print(calibration.summary())


if __name__ == "__main__":
    main()
