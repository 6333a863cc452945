"""Budgets against brute force: plain Python over tokens, one decision at a time."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hardkv.selectors import AdaKV, Adaptive, Budget, Observation, Pyramid, Risk, TopK, TopP
from hardkv.selectors.ranking import Ranking


@dataclass(frozen=True)
class Case:
    """Rows of held tokens with scores; `rows[b][h]` lists `(z, position, protected)`, ascending in position."""

    rows: list
    keys: np.ndarray  # [N, D]
    queries: np.ndarray  # [B, Hq, W, D]
    columns: int

    @property
    def heads(self):
        return len(self.rows[0])

    def flat(self):
        return [token for sequence in self.rows for row in sequence for token in row]

    def z(self, dtype=torch.float64):
        return torch.tensor([z for z, _, _ in self.flat()], dtype=dtype)

    def observation(self, dtype=torch.float64):
        tokens, num_queries = self.flat(), self.queries.shape[2]
        lengths = [len(row) for sequence in self.rows for row in sequence]
        keys = torch.tensor(self.keys, dtype=dtype)
        return Observation(
            keys=keys,
            load_values=lambda: keys,
            positions=torch.tensor([position for _, position, _ in tokens], dtype=torch.int32),
            cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            queries=torch.tensor(self.queries, dtype=dtype),
            query_positions=torch.arange(self.columns - num_queries, self.columns),
            query_valid=torch.ones(len(self.rows), num_queries, dtype=torch.bool),
            protected=torch.tensor([protected for _, _, protected in tokens], dtype=torch.bool),
            scale=1.0,
            window=1,
        )

    def start(self, b, h):
        return sum(len(row) for sequence in self.rows[:b] for row in sequence) + sum(map(len, self.rows[b][:h]))

    def candidates(self, b, h):
        """Places in the row, best first: higher z, then newer."""
        row = self.rows[b][h]
        places = [place for place, (_, _, protected) in enumerate(row) if not protected]
        return sorted(places, key=lambda place: (-row[place][0], -row[place][1]))

    def num_protected(self, b, h):
        return sum(protected for _, _, protected in self.rows[b][h])

    def protected_mass(self, b, h):
        """A(F), by loops over queries and query heads."""
        row, start, group = self.rows[b][h], self.start(b, h), self.queries.shape[1] // self.heads
        num_queries, mass = self.queries.shape[2], 0.0
        for g in range(group):
            for i in range(num_queries):
                query = self.queries[b, h * group + g, i]
                seen = [p for p in range(len(row)) if row[p][1] <= self.columns - num_queries + i]
                weights = {p: np.exp(query @ self.keys[start + p]) for p in seen}
                mass += sum(weights[p] for p in seen if row[p][2]) / max(sum(weights.values()), 1e-300)
        return mass / (group * num_queries)

    def probabilities(self, b, h, temperature=1.0):
        """Softmax of z / T over the candidates, best first."""
        z = np.array([self.rows[b][h][place][0] for place in self.candidates(b, h)]) / temperature
        weights = np.exp(z - z.max()) if len(z) else z
        return weights / weights.sum()

    def kept(self, counts):
        """The kept set of `counts[b][h]` candidates a row, flat."""
        keep = []
        for b, sequence in enumerate(self.rows):
            for h, row in enumerate(sequence):
                best = self.candidates(b, h)[: counts[b][h]]
                keep += [protected or place in best for place, (_, _, protected) in enumerate(row)]
        return torch.tensor(keep, dtype=torch.bool)

    def counts(self, keep):
        """Candidates kept in every row, `[b][h]`."""
        keep, counts = keep.tolist(), []
        for b, sequence in enumerate(self.rows):
            counts.append([])
            for h in range(len(sequence)):
                start = self.start(b, h)
                counts[b].append(sum(keep[start + place] for place in self.candidates(b, h)))
        return counts


def make_case(seed, lengths, *, batch=1, ties=False, protect=0.3, group=2, num_queries=2, spread=2.0, columns=None):
    """Rows of the given lengths (B * H of them); with `ties`, few distinct scores on plateaus across heads."""
    rng = np.random.default_rng(seed)
    heads = len(lengths) // batch
    columns = max(lengths, default=0) + 3 if columns is None else columns
    rows = []
    for length in lengths:
        positions = np.sort(rng.choice(columns, size=length, replace=False))
        z = rng.integers(0, 3, size=length) / 2 if ties else spread * rng.normal(size=length)
        protected = rng.random(length) < protect
        rows.append([(float(a), int(b), bool(c)) for a, b, c in zip(z, positions, protected, strict=True)])
    return Case(
        rows=[rows[b * heads : (b + 1) * heads] for b in range(batch)],
        keys=rng.normal(size=(sum(lengths), 2)),
        queries=rng.normal(size=(batch, heads * group, num_queries, 2)),
        columns=columns,
    )


@st.composite
def cases(draw, max_length=9, ties=None, **options):
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, max_length), min_size=batch * heads, max_size=batch * heads))
    ties = draw(st.booleans()) if ties is None else ties
    protect = draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    return make_case(draw(st.integers(0, 2**32)), lengths, batch=batch, ties=ties, protect=protect, **options)


# ---------------------------------------------------------------- oracles: candidates to keep, [b][h]


def room(case, b, n):
    """n - |F| of every head, at least 0."""
    return [max(0, n - case.num_protected(b, h)) for h in range(case.heads)]


def topk(case, n):
    return [
        [min(spare, len(case.candidates(b, h))) for h, spare in enumerate(room(case, b, n))]
        for b in range(len(case.rows))
    ]


def adakv(case, n, alpha):
    """`alpha` is a Fraction, and so is everything here."""
    counts = []
    for b, sequence in enumerate(case.rows):
        base = room(case, b, n)
        pool = [(-sequence[h][p][0], -sequence[h][p][1], h) for h in range(case.heads) for p in case.candidates(b, h)]
        best = [h for _, _, h in sorted(pool)[: sum(base)]]
        target = [best.count(h) * (1 - alpha) + alpha * base[h] for h in range(case.heads)]
        have = [len(case.candidates(b, h)) for h in range(case.heads)]
        kept = [0] * case.heads
        while sum(kept) < min(sum(base), sum(have)):
            open_heads = [h for h in range(case.heads) if kept[h] < have[h]]
            neediest = max(open_heads, key=lambda h: (target[h] - kept[h], -h))
            kept[neediest] += 1
        counts.append(kept)
    return counts


def topp(case, p, floor=0, cap=None, temperature=None):
    """Also the distance of the closest decision from its threshold."""
    counts, margin = [], 1.0
    for b in range(len(case.rows)):
        counts.append([])
        for h in range(case.heads):
            have, protected = len(case.candidates(b, h)), case.num_protected(b, h)
            mass = case.protected_mass(b, h)
            kept = have
            if p < 1:
                kept = 0
                if mass < p:
                    target, held = (p - mass) / (1 - mass), 0.0
                    shares = case.probabilities(b, h, 1.0 if temperature is None else temperature[b][h])
                    for share in shares:
                        margin = min(margin, abs(held - target))
                        if held >= target:
                            break
                        held, kept = held + share, kept + 1
                margin = min(margin, abs(mass - p))
                kept = max(kept, min(max(0, floor - protected), have))
                if cap is not None:
                    kept = min(kept, max(0, cap - protected))
            counts[b].append(kept)
    return counts, margin


def mass_lost(case, b, h, temperature=1.0):
    """u of every candidate, best first, summed from the tail."""
    shares, u, tail = case.probabilities(b, h, temperature), [], 0.0
    for share in shares[::-1]:
        tail += share
        u.append((1 - case.protected_mass(b, h)) * tail)
    return u[::-1]


def bounds(case, b, h, floor, cap):
    """Fewest and most candidates of a row."""
    have, protected = len(case.candidates(b, h)), case.num_protected(b, h)
    low = min(max(0, floor - protected), have)
    return low, have if cap is None else min(max(0, cap - protected), have)


# ---------------------------------------------------------------- each against its oracle


class TestTopK:
    @settings(max_examples=60, deadline=None)
    @given(cases(), st.integers(1, 12))
    def test_oracle(self, case, n):
        keep = TopK(n).select(case.z(), case.observation())
        assert torch.equal(keep, case.kept(topk(case, n)))

    def test_n_counts_the_protected(self):
        case = make_case(0, [9, 9], protect=0.4)
        keep = TopK(6).select(case.z(), case.observation())
        assert case.observation().to_padded(keep.double(), fill=0.0).sum(-1).tolist() == [[6.0, 6.0]]

    def test_fewer_than_protected_keeps_the_protected(self):
        case = make_case(1, [9, 9], protect=0.6)
        assert case.num_protected(0, 0) > 2
        keep = TopK(2).select(case.z(), case.observation())
        assert torch.equal(keep, case.observation().protected)


class TestAdaKV:
    @settings(max_examples=80, deadline=None)
    @given(cases(), st.integers(1, 12), st.integers(0, 20).map(lambda twentieths: Fraction(twentieths, 20)))
    def test_oracle(self, case, n, alpha):
        keep = AdaKV(n, alpha=float(alpha)).select(case.z(), case.observation())
        assert torch.equal(keep, case.kept(adakv(case, n, alpha)))

    @pytest.mark.parametrize("alpha", [Fraction(0), Fraction(1, 5), Fraction(7, 20)], ids=str)
    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("seed", range(4))
    def test_oracle_at_every_n(self, seed, ties, alpha):
        """Every remainder comes up; with ties, the cut falls into plateaus that span the heads."""
        case = make_case(seed, [20, 12, 18], ties=ties, protect=0.1, columns=22)
        for n in range(1, 18):
            keep = AdaKV(n, alpha=float(alpha)).select(case.z(), case.observation())
            assert case.counts(keep) == adakv(case, n, alpha)

    @settings(max_examples=60, deadline=None)
    @given(cases(), st.integers(1, 12), st.floats(0, 1))
    def test_totals_are_exact(self, case, n, alpha):
        kept = case.counts(AdaKV(n, alpha=alpha).select(case.z(), case.observation()))
        for b in range(len(case.rows)):
            have = [len(case.candidates(b, h)) for h in range(case.heads)]
            assert sum(kept[b]) == min(sum(room(case, b, n)), sum(have))

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32), st.integers(1, 6), st.floats(0, 1), st.booleans())
    def test_within_one_of_the_paper_where_no_head_runs_short(self, seed, n, alpha, ties):
        """capacity = c_h (1 - alpha) + alpha base, rounded down or up."""
        case = make_case(seed, [30, 30, 30], ties=ties, protect=0.0)
        best = case.counts(AdaKV(n, alpha=0.0).select(case.z(), case.observation()))[0]
        kept = case.counts(AdaKV(n, alpha=alpha).select(case.z(), case.observation()))[0]
        for c, count in zip(best, kept, strict=True):
            assert abs(count - (c * (1 - alpha) + alpha * n)) < 1

    def test_alpha_0_keeps_the_best_of_the_layer(self):
        case = make_case(2, [20, 20, 20], protect=0.0)
        keep = AdaKV(5, alpha=0.0).select(case.z(), case.observation())
        assert torch.equal(keep, case.z() >= case.z().sort(descending=True).values[14])

    def test_alpha_1_is_topk(self):
        for seed in range(5):
            case = make_case(seed, [20, 15, 18, 11], batch=2, ties=seed % 2 == 0)
            topk_set = TopK(7).select(case.z(), case.observation())
            assert torch.equal(AdaKV(7, alpha=1.0).select(case.z(), case.observation()), topk_set)

    @pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
    def test_surplus_of_a_short_head_goes_to_the_others(self, alpha):
        case = make_case(3, [2, 30, 30], protect=0.0)
        kept = case.counts(AdaKV(10, alpha=alpha).select(case.z(), case.observation()))[0]
        assert sum(kept) == 30
        assert kept[0] <= 2
        if alpha == 1:
            assert kept == [2, 14, 14]

    def test_surplus_when_only_one_head_has_room(self):
        case = make_case(4, [0, 1, 50, 0], protect=0.0)
        assert case.counts(AdaKV(8).select(case.z(), case.observation())) == [[0, 1, 31, 0]]

    def test_default_alpha(self):
        assert AdaKV(8).alpha == 0.2


class TestTopP:
    @settings(max_examples=120, deadline=None)
    @given(
        cases(),
        st.one_of(st.floats(0.01, 0.999), st.just(1.0)),
        st.integers(0, 8),
        st.one_of(st.none(), st.integers(8, 10)),
        st.floats(0.2, 5),
    )
    def test_oracle(self, case, p, floor, cap, temperature):
        per_row = [[temperature * (1 + b + h) for h in range(case.heads)] for b in range(len(case.rows))]
        counts, margin = topp(case, p, floor, cap, per_row)
        assume(margin > 1e-9)
        observation = case.observation()
        keep = TopP(p, floor=floor, cap=cap).select(case.z(), observation, torch.tensor(per_row).double().flatten())
        assert torch.equal(keep, case.kept(counts))

    @settings(max_examples=40, deadline=None)
    @given(cases(), st.floats(0.05, 0.95))
    def test_no_temperature_is_one(self, case, p):
        counts, margin = topp(case, p)
        assume(margin > 1e-9)
        assert torch.equal(TopP(p).select(case.z(), case.observation()), case.kept(counts))

    @settings(max_examples=30, deadline=None)
    @given(cases(), st.integers(0, 5), st.integers(5, 6))
    def test_p_1_keeps_everything(self, case, floor, cap):
        """Tokens whose probability underflows included, whatever floor and cap say."""
        z = case.z() * 1e4
        assert TopP(1.0, floor=floor, cap=cap).select(z, case.observation()).all()

    @pytest.mark.parametrize(("p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3)])
    def test_smallest_set_that_reaches_p(self, p, kept):
        """Four equal candidates of mass 1/4: reaching p exactly is enough."""
        case = make_case(5, [4], protect=0.0)
        keep = TopP(p).select(torch.zeros(4).double(), case.observation())
        assert keep.tolist() == [False] * (4 - kept) + [True] * kept  # the newest

    @staticmethod
    def with_protected_mass(mass, temperature=None):
        """One row: one protected token that receives `mass` of the attention, four candidates sharing the rest."""
        logit = np.log(4 * mass / (1 - mass)) if 0 < mass < 1 else (800.0 if mass else -800.0)
        rows = [[[(0.0, 0, True), (4.0, 1, False), (3.0, 2, False), (2.0, 3, False), (1.0, 4, False)]]]
        return Case(rows, np.array([[logit], [0.0], [0.0], [0.0], [0.0]]), np.ones((1, 1, 1, 1)), columns=5)

    @pytest.mark.parametrize("p", [0.3, 0.6, 0.7, 0.8, 0.9, 0.99])
    @pytest.mark.parametrize("mass", [0.0, 0.5, 0.65, 0.95])
    def test_protected_mass_counts_toward_p(self, mass, p):
        case = self.with_protected_mass(mass)
        assert case.protected_mass(0, 0) == pytest.approx(mass, abs=1e-12)
        weights = np.exp([3.0, 2.0, 1.0, 0.0])
        held = np.cumsum(weights / weights.sum())
        target = (p - mass) / (1 - mass)
        expected = 0 if target <= 0 else 1 + int((held < target).sum())
        assert case.counts(TopP(p).select(case.z(), case.observation())) == [[expected]]

    def test_protected_hold_all_the_mass(self):
        """A(F) = 1: only the floor is kept, and nothing divides by zero."""
        case = self.with_protected_mass(1.0)
        assert case.counts(TopP(0.999).select(case.z(), case.observation())) == [[0]]
        assert case.counts(TopP(0.999, floor=3).select(case.z(), case.observation())) == [[2]]

    def test_target_not_positive_keeps_the_floor(self):
        case = self.with_protected_mass(0.7)
        assert case.counts(TopP(0.6).select(case.z(), case.observation())) == [[0]]
        assert case.counts(TopP(0.6, floor=4).select(case.z(), case.observation())) == [[3]]

    def test_target_of_exactly_zero_keeps_nothing(self):
        """One protected of four tokens with equal attention: A(F) = 1/4 = p."""
        rows = [[[(0.0, 0, True), (1.0, 1, False), (1.0, 2, False), (1.0, 3, False)]]]
        case = Case(rows, np.zeros((4, 1)), np.ones((1, 1, 1, 1)), columns=4)
        assert case.counts(TopP(0.25).select(case.z(), case.observation())) == [[0]]

    def test_hotter_keeps_more(self):
        """Flatter probabilities: more tokens hold the mass. Each row has its own temperature."""
        case = make_case(12, [30, 30], protect=0.1)
        counts = [
            case.counts(TopP(0.8).select(case.z(), case.observation(), torch.tensor([t, 1.0]).double()))[0]
            for t in (0.2, 1.0, 5.0)
        ]
        assert counts[0][0] < counts[1][0] < counts[2][0]
        assert counts[0][1] == counts[1][1] == counts[2][1]

    def test_floor_and_cap_count_the_protected(self):
        case = make_case(6, [20, 20], protect=0.25)
        sizes = [case.num_protected(0, h) for h in range(2)]
        few = case.counts(TopP(1e-6, floor=9).select(case.z(), case.observation()))[0]
        many = case.counts(TopP(1 - 1e-9, cap=12).select(case.z(), case.observation()))[0]
        assert few == [9 - size for size in sizes]
        assert many == [12 - size for size in sizes]

    def test_floor_above_the_length_keeps_what_there_is(self):
        case = make_case(7, [5, 0, 1])
        assert TopP(0.01, floor=50).select(case.z(), case.observation()).all()

    def test_cap_is_bounded_by_default(self):
        assert TopP(0.9).cap == 4096
        assert TopP(0.9).limit == 4096
        assert TopP(1.0).limit is None


class TestAdaptive:
    @settings(max_examples=120, deadline=None)
    @given(cases(), st.integers(1, 12), st.data())
    def test_best_set_of_the_exact_total(self, case, n, data):
        """Counts within floor and cap, an exact total, and no dropped u above a kept one."""
        floor = data.draw(st.integers(0, n))
        cap = data.draw(st.one_of(st.none(), st.integers(n, n + 4)))
        temperature = data.draw(st.floats(0.3, 3.0))
        observation = case.observation()
        keep = Adaptive(n, floor=floor, cap=cap).select(
            case.z(), observation, torch.full((observation.num_rows,), temperature, dtype=torch.float64)
        )
        counts = case.counts(keep)
        assert torch.equal(keep, case.kept(counts))
        for b in range(len(case.rows)):
            limits = [bounds(case, b, h, floor, cap) for h in range(case.heads)]
            assert sum(counts[b]) == min(sum(room(case, b, n)), sum(high for _, high in limits))
            kept_u, dropped_u = [], []
            for h, (low, high) in enumerate(limits):
                assert low <= counts[b][h] <= high
                u = mass_lost(case, b, h, temperature)
                kept_u += u[low : counts[b][h]]
                dropped_u += u[counts[b][h] : high]
            if kept_u and dropped_u:
                assert min(kept_u) >= max(dropped_u) - 1e-12

    @settings(max_examples=12, deadline=None)
    @given(st.integers(0, 2**32), st.integers(3, 9), st.booleans())
    def test_is_topp_at_the_one_p_of_that_total(self, seed, n, bounded):
        """Found by bisecting p, each sequence on its own."""
        case = make_case(seed, [12, 9, 1, 14], batch=1)
        floor, cap = (2, 10) if bounded else (0, None)
        adaptive = Adaptive(n, floor=floor, cap=cap).select(case.z(), case.observation())
        total, low, high = int(adaptive.sum()), 0.0, 1.0
        for _ in range(60):
            p = (low + high) / 2
            top = TopP(p, floor=floor, cap=cap).select(case.z(), case.observation())
            if int(top.sum()) == total:
                break
            low, high = (p, high) if int(top.sum()) < total else (low, p)
        else:
            pytest.fail(f"no p keeps {total} tokens")
        assert torch.equal(top, adaptive)

    def test_floor_and_cap_bind(self):
        """A flat and a peaked head: without bounds the flat one takes nearly all."""
        z = torch.cat([torch.arange(20) * 1e-3, torch.arange(20) * 5.0]).double()
        case = make_case(8, [20, 20], protect=0.0)

        def counts(**options):
            return case.counts(Adaptive(10, **options).select(z, case.observation()))[0]

        assert counts() == [18, 2] or counts()[0] > 16
        assert counts(floor=5) == [15, 5]
        assert counts(cap=12) == [12, 8]
        assert counts(floor=10) == [10, 10]

    def test_protected_mass_weighs_the_heads(self):
        """Equal scores: the head whose protected tokens hold 90% of the attention keeps fewer."""
        rows = [[[(0.0, 0, True), *((0.1 * j, j, False) for j in range(1, 9))] for _ in range(2)]]
        logits = [np.log(8 * 0.9 / 0.1), *[0.0] * 8, np.log(8 * 0.1 / 0.9), *[0.0] * 8]
        case = Case(rows, np.array(logits)[:, None], np.ones((1, 2, 1, 1)), columns=9)
        assert [case.protected_mass(0, h) for h in range(2)] == pytest.approx([0.9, 0.1])
        few, many = case.counts(Adaptive(5).select(case.z(), case.observation()))[0]
        assert few < many
        assert few + many == 8

    def test_underflowing_tail_keeps_the_exact_total(self):
        case = make_case(9, [20, 20], protect=0.0)
        keep = Adaptive(15).select(torch.arange(40).float() * 1e3, case.observation(torch.float32))
        assert int(keep.sum()) == 30


class TestPyramid:
    @settings(max_examples=200, deadline=None)
    @given(st.integers(1, 5000), st.integers(0, 64), st.integers(1, 50), st.integers(1, 80))
    def test_mean_over_layers_is_exactly_n(self, base, num_protected, beta, num_layers):
        base += beta  # so that the last layer keeps something
        pyramid = Pyramid(num_protected + base, beta=beta)
        n = [budget.n for budget in pyramid.for_layers(num_layers, num_protected)]
        assert sum(n) == num_layers * (num_protected + base)
        assert n == sorted(n, reverse=True)
        if num_layers > 1:
            low = base // beta
            high = 2 * base - low
            assert n[0] == num_protected + high
            assert n[-1] == num_protected + low
            for layer, count in enumerate(n):
                line = high - Fraction(layer * (high - low), num_layers - 1)
                assert abs(count - num_protected - line) <= Fraction(1, 2)

    def test_beta_1_is_flat(self):
        assert [budget.n for budget in Pyramid(100, beta=1).for_layers(7, 36)] == [100] * 7

    def test_default_beta(self):
        assert Pyramid(100).beta == 20

    def test_wraps_another_budget(self):
        pyramid = Pyramid(AdaKV(100, alpha=0.4), beta=4)
        first, *_, last = pyramid.for_layers(5, 20)
        assert first == AdaKV(20 + 140, alpha=0.4)
        assert last == AdaKV(20 + 20, alpha=0.4)
        assert Pyramid(100, beta=4).for_layers(5, 20)[0] == TopK(160)
        assert Pyramid(Adaptive(100), beta=4).for_layers(5, 20)[4] == Adaptive(40)
        assert [Pyramid(b).uses_temperature for b in (9, AdaKV(9), Adaptive(9))] == [False, False, True]

    def test_bounds_of_the_wrapped_budget_give_way_in_extreme_layers(self):
        """A floor above the last layer's n, a cap below the first's: the totals stay exact."""
        pyramid = Pyramid(Adaptive(64, floor=32, cap=96))
        layers = pyramid.for_layers(8, 8)
        assert sum(layer.n for layer in layers) == 8 * 64
        case = make_case(10, [150, 150], protect=0.0)
        for layer in layers:
            assert int(layer.select(case.z(), case.observation()).sum()) == 2 * layer.n

    def test_without_a_layer_it_says_what_to_call(self):
        case = make_case(11, [4])
        with pytest.raises(TypeError, match="for_layers"):
            Pyramid(3).select(case.z(), case.observation())

    def test_other_budgets_are_the_same_in_every_layer(self):
        for budget in (TopK(9), AdaKV(9), TopP(0.9), Adaptive(9)):
            assert list(budget.for_layers(8, 4)) == [budget] * 8
            assert list(budget.for_layers(None, 4)) == [budget]

    @pytest.mark.parametrize("budget", [TopK(5), AdaKV(5), Adaptive(5)], ids=str)
    @pytest.mark.parametrize(("length", "protected", "each"), [(9, 2, 5), (3, 2, 3), (9, 7, 7)])
    def test_fixed_total(self, budget, length, protected, each):
        assert budget.fixed_total(4, length, protected) == 4 * each

    @pytest.mark.parametrize(
        ("budget", "limit", "smallest", "calibration_p"),
        [
            (TopK(9), 9, ("n", 9), 0.9),
            (Adaptive(9, cap=20), 9, ("n", 9), 0.9),
            (Pyramid(9), 9, ("n", 9), 0.9),
            (Pyramid(AdaKV(1)), 1, ("n", 1), 0.9),
            (Pyramid(1), 1, ("n", 1), 0.9),
            (TopP(0.7, cap=8), 8, ("cap", 8), 0.7),
            (TopP(0.7, cap=None), None, None, 0.7),
            (TopP(1.0, cap=8), None, None, 1.0),
        ],
        ids=str,
    )
    def test_what_a_cache_reads_of_a_budget(self, budget, limit, smallest, calibration_p):
        assert (budget.limit, budget.smallest, budget.calibration_p) == (limit, smallest, calibration_p)

    def test_only_budgets_that_leave_layers_alike_are_wrapped(self):
        with pytest.raises(ValueError, match=r"Risk\(n=9.*Pyramid"):
            Pyramid(Risk(9))

    def test_only_equal_budgets_are_joined(self):
        for budget, other in ((TopK(9), TopK(8)), (AdaKV(9), AdaKV(9, 0.5)), (TopP(0.9), TopP(0.8))):
            assert budget.joint([budget] * 3) == budget
            assert budget.joint([budget, budget, other]) is None


# ---------------------------------------------------------------- what every budget owes


@dataclass(frozen=True)
class OddHalf(Budget):
    """A user's budget: half of the candidates, rounded up."""

    def counts(self, ranking: Ranking) -> torch.Tensor:
        return (ranking.num_candidates + 1) // 2


