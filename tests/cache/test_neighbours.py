"""Test that a row's tokens and kept positions do not depend on its neighbours in the batch, with any settings.

In float64, so that products of other shapes round to the same choice. Where events come is told by columns, so a row
is compared with itself at the same distance from the prompt's end, or behind the same padding.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.cache.argument import CACHE
from hardkv.cache.events import select as event
from hardkv.cache.model import Traits
from hardkv.selectors import SCORERS, AdaKV, Adaptive, Pyramid, Risk, TopK, TopP
from tests.cache.conftest import PAD, VOCABULARY

NEW = 13
PROMPTS = (6, 30, 17)  # tokens of the rows; the first is shorter than the window and the sinks
COLUMNS = max(PROMPTS)
SIZES = {"window": 7, "sinks": 1, "interval": 3}
BUDGETS = [TopK(12), AdaKV(12), Pyramid(12, beta=2), Adaptive(12, floor=9), TopP(0.6, floor=9, cap=16)]
WITH_TEMPERATURES = [Adaptive(12), TopP(0.6, floor=9, cap=16), Pyramid(Adaptive(12), beta=2)]
SETTINGS = {"": {}, "patience": {"patience": 2}, "pinned": {"pin_prompt": True}}
CALIBRATED = {
    "online": {"calibration": "online"},
    "refit": {"calibration": "online", "refit": 2, "patience": 1},
    "online, pinned": {"calibration": "online", "pin_prompt": True},
    "file": {"calibration": "file"},
}
CASES = [
    *((budget, settings) for budget in BUDGETS for settings in SETTINGS.values()),
    *((budget, settings) for budget in WITH_TEMPERATURES for settings in CALIBRATED.values()),
    *((Risk(12), settings | {"calibration": "file"}) for settings in SETTINGS.values()),
    (AdaKV(12), {"bits": 4, "patience": 2}),
    (TopP(0.6, floor=9, cap=16), {"bits": (8, 3), "calibration": "online"}),
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3", dtype=torch.float64, num_hidden_layers=2)


def measured(model, scorer: str, window: int = SIZES["window"]) -> Calibration:
    """A calibration as of a file: temperatures and curves that differ from head to head."""
    config = model.config
    shape = config.num_hidden_layers, config.num_key_value_heads
    counts = torch.tensor([0, 2, 4, 8, 16, 32, 64])
    steep = torch.linspace(0.02, 0.6, shape[0] * shape[1])
    loss = torch.exp(-steep.view(*shape, 1) * counts) * (1 - counts / 64)
    temperatures = torch.linspace(0.2, 1.5, shape[0] * shape[1]).view(shape)
    provenance = {
        **{"geometry": Traits.of(config).geometry, "layers": list(range(shape[0]))},
        **{"scorer": HardKVConfig(scorer=scorer).to_dict()["scorer"], "window": window},
    }
    return Calibration(temperatures, temperatures, counts, loss, None, provenance)


def prompts(seed: int, lengths=PROMPTS) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask `[B, COLUMNS]`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (len(lengths), COLUMNS), generator=generator, device="cpu")
    mask = torch.stack([torch.arange(COLUMNS, device="cpu") >= COLUMNS - length for length in lengths]).long()
    ids[mask == 0] = PAD
    return ids, mask


def run(model, settings: dict, ids: Tensor, mask: Tensor, chunks: list[int] | None = None):
    """Greedy tokens `[B, NEW]` behind a prompt, and the cache."""
    device, cache = model.device, HardKVCache(config=model.config, **SIZES | settings)
    ids, mask = ids.to(device), mask.to(device)
    tokens, start = [], 0
    for count in (chunks or [ids.shape[1]]) + [1] * NEW:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, start : start + count]
        seen = {"attention_mask": mask[:, : start + count], "position_ids": positions}
        with torch.no_grad():
            logits = model(ids[:, start : start + count], **seen, **{CACHE: cache}).logits
        start += count
        if start >= ids.shape[1]:
            tokens.append(logits[:, -1].argmax(-1))
            ids, mask = torch.cat([ids, tokens[-1][:, None]], 1), F.pad(mask, (0, 1), value=1)
    return torch.stack(tokens, 1), cache


def with_room(budget):
    """The budget with room for a pinned prompt."""
    if isinstance(budget, Pyramid):
        return replace(budget, n=budget.inner.with_n(68))  # the last layer has 38 of them
    return replace(budget, **{"cap" if isinstance(budget, TopP) else "n": 42})


def assert_same_row(one, row: int, other, other_row: int, shift: int = 0) -> None:
    """The row of one run is the other's; its columns there come `shift` earlier."""
    (tokens, cache), (others, other_cache) = one, other
    assert tokens[row].tolist() == others[other_row].tolist()
    for layer, theirs in zip(cache.layers, other_cache.layers, strict=True):
        held, there = layer.tiers.kept()[row], theirs.tiers.kept()[other_row]
        assert [head.tolist() for head in held] == [(head + shift).tolist() for head in there]
        for tier in ("sparse", "dense"):
            assert torch.equal(layer.tiers.lengths(tier)[row], theirs.tiers.lengths(tier)[other_row])
        assert layer.tiers.tokens[row] == theirs.tiers.tokens[other_row]
        known, other_known = layer.tiers.temperatures, theirs.tiers.temperatures
        if known is not None or other_known is not None:
            heads = layer.tiers.shape[1]
            known, other_known = known.view(-1, heads)[row], other_known.view(-1, heads)[other_row]
            torch.testing.assert_close(known, other_known, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("budget", "settings"), CASES, ids=str)
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_a_row_does_not_depend_on_its_neighbours(scorer, budget, settings, model):
    """Compare a row beside others, elsewhere in the batch, and alone without pads."""
    settings = settings | {"scorer": scorer, "budget": budget}
    if settings.get("calibration") == "file":
        settings["calibration"] = measured(model, scorer)
    if settings.get("pin_prompt"):
        settings["budget"] = with_room(budget)
    ids, mask = prompts(1)
    together = run(model, settings, ids, mask)
    assert together[1].stats().events >= 5
    if settings.get("calibration") == "online" and not settings.get("pin_prompt"):
        assert {tiers.fitted for tiers in (layer.tiers for layer in together[1].layers)} == {(1, 0, 0)}
    other_ids, other_mask = prompts(2, (COLUMNS, 11))
    beside = run(model, settings, torch.cat([other_ids, ids[:2]]), torch.cat([other_mask, mask[:2]]))
    assert_same_row(together, 0, beside, 2)
    assert_same_row(together, 1, beside, 3)
    pads = COLUMNS - PROMPTS[0]
    assert_same_row(together, 0, run(model, settings, ids[:1, pads:], mask[:1, pads:]), 0, pads)


