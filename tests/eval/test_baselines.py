"""Budgets to compare with: their counts against plain Python, alone and through a cache."""

import itertools
import random

import pytest
import torch

from eval.baselines import LUKV, DuoAttention, HeadKV, LayerShares, Mixed, importance
from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.calibration.file import describe_scorer
from hardkv.selectors import Observation, Risk, RiskCurves
from hardkv.selectors.ranking import Ranking
from tests.cache import conftest as tiny

LAYERS, HEADS, PROTECTED = 3, 2, 10
BASE = PROTECTED + 16
WEIGHTS = [[1.0, 5.0], [3.0, 0.5], [8.0, 2.0]]  # of the heads


def make_curves(weights=WEIGHTS, counts=(10, 20, 40, 60, 80, 120, 160), tilt=False):
    """Loss falls as weight / n to 0 at the last count; with `tilt`, heads of small weight fall steeper."""
    n, weight = torch.tensor(counts), torch.tensor(weights)[..., None]
    power = 1 + (1 / weight if tilt else torch.zeros_like(weight))
    loss = weight * ((10 / n) ** power - (10 / n[-1]) ** power)
    return RiskCurves(n, loss)


# ---------------------------------------------------------------- totals


def test_importance_is_the_loss_at_the_last_count_up_to_64():
    curves = make_curves(counts=(10, 40, 64, 80, 160))
    assert importance(curves).tolist() == curves.loss[..., 2].double().tolist()
    curves = make_curves(counts=(10, 40, 63, 65, 160))
    assert importance(curves).tolist() == curves.loss[..., 2].double().tolist()


def shares_with_limit(weights, total, limit):
    """Real-valued shares in proportion to the weights, none above the limit: heads reach it one by one."""
    full = set()
    while True:
        left = total - limit * len(full)
        open_weight = sum(w for i, w in enumerate(weights) if i not in full)
        shares = [limit if i in full else left * w / open_weight for i, w in enumerate(weights)]
        over = {i for i, share in enumerate(shares) if share > limit} - full
        if not over:
            return shares
        full |= over


@pytest.mark.parametrize("length", [1000, 200, 90])  # no head is short of tokens, one is, several are
@pytest.mark.parametrize("n", [30, 50, 80])
def test_headkv_is_proportional_up_to_what_a_sequence_has(n, length):
    curves = make_curves()
    weights = importance(curves).flatten().tolist()
    found = HeadKV(n, curves).totals(length, PROTECTED).flatten()
    expected = shares_with_limit(weights, (n - BASE) * len(weights), length - BASE)
    for count, share in zip(found.tolist(), expected, strict=True):
        assert BASE + share - 1.001 < count < BASE + share + 0.001
    assert n * len(weights) - len(weights) <= int(found.sum()) <= n * len(weights)


def test_headkv_proportions_hold_to_the_token():
    curves = make_curves([[1.0, 2.0], [3.0, 4.0]])
    found = HeadKV(BASE + 1000, curves).totals(10**6, PROTECTED) - BASE  # 4,000 tokens for 10 parts
    assert (found - torch.tensor([[400, 800], [1200, 1600]])).abs().max() <= 1


def test_headkv_passes_on_what_a_very_important_head_has_no_tokens_for():
    """The head that has it all takes 150 of 200 tokens; the other gets the 50 left, little as it matters."""
    curves = make_curves([[1.0, 0.001]])
    found = HeadKV(BASE + 100, curves).totals(BASE + 150, PROTECTED)
    assert found[0, 0] == pytest.approx(BASE + 150, abs=1)
    assert found[0, 1] == pytest.approx(BASE + 50, abs=1)


def test_headkv_below_the_base_is_flat():
    assert (HeadKV(20, make_curves()).totals(500, PROTECTED) == 20).all()


@pytest.mark.parametrize("n", [26, 40, 60, 75])
def test_duo_attention_gives_the_most_important_heads_everything(n):
    curves = make_curves()
    weights = importance(curves).flatten().tolist()
    found = DuoAttention(n, curves).totals(140, PROTECTED).flatten().tolist()
    full = {i for i, count in enumerate(found) if count == 140}
    assert full == set(sorted(range(6), key=lambda i: -weights[i])[: len(full)])
    assert {count for i, count in enumerate(found) if i not in full} == {BASE}
    # the contexts of a text of 160 tokens, counted from a quarter on: one full head more or less is further from n
    contexts = range(40, 161)
    means = [sum(m * c + (6 - m) * BASE for c in contexts) / len(contexts) / 6 for m in range(7)]
    assert len(full) == min(range(7), key=lambda m: abs(means[m] - n))


