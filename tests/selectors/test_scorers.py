"""Scorers against their papers' definitions, written out as float64 loops over single tokens."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.selectors import RKV, SCORERS, Attention, Observation, SnapKV, log_affine, log_score

TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Case:
    """Rectangular input of `Observation.from_dense`, float64."""

    keys: np.ndarray  # [B, H, n, D]
    queries: np.ndarray  # [B, Hq, W, D]
    mask: np.ndarray  # bool [B, H, n]
    window: int
    sinks: int = 1
    softcap: float | None = None
    scale: float | None = None

    @property
    def shape(self):
        """B, H, n."""
        return self.mask.shape

    @property
    def group(self):
        return self.queries.shape[1] // self.shape[1]

    @property
    def rows(self):
        """Every (sequence, head), row-major."""
        return [(b, h) for b in range(self.shape[0]) for h in range(self.shape[1])]

    def observation(self, dtype=torch.float64):
        keys = torch.tensor(self.keys, dtype=dtype)
        return Observation.from_dense(
            keys,
            torch.randn(*keys.shape[:3], 3, dtype=torch.float64).to(dtype),
            torch.tensor(self.queries, dtype=dtype),
            scale=self.scale,
            window=self.window,
            sinks=self.sinks,
            mask=torch.tensor(self.mask),
            softcap=self.softcap,
        )

    # What a token is, per row; columns in ascending order.

    def tokens(self, b, h):
        return [j for j in range(self.shape[2]) if self.mask[b, h, j]]

    def window_tokens(self, b, h):
        tokens = self.tokens(b, h)
        return tokens[max(0, len(tokens) - self.window) :]

    def candidates(self, b, h):
        """Neither a sink nor in the window."""
        tokens = self.tokens(b, h)
        return [j for j in tokens[self.sinks :] if j not in self.window_tokens(b, h)]

    def counted_queries(self, b):
        """(index, column) of the queries whose column exists in some head of the sequence."""
        num_queries = self.queries.shape[2]
        columns = [(i, self.shape[2] - num_queries + i) for i in range(num_queries)]
        return [(i, column) for i, column in columns if column >= 0 and self.mask[b, :, column].any()]

    def logit(self, b, h, g, i, j):
        scale = self.keys.shape[-1] ** -0.5 if self.scale is None else self.scale
        logit = float(self.queries[b, h * self.group + g, i] @ self.keys[b, h, j]) * scale
        return logit if self.softcap is None else self.softcap * np.tanh(logit / self.softcap)


def make_case(seed, *, batch=2, heads=2, group=2, columns=12, queries=4, dim=4, keep=0.8, **options):
    rng = np.random.default_rng(seed)
    return Case(
        keys=rng.normal(size=(batch, heads, columns, dim)),
        queries=2 * rng.normal(size=(batch, heads * group, queries, dim)),
        mask=rng.random((batch, heads, columns)) < keep,
        **{"window": queries, **options},
    )


def with_lengths(case, lengths):
    """The same case with `lengths` (one a row) tokens, right-aligned like left-padded text."""
    mask = np.zeros(case.shape, dtype=bool)
    for (b, h), length in zip(case.rows, lengths, strict=True):
        mask[b, h, case.shape[2] - length :] = True
    return replace(case, mask=mask)


# ---------------------------------------------------------------- the definitions


def softmax(logits):
    """`{token: logit}` -> `{token: probability}`."""
    if not logits:
        return {}
    largest = max(logits.values())
    weights = {j: np.exp(logit - largest) for j, logit in logits.items()}
    return {j: weight / sum(weights.values()) for j, weight in weights.items()}


def mean_over_queries(case, b, h, logits_of_query, tokens):
    """`{token: mean over counted queries of its probability}`; a query that sees nothing gives 0."""
    counted = case.counted_queries(b)
    received = dict.fromkeys(tokens, 0.0)
    for i, column in counted:
        visible = [j for j in tokens if j <= column]
        for j, probability in softmax({j: logits_of_query(i, j) for j in visible}).items():
            received[j] += probability / len(counted)
    return received


def head_attention(case, b, h, g):
    """One query head's attention, mean over the queries, over all keys of the row."""
    return mean_over_queries(case, b, h, lambda i, j: case.logit(b, h, g, i, j), case.tokens(b, h))


