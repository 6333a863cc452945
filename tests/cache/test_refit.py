"""When temperatures are fitted online, and to what: at a sequence's first event, and after every `refit` later ones."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch

from hardkv import HardKVCache
from hardkv.selectors import Adaptive, SnapKV, TopP, fit_temperatures


@dataclass
class Watched:
    """SnapKV, which keeps what each event showed it."""

    seen: list = field(default_factory=list)

    def score(self, observation):
        z = SnapKV().score(observation)
        self.seen.append((z, observation))
        return z


def fitted(z, observation, p):
    """Temperatures `[R]` at which one event's scores of each row spread like its attention, row by row."""
    temperatures = []
    bounds = observation.cu_seqlens.tolist()
    for first, last in itertools.pairwise(bounds):
        row = slice(first, last)
        parts = (part[row][None, None] for part in (z, observation.attention, ~observation.protected))
        scores, attention, mask = parts
        temperatures.append(fit_temperatures(scores, attention, p, mask, "bisect").temperatures)
    return torch.cat(temperatures)


@pytest.mark.parametrize("refit", [0, 1, 2, 3])
@pytest.mark.parametrize("budget", [Adaptive(12), TopP(0.7, floor=8, cap=20)], ids=str)
@pytest.mark.filterwarnings("ignore:.*temperatures stopped")
def test_every_so_many_events(refit, budget, tiny_model, tiny_prompts, run_feed):
    model, watched = tiny_model("llama", num_hidden_layers=1, dtype=torch.float64), Watched()
    settings = {"window": 4, "sinks": 1, "interval": 5, "calibration": "online", "refit": refit}
    cache = HardKVCache(config=model.config, scorer=watched, budget=budget, **settings)
    inputs = tiny_prompts(2, 24, new=30)["input_ids"]
    held = []
    for _ in run_feed(model, cache, inputs, torch.ones_like(inputs), [24, *[5] * 6]):
        assert len(watched.seen) == cache.stats().events == len(held) + 1
        held.append(torch.tensor(cache.stats().temperatures).flatten())
    for event, temperatures in enumerate(held):
        last = event - event % refit if refit else 0
        torch.testing.assert_close(temperatures, fitted(*watched.seen[last], budget.calibration_p), check_dtype=False)
    alike = [torch.equal(one, two) for one, two in itertools.pairwise(held)]
    assert alike == [not refit or bool(event % refit) for event in range(1, 7)]  # each fit was another