def on_hull(counts, losses, n):
    """The lower convex hull at n: the lowest of the chords that pass over it, or of the points at it."""
    points = list(zip(counts, losses, strict=True))
    chords = [
        left + (right - left) * (n - low) / (high - low)
        for (low, left), (high, right) in itertools.combinations(points, 2)
        if low <= n <= high
    ]
    return min(chords)


def best_split(curves, total):
    """The least sum of losses, over all ways to split `total` tokens between the heads."""
    ways = itertools.product(*(range(len(curve)) for curve in curves))
    return min(sum(c[i] for c, i in zip(curves, way, strict=True)) for way in ways if sum(way) == total)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_lukv_is_the_best_split_of_convex_curves_and_of_the_hulls_of_others(seed, convex):
    """Three layers of one head, and contexts of 9 tokens, two of them protected."""
    rng = random.Random(seed)
    counts = list(range(2, 10)) if convex else [2, *sorted(rng.sample(range(3, 9), 4)), 9]
    losses = []
    for _ in range(3):
        drops = [rng.random() for _ in counts[1:]]
        drops = sorted(drops) if convex else drops
        losses.append([0.0, *itertools.accumulate(drops)][::-1])
    curves = RiskCurves(torch.tensor(counts), torch.tensor(losses, dtype=torch.float64)[:, None])
    hulls = [[on_hull(counts, loss, n) for n in range(2, 10)] for loss in losses]
    if convex:
        assert hulls == [pytest.approx(loss) for loss in losses]
    for n in range(2, 10):
        found = LUKV(n, curves).totals(9, 2).flatten().tolist()
        assert sum(found) == 3 * n
        assert all(2 <= count <= 9 for count in found)
        spent = sum(hull[count - 2] for hull, count in zip(hulls, found, strict=True))
        assert spent == pytest.approx(best_split(hulls, 3 * (n - 2)))


@pytest.mark.parametrize("length", [85, 160, 310])  # candidates: half of the curves', as many, twice as many
@pytest.mark.parametrize("n", [26, 46, 70])
def test_lukv_keeps_the_shares_of_the_curves_length(n, length):
    curves, scale = make_curves(), (length - PROTECTED) / 150
    found = LUKV(n, curves).totals(length, PROTECTED)
    whole = LUKV(round(PROTECTED + (n - PROTECTED) / scale), curves).totals(160, PROTECTED)
    assert int(found.sum()) == 6 * n
    assert (found - PROTECTED - scale * (whole - PROTECTED)).abs().max() <= 1
    assert found.unique().numel() > 2


def test_lukv_keeps_all_of_a_short_sequence():
    assert (LUKV(45, make_curves()).totals(31, PROTECTED) == 31).all()


def test_lukv_leaves_every_head_a_hundredth():
    counts = (10, 20, 400, 3000)
    curves = make_curves([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], counts)  # one head never loses anything
    assert int(LUKV(100, curves).totals(3000, PROTECTED)[0, 1]) == 30
    assert (LUKV(20, curves).totals(3000, PROTECTED) == 20).all()  # all have less


@pytest.mark.parametrize("length", [70, 160, 400])
@pytest.mark.parametrize("n", [30, 37, 65])
def test_layer_shares_are_risks_layers_split_evenly(n, length):
    curves = make_curves([[*row, 1.5] for row in WEIGHTS])  # three heads, so that most layers do not divide
    risk = Risk(n).allocation(curves, length, PROTECTED)
    found = LayerShares(n, curves).totals(length, PROTECTED)
    assert found.sum(1).tolist() == risk.sum(1).tolist()
    assert int(found.sum()) == n * 9
    assert int((found.amax(1) - found.amin(1)).max()) <= 1
    assert (found.diff(dim=1) <= 0).all()  # the first heads get what is over
    assert found.tolist() != risk.tolist()


def test_a_layer_gets_its_own_row():
    curves = make_curves()
    budget = Mixed(40, curves, dynamic=0.25)
    layers = budget.for_layers(LAYERS, PROTECTED)
    assert [(layer.layer, layer.n, layer.dynamic) for layer in layers] == [(i, 40, 0.25) for i in range(LAYERS)]
    assert all(layer.curves is curves for layer in layers)


# ---------------------------------------------------------------- Mixed, against a loop over tokens