@pytest.mark.parametrize("settings", [{}, *CALIBRATED.values()], ids=str)
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_a_prompt_in_chunks_that_a_row_begins_late(scorer, settings, model):
    """Its first events find nothing of the short rows, and choose among the long one's tokens."""
    settings = settings | {"scorer": scorer, "budget": Adaptive(42 if settings.get("pin_prompt") else 12)}
    if settings.get("calibration") == "file":
        settings["calibration"] = measured(model, scorer)
    (ids, mask), (others, other_mask) = prompts(1), prompts(2, (29, 21))
    together = run(model, settings, ids, mask, [13, 8, 9])
    beside = run(model, settings, torch.cat([others, ids[:1]]), torch.cat([other_mask, mask[:1]]), [13, 8, 9])
    assert_same_row(together, 0, beside, 2)


@pytest.mark.parametrize("refit", [1, 2, 3])
def test_each_row_is_fitted_again_from_its_own_first_fit_on(refit, model):
    """Temperatures change only at these events.

    The short row's first fit has two candidates, which determine nothing.
    """
    ids, mask = prompts(1)
    settings = {"scorer": "snapkv", "budget": Adaptive(12), "calibration": "online", "refit": refit}
    cache = HardKVCache(config=model.config, **SIZES | {"interval": 4} | settings)
    before, changed = None, [[], [], []]
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: cache})
        for step in range(33):
            tiers = cache.layers[0].tiers
            if before is None or tiers.events > before[0]:
                now = tiers.temperatures.view(3, -1)
                for row in range(3):
                    if before is not None and not torch.equal(now[row], before[1][row]):
                        changed[row].append(tiers.events - 1)
                before = tiers.events, now
            mask = F.pad(mask, (0, 1), value=1)
            model(ids[:, step % COLUMNS, None].clamp_min(2), attention_mask=mask, **{CACHE: cache})
    assert tiers.fitted == (1, 0, 0)
    assert changed == [list(range(1 + refit, 9, refit)), list(range(refit, 9, refit)), list(range(refit, 9, refit))]


def test_rows_go_on_with_their_own_fits(model):
    """Picked and repeated before and after the short one is fitted."""
    ids, mask = prompts(1)
    settings = {"scorer": "snapkv", "budget": Adaptive(12), "calibration": "online", "refit": 2} | SIZES
    rows = torch.tensor([1, 0, 0, 2])

    def steps(cache, mask, count):
        for _ in range(count):
            mask = F.pad(mask, (0, 1), value=1)
            new = torch.full((len(mask), 1), 5 + mask.shape[1])
            with torch.no_grad():
                model(new, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, **{CACHE: cache})
        return mask

    for before in (0, 7):
        one, other = (HardKVCache(config=model.config, **settings) for _ in range(2))
        for cache in (one, other):
            with torch.no_grad():
                model(ids, attention_mask=mask, **{CACHE: cache})
        picked = steps(one, mask, before)[rows]
        one.batch_select_indices(rows)
        steps(one, picked, 18 - before)
        steps(other, mask, 18)
        for layer, theirs in zip(one.layers, other.layers, strict=True):
            assert layer.tiers.fitted == tuple(theirs.tiers.fitted[row] for row in rows.tolist()) == (0, 1, 1, 0)
            temperatures = theirs.tiers.temperatures.view(3, -1)[rows]
            torch.testing.assert_close(layer.tiers.temperatures.view(4, -1), temperatures, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("pin_prompt", [False, True])
def test_every_row_is_fitted_once(pin_prompt, model, monkeypatch):
    """At its first choice, which a pinned prompt does not offer; fits wait for the device, so there are no others."""
    fits, fit = [], event.fit_temperatures

    def counting(z, *args, **kwargs):
        fits.append(len(z))
        return fit(z, *args, **kwargs)

    monkeypatch.setattr(event, "fit_temperatures", counting)
    settings = {"scorer": "snapkv", "budget": Adaptive(42), "calibration": "online", "pin_prompt": pin_prompt}
    if pin_prompt:
        settings |= {"window": 4, "interval": 9}
    _, cache = run(model, settings, *prompts(1))
    tiers = cache.layers[0].tiers
    assert sum(fits) == 2 * 3 * tiers.shape[1]
    assert tiers.fitted == ((1, 1, 1) if pin_prompt else (1, 0, 0))
    assert (tiers.temperatures != 1).any()