@dataclass(frozen=True)
class Greedy(Budget):
    """A user's budget that asks for more than there is."""

    def counts(self, ranking: Ranking) -> torch.Tensor:
        return ranking.num_candidates + 5


EVERY_BUDGET = [
    TopK(5),
    AdaKV(5),
    AdaKV(4, alpha=0.0),
    Pyramid(AdaKV(5), beta=2).for_layers(3, 1)[0],
    TopP(0.7),
    TopP(0.9, floor=3, cap=6),
    Adaptive(5),
    Adaptive(5, floor=3, cap=7),
    OddHalf(),
    Greedy(),
]


@pytest.mark.parametrize("budget", EVERY_BUDGET, ids=str)
class TestEveryBudget:
    @settings(max_examples=25, deadline=None)
    @given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_protected_and_a_prefix_of_the_order(self, budget, case, dtype):
        keep = budget.select(case.z(dtype), case.observation(dtype))
        assert keep.dtype == torch.bool
        assert keep.shape == (len(case.flat()),)
        assert keep[case.observation().protected].all()
        assert torch.equal(keep, case.kept(case.counts(keep)))

    @pytest.mark.parametrize("seed", range(3))
    def test_sequences_are_separate(self, budget, seed):
        lengths = [9, 4, 0, 12, 1, 7]
        case = make_case(seed, lengths, batch=2)
        together = budget.select(case.z(), case.observation())
        for b, part in enumerate(torch.split(together, [13, 20])):
            start = 13 * b
            keys, queries = case.keys[start : start + len(part)], case.queries[b : b + 1]
            alone = Case(case.rows[b : b + 1], keys, queries, case.columns)
            assert torch.equal(budget.select(alone.z(), alone.observation()), part)

    @pytest.mark.parametrize("scale", [0.25, 2.0, 3.7])
    def test_scores_and_temperature_scale_together(self, budget, scale):
        case = make_case(20, [9, 4, 0, 12, 1, 7], batch=2)
        temperature = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
        keep = budget.select(case.z(), case.observation(), temperature)
        assert torch.equal(budget.select(case.z() * scale, case.observation(), temperature * scale), keep)

    def test_temperature_matters_where_declared(self, budget):
        """And only there."""
        case = make_case(21, [30, 25, 28, 30], batch=2, protect=0.1)
        temperatures = [torch.tensor([t, 1.0, 1.0, t], dtype=torch.float64) for t in (0.1, 20.0)]
        cold, hot = (budget.select(case.z(), case.observation(), temperature) for temperature in temperatures)
        assert torch.equal(cold, hot) == (not budget.uses_temperature)

    def test_inputs_are_left_alone(self, budget):
        case = make_case(22, [9, 4])
        z, observation = case.z(), case.observation()
        before = [z.clone(), observation.protected.clone()]
        budget.select(z, observation)
        assert torch.equal(z, before[0])
        assert torch.equal(observation.protected, before[1])

    def test_the_default_device_plays_no_part(self, budget):
        case = make_case(25, [9, 4, 0, 12], batch=2)
        z, expected = case.z(), budget.select(case.z(), case.observation())
        observation = case.observation()
        with torch.device("meta"):
            assert torch.equal(budget.select(z, observation), expected)

    @pytest.mark.parametrize("lengths", [[0, 0], [1, 1], [0, 1], [1, 0]], ids=str)
    @pytest.mark.parametrize("protect", [0.0, 1.0])
    def test_almost_nothing_held(self, budget, lengths, protect):
        case = make_case(23, lengths, protect=protect)
        keep = budget.select(case.z(), case.observation())
        assert keep.all() or budget in (TopP(0.7), TopP(0.9, floor=3, cap=6))
        assert keep.shape == (sum(lengths),)


