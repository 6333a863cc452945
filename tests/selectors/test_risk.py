"""Risk budgets against a convex hull, a greedy loop and a dynamic programme in plain Python."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.calibration.file import describe_scorer
from hardkv.selectors import Observation, Pyramid, Risk, RiskCurves, TopK, get_budget, get_scorer
from hardkv.selectors.budgets import budget_to_dict
from hardkv.selectors.ranking import Ranking
from tests.cache import conftest as tiny

# ---------------------------------------------------------------- oracles: counts, losses as plain lists of ints


def layer_budgets(risk, curves):
    """The budgets of all layers that the curves know."""
    return risk.for_layers(curves.loss.shape[0], 0, curves)


def hull_gains(counts, loss):
    """Falls of the lower convex hull of the points, a Fraction per step; where it rises, 0. Monotone chain."""
    hull = []
    for point in zip(counts, loss, strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1), (x2, y2) = *hull[-2:], point
            if (y1 - y0) * (x2 - x1) < (y2 - y1) * (x1 - x0):  # the last corner lies below the chord
                break
            hull.pop()
        hull.append(point)
    gains = []
    for (x0, y0), (x1, y1) in pairwise(hull):
        gains += [max(Fraction(0), Fraction(y0 - y1, x1 - x0))] * sum(x0 <= c < x1 for c in counts)
    return gains


def middles(counts):
    """Geometric middle of every step; count 0 stands for 1."""
    return [math.sqrt(max(a, 1) * b) for a, b in pairwise(counts)]


def reached(count, context):
    """The share of the contexts from context / 4 to `context` that have more than `count` tokens."""
    return min(1.0, max(0.0, (context - count) / (context - context / 4)))


def tail_gains(counts, gains):
    """One head's gains per step of `counts`, from those of its first steps, which were measured.

    Measured gains over their reach up to half the measured length; a power law from there on, through the steps between
    an eighth and three quarters of it that gain anything, by weighted least squares in log-log; never rising.
    """
    length, middle = counts[len(gains)], middles(counts)
    true = [gain / reached(m, length) for m, gain in zip(middle[: len(gains)], gains, strict=True) if m < length]
    steps = [k for k, gain in enumerate(true) if length / 8 <= middle[k] <= length * 3 / 4 and gain > 0]
    law = np.zeros(len(middle))
    if steps:
        x, y = np.log([middle[k] for k in steps]), np.log([true[k] for k in steps])
        weight = [counts[k + 1] - counts[k] for k in steps]
        (spread, both), _ = np.cov(x, y, aweights=weight, ddof=0)
        exponent = min(4.0, max(0.5, -both / spread)) if len(steps) > 1 else 0.5
        law = np.exp(np.average(y, weights=weight) - exponent * (np.log(middle) - np.average(x, weights=weight)))
    found = [true[k] if m <= length / 2 else law[k] for k, m in enumerate(middle)]
    return np.minimum.accumulate(found).tolist()


def further(counts):
    """`counts`, and those beyond them up to 2 ** 24: four to a doubling."""
    far = {math.ceil(counts[-1] * 2 ** (quarter / 4)) for quarter in range(1, 100)}
    return [*counts, *sorted(count for count in far if counts[-1] < count < 1 << 24), 1 << 24]


def gains_at(counts, loss, length):
    """Counts, and what every step of every head gains in a sequence of `length` tokens, `[L][H][K - 1]`."""
    gains = [[hull_gains(counts, curve) for curve in layer] for layer in loss]
    if length <= counts[-1]:
        return counts, gains
    every = further(counts)
    share = [reached(m, length) for m in middles(every)]

    def longer(row):
        return [g * r for g, r in zip(tail_gains(every, [float(gain) for gain in row]), share, strict=True)]

    return every, [[longer(row) for row in layer] for layer in gains]


def greedy(counts, gains, n, low, high):
    """Counts of all rows: every row `low`, then step by step to whoever gains most (equals: lower step, lower row)."""
    kept = [min(low, high)] * len(gains)
    left = n * len(gains) - sum(kept)
    for _, stop, row in sorted((-g, counts[k + 1], r) for r, gain in enumerate(gains) for k, g in enumerate(gain)):
        while left > 0 and kept[row] < min(stop, high):
            kept[row] += 1
            left -= 1
    return kept


def bounds(risk, length, protected):
    """Fewest and most tokens of a head."""
    low = protected + int(risk.floor * max(0, risk.n - protected)) if isinstance(risk.floor, float) else risk.floor
    high = length if risk.cap is None else min(length, max(risk.cap, protected))
    return min(max(low, protected), high), high


def expected(risk, counts, loss, length, protected):
    """The counts `[L][H]` of a sequence; `loss [L][H][K]`."""
    low, high = bounds(risk, length, protected)
    counts, gains = gains_at(counts, loss, length)
    if risk.scope == "layer":
        return [greedy(counts, layer, risk.n, low, high) for layer in gains]
    flat = greedy(counts, list(chain(*gains)), risk.n, low, high)
    heads = len(loss[0])
    return [flat[i : i + heads] for i in range(0, len(flat), heads)]


def least_loss(losses, low, high, total):
    """The smallest sum of `losses[r][c_r]` with `low <= c_r <= high` that add up to `total`, by dynamic programme."""
    best = {0: 0}
    for loss in losses:
        step = {}
        for spent, so_far in best.items():
            for c in range(low, high + 1):
                step[spent + c] = min(step.get(spent + c, float("inf")), so_far + loss[c])
        best = step
    return best[total]


# ---------------------------------------------------------------- random curves


@st.composite
def knots(draw, most=7):
    start = draw(st.integers(0, 5))
    steps = draw(st.lists(st.integers(1, 6), min_size=1, max_size=most))
    return [start + sum(steps[:k]) for k in range(len(steps) + 1)]


def ending(loss):
    """The falling curve with its end: something to lose up to there, or nothing anywhere."""
    return [*(value + 1 for value in loss), 0] if any(loss) else [0] * (len(loss) + 1)


@st.composite
def curves(draw, falling=True):
    """`counts [K]` and `loss [L][H][K]`, whole numbers so that everything here is exact; many ties."""
    counts = draw(knots())
    layers, heads, top = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([3, 60]))

    def curve():
        loss = draw(st.lists(st.integers(0, top), min_size=len(counts), max_size=len(counts)))
        return ending([value - min(loss) for value in sorted(loss, reverse=True)[:-1]]) if falling else loss

    return counts, [[curve() for _ in range(heads)] for _ in range(layers)]


@st.composite
def long_curves(draw):
    """`curves` measured far beyond their first step, as calibrations are: every context of that length reaches it."""
    counts, loss = draw(curves())
    if counts[-1] <= 4 * counts[1]:
        counts, loss = [*counts, 4 * counts[1] + draw(st.integers(1, 20))], [[ending(c) for c in row] for row in loss]
    return counts, loss


@st.composite
def budgets(draw, most=16):
    n = draw(st.integers(1, most))
    floor = draw(st.one_of(st.integers(0, n), st.integers(0, 16).map(lambda sixteenths: sixteenths / 16)))
    cap = draw(st.one_of(st.none(), st.integers(n, n + 8)))
    return Risk(n, scope=draw(st.sampled_from(["model", "layer"])), floor=floor, cap=cap)


def risk_curves(counts, loss):
    return RiskCurves(torch.tensor(counts), torch.tensor(loss, dtype=torch.float64))


# ---------------------------------------------------------------- curves


class TestRiskCurves:
    @settings(max_examples=150, deadline=None)
    @given(st.booleans().flatmap(lambda falling: st.tuples(st.just(falling), curves(falling=falling))))
    def test_gains_are_the_slopes_of_the_lower_convex_hull(self, drawn):
        falling, (counts, loss) = drawn
        found = risk_curves(counts, loss).gains
        for layer, gains in zip(loss, found.tolist(), strict=True):
            for curve, row in zip(layer, gains, strict=True):
                assert row == [float(gain) for gain in hull_gains(counts, curve)]
                assert row == sorted(row, reverse=True)
                if falling:
                    widths = [b - a for a, b in pairwise(counts)]
                    drop = sum(g * w for g, w in zip(row, widths, strict=True))
                    assert drop == pytest.approx(curve[0] - curve[-1], rel=1e-12)

    def test_gains_of_float32_curves(self):
        """What calibrations hold: as many counts as `calibrate` makes, convex or not."""
        generator = torch.Generator().manual_seed(0)
        counts = torch.arange(90).square() + 36
        loss = torch.rand(2, 3, 90, generator=generator).flip(-1).cumsum(-1).flip(-1)
        found = RiskCurves(counts, loss).gains
        for layer in range(2):
            for h in range(3):
                exact = hull_gains(counts.tolist(), [Fraction(value) for value in loss[layer, h].tolist()])
                torch.testing.assert_close(
                    found[layer, h], torch.tensor([float(g) for g in exact], dtype=torch.float64)
                )

    def test_length(self):
        assert risk_curves([3, 8, 20], [[[5, 1, 0]]]).length == 20

    @pytest.mark.parametrize(
        ("counts", "shape", "match"),
        [
            ([1, 2], (2, 2), r"\(2,\).*\(2, 2\).*\[L, H, K\]"),
            ([[1, 2]], (1, 1, 2), r"\(1, 2\)"),
            ([1], (1, 1, 1), "K at least 2"),
            ([1, 2, 3], (1, 1, 2), r"\(3,\)"),
            ([1, 3, 3], (1, 1, 3), "ascend"),
            ([1, 3, 2], (1, 1, 3), "ascend"),
            ([-1, 3, 4], (1, 1, 3), "ascend from 0"),
        ],
    )
    def test_bad_shapes_and_counts(self, counts, shape, match):
        with pytest.raises(ValueError, match=match):
            RiskCurves(torch.tensor(counts), torch.zeros(shape))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_bad_losses(self, value):
        loss = torch.zeros(1, 2, 3)
        loss[0, 1, 0] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            RiskCurves(torch.tensor([1, 2, 3]), loss)


def power_law(exponents, scales, counts, change=None):
    """Curves `[1, H, K]` of texts of `counts[-1]` tokens, in whose contexts step k gains `scale * m ** -exponent`.

    m is the geometric middle of the step; of those contexts, only some reach it. `change [K - 1]`: factors.
    """
    middle = torch.tensor(middles(counts), dtype=torch.float64)
    share = torch.tensor([reached(m, counts[-1]) for m in middle.tolist()], dtype=torch.float64)
    gains = torch.stack([s * middle.pow(-e) * share for e, s in zip(exponents, scales, strict=True)])
    gains = gains if change is None else gains * change
    counts = torch.tensor(counts)
    loss = torch.nn.functional.pad((gains * counts.diff()).flip(-1).cumsum(-1).flip(-1), (0, 1))
    return RiskCurves(counts, loss[None])


def random_curves(seed, counts, layers=2, heads=3, lost=0.5):
    """Falling curves of all kinds, without ties, heads unlike each other; from some step on, a few lose nothing."""
    rng = np.random.default_rng(seed)
    exponents = rng.uniform(0.2, 3.0, (layers, heads, 1))
    falls = rng.gamma(8, size=(layers, heads, len(counts) - 1)) * (np.array(middles(counts)) / counts[-1]) ** -exponents
    stop = rng.integers(1, len(counts), (layers, heads, 1))
    falls[(rng.random((layers, heads, 1)) < lost) & (np.arange(len(counts) - 1) >= stop)] = 0.0
    falls *= np.diff(counts)
    return [[[*row[::-1].cumsum()[::-1].tolist(), 0.0] for row in layer] for layer in falls]


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(10, 400),
    longer=st.floats(1.0, 6.0),
    protected=st.integers(0, 12),
    scope=st.sampled_from(["model", "layer"]),
    floor=st.sampled_from([0, 0.1, 5]),
    cap=st.sampled_from([None, 2, 1.2]),
)
def test_room_for_every_length(seed, n, longer, protected, scope, floor, cap):
    """What a layer keeps at any length fits into what is set aside for it, and that is not much more."""
    loss = torch.tensor(random_curves(seed, TestContinued.COUNTS, layers=4), dtype=torch.float64)
    risk = Risk(n, scope, floor, None if cap is None else int(cap * n))
    curves, length = RiskCurves(torch.tensor(TestContinued.COUNTS), loss), int(longer * n)
    each = [risk.allocation(curves, at, min(protected, at)).sum(1) for at in range(1, length + 1, max(1, n // 60))]
    most = torch.stack([*each, risk.allocation(curves, length, min(protected, length)).sum(1)]).amax(0)
    room = torch.tensor([layer.fixed_total(3, length, protected) for layer in layer_budgets(risk, curves)])
    assert (most <= room).all()
    assert (room <= 1.03 * most + 1 + 3 * n / 60).all()  # of the lengths some are left out here


def test_layers_that_are_joined():
    """Their sequences follow one another; heads of other plans and of other numbers are not joined."""
    loss = torch.tensor(random_curves(5, TestContinued.COUNTS, layers=4), dtype=torch.float64)
    curves = RiskCurves(torch.tensor(TestContinued.COUNTS), loss)
    layers, others = layer_budgets(Risk(40), curves), layer_budgets(Risk(40), curves)
    at = torch.tensor([90, 60]), torch.tensor([4, 4])
    joint = layers[1].joint(layers[1:3])
    assert torch.equal(joint.totals(*at), torch.cat([layer.totals(*at) for layer in layers[1:3]]))
    assert not torch.equal(layers[1].totals(*at), layers[2].totals(*at))
    assert layers[1].known_heads == 3
    part = layers[1].for_heads(1, 3)
    assert torch.equal(part.totals(*at), layers[1].totals(*at)[:, 1:])
    for other in (others[2], part, TopK(40)):
        assert layers[1].joint([layers[1], other]) is None
    mine, next_ones = (layer.tensors(torch.device("cpu")) for layer in layers[:2])
    assert mine
    assert all(one is two for one, two in zip(mine, next_ones, strict=True))  # one plan
    with pytest.raises(ValueError, match="has the curves of 4 layers, not of 3: calibrate this model"):
        Risk(40).for_layers(3, 0, curves)


def fractions(loss):
    """The same numbers, exactly."""
    return [[[Fraction(value) for value in curve] for curve in layer] for layer in loss]


class TestContinued:
    COUNTS = (*range(16, 64, 4), *range(64, 257, 8))
    BEYOND = len(COUNTS) - 1  # steps that were measured

    @pytest.mark.parametrize("length", [2, 3, 7, 100, 256, 1936, 2048, 100_000])
    def test_counts(self, length):
        """Four to a doubling, up to more than any context has."""
        known = [1, length]
        found = risk_curves(known, [[[1, 0]]]).continued()[0].tolist()
        assert found[:2] == known
        assert found == sorted(set(found))
        assert found[-1] == 1 << 24
        far = found[1:-1]
        assert {length << k for k in range(24) if length << k < 1 << 24} <= set(far)
        for a, b in pairwise(far):
            assert b <= a * 2**0.25 + 1
            if a > 50:
                assert b >= a * 2**0.25 - 2
        assert found[-1] <= far[-1] * 2**0.25 + 1

    @settings(max_examples=200, deadline=None)
    @given(curves())
    def test_gains_of_small_curves(self, drawn):
        """Ties, heads without anything to lose, one step or none that can be fitted, and from count 0 on."""
        self.compare(*drawn)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("counts", [COUNTS, (*range(40, 100, 4), 150, 200, 256), (0, 1, 3, *range(10, 900, 40))])
    def test_gains_of_random_curves(self, counts, seed):
        self.compare(list(counts), fractions(random_curves(seed, counts)))

    @staticmethod
    def compare(counts, loss):
        floats = [[[float(value) for value in curve] for curve in layer] for layer in loss]
        every, found = risk_curves(counts, floats).continued()
        assert every.tolist() == further(counts)
        assert found.dtype == torch.float64
        assert (found.diff() <= 0).all()
        for layer, rows in zip(loss, found, strict=True):
            for curve, row in zip(layer, rows, strict=True):
                wanted = tail_gains(every.tolist(), [float(gain) for gain in hull_gains(counts, curve)])
                torch.testing.assert_close(row, torch.tensor(wanted, dtype=torch.float64), rtol=1e-8, atol=0)

    @pytest.mark.parametrize("exponent", [0.5, 0.9, 1.0, 2.3, 4.0])
    def test_a_power_law_goes_on(self, exponent):
        """Measured where ever fewer contexts reach, and found again without that, from the first step to the last."""
        curves = power_law([exponent, exponent], [1.0, 5.0], self.COUNTS)
        counts, gains = curves.continued()
        assert counts[: len(self.COUNTS)].tolist() == list(self.COUNTS)
        middle = torch.tensor(middles(counts.tolist()), dtype=torch.float64)
        law = torch.stack([s * middle.pow(-exponent) for s in (1.0, 5.0)])
        torch.testing.assert_close(gains[0], law, rtol=1e-6, atol=0)
        known = gains[..., : self.BEYOND]
        assert torch.equal(known[..., middle[: self.BEYOND] < 64], curves.gains[..., middle[: self.BEYOND] < 64])
        assert (known[..., -1] > 10 * curves.gains[..., -1]).all()

    @pytest.mark.parametrize(("exponent", "taken"), [(0.0, 0.5), (0.1, 0.5), (4.5, 4.0), (7.0, 4.0)])
    def test_exponents_have_limits(self, exponent, taken):
        counts, gains = power_law([exponent], [1.0], self.COUNTS).continued()
        middle = torch.tensor(middles(counts.tolist()), dtype=torch.float64)[self.BEYOND :]
        found = gains[0, 0, self.BEYOND :]
        torch.testing.assert_close(found / found[0], (middle / middle[0]).pow(-taken), rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        ("low", "high", "fitted"), [(0, 32, False), (32, 128, True), (128, 192, True), (192, 256, False)]
    )
    def test_what_each_part_decides(self, low, high, fitted):
        """The law comes from an eighth of the length to three quarters; single steps count up to a half."""
        middle = torch.tensor(middles(self.COUNTS), dtype=torch.float64)
        inside = (middle > low) & (middle < high)
        plain = power_law([1.5], [1.0], self.COUNTS).continued()[1][0, 0]
        found = power_law([1.5], [1.0], self.COUNTS, torch.where(inside, 0.99, 1.0)).continued()[1][0, 0]
        near = (middle < 128).sum()
        single = torch.where(inside, 0.99, 1.0).double()[:near]
        torch.testing.assert_close(found[:near] / plain[:near], single, rtol=1e-7, atol=0)
        changed = (found[near:] / plain[near:] - 1).abs() > 1e-6
        assert changed.tolist() == [fitted] * len(changed)

    @settings(max_examples=150, deadline=None)
    @given(long_curves(), budgets(most=60), st.integers(1, 200), st.integers(0, 6))
    def test_longer_sequences_gain_the_most_possible(self, drawn, risk, more, protected):
        """As much as greedy water-filling, with ties broken either way; exact totals, within bounds."""
        counts, loss = drawn
        length = counts[-1] + more
        protected = min(protected, length)
        low, high = bounds(risk, length, protected)
        found = risk.allocation(risk_curves(counts, loss), length, protected).tolist()
        every, gains = gains_at(counts, loss, length)
        wanted = expected(risk, counts, loss, length, protected)
        groups = zip(found, wanted, gains, strict=True)
        if risk.scope == "model":
            groups = [(list(chain(*found)), list(chain(*wanted)), list(chain(*gains)))]
        steps = [(0, every[1]), *pairwise(every[1:])]

        def worth(kept, rows):
            return sum(
                gain * max(0, min(count, stop) - start)
                for count, row in zip(kept, rows, strict=True)
                for (start, stop), gain in zip(steps, row, strict=True)
            )

        for kept, best, rows in groups:
            assert sum(kept) == sum(best) == max(len(rows) * low, min(len(rows) * risk.n, len(rows) * high))
            assert all(low <= count <= high for count in kept)
            assert worth(kept, rows) == pytest.approx(worth(best, rows), rel=1e-6)

    @pytest.mark.parametrize("scope", ["model", "layer"])
    @pytest.mark.parametrize("seed", range(4))
    def test_longer_sequences_without_ties(self, seed, scope):
        """Just beyond the length, where the tail of most is cut off, and where nothing is."""
        loss = random_curves(seed, self.COUNTS, lost=0.3)
        curves = risk_curves(self.COUNTS, loss)
        for length, n, floor, cap in [
            (257, 100, 0.1, None),
            (300, 200, 0, None),
            (400, 60, 30, 100),
            (2000, 100, 0.0, None),
            (2000, 700, 0.2, 1500),
        ]:
            risk = Risk(n, scope=scope, floor=floor, cap=cap)
            wanted = expected(risk, list(self.COUNTS), fractions(loss), length, 16)
            assert risk.allocation(curves, length, 16).tolist() == wanted
            assert len(set(chain(*wanted))) > 2

    @settings(max_examples=60, deadline=None)
    @given(long_curves(), budgets(most=60), st.integers(1, 200))
    def test_equal_heads_of_longer_sequences_in_a_fixed_order(self, drawn, risk, more):
        """Each step of all heads before the next one, lower heads of lower layers first."""
        counts, loss = drawn
        loss = [[loss[0][0]] * 3] * 2
        length = counts[-1] + more
        found = risk.allocation(risk_curves(counts, loss), length, 2)
        assert found.tolist() == expected(risk, counts, loss, length, 2)
        assert torch.equal(found, risk.allocation(risk_curves(counts, loss), length, 2))
        rows = found.flatten() if risk.scope == "model" else found[0]
        assert (rows.diff() <= 0).all()

    def test_equal_heads_beyond_by_hand(self):
        """All steps of the four heads gain alike, and every context reaches them."""
        curves = risk_curves([10, 20, 40, 80, 160], [[[150, 140, 120, 80, 0]] * 2] * 2)
        gains = curves.continued()[1]
        assert (gains[..., :2] == 1).all()
        for n, wanted in [(15, [[20, 20], [10, 10]]), (25, [[40, 20], [20, 20]]), (30, [[40, 40], [20, 20]])]:
            assert Risk(n, floor=10).allocation(curves, 640, 10).tolist() == wanted

    def test_no_jump_behind_the_measured_length(self):
        """Where curves are what contexts that reach less and less make of a law, one token more changes little."""
        curves = power_law([1.0, 1.5, 0.7], [1.0, 20.0, 0.3], self.COUNTS)
        for n in (60, 100, 180):
            last, first = (Risk(n).allocation(curves, length, 16) for length in (256, 257))
            assert len(set(last[0].tolist())) == 3
            assert (last - first).abs().max() <= 2

    @pytest.mark.parametrize("scope", ["model", "layer"])
    @pytest.mark.parametrize(("times", "n"), [(2, 300), (16, 700), (16, 4096), (1000, 200_000)])
    def test_longer_sequences(self, scope, times, n):
        """Totals stay exact, and what lies beyond the measurement goes to the heads that fall slower there."""
        curves = power_law([2.5, 1.2, 1.8], [256.0**1.3, 1.0, 256.0**0.6], self.COUNTS)  # equal at 256
        length = 256 * times
        for floor, cap in [(0, None), (0.25, 2 * n)]:
            found = Risk(n, scope=scope, floor=floor, cap=cap).allocation(curves, length, 16)[0].tolist()
            assert sum(found) == min(3 * n, 3 * length)
            assert all(count <= min(length, cap or length) for count in found)
            if n < length:
                assert found[0] <= found[2] <= found[1]
                assert found[0] < found[1]

    @settings(max_examples=60, deadline=None)
    @given(curves(), budgets(most=60), st.integers(0, 8), st.integers(0, 30))
    def test_totals_beyond_the_measured_length(self, drawn, risk, always, prompt):
        """Token by token, with and without a pinned prompt."""
        counts, loss = drawn
        tokens = counts[-1] + torch.arange(1, 80)
        for protected in (tokens.clamp_max(always), tokens.minimum(tokens.clamp_max(prompt) + always)):
            found = torch.stack([b.totals(tokens, protected) for b in layer_budgets(risk, risk_curves(counts, loss))])
            for b, pair in enumerate(zip(tokens.tolist(), protected.tolist(), strict=True)):
                low, high = bounds(risk, *pair)
                totals = found[:, b].sum(1).tolist() if risk.scope == "layer" else [int(found[:, b].sum())]
                rows = len(loss[0]) if risk.scope == "layer" else len(loss[0]) * len(loss)
                assert totals == [max(rows * low, min(rows * risk.n, rows * high))] * len(totals)
                assert low <= int(found[:, b].min())
                assert int(found[:, b].max()) <= high


# ---------------------------------------------------------------- counts of a sequence


class TestAllocation:
    @settings(max_examples=200, deadline=None)
    @given(curves(), budgets(), st.integers(0, 45), st.integers(0, 8))
    def test_greedy_on_the_hulls(self, drawn, risk, length, protected):
        """Ties too, and whatever the protected tokens are in the calibration and in the cache."""
        counts, loss = drawn
        length = min(length, counts[-1])
        protected = min(protected, length)
        found = risk.allocation(risk_curves(counts, loss), length, protected)
        assert found.dtype == torch.int64
        assert found.tolist() == expected(risk, counts, loss, length, protected)

    @settings(max_examples=150, deadline=None)
    @given(knots(most=4), budgets(most=14), st.integers(0, 29), st.data())
    def test_convex_curves_lose_the_least_possible(self, counts, risk, length, data):
        """Against all ways to split the total, with floor, cap and short sequences; totals are exact."""
        length, steps = min(length, counts[-1]), len(counts) - 1
        protected = min(counts[0], length)
        layers, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
        rate = st.lists(st.integers(1, 12), min_size=steps, max_size=steps).map(lambda g: sorted(g, reverse=True))
        rate |= st.just([0] * steps)
        rates = [[data.draw(rate) for _ in range(heads)] for _ in range(layers)]

        def loss_at(rates, c):
            """A token fewer costs the rate of its step; below the first count, that of the first step."""
            steps = zip([0, *counts[1:-1]], counts[1:], rates, strict=True)
            return sum(rate * max(0, high - max(low, c)) for low, high, rate in steps)

        loss = [[[loss_at(row, c) for c in counts] for row in layer] for layer in rates]
        found = risk.allocation(risk_curves(counts, loss), length, protected).tolist()
        low, high = bounds(risk, length, protected)
        groups = rates if risk.scope == "layer" else [list(chain(*rates))]
        chosen = found if risk.scope == "layer" else [list(chain(*found))]
        for rows, kept in zip(groups, chosen, strict=True):
            assert all(low <= c <= high for c in kept)
            total = max(low * len(rows), min(risk.n * len(rows), high * len(rows)))
            assert sum(kept) == total
            losses = [[loss_at(row, c) for c in range(high + 1)] for row in rows]
            spent = sum(loss[c] for loss, c in zip(losses, kept, strict=True))
            assert spent == least_loss(losses, low, high, total)

    def test_a_head_with_nothing_left_to_lose(self):
        """The first is done at 20 tokens, the second would still lose by every one."""
        curves = risk_curves([10, 20, 30, 40], [[[1000, 0, 0, 0], [600, 400, 200, 0]]])
        assert Risk(25, floor=0).allocation(curves, 40, 10).tolist() == [[20, 30]]

    def test_equal_heads_in_a_fixed_order(self):
        """Equal curves: each step of all heads before the next one, lower heads of lower layers first."""
        curves = risk_curves([2, 4, 6, 8], [[[6, 4, 2, 0]] * 2] * 2)
        assert Risk(5, floor=0).allocation(curves, 8, 2).tolist() == [[6, 6], [4, 4]]
        assert Risk(5, floor=0, scope="layer").allocation(curves, 8, 2).tolist() == [[6, 4], [6, 4]]
        assert Risk(7, floor=0).allocation(curves, 8, 2).tolist() == [[8, 8], [6, 6]]

    def test_heads_that_lose_nothing_get_the_floor(self):
        curves = risk_curves([2, 10, 20], [[[90, 40, 0], [0, 0, 0]], [[9, 4, 0], [0, 0, 0]]])
        assert Risk(8, floor=0.5).allocation(curves, 20, 2).tolist() == [[17, 5], [5, 5]]
        assert Risk(8, floor=4).allocation(curves, 20, 2).tolist() == [[20, 4], [4, 4]]
        assert Risk(8, floor=0.5, cap=12).allocation(curves, 20, 2).tolist() == [[12, 5], [10, 5]]

    def test_scope_layer_gives_every_layer_the_same(self):
        """A layer that loses a thousand times more gets no more, unlike with scope="model"."""
        curves = risk_curves([2, 12, 22], [[[4000, 1000, 0], [2000, 900, 0]], [[4, 1, 0], [2, 1, 0]]])
        layered = Risk(7, scope="layer", floor=0).allocation(curves, 22, 2)
        assert layered.sum(1).tolist() == [14, 14]
        assert layered[0].tolist() == layered[1].tolist()
        assert Risk(7, floor=0).allocation(curves, 22, 2).sum(1).tolist() == [24, 4]

    @settings(max_examples=80, deadline=None)
    @given(curves(), budgets(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), min_size=1, max_size=5))
    def test_sequences_of_a_batch_are_separate(self, drawn, risk, sequences):
        tokens = [length for length, _ in sequences]
        protected = [min(pair) for pair in sequences]
        layers = layer_budgets(risk, risk_curves(*drawn))
        assert len(layers) == len(drawn[1])
        for layer, budget in enumerate(layers):
            together = budget.totals(torch.tensor(tokens), torch.tensor(protected))
            for b in range(len(sequences)):
                alone = risk.allocation(risk_curves(*drawn), tokens[b], protected[b])
                assert together[b].tolist() == alone[layer].tolist()

    @settings(max_examples=100, deadline=None)
    @given(curves(), budgets(most=40), st.integers(0, 8), st.integers(0, 30))
    def test_a_head_never_needs_what_it_gave_up(self, drawn, risk, always, prompt):
        """Token by token up to the measured length, with and without a pinned prompt."""
        counts, loss = [*drawn[0], 120], [[ending(curve) for curve in layer] for layer in drawn[1]]
        tokens = torch.arange(1, 121)
        for protected in (tokens.clamp_max(always), tokens.minimum(tokens.clamp_max(prompt) + always)):
            for budget in layer_budgets(risk, risk_curves(counts, loss)):
                found = budget.totals(tokens, protected)
                assert (found <= tokens[:, None]).all()
                assert (found[1:] <= found[:-1] + 1).all()

    def test_counts_settle_once_the_sequence_is_longer_than_the_largest(self):
        """And again beyond the measured length, once all contexts reach what is kept."""
        curves = power_law([1.0, 1.5, 0.7], [1.0, 20.0, 1.0], TestContinued.COUNTS)
        risk = Risk(80)
        settled = risk.allocation(curves, 256, 16)
        largest = int(settled.max())
        assert largest < 256
        for length in (largest, 200, 255, 256):
            assert torch.equal(risk.allocation(curves, max(length, largest), 16), settled)
        assert not torch.equal(risk.allocation(curves, largest - 1, 16), settled)
        far = risk.allocation(curves, 2000, 16)
        assert 256 * 2**0.25 > far.max() > largest  # its next step ends before 2000 / 4
        for length in (3000, 10_000, 1_000_000):
            assert torch.equal(risk.allocation(curves, length, 16), far)
        assert not torch.equal(risk.allocation(curves, 300, 16), far)


# ---------------------------------------------------------------- counts of held tokens


def held(seed, exists, dropped, heads, window, sinks):
    """An observation: bool `exists [B, n]`, of whose inner tokens every head lost the share `dropped`."""
    generator = torch.Generator().manual_seed(seed)
    batch, columns = exists.shape
    rank, tokens = exists.long().cumsum(1), exists.sum(1, keepdim=True)
    inner = (rank > sinks) & (rank <= tokens - window)
    lost = torch.rand(batch, heads, columns, generator=generator) < dropped
    lost[:, 0] = False  # the longest row: what is seen is what it holds
    keys = torch.randn(batch, heads, columns, 2, generator=generator, dtype=torch.float64)
    queries = torch.randn(batch, 2 * heads, 3, 2, generator=generator, dtype=torch.float64)
    mask = exists[:, None] & ~(lost & inner[:, None])
    observation = Observation.from_dense(keys, keys, queries, window=window, sinks=sinks, mask=mask)
    z = torch.randn(observation.keys.shape[0], generator=generator, dtype=torch.float64)
    return observation, z


def best_of(observation, z, wanted):
    """The kept set: of row r the protected tokens and the `wanted[r]` in all, by z; plain loops."""
    keep, start = observation.protected.tolist(), observation.cu_seqlens.tolist()
    for row, count in enumerate(wanted):
        tokens = range(start[row], start[row + 1])
        candidates = sorted((t for t in tokens if not keep[t]), key=lambda t: -z[t].item())
        for t in candidates[: max(0, count - sum(keep[t] for t in tokens))]:
            keep[t] = True
    return torch.tensor(keep)


class TestOnObservations:
    @settings(max_examples=80, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        pads=st.lists(st.integers(0, 12), min_size=1, max_size=3),
        columns=st.integers(1, 25),
        sizes=st.tuples(st.integers(1, 4), st.integers(0, 3)),
        dropped=st.sampled_from([0.0, 0.5]),
        prompt=st.sampled_from([0, 0, 6, 20]),
        drawn=curves(),
        risk=budgets(),
    )
    def test_counts_and_kept_sets(self, seed, pads, columns, sizes, dropped, prompt, drawn, risk):
        """Left-padded batches, ragged rows, pinned prompts; the first head holds everything."""
        counts, loss = drawn
        window, sinks = sizes
        exists = torch.arange(columns)[None] >= torch.tensor(pads)[:, None]
        observation, z = held(seed, exists, dropped if prompt == 0 else 0.0, len(loss[0]), window, sinks)
        pinned = observation.positions < prompt
        observation = replace(observation, protected=observation.protected | pinned)
        counts, loss = [*counts, 100], [[ending(curve) for curve in layer] for layer in loss]
        curve = risk_curves(counts, loss)
        for layer, budget in enumerate(layer_budgets(risk, curve)):
            wanted, protected = [], []
            for sequence in exists:
                places = sequence.nonzero()[:, 0].tolist()
                always = {*places[:sinks], *places[max(0, len(places) - window) :]} | {p for p in places if p < prompt}
                protected += [len(always)] * len(loss[0])
                wanted += expected(risk, counts, loss, len(places), len(always))[layer]
            room = budget.counts(Ranking.of(z, observation)).tolist()
            assert room == [w - p for w, p in zip(wanted, protected, strict=True)]
            assert torch.equal(budget.select(z, observation), best_of(observation, z, wanted))

    def test_what_was_evicted_counts_as_context(self):
        """`seen` is the length that caps the counts, not what a head happens to hold."""
        curve = risk_curves([2, 10, 40], [[[90, 40, 0], [8, 4, 0]]])
        exists = torch.ones(1, 30, dtype=torch.bool)
        observation, z = held(0, exists, 0.5, heads=2, window=1, sinks=1)
        budget = layer_budgets(Risk(10, floor=0), curve)[0]
        assert (budget.counts(Ranking.of(z, observation)) + 2).tolist() == [18, 2]
        grown = replace(observation, tokens=torch.tensor([12]))
        assert (budget.counts(Ranking.of(z, grown)) + 2).tolist() == [12, 8]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"n": 0}, ValueError, "n=0"),
            ({"n": 8, "scope": "head"}, ValueError, "scope='head'.*'model' or 'layer'"),
            ({"n": 8, "floor": 9}, ValueError, "floor=9.*<= 8"),
            ({"n": 8, "floor": -1}, ValueError, "floor=-1"),
            ({"n": 8, "floor": 1.5}, ValueError, "floor=1.5"),
            ({"n": 8, "floor": "0.1"}, TypeError, "floor='0.1'"),
            ({"n": 8, "floor": True}, TypeError, "floor=True"),
            ({"n": 8, "cap": 7}, ValueError, "cap=7.*>= 8"),
            ({"n": 8, "cap": 9.0}, TypeError, "cap=9.0"),
        ],
        ids=str,
    )
    def test_checked(self, arguments, error, match):
        with pytest.raises(error, match=match):
            Risk(**arguments)

    @pytest.mark.parametrize("budget", [Risk(64), Risk(64, scope="layer", floor=12, cap=80), Risk(9, floor=1.0)])
    def test_through_json_and_back(self, budget):
        values = json.loads(json.dumps(budget_to_dict(budget)))
        again = get_budget(values)
        assert again == budget
        assert type(again.floor) is type(budget.floor)  # 1 is a count, 1.0 a share
        assert values == {"name": "risk", **vars(budget)}

    def test_not_in_a_pyramid(self):
        with pytest.raises(ValueError, match=r"Risk\(n=64.*Pyramid"):
            Pyramid(Risk(64))

    def test_not_without_curves(self):
        observation, z = held(0, torch.ones(1, 9, dtype=torch.bool), 0.0, 1, 1, 1)
        with pytest.raises(TypeError, match=r"for_layers\(.*curves\)"):
            Risk(8).select(z, observation)
        with pytest.raises(ValueError, match=r"Risk\(n=64.*risk curves.*calibrate\(model\)"):
            HardKVConfig(budget=Risk(64))
        temperatures = Calibration(torch.ones(1, 1), torch.zeros(1, 1), provenance=made_for(tiny.make_model("llama")))
        with pytest.raises(ValueError, match=r"Risk\(n=64.*risk curves"):
            HardKVConfig("attention", Risk(64), calibration=temperatures, window=SIZES["window"])


# ---------------------------------------------------------------- through the cache

SIZES = {"scorer": "attention", "window": 4, "sinks": 2, "interval": 5}
PROMPT, NEW = 24, 26


def full_layers(model):
    """Those that the cache compresses."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [idx for idx, kind in enumerate(kinds) if kind == "full_attention"]