def attention(case, b, h):
    heads = [head_attention(case, b, h, g) for g in range(case.group)]
    return {j: sum(head[j] for head in heads) / case.group for j in case.tokens(b, h)}


def pooled(scores, tokens, pooling, kernel_size):
    """Scores of consecutive `tokens`, smoothed; what lies beyond the ends is 0 (avg) or absent (max)."""
    if pooling == "none":
        return {j: scores[j] for j in tokens}
    half = kernel_size // 2
    result = {}
    for place, j in enumerate(tokens):
        near = [scores[k] for k in tokens[max(0, place - half) : place + half + 1]]
        result[j] = max(near) if pooling == "max" else sum(near) / kernel_size
    return result


def snapkv(case, b, h, kernel_size=7, pooling="max", group_reduce="mean"):
    """Scores of all tokens before the window."""
    heads = [head_attention(case, b, h, g) for g in range(case.group)]
    window = case.window_tokens(b, h)
    before = [j for j in case.tokens(b, h) if j not in window]
    if group_reduce == "mean":
        scores = {j: sum(head[j] for head in heads) / case.group for j in before}
    else:
        scores = {j: max(head[j] for head in heads) for j in before}
    return pooled(scores, before, pooling, kernel_size)


def redundancy(keys, threshold):
    """R of one row from its n x n cosines, keys `[n, D]`."""
    n = len(keys)
    cosine = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                cosine[i, j] = (keys[i] / max(np.linalg.norm(keys[i]), 1e-8)) @ (
                    keys[j] / max(np.linalg.norm(keys[j]), 1e-8)
                )
    for i in range(n):
        similar = [j for j in range(n) if cosine[i, j] > threshold]
        if similar:
            cosine[i, similar[-1]] = 0.0
    return [sum(cosine[i, j] for i in range(n)) / n for j in range(n)]


def rkv(case, b, h, lam=0.1, threshold=0.5, kernel_size=7, pooling="max"):
    """s of all tokens of the row; importance is 0 in the window."""
    tokens, window = case.tokens(b, h), case.window_tokens(b, h)
    before = [j for j in tokens if j not in window]

    def largest_logit(i, j):
        return max(case.logit(b, h, g, i, j) for g in range(case.group))

    importance = pooled(mean_over_queries(case, b, h, largest_logit, before), before, pooling, kernel_size)
    redundant = softmax(dict(zip(tokens, redundancy(case.keys[b, h, tokens], threshold), strict=True)))
    return {j: lam * importance.get(j, 0.0) - (1 - lam) * redundant[j] for j in tokens}


# ---------------------------------------------------------------- comparison


def assert_log_scores(case, z, scores_of_row, tokens_of_row):
    """z = log(s + tiny) at the given tokens of every row."""
    padded = case.observation().to_padded(z).flatten(0, 1)
    for row, (b, h) in enumerate(case.rows):
        scores = scores_of_row(b, h)
        for slot, j in enumerate(case.tokens(b, h)):
            if j in tokens_of_row(b, h):
                assert float(padded[row, slot]) == pytest.approx(np.log(scores[j] + TINY), rel=1e-9, abs=1e-9)


def assert_affine_scores(case, z, scores_of_row):
    """exp(z) is the image of s under one increasing affine map onto [0, 1] of a sequence's candidates."""
    padded = case.observation().to_padded(z).flatten(0, 1)
    for b in range(case.shape[0]):
        expected, found = [], []
        for row, (b_row, h) in enumerate(case.rows):
            if b_row != b:
                continue
            scores = scores_of_row(b, h)
            for slot, j in enumerate(case.tokens(b, h)):
                if j in case.candidates(b, h):
                    expected.append(scores[j])
                    found.append(np.exp(float(padded[row, slot])))
        if len(expected) < 2:
            continue
        low, high = min(expected), max(expected)
        if high - low < 1e-6:
            continue
        for score, unit in zip(expected, found, strict=True):
            assert unit == pytest.approx((score - low) / (high - low), rel=1e-9, abs=1e-9)