@pytest.mark.parametrize("budget", [TopK(5), AdaKV(5), TopP(1.0), TopP(0.9, floor=3), Adaptive(5)], ids=str)
def test_scores_of_minus_infinity_are_candidates_without_mass(budget):
    """What a user's log(0) gives: last in the order, and no other row is touched for its sake."""
    case = make_case(24, [9, 8, 7], protect=0.2)
    z = case.z()
    dead, lowest = z.masked_fill(z < 0, -torch.inf), z.masked_fill(z < 0, -1e4)
    found = budget.select(dead, case.observation()).tolist()
    assert found == budget.select(lowest, case.observation()).tolist()


@pytest.mark.parametrize("budget", [TopK(700), AdaKV(700), AdaKV(700, alpha=0.37), Adaptive(700)], ids=str)
def test_totals_are_exact_on_long_rows(budget):
    """Thousands of float32 scores on plateaus, one row empty, one shorter than n."""
    lengths = [3000, 0, 2500, 300, 1800, 2999, 1, 2048]
    case = make_case(25, lengths, batch=2, ties=True, protect=0.02)
    kept = case.counts(budget.select(case.z(torch.float32), case.observation(torch.float32)))
    for b in range(2):
        have = [len(case.candidates(b, h)) for h in range(4)]
        if isinstance(budget, TopK):
            assert kept[b] == [min(pair) for pair in zip(room(case, b, 700), have, strict=True)]
        else:
            assert sum(kept[b]) == min(sum(room(case, b, 700)), sum(have))