def made_for(model, scorer="attention"):
    return {
        "name": "",
        "geometry": Traits.of(model.config).geometry,
        "layers": full_layers(model),
        "scorer": describe_scorer(get_scorer(scorer)),
        "window": SIZES["window"],
    }


def handmade(model, counts, seed=0, scorer="attention"):
    """A calibration with random falling curves, and these curves as lists `[L][H][K]`, in millionths."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads = len(full_layers(model)), model.config.num_key_value_heads
    falls = torch.randint(1, 10**5, (layers, heads, len(counts) - 1), generator=generator)
    falls = falls * torch.logspace(0, -2, layers * heads).view(layers, heads, 1)  # heads differ in weight
    loss = torch.nn.functional.pad(falls.long().flip(-1).cumsum(-1).flip(-1), (0, 1))
    assert loss.max() < 1 << 24  # exact in float32
    ones = torch.ones(layers, heads)
    calibration = Calibration(ones, ones, torch.tensor(counts), loss.float(), provenance=made_for(model, scorer))
    return calibration, loss.tolist()


COUNTS = [6, 8, 11, 15, 20, 26, 33, 41, 64]


class TestThroughTheCache:
    @staticmethod
    def step(model, cache, inputs, chunks):
        """Lengths `[layers, B, H]` right after each event, with how many tokens each sequence had."""
        events = 0
        for _, stop, _ in tiny.feed(model, cache, **inputs, chunks=chunks):
            if cache.stats().events > events:
                events = cache.stats().events
                yield inputs["attention_mask"][:, :stop].sum(1).tolist(), cache.lengths().tolist()
        assert events > 4

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(
        ("name", "risk", "patience"),
        [
            ("qwen3", Risk(12), 0),
            ("qwen3", Risk(12), 2),
            ("llama", Risk(12, scope="layer"), 0),
            ("llama", Risk(14, floor=9, cap=24), 0),
            ("llama", Risk(20, floor=0.0), 0),
            ("gemma3", Risk(12), 0),  # every second layer has a sliding window
        ],
        ids=str,
    )
    def test_lengths_after_events(self, name, risk, patience, batch):
        inputs, model = tiny.make_prompts(batch, PROMPT, new=NEW), tiny.make_model(name)
        calibration, loss = handmade(model, COUNTS, scorer="snapkv")
        cache = HardKVCache(
            config=model.config,
            budget=risk,
            calibration=calibration,
            patience=patience,
            **SIZES | {"scorer": "snapkv"},
        )
        for tokens, lengths in self.step(model, cache, inputs, [PROMPT] + [1] * NEW):
            for b, length in enumerate(tokens):
                protected = min(length, SIZES["window"] + SIZES["sinks"])
                wanted = expected(risk, COUNTS, loss, length, protected)
                assert [layer[b] for layer in lengths] == wanted
        assert len({count for layer in wanted for count in layer}) > 1

    def test_chunks_padding_inside_and_a_pinned_prompt(self):
        inputs, model = tiny.make_prompts(3, 12, new=38), tiny.make_model("llama")
        inputs["attention_mask"][1, 14:17] = 0  # a whole chunk
        inputs["attention_mask"][2, 28:30] = 0
        calibration, loss = handmade(model, COUNTS)
        cache = HardKVCache(
            config=model.config, budget=Risk(20, floor=0.5), calibration=calibration, pin_prompt=True, **SIZES
        )
        exists = inputs["attention_mask"].bool()
        for tokens, lengths in self.step(model, cache, inputs, [12, 1, 1, 3, 7, 1, 5, 4, 1, 1, 4, 5, 5]):
            for b, length in enumerate(tokens):
                places = exists[b].nonzero()[:, 0].tolist()[:length]
                always = {*places[:2], *places[max(0, length - 4) :], *(p for p in places if p < 12)}
                wanted = expected(Risk(20, floor=0.5), COUNTS, loss, length, len(always))
                assert [layer[b] for layer in lengths] == wanted

    def test_tokens_taken_back_and_sequences_picked(self):
        """crop() and beam search change how long a sequence is."""
        inputs, model = tiny.make_prompts(3, PROMPT, new=NEW), tiny.make_model("llama")
        calibration, loss = handmade(model, COUNTS)
        risk = Risk(20, floor=0.0)
        cache = HardKVCache(config=model.config, budget=risk, calibration=calibration, **SIZES)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in tiny.feed(model, cache, ids, mask, [PROMPT, 3]):
            pass
        cache.crop(-2)
        picked = torch.tensor([2, 1, 0, 2])
        cache.batch_select_indices(picked)
        ids, mask, seen = ids[picked], mask[picked], PROMPT + 1
        for _ in range(8):
            with torch.no_grad():
                model(input_ids=ids[:, seen : seen + 2], attention_mask=mask[:, : seen + 2], **{CACHE: cache})
            seen += 2
        assert cache.stats().events == 4  # the last one just now
        tokens = mask[:, :seen].sum(1).tolist()
        wanted = [expected(risk, COUNTS, loss, length, 6) for length in tokens]
        assert cache.lengths().transpose(0, 1).tolist() == wanted
        assert [max(chain(*rows)) for rows in wanted] == tokens  # a head that holds everything shows the length

    @pytest.mark.parametrize("n", [12, 30])
    def test_beyond_the_measured_length(self, n):
        """What a head is to hold then may be more than it still has: it keeps all of that."""
        counts = [2, 6, 9, 14, 20, 27]
        inputs, model = tiny.make_prompts(1, PROMPT, new=NEW), tiny.make_model("llama")
        calibration, loss = handmade(model, counts)
        risk = Risk(n, floor=0.0)
        cache = HardKVCache(config=model.config, budget=risk, calibration=calibration, **SIZES)
        held, last, longer, missing = [[PROMPT] * 2 for _ in range(3)], PROMPT, 0, 0
        for (length,), lengths in self.step(model, cache, inputs, [PROMPT] + [1] * NEW):
            wanted = expected(risk, counts, loss, length, 6)
            assert sum(chain(*wanted)) == 6 * min(n, length)
            pairs = [zip(*pair, strict=True) for pair in zip(wanted, held, strict=True)]
            held = [[min(want, has + length - last) for want, has in pair] for pair in pairs]
            assert [layer[0] for layer in lengths] == held
            last, longer = length, longer + (length > counts[-1])
            missing += held != wanted
        assert longer > 3
        assert missing > 0
        assert max(chain(*wanted)) > counts[-1]

    @pytest.mark.parametrize(("name", "batch", "patience"), [("llama", 1, 0), ("qwen3", 3, 2)])
    def test_logits_equal_masked_dense_attention(self, name, batch, patience):
        inputs, model = tiny.make_prompts(batch, PROMPT, new=NEW), tiny.make_model(name)
        calibration, _ = handmade(model, COUNTS)
        cache = HardKVCache(config=model.config, budget=12, calibration=calibration, patience=patience, **SIZES)
        assert cache.settings.budget == Risk(12)
        logits, visibility = tiny.record(model, cache, **inputs, chunks=[PROMPT] + [1] * NEW)
        exists = visibility.exists
        assert (cache.lengths().sum((0, 2)) < 3 * exists.sum(1)).all()  # less than half of six rows
        reference = tiny.oracle_logits(name, visibility, inputs["input_ids"])
        torch.testing.assert_close(logits[exists], reference[exists], atol=2e-5, rtol=0)

    def test_bytes_are_those_of_topk(self):
        """The same total as a uniform budget of n, in memory too, but for the curves, held once for all layers."""
        inputs, model = tiny.make_prompts(1, PROMPT, new=NEW), tiny.make_model("llama")
        calibration, _ = handmade(model, COUNTS)
        sizes = []
        for settings_ in ({"budget": TopK(12)}, {"budget": Risk(12), "calibration": calibration}):
            cache = HardKVCache(config=model.config, **settings_, **SIZES)
            for _ in tiny.feed(model, cache, **inputs, chunks=[PROMPT] + [1] * 25):
                pass
            sizes.append((int(cache.lengths().sum()), cache.nbytes()))
        curves = cache.layers[0].budget.tensors(torch.device("cpu"))
        # five of the curves, and the cost of a token
        assert len({tensor.untyped_storage().data_ptr() for tensor in curves}) == 6
        assert sizes[1] == (sizes[0][0], sizes[0][1] + sum(tensor.nbytes for tensor in curves))