LENGTHS = [
    pytest.param([12, 12, 12, 12], id="full"),
    pytest.param([0, 1, 2, 3], id="shorter-than-window"),
    pytest.param([5, 6, 0, 12], id="shorter-than-kernel"),
    pytest.param([1, 1, 1, 1], id="ones"),
    pytest.param([0, 0, 0, 9], id="one-row"),
    pytest.param([0, 0, 7, 0], id="empty-sequence"),
]
SNAPKV_OPTIONS = [
    {"kernel_size": kernel_size, "pooling": pooling, "group_reduce": group_reduce}
    for pooling, kernel_size in [("none", 7), ("max", 1), ("max", 3), ("max", 7), ("avg", 1), ("avg", 5), ("avg", 7)]
    for group_reduce in ["mean", "max"]
]
RKV_OPTIONS = [
    {},
    {"lam": 0.0},
    {"lam": 1.0},
    {"lam": 0.5, "threshold": 0.0},
    {"lam": 0.3, "threshold": 0.9, "kernel_size": 3},
    {"lam": 0.7, "pooling": "avg", "kernel_size": 5},
    {"lam": 0.7, "pooling": "none"},
]


class TestAttention:
    @pytest.mark.parametrize("lengths", LENGTHS)
    @pytest.mark.parametrize("group", [1, 3])
    def test_lengths(self, lengths, group):
        case = with_lengths(make_case(1, group=group), lengths)
        z = Attention().score(case.observation())
        assert_log_scores(case, z, lambda b, h: attention(case, b, h), case.tokens)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 2**32), st.integers(1, 6), st.floats(0.0, 1.0), st.sampled_from([None, 0.5, 30.0]))
    def test_ragged(self, seed, queries, keep, softcap):
        case = make_case(seed, columns=7, queries=queries, keep=keep, softcap=softcap, scale=0.7)
        z = Attention().score(case.observation())
        assert_log_scores(case, z, lambda b, h: attention(case, b, h), case.tokens)

    def test_more_queries_than_columns(self):
        case = make_case(2, columns=3, queries=5, keep=1.0, window=1)
        assert_log_scores(case, Attention().score(case.observation()), lambda b, h: attention(case, b, h), case.tokens)

    def test_probabilities_of_a_row_sum_to_one(self):
        case = with_lengths(make_case(3), [12, 5, 4, 8])  # at least one key for each of the 4 queries
        observation = case.observation()
        sums = observation.to_padded(Attention().score(observation).exp(), fill=0.0).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)

    def test_invalid_queries_do_not_count(self):
        """Whatever stands in a padded query changes nothing, and the mean is over the others."""
        case = make_case(4, keep=1.0)
        case.mask[0, :, 8:10] = False  # the first two of four query columns
        other = replace(case, queries=case.queries.copy())
        other.queries[0, :, :2] = 100.0
        assert case.counted_queries(0) == [(2, 10), (3, 11)]
        z = Attention().score(case.observation())
        torch.testing.assert_close(Attention().score(other.observation()), z, rtol=0, atol=0)
        assert_log_scores(case, z, lambda b, h: attention(case, b, h), case.tokens)

    def test_no_valid_query(self):
        case = make_case(5, keep=1.0)
        case.mask[0, :, 8:] = False  # all four query columns of sequence 0
        observation = case.observation()
        attended = observation.to_padded(observation.attention)
        assert torch.all(attended[0, :, :8] == 0)
        assert_log_scores(case, Attention().score(observation), lambda b, h: attention(case, b, h), case.tokens)

    def test_causal_inside_the_window(self):
        """The newest token is seen by the newest query only."""
        case = make_case(6, columns=6, queries=3, group=1, keep=1.0)
        case.keys[..., -1, :] = 50 * case.queries[:, :, 0]  # what the oldest query would love
        a = case.observation().to_padded(case.observation().attention)
        for b, h in case.rows:
            newest = softmax({j: case.logit(b, h, 0, 2, j) for j in range(6)})[5]
            assert float(a[b, h, 5]) == pytest.approx(newest / 3, rel=1e-9)