class TestTies:
    """The newer position wins, then the lower head."""

    @staticmethod
    def plateau(positions, protected=()):
        """Heads of one sequence with equal scores at the given positions; attention is uniform."""
        rows = [[[(1.0, position, position in protected) for position in row] for row in positions]]
        tokens = sum(map(len, positions))
        return Case(rows, np.zeros((tokens, 1)), np.ones((1, len(positions), 1, 1)), columns=100)

    def test_topk_keeps_the_newer(self):
        case = self.plateau([[0, 3, 4, 8], [1, 2, 5, 9]])
        assert TopK(2).select(case.z(), case.observation()).tolist() == [False, False, True, True] * 2

    def test_adakv_counts_the_newer_position_then_the_lower_head(self):
        case = self.plateau([[0, 1, 6, 9], [3, 7, 8, 9]])  # the four newest: 9 9 8 7
        assert case.counts(AdaKV(2, alpha=0.0).select(case.z(), case.observation())) == [[1, 3]]
        case = self.plateau([[8, 9], [8, 9], [8, 9], []])  # the four newest: 9 9 9 8, and three heads have that 8
        assert case.counts(AdaKV(1, alpha=0.0).select(case.z(), case.observation())) == [[2, 1, 1, 0]]

    def test_adakv_rounds_equal_remainders_to_the_lower_head(self):
        case = self.plateau([list(range(10))] * 3)
        z = case.z()
        z[[3, 4, 5, 13, 14, 15]] = 2.0  # of the six best, heads 0 and 1 hold three each: targets 2.5, 2.5, 1
        assert case.counts(AdaKV(2, alpha=0.5).select(z, case.observation())) == [[3, 2, 1]]

    def test_adakv_rounds_equal_remainders_of_long_rows_to_the_lower_head(self):
        """Targets 210.4, 1802.4 and 987.2: in float32 the second remainder would be the larger."""
        case, z = self.plateau([list(range(2100))] * 3), torch.ones(3, 2100, dtype=torch.float64)
        for row, best in zip(z, (13, 2003, 984), strict=True):
            row[:best] = 2.0
        assert case.counts(AdaKV(1000).select(z.flatten(), case.observation())) == [[211, 1802, 987]]

    def test_adaptive_takes_the_newer_position_then_the_lower_head(self):
        """u of equal rank is equal in heads of equal length: three tokens, one for each head and one to spare."""
        case = self.plateau([[1, 2, 3, 5], [1, 2, 4, 5], []])
        assert case.counts(Adaptive(1).select(case.z(), case.observation())) == [[1, 2, 0]]
        case = self.plateau([[1, 2, 3, 4], [1, 2, 3, 4], []])
        assert case.counts(Adaptive(1).select(case.z(), case.observation())) == [[2, 1, 0]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_plateau_over_everything(self, dtype):
        """All scores equal: every budget keeps the newest of each row it keeps anything of."""
        case = self.plateau([[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]], protected=(0, 1))
        for budget in EVERY_BUDGET:
            keep = budget.select(case.z(dtype), case.observation(dtype))
            for row in (keep[:5].tolist(), keep[5:].tolist()):
                assert row[0]
                assert row[1:] == sorted(row[1:])
