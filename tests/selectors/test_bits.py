"""Bits per layer and tokens in bytes, against every choice and every count in plain Python."""

from itertools import chain, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.selectors import Risk, RiskCurves
from hardkv.selectors.budgets.bits import CHOICES, CONTEXT, EXCHANGE, losses
from hardkv.selectors.budgets.water_filling import ROOM_SPARE
from tests.selectors import test_risk
from tests.selectors.test_risk import hull_gains, random_curves

NBYTES = [261 if pair == (16, 16) else 16 * sum(pair) // 2 + 9 for pair in CHOICES]  # head dims 64
FULL = NBYTES[0]


def hull(counts, loss, count):
    """The lower convex hull of a curve at a count."""
    lost = loss[-1]
    for start, stop, gain in zip(counts, counts[1:], hull_gains(counts, loss), strict=False):
        lost += gain * max(0, stop - max(start, count))
    return lost


def by_layer(distortion):
    """The loss of every layer by every choice, `[L][C]`."""
    order = (16, 8, 4, 3, 2)

    def of(head, kind, bits):
        return 0 if bits == 16 else head[kind][order.index(bits) - 1]

    return [[EXCHANGE * sum(of(h, 0, k) + of(h, 1, v) for h in layer) for k, v in CHOICES] for layer in distortion]


def least(counts, loss, distortion, total, low, high):
    """The least loss of any bits per layer and counts per head, between `low` and `high`, for `total` bytes."""
    extra = by_layer(distortion)
    best = {0: 0}  # by bytes
    for layer, curves in enumerate(loss):
        step = {}
        for choice, nbytes in enumerate(NBYTES):
            for kept in product(range(low, high + 1), repeat=len(curves)):
                lost = extra[layer][choice] + sum(hull(counts, c, n) for c, n in zip(curves, kept, strict=True))
                for spent, so_far in best.items():
                    at = spent + nbytes * sum(kept)
                    if at <= total:
                        step[at] = min(step.get(at, float("inf")), so_far + lost)
        best = step
    return min(best.values())


def found_by(risk, counts, loss, distortion, protected=0):
    """The layers' budgets, bits, and counts at the measured length, `[L][H]`."""
    curves = RiskCurves(torch.tensor(counts), torch.tensor(loss, dtype=torch.float64))
    budgets, bits = risk.for_bits(protected, curves, torch.tensor(distortion, dtype=torch.float64), NBYTES)
    at = torch.tensor([counts[-1]]), torch.tensor([protected])
    return budgets, bits, torch.cat([budget.totals(*at) for budget in budgets]).tolist()


def spent_on(bits, kept, protected=0):
    return sum(NBYTES[CHOICES.index(pair)] * (n - protected) for pair, row in zip(bits, kept, strict=True) for n in row)


@st.composite
def instances(draw, layers=2, heads=1, most=40):
    """Counts, losses `[L][H][K]`, and distortions `[L][H][2][4]` that grow as bits become fewer; whole numbers."""
    counts = sorted({0, most, *draw(st.lists(st.integers(1, most - 1), max_size=3))})

    def falling(length, top):
        return sorted(draw(st.lists(st.integers(0, top), min_size=length, max_size=length)), reverse=True)

    top = draw(st.sampled_from([50, 600]))
    loss = [[[*falling(len(counts) - 1, 100), 0] for _ in range(heads)] for _ in range(layers)]
    distortion = [[[falling(4, top)[::-1] for _ in range(2)] for _ in range(heads)] for _ in range(layers)]
    return counts, loss, distortion


def lost_by(counts, loss, distortion, bits, kept):
    extra = by_layer(distortion)
    lost = sum(extra[layer][CHOICES.index(pair)] for layer, pair in enumerate(bits))
    return lost + sum(hull(counts, c, k) for c, k in zip(chain(*loss), chain(*kept), strict=True))


@settings(max_examples=40, deadline=None)
@given(instances(), st.integers(1, 3), st.integers(0, 2), st.sampled_from(["model", "layer"]))
def test_bytes_are_spent_and_no_single_choice_is_better(drawn, n, protected, scope):
    """All bytes but less than a token's are spent, and the loss is at most that of any bits that all layers share."""
    counts, loss, distortion = drawn
    n, high = n + protected, counts[-1]
    budgets, bits, kept = found_by(Risk(n, scope, floor=0), counts, loss, distortion, protected)
    parts = [range(len(loss))] if scope == "model" else [[layer] for layer in range(len(loss))]
    for part in parts:
        own = [[each[layer] for layer in part] for each in (loss, distortion, bits, kept)]
        heads = sum(len(row) for row in own[3])
        left = FULL * (n - protected) * heads - spent_on(*own[2:], protected)
        assert left >= 0
        assert left < FULL or all(k == high for k in chain(*own[3]))
        found = lost_by(counts, *own)
        for pair, nbytes in zip(CHOICES, NBYTES, strict=True):
            curves = RiskCurves(torch.tensor(counts), torch.tensor(own[0], dtype=torch.float64))
            most = protected + FULL * (n - protected) * heads // nbytes // heads  # of all heads at least
            same = Risk(max(n, most), floor=0).allocation(curves, high, protected).tolist()
            assert found <= lost_by(counts, *own[:2], [pair] * len(part), same) + 1e-9
    lengths = torch.arange(1, high + 1), torch.arange(1, high + 1).clamp_max(protected)
    for layer, budget in enumerate(budgets):
        most = budget.totals(*lengths).sum(1).max()
        assert most <= budget.fixed_total(len(loss[0]), high, protected)
        assert budget.limit >= n
        assert len(kept[layer]) == len(loss[layer])


def test_hardly_any_choice_is_better():
    """The best of all bits and counts loses 2 % less at most, on the average of instances with few choices."""
    generator = torch.Generator().manual_seed(0)
    found = best = 0.0
    for _ in range(15):
        inner = torch.randperm(15, generator=generator)[:3].add(1).sort().values.tolist()
        counts = [0, *inner, 16]
        gains = torch.randint(1, 20, (2, 1, 4), generator=generator) * torch.tensor([30, 10, 3, 1])
        loss = torch.nn.functional.pad(gains.flip(-1).cumsum(-1).flip(-1), (0, 1)).tolist()
        scale = torch.tensor([1.0, 30.0, 100.0, 400.0]) * torch.rand(2, 1, 1, 1, generator=generator).mul(4).exp()
        distortion = (torch.rand(2, 1, 2, 4, generator=generator) * scale).cumsum(-1).double().tolist()
        total = 2 * FULL * 2
        _, bits, kept = found_by(Risk(2, floor=0), counts, loss, distortion)
        found += lost_by(counts, loss, distortion, bits, kept)
        best += least(counts, loss, distortion, total, 0, 16)
    assert best <= found <= 1.02 * best


def test_layers_that_bits_hurt_keep_them():
    """Two layers with the same risk: that with the larger distortion gets more bits and fewer tokens."""
    counts = list(test_risk.TestContinued.COUNTS)
    loss = random_curves(0, counts, layers=1, heads=2, lost=0) * 2
    distortion = [[[[each * scale for each in (0.1, 4.0, 16.0, 64.0)]] * 2] * 2 for scale in (1.0, 100.0)]
    _, bits, kept = found_by(Risk(24), counts, loss, distortion, 10)
    assert sum(bits[0]) < sum(bits[1])
    assert sum(kept[0]) > sum(kept[1])


def test_losses_of_keys_and_values_add_up():
    distortion = torch.rand(3, 2, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(losses(distortion), torch.tensor(by_layer(distortion.tolist()), dtype=torch.float64))


def test_without_any_loss_there_are_16_bits():
    _, bits, _ = found_by(Risk(3), [0, 4, 9], [[[0, 0, 0]]] * 2, [[[[0, 0, 0, 0]] * 2]] * 2)
    assert bits == [(16, 16)] * 2


@pytest.mark.parametrize("length", [300, 2000, 50_000])
def test_longer_contexts(length):
    """Bits stay; tokens fill the same bytes, in layers that are joined too."""
    counts = list(test_risk.TestContinued.COUNTS)
    loss = random_curves(3, counts, layers=3, heads=2, lost=0)
    distortion = (torch.rand(3, 2, 2, 4) * torch.tensor([0.01, 1, 4, 16])).cumsum(-1).tolist()
    budgets, bits, _ = found_by(Risk(50), counts, loss, distortion, 10)
    at = torch.tensor([length, length]), torch.tensor([10, 10])
    kept = [budget.totals(*at) for budget in budgets]
    assert torch.equal(budgets[0].joint(budgets[:2]).totals(*at), torch.cat(kept[:2]))
    left = FULL * 40 * 6 - spent_on(bits, [each[0].tolist() for each in kept], 10)
    assert 0 <= left < FULL
    assert counts[-1] < CONTEXT * 50
    room = [budget.fixed_total(2, length, 10) for budget in budgets]
    assert all(each.sum(1).max() <= most for each, most in zip(kept, room, strict=True))
    assert max(room) <= 1 + ROOM_SPARE * 2 * max(budget.totals(*at).max() for budget in budgets)
