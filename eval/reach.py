"""Measure how much `rkv` loses by searching near-duplicates only among a row's newest `REACH` tokens.

    python -m eval.reach    # SmolLM2 on texts of 6,144 tokens; a quarter of an hour on two CPU cores

A prompt runs through the model once. Its event then runs once per reach, and the text continues for a few hundred
tokens, whose loss counts. The program also counts the keys whose last near-duplicate is within the reach, and
the kept tokens that an unlimited search keeps too.
"""

import argparse
import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from hardkv import HardKVCache
from hardkv.cache.argument import argument_of
from hardkv.files import file_to_write, write_text
from hardkv.kernels import similarity
from hardkv.loading import load
from hardkv.selectors import RKV, Observation
from hardkv.selectors.scorers import rkv

OUT = "eval/results/reach.json"
TEXTS = Path(__file__).parent / "texts" / "report"
REACHES = (512, 1024, 1536, 4096)
EVERYTHING = 1 << 30


@dataclass(frozen=True)
class Reaching(RKV):
    """RKV that searches near-duplicates among the newest `reach` tokens of a row."""

    reach: int = similarity.REACH

    def score(self, observation: Observation) -> Tensor:
        """Return log-scores `[N]`."""
        with mock.patch.object(rkv, "mean_cosine", partial(similarity.mean_cosine, reach=self.reach)):
            return super().score(observation)


def within(observation: Observation, threshold: float) -> Tensor:
    """Return each key's distance from the row's end to its last near-duplicate, in tokens, 0 without one. `[N]`."""
    (length,) = set(observation.lengths.tolist())
    distance = []
    for keys in observation.keys.split(length):
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        for first in range(0, length, 512):
            cosine = unit[first : first + 512] @ unit.T
            cosine.diagonal(first).zero_()
            back = torch.arange(length, 0, -1, device=keys.device) * (cosine > threshold)
            distance.append(back.masked_fill(back == 0, length + 1).amin(1) % (length + 1))
    return torch.cat(distance)


@torch.inference_mode()
def measure(model: Any, ids: Tensor, prompt: int, budget: int) -> list[dict[str, Any]]:
    """Return one record per reach for one text; ids int64 `[1, n]`."""
    name = argument_of(model)

    def loss(cache: Any) -> float:
        logits = model(input_ids=ids[:, prompt:-1], **{name: cache}).logits
        return float(torch.nn.functional.cross_entropy(logits[0].float(), ids[0, prompt + 1 :]))

    dense = DynamicCache(config=model.config)
    model(input_ids=ids[:, :prompt], **{name: dense}, logits_to_keep=1)
    dense_loss = loss(dense)
    del dense
    scorer = Reaching()
    full = HardKVCache(config=model.config, scorer=scorer, budget=budget, interval=ids.shape[1])
    full.activate_past_recording()  # hold the prompt's event back
    model(input_ids=ids[:, :prompt], **{name: full}, logits_to_keep=1)
    far = [within(full.observe(idx), scorer.threshold) for idx in range(len(full.layers))]
    exact, records = None, []
    for reach in (EVERYTHING, *REACHES):
        cache = copy.deepcopy(full)
        cache.settings.scorer = Reaching(reach=reach)  # the layers share the settings of the cache
        cache.crop(0)  # run the event
        kept = [[set(head.tolist()) for head in cache.kept(idx)[0]] for idx in range(len(cache.layers))]
        exact = exact or kept
        pairs = [
            (ours, theirs)
            for mine, yours in zip(kept, exact, strict=True)
            for ours, theirs in zip(mine, yours, strict=True)
        ]
        records.append(
            {
                "reach": None if reach == EVERYTHING else reach,
                "excess": loss(cache) - dense_loss,
                "same": sum(len(ours & theirs) for ours, theirs in pairs) / sum(len(ours) for ours, _ in pairs),
                "within": sum(int((each <= reach).sum()) for each in far) / sum(each.numel() for each in far),
                "prompt": prompt,
                "tokens": ids.shape[1] - 1 - prompt,
                "budget": budget,
                "dense_nll": dense_loss,
            }
        )
    return records


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.reach", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default=file_to_write(OUT))
    parser.add_argument("--prompt", type=int, default=6144, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=512, help="that follow the prompt")
    parser.add_argument("--budgets", nargs="+", type=int, default=[512])
    parser.add_argument("--texts", type=int, default=4, help="how many of eval/texts/report, by name")
    args = parser.parse_args(argv)
    model, tokenizer = load(None)
    found = []
    for path in sorted(TEXTS.glob("*.txt"))[: args.texts]:
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        ids = ids[:, : args.prompt + args.tokens + 1].to(model.device)
        for budget in args.budgets:
            for record in measure(model, ids, args.prompt, budget):
                found.append({"text": path.stem, **record})
                print(
                    {name: round(value, 5) if isinstance(value, float) else value for name, value in found[-1].items()}
                )
            write_text(args.out, json.dumps({"records": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