class TestSnapKV:
    @pytest.mark.parametrize("options", SNAPKV_OPTIONS, ids=str)
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_lengths(self, options, lengths):
        case = with_lengths(make_case(11, queries=3), lengths)
        z = SnapKV(**options).score(case.observation())
        assert_log_scores(
            case,
            z,
            lambda b, h: snapkv(case, b, h, **options),
            lambda b, h: [j for j in case.tokens(b, h) if j not in case.window_tokens(b, h)],
        )

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32), st.sampled_from(SNAPKV_OPTIONS), st.integers(0, 5), st.sampled_from([None, 2.0]))
    def test_ragged(self, seed, options, window, softcap):
        case = make_case(seed, columns=9, queries=3, window=window, softcap=softcap, keep=0.7)
        z = SnapKV(**options).score(case.observation())
        assert_log_scores(
            case,
            z,
            lambda b, h: snapkv(case, b, h, **options),
            lambda b, h: [j for j in case.tokens(b, h) if j not in case.window_tokens(b, h)],
        )

    def test_defaults_are_the_canonical_ones(self):
        assert SnapKV() == SnapKV(kernel_size=7, pooling="max", group_reduce="mean")

    def test_window_takes_part_in_the_softmax(self):
        """A key of the window that draws all attention leaves nothing for the tokens before it."""
        case = make_case(12, columns=8, queries=2, group=1, batch=1, heads=1, keep=1.0)
        case.keys[0, 0, 6] = 100 * case.queries[0, 0].sum(0)
        weak = np.exp(SnapKV().score(case.observation())[:6].numpy())
        del_window = case.keys.copy()
        del_window[0, 0, 6] = 0.0
        strong = np.exp(SnapKV().score(replace(case, keys=del_window).observation())[:6].numpy())
        assert weak.max() < 1e-3 * strong.max()

    @pytest.mark.parametrize("pooling", ["max", "avg", "none"])
    def test_window_tokens_are_the_lowest(self, pooling):
        case = with_lengths(make_case(13, queries=3), [12, 5, 3, 1])
        observation = case.observation()
        z = SnapKV(pooling=pooling).score(observation)
        assert torch.all(z[observation.window_mask] == np.log(TINY))

    def test_max_pooling_makes_a_plateau_of_the_kernel_width(self):
        case = make_case(14, columns=30, queries=2, batch=1, heads=1, group=1, keep=1.0)
        case.keys[0, 0, 14] = 20 * case.queries[0, 0].mean(0)  # a peak
        z = SnapKV(kernel_size=5).score(case.observation())
        plateau = (z == z.max()).nonzero()[:, 0].tolist()
        assert plateau == [12, 13, 14, 15, 16]


class TestRKV:
    @pytest.mark.parametrize("options", RKV_OPTIONS, ids=str)
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_lengths(self, options, lengths):
        case = with_lengths(make_case(21, queries=3, dim=3), lengths)
        z = RKV(**options).score(case.observation())
        assert z.shape == (case.mask.sum(),)
        assert torch.isfinite(z).all()
        assert_affine_scores(case, z, lambda b, h: rkv(case, b, h, **options))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32), st.sampled_from(RKV_OPTIONS), st.integers(0, 4), st.sampled_from([None, 2.0]))
    def test_ragged(self, seed, options, window, softcap):
        case = make_case(seed, columns=11, queries=3, window=window, softcap=softcap, keep=0.7, dim=3)
        assert_affine_scores(case, RKV(**options).score(case.observation()), lambda b, h: rkv(case, b, h, **options))

    def test_defaults_are_the_canonical_ones(self):
        assert RKV() == RKV(lam=0.1, threshold=0.5, kernel_size=7, pooling="max")

    def test_all_rows_empty(self):
        case = with_lengths(make_case(22), [0, 0, 0, 0])
        assert RKV().score(case.observation()).shape == (0,)

    @pytest.mark.parametrize("tile", [1, 5, 40])
    def test_small_tiles_change_nothing(self, monkeypatch, tile):
        case = make_case(23, columns=20, dim=3)
        whole = RKV().score(case.observation())
        monkeypatch.setattr("hardkv.kernels.similarity.reference.CPU_COSINES", tile)
        torch.testing.assert_close(RKV().score(case.observation()), whole, rtol=0, atol=1e-12)

    def test_newest_of_duplicates_ranks_above_the_older(self):
        case = make_case(24, columns=10, queries=2, batch=1, heads=1, keep=1.0, dim=8)
        case.keys[0, 0, [2, 4, 6]] = case.keys[0, 0, 2]
        z = RKV(lam=0.0).score(case.observation())
        assert z[6] > z[4]
        assert z[6] > z[2]

    def test_order_between_heads_survives(self):
        """One affine map a sequence: the best candidate of the weaker head does not reach the top."""
        case = make_case(25, batch=1, heads=2, keep=1.0, dim=3)
        scores = {(h, j): s for h in range(2) for j, s in rkv(case, 0, h).items() if j in case.candidates(0, h)}
        z = case.observation().to_padded(RKV().score(case.observation()))
        by_z = sorted(scores, key=lambda key: float(z[0, key[0], key[1]]))
        assert by_z == sorted(scores, key=scores.get)
        best = [max(scores[h, j] for j in case.candidates(0, h)) for h in range(2)]
        assert abs(best[0] - best[1]) > 1e-6  # else the case proves nothing


