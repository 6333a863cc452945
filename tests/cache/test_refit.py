"""Test online fits of temperatures: at a sequence's first event, and after every `refit` later events."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

from hardkv import HardKVCache
from hardkv.selectors import Adaptive, SnapKV, fit_temperatures


@dataclass
class Watched:
    """SnapKV that stores the observation of each event."""

    seen: list = field(default_factory=list)

    def score(self, observation):
        z = SnapKV().score(observation)
        self.seen.append((z, observation))
        return z


def fitted(z, observation, p):
    """Temperatures `[R]` at which one event's scores of each row spread like its attention, row by row."""
    temperatures = []
    bounds = observation.cu_seqlens.tolist()
    for first, last in pairwise(bounds):
        row = slice(first, last)
        parts = (part[row][None, None] for part in (z, observation.attention, ~observation.protected))
        scores, attention, mask = parts
        temperatures.append(fit_temperatures(scores, attention, p, mask, "bisect").temperatures)
    return torch.cat(temperatures)


@pytest.mark.parametrize("refit", [0, 2, 3])
@pytest.mark.filterwarnings("ignore:.*temperatures stopped")
def test_every_so_many_events(refit, tiny_model, tiny_prompts, run_feed):
    model, watched = tiny_model("llama", num_hidden_layers=1, dtype=torch.float64), Watched()
    settings = {"window": 4, "sinks": 1, "interval": 5, "calibration": "online", "refit": refit}
    cache = HardKVCache(config=model.config, scorer=watched, budget=Adaptive(12), **settings)
    inputs = tiny_prompts(2, 24, new=25)["input_ids"]
    held = []
    for _ in run_feed(model, cache, inputs, torch.ones_like(inputs), [24, *[5] * 5]):
        assert len(watched.seen) == cache.stats().events == len(held) + 1
        held.append(torch.tensor(cache.stats().temperatures).flatten())
    fits = [event for event in range(6) if event == 0 or (refit and event % refit == 0)]
    expected = {event: fitted(*watched.seen[event], Adaptive(12).calibration_p) for event in fits}
    for event, temperatures in enumerate(held):
        last = max(fit for fit in fits if fit <= event)
        torch.testing.assert_close(temperatures, expected[last], check_dtype=False)
    assert len({tuple(temperatures.tolist()) for temperatures in held}) == len(fits)  # each fit was another