def make_ranking(sharpness, length=60, temperature=None):
    """One sequence of two heads; head h attends by keys scaled with `sharpness[h]`, 10 tokens protected."""
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, HEADS, length, 8, dtype=torch.float64, generator=generator)
    queries = torch.randn(1, 2 * HEADS, 4, 8, dtype=torch.float64, generator=generator)
    keys = keys * torch.tensor(sharpness, dtype=torch.float64)[:, None, None]
    observation = Observation.from_dense(keys, values, queries, window=8, sinks=2)
    return Ranking.of(observation.attention.log(), observation, temperature)


def mixed_counts(ranking, risk, dynamic, temperature):
    """Candidates of every head: a fixed part of Risk's, then one at a time to the head that would lose most mass."""
    observation, tails = ranking.observation, []
    for head in range(HEADS):
        row = slice(head * 60, head * 60 + 60)
        attention, protected = observation.attention[row], observation.protected[row]
        best = sorted(attention[~protected].tolist(), reverse=True)
        shares = [a ** (1 / temperature[head]) for a in best]
        outside = 1 - float(attention[protected].sum())
        tails.append([outside * sum(shares[j:]) / sum(shares) for j in range(len(shares))])
    counts = [int(r * (1 - dynamic)) for r in risk]
    while sum(counts) < sum(risk):
        open_heads = [h for h in range(HEADS) if counts[h] < len(tails[h])]
        counts[max(open_heads, key=lambda h: tails[h][counts[h]])] += 1
    return counts


@pytest.mark.parametrize("temperature", [(1.0, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("dynamic", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_mixed_gives_out_the_dynamic_part_by_mass(layer, dynamic, temperature):
    curves = make_curves(tilt=True)
    ranking = make_ranking((0.1, 2.0), temperature=torch.tensor(temperature, dtype=torch.float64))
    risk = (Risk(24).allocation(curves, 60, PROTECTED)[layer] - PROTECTED).tolist()
    found = Mixed(24, curves, dynamic=dynamic).for_layers(LAYERS, PROTECTED)[layer].counts(ranking).tolist()
    assert found == mixed_counts(ranking, risk, dynamic, temperature)
    assert sum(found) == sum(risk)
    assert all(count >= int(r * (1 - dynamic)) for count, r in zip(found, risk, strict=True))
    if dynamic == 0:
        assert found == risk
    if dynamic >= 0.5 and temperature == (1.0, 1.0):
        assert found != risk  # the flat head takes from the sharp one


# ---------------------------------------------------------------- through a cache


def run_cache(model, budget, length=160, calibration=None):
    cache = HardKVCache(config=model.config, budget=budget, window=8, sinks=2, interval=16, calibration=calibration)
    ids = tiny.make_prompts(2, length)["input_ids"].clamp_min(2)
    with torch.no_grad():
        for chunk in ids.split(16, 1):
            model(input_ids=chunk, **{CACHE: cache})
    return cache


def make_calibration(model, curves):
    return Calibration(
        temperatures=torch.ones(LAYERS, HEADS),
        residuals=torch.zeros(LAYERS, HEADS),
        counts=curves.counts,
        risk=curves.loss,
        provenance={
            "geometry": Traits.of(model.config).geometry,
            "layers": list(range(LAYERS)),
            "scorer": describe_scorer(HardKVConfig().scorer),
            "window": 8,
        },
    )


@pytest.mark.parametrize("kind", [HeadKV, DuoAttention, LUKV, LayerShares, Mixed])
@pytest.mark.parametrize("length", [48, 160])
def test_caches_hold_the_totals(kind, length):
    model, curves = tiny.make_model("llama"), make_curves()
    budget = kind(45, curves)
    held = run_cache(model, budget, length).lengths()
    totals = budget.totals(length, PROTECTED)
    assert held.tolist() == totals[:, None].expand(-1, 2, -1).tolist()
    assert int(held.amax()) > int(held.amin())


def test_mixed_without_dynamic_is_risk_and_with_it_is_not():
    model, curves = tiny.make_model("llama"), make_curves()
    risk = run_cache(model, Risk(30), calibration=make_calibration(model, curves))
    plain, mixed = (run_cache(model, Mixed(30, curves, dynamic=share)) for share in (0.0, 0.5))
    for layer in range(LAYERS):
        for ours, theirs in zip(plain.kept(layer), risk.kept(layer), strict=True):
            assert [positions.tolist() for positions in ours] == [positions.tolist() for positions in theirs]
    assert mixed.lengths().tolist() != risk.lengths().tolist()
    assert mixed.lengths().sum(-1).tolist() == risk.lengths().sum(-1).tolist()