class TestLogAffine:
    @staticmethod
    def observation():
        """Two sequences of two heads; of six tokens, the first and the newest are protected."""
        keys = torch.zeros(2, 2, 6, 1)
        return Observation.from_dense(keys, keys, torch.zeros(2, 2, 1, 1), window=1, sinks=1)

    def test_candidates_fill_the_range_and_protected_tokens_stay_in_it(self):
        scores = [[[-9, 2, 3, 4, 6, 9], [9, 3, 4, 5, 5, 5]], [[0, 20, 30, 20, 30, 0], [40, 20, 20, 20, 20, 40]]]
        expected = [[[0, 0, 1, 2, 4, 4], [4, 1, 2, 3, 3, 3]], [[0, 0, 4, 0, 4, 0], [4, 0, 0, 0, 0, 4]]]
        z = log_affine(torch.tensor(scores).double().flatten(), self.observation())
        torch.testing.assert_close(z.exp(), torch.tensor(expected).double().flatten() / 4, rtol=0, atol=1e-12)
        assert z.max() == 0  # not above the range, not even by the tiny number that keeps 0 finite

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
    def test_scores_that_are_not_finite_are_not_hidden(self, wrong):
        score = torch.arange(24.0)
        score[2] = wrong
        z = log_affine(score, self.observation())
        assert not torch.isfinite(z[:12]).all()
        assert torch.isfinite(z[12:]).all()

    def test_equal_scores_and_no_candidates(self):
        keys = torch.zeros(2, 1, 6, 1)
        mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])  # of the second, all tokens are protected
        observation = Observation.from_dense(keys, keys, torch.zeros(2, 1, 1, 1), window=1, sinks=1, mask=mask)
        assert log_affine(torch.full((8,), 5.0), observation).tolist() == [0.0] * 8


def test_log_score_adds_the_tiny_number():
    tiny = torch.tensor([0.0, TINY, 1.0]).double()
    torch.testing.assert_close(log_score(tiny).exp(), torch.tensor([TINY, 2 * TINY, 1.0]).double(), rtol=1e-12, atol=0)


# ---------------------------------------------------------------- what every scorer owes

EVERY_SCORER = [
    *(pytest.param(SCORERS[name](), id=name) for name in ("attention", "snapkv", "rkv")),
    pytest.param(SnapKV(pooling="avg", group_reduce="max"), id="snapkv-avg-max"),
    pytest.param(SnapKV(pooling="none"), id="snapkv-none"),
    pytest.param(RKV(lam=0.6, pooling="avg"), id="rkv-avg"),
]
RAGGED = [12, 0, 1, 3, 7, 12]


def test_every_registered_scorer_is_in_the_matrix():
    assert {type(parameter.values[0]) for parameter in EVERY_SCORER} >= {
        cls for cls in SCORERS.values() if cls.__module__.startswith("hardkv.")
    }


@pytest.mark.parametrize("scorer", EVERY_SCORER)
class TestEveryScorer:
    @staticmethod
    def case(seed=31, lengths=RAGGED):
        return with_lengths(make_case(seed, batch=3), lengths)

    @pytest.mark.parametrize(
        ("given_dtype", "expected"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    @pytest.mark.parametrize("lengths", [RAGGED, [0] * 6, [1] * 6, [2, 0, 0, 0, 0, 0]], ids=str)
    def test_finite_flat_and_in_the_accumulation_dtype(self, scorer, given_dtype, expected, lengths):
        observation = self.case(lengths=lengths).observation(given_dtype)
        z = scorer.score(observation)
        assert z.shape == (sum(lengths),)
        assert z.dtype == expected
        assert torch.isfinite(z).all()

    def test_half_precision_input_is_scored_in_float32(self, scorer):
        """bf16 tensors give what the same numbers give in float32."""
        case = self.case()
        case = replace(
            case,
            keys=torch.tensor(case.keys).bfloat16().double().numpy(),
            queries=torch.tensor(case.queries).bfloat16().double().numpy(),
        )
        half, full = scorer.score(case.observation(torch.bfloat16)), scorer.score(case.observation(torch.float32))
        torch.testing.assert_close(half, full, rtol=0, atol=0)

    def test_large_activations_stay_finite(self, scorer):
        case = self.case()
        case = replace(case, keys=1000 * case.keys, queries=50 * case.queries)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert torch.isfinite(scorer.score(case.observation(dtype))).all()

    def test_permuted_sequences_permute_z(self, scorer):
        case = self.case()
        order = [2, 0, 1]
        permuted = replace(case, keys=case.keys[order], queries=case.queries[order], mask=case.mask[order])
        z = case.observation().to_padded(scorer.score(case.observation()), fill=0.0)
        permuted_z = permuted.observation().to_padded(scorer.score(permuted.observation()), fill=0.0)
        torch.testing.assert_close(permuted_z, z[order], rtol=1e-12, atol=1e-12)

    def test_a_sequence_does_not_depend_on_the_others(self, scorer):
        case = self.case(32)
        other = self.case(33, lengths=[1, 4, 1, 3, 9, 0])
        other.keys[1], other.queries[1], other.mask[1] = case.keys[1], case.queries[1], case.mask[1]
        alone = Case(case.keys[1:2], case.queries[1:2], case.mask[1:2], case.window)
        for neighbours, b in ((case, 1), (other, 1), (alone, 0)):
            z = neighbours.observation().to_padded(scorer.score(neighbours.observation()))[b]
            z = [z[h, : RAGGED[2 + h]] for h in range(2)]
            if neighbours is case:
                expected = z
            torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)

    def test_values_and_state_play_no_part(self, scorer):
        """The same observation scores the same twice, and `from_dense` gave it random values each time."""
        case = self.case()
        first, second = case.observation(), case.observation()
        assert not torch.equal(first.values, second.values)
        assert torch.equal(scorer.score(first), scorer.score(second))
        assert torch.equal(scorer.score(first), scorer.score(first))

    def test_the_default_device_plays_no_part(self, scorer):
        observation = make_case(45).observation()
        expected = scorer.score(replace(observation))
        with torch.device("meta"):
            assert torch.equal(scorer.score(observation), expected)

    def test_small_buckets_change_nothing(self, scorer, monkeypatch):
        case = self.case(34)
        whole = scorer.score(case.observation())
        for limit in (1, 13):
            monkeypatch.setattr("hardkv.kernels.rows.MAX_BUCKET_TOKENS", limit)
            torch.testing.assert_close(scorer.score(case.observation()), whole, rtol=1e-12, atol=1e-12)

    def test_tokens_held_elsewhere_in_the_text_score_alike(self, scorer):
        """Only the order of held tokens matters, not the gaps between their columns."""
        case = make_case(35, columns=8, queries=2, keep=1.0, batch=1)
        columns = [0, 3, 4, 9, 10, 13, 14, 15]  # the queries' columns stay the last two
        sparse = np.zeros((1, 2, 16, 4))
        mask = np.zeros((1, 2, 16), dtype=bool)
        sparse[:, :, columns], mask[:, :, columns] = case.keys, True
        spread = replace(case, keys=sparse, mask=mask)
        torch.testing.assert_close(
            scorer.score(spread.observation()), scorer.score(case.observation()), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    ("scorer", "own_score"),
    [
        pytest.param(Attention(), attention, id="attention"),
        pytest.param(SnapKV(pooling="none"), lambda *row: snapkv(*row, pooling="none"), id="snapkv-none"),
        pytest.param(SnapKV(pooling="avg"), lambda *row: snapkv(*row, pooling="avg"), id="snapkv-avg"),
        pytest.param(RKV(), rkv, id="rkv"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_order_by_z_is_order_by_the_methods_own_score(scorer, own_score, seed):
    """Over all candidates of a sequence, heads mixed."""
    case = make_case(seed + 40, columns=14, keep=0.9, dim=3)
    z = case.observation().to_padded(scorer.score(case.observation()))
    for b in range(case.shape[0]):
        rated = []
        for h in range(case.shape[1]):
            scores, tokens = own_score(case, b, h), case.tokens(b, h)
            rated += [(scores[j], float(z[b, h, tokens.index(j)])) for j in case.candidates(b, h)]
        rated.sort()
        assert len(rated) > 6
        for (low, z_low), (high, z_high) in pairwise(rated):
            assert z_low < z_high or high - low < 1e-12
