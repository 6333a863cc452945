"""Test attention over the tiers against one softmax over all tokens that a query sees, in float64."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hardkv.kernels.attention import attend, dense_allowed, merge, tiered_attention
from hardkv.kernels.rows import Rows


@dataclass(frozen=True)
class Case:
    """Hold a condensed tier of ragged rows, a dense tier with a fill per sequence, and new queries."""

    query: np.ndarray  # [B, Hq, q, D]
    lengths: list  # condensed tokens per row
    keys: np.ndarray  # [N, D]
    values: np.ndarray  # [N, Dv]
    dense_keys: np.ndarray  # [B, H, C, D]
    dense_values: np.ndarray  # [B, H, C, Dv]
    positions: np.ndarray  # [B, C]
    fill: np.ndarray  # [B]
    start: int  # column of the first new query
    scale: float = 0.6
    softcap: float | None = None
    sinks: np.ndarray | None = None  # [Hq]
    new_mask: np.ndarray | None = None  # bool [B, q, q]

    def run(self, dtype=torch.float64):
        def tensor(array):
            return torch.tensor(array, dtype=dtype)

        q_len = self.query.shape[2]
        new_mask = None if self.new_mask is None else torch.tensor(self.new_mask)
        positions, fill = torch.tensor(self.positions, dtype=torch.int32), torch.tensor(self.fill)
        return tiered_attention(
            tensor(self.query),
            tensor(self.keys),
            tensor(self.values),
            Rows.of(torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32)),
            tensor(self.dense_keys),
            tensor(self.dense_values),
            dense_allowed(positions, fill, self.start, q_len, new_mask),
            scale=self.scale,
            softcap=self.softcap,
            sinks=None if self.sinks is None else tensor(self.sinks),
        )

    def expected(self):
        """Compute out and lse with loops."""
        batch, num_heads, q_len, _ = self.query.shape
        num_kv_heads = self.dense_keys.shape[1]
        out = np.zeros((batch, num_heads, q_len, self.values.shape[-1]))
        lse = np.full((batch, num_heads, q_len), -np.inf)
        starts = np.cumsum([0, *self.lengths])
        for b in range(batch):
            for head in range(num_heads):
                h = head // (num_heads // num_kv_heads)
                row = b * num_kv_heads + h
                held = range(starts[row], starts[row + 1])
                for i in range(q_len):
                    slots = [c for c in range(self.fill[b]) if self.sees(b, i, self.positions[b, c])]
                    keys = [*(self.keys[t] for t in held), *(self.dense_keys[b, h, c] for c in slots)]
                    values = [*(self.values[t] for t in held), *(self.dense_values[b, h, c] for c in slots)]
                    logits = [float(self.query[b, head, i] @ key) * self.scale for key in keys]
                    if self.softcap is not None:
                        logits = [self.softcap * np.tanh(logit / self.softcap) for logit in logits]
                    total = logits if self.sinks is None else [*logits, self.sinks[head]]
                    if total:
                        lse[b, head, i] = max(total) + np.log(sum(np.exp(logit - max(total)) for logit in total))
                    for logit, value in zip(logits, values, strict=True):
                        out[b, head, i] += np.exp(logit - lse[b, head, i]) * value
        return torch.tensor(out), torch.tensor(lse)

    def sees(self, b, i, position):
        """Return whether new query i sees a dense token at `position`."""
        if position < self.start or self.new_mask is None:
            return position <= self.start + i
        return bool(self.new_mask[b, i, position - self.start])


def make_case(seed, lengths, batch, *, group=2, q_len=1, capacity=6, old=None, padding=0.0, **options):
    """Make a case; `old`: dense tokens before this call, per sequence; `padding`: share of new tokens not stored."""
    rng = np.random.default_rng(seed)
    heads, start, dim, value_dim = len(lengths) // batch, 50, 4, 3
    old = rng.integers(0, capacity + 1, size=batch) if old is None else np.array(old)
    positions = rng.integers(0, 100, size=(batch, capacity + q_len))  # garbage after the filled slots
    fill = np.zeros(batch, dtype=np.int64)
    for b in range(batch):
        new = [start + i for i in range(q_len) if rng.random() >= padding]
        stored = [*np.sort(rng.choice(start, size=old[b], replace=False)), *new]
        fill[b] = len(stored)
        positions[b, : len(stored)] = stored
    return Case(
        query=rng.normal(size=(batch, heads * group, q_len, dim)),
        lengths=list(lengths),
        keys=rng.normal(size=(sum(lengths), dim)),
        values=rng.normal(size=(sum(lengths), value_dim)),
        dense_keys=rng.normal(size=(batch, heads, capacity + q_len, dim)),
        dense_values=rng.normal(size=(batch, heads, capacity + q_len, value_dim)),
        positions=positions,
        fill=fill,
        start=start,
        **options,
    )


def draw_case(data, make, *, batch, longest, group, q_len):
    """Draw a case of `make` by hypothesis, varying everything up to the given sizes."""
    batch, heads = data.draw(st.integers(1, batch)), data.draw(st.integers(1, 2))
    lengths = data.draw(st.lists(st.integers(0, longest), min_size=batch * heads, max_size=batch * heads))
    group, q_len = data.draw(st.integers(1, group)), data.draw(st.integers(1, q_len))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    return make(
        data.draw(st.integers(0, 2**32)),
        lengths,
        batch,
        group=group,
        q_len=q_len,
        padding=data.draw(st.sampled_from([0.0, 0.4])),
        scale=data.draw(st.sampled_from([1.0, 0.3])),
        softcap=data.draw(st.sampled_from([None, 0.5, 20.0])),
        sinks=rng.normal(size=heads * group) if data.draw(st.booleans()) else None,
        new_mask=rng.random((batch, q_len, q_len)) < 0.6 if data.draw(st.booleans()) else None,
    )


def assert_matches(case, tolerance=1e-9):
    (out, lse), (expected_out, expected_lse) = case.run(), case.expected()
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance)


class TestTieredAttention:
    @settings(max_examples=80, deadline=None)
    @given(st.data())
    def test_against_one_softmax(self, data):
        assert_matches(draw_case(data, make_case, batch=3, longest=9, group=8, q_len=5))

    @pytest.mark.parametrize("group", range(1, 9))
    def test_group_sizes(self, group):
        assert_matches(make_case(group, [5, 0, 1, 8], batch=2, group=group, q_len=2))

    @pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 40, 3], [64, 0, 0, 63]], ids=str)
    def test_lengths(self, lengths):
        assert_matches(make_case(1, lengths, batch=2, q_len=3))

    def test_empty_dense_tier(self):
        case = make_case(2, [4, 1, 7, 3], batch=2, capacity=0, old=[0, 0])
        empty = replace(
            case,
            dense_keys=case.dense_keys[:, :, :0],
            dense_values=case.dense_values[:, :, :0],
            positions=case.positions[:, :0],
            fill=np.zeros(2, dtype=np.int64),
        )
        assert_matches(empty)

    def test_queries_that_see_nothing(self):
        """Without condensed and dense tokens the result is 0 and -inf; the other sequence does not change."""
        case = make_case(3, [0, 0, 5, 2], batch=2, old=[0, 4], padding=0.0)
        case.fill[0] = 0
        out, lse = case.run()
        assert torch.all(out[0] == 0)
        assert torch.all(lse[0] == -torch.inf)
        assert_matches(case)

    def test_queries_that_see_only_the_sink(self):
        case = make_case(4, [0, 0], batch=1, sinks=np.array([0.5, -1.0, 2.0, 0.0]))
        case.fill[0] = 0
        out, lse = case.run()
        assert torch.all(out == 0)
        assert lse[0, :, 0].tolist() == [0.5, -1.0, 2.0, 0.0]

    def test_causal_among_the_new_tokens(self):
        """The first of several new tokens does not see the later ones, so it equals a separate call."""
        case = make_case(5, [3, 6], batch=1, q_len=4, old=[2])
        whole, _ = case.run()
        for i in range(4):
            alone = replace(case, query=case.query[:, :, i : i + 1], fill=case.fill - 3 + i, start=case.start + i)
            torch.testing.assert_close(alone.run()[0][:, :, 0], whole[:, :, i], rtol=1e-12, atol=1e-12)

    def test_order_of_tokens_and_tier_do_not_matter(self):
        """A token counts the same in both tiers."""
        case = make_case(6, [4, 4], batch=1, old=[5])
        both = case.run()[0]
        keys = np.concatenate([case.keys.reshape(2, 4, -1), case.dense_keys[:, :, :5][0]], 1)
        values = np.concatenate([case.values.reshape(2, 4, -1), case.dense_values[:, :, :5][0]], 1)
        moved = replace(
            case,
            lengths=[9, 9],
            keys=keys[:, ::-1].reshape(18, -1),
            values=values[:, ::-1].reshape(18, -1),
            dense_keys=case.dense_keys[:, :, 5:],
            dense_values=case.dense_values[:, :, 5:],
            positions=case.positions[:, 5:],
            fill=case.fill - 5,
        )
        torch.testing.assert_close(moved.run()[0], both, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes(self, dtype):
        """The output has the query's dtype and lse at least float32, both as close as the inputs' rounding allows."""
        case = make_case(7, [9, 0, 1, 30], batch=2, q_len=3, softcap=30.0, sinks=np.zeros(4))
        names = ["query", "keys", "values", "dense_keys", "dense_values"]
        rounded = {name: torch.tensor(getattr(case, name)).to(dtype).double().numpy() for name in names}
        case = replace(case, **rounded)
        (out, lse), (expected_out, expected_lse) = case.run(dtype), case.expected()
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), expected_out, rtol=max(eps, 2e-6), atol=max(eps, 2e-6))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_logits_beyond_half_precision(self, dtype):
        """Use dot products that overflow float16."""
        case = make_case(8, [9, 0, 1, 12], batch=2, q_len=2)
        names = ["query", "keys", "dense_keys"]
        case = replace(case, **{name: np.round(100 * getattr(case, name)) * 8 for name in names})
        (out, lse), (expected_out, _) = case.run(dtype), case.expected()
        assert torch.isfinite(out).all()
        assert lse.max() > 70000
        if dtype == torch.float16:  # the inputs are exact there
            torch.testing.assert_close(out.double(), expected_out, rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
    def test_slots_behind_the_fill_are_never_read(self, garbage):
        """These slots may hold leftovers of the allocator or of a padded token."""
        case = make_case(9, [3, 0, 5, 1], batch=2, q_len=2, old=[1, 4])
        clean = case.run()
        for b in range(2):
            case.dense_keys[b, :, case.fill[b] :] = garbage
            case.dense_values[b, :, case.fill[b] :] = garbage
        for found, expected in zip(case.run(), clean, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_row_that_overflowed_does_not_reach_the_others(self, value):
        """Rows of one bucket have different lengths; padding must not carry row 0's numbers into other rows."""
        case = make_case(10, [7, 5, 6, 4], batch=2)
        clean = case.run()
        case.keys[0], case.values[0] = value, value
        for found, expected in zip(case.run(), clean, strict=True):
            torch.testing.assert_close(found[:, 2:], expected[:, 2:], rtol=0, atol=0)  # KV head 1
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)

    @pytest.mark.parametrize("limit", [1, 50, 200])
    def test_small_blocks_change_nothing(self, monkeypatch, limit):
        case = make_case(11, [9, 0, 1, 5], batch=2, q_len=5, new_mask=np.tril(np.ones((2, 5, 5), dtype=bool)))
        whole = case.run()
        monkeypatch.setattr("hardkv.kernels.attention.reference.MAX_LOGITS", limit)
        for found, expected in zip(case.run(), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert_matches(case)

    def test_small_buckets_change_nothing(self, monkeypatch):
        case = make_case(12, [9, 0, 1, 5, 8, 8], batch=2, q_len=2)
        whole = case.run()
        monkeypatch.setattr("hardkv.kernels.rows.MAX_BUCKET_TOKENS", 1)
        for found, expected in zip(case.run(), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_inputs_are_left_alone(self):
        case = make_case(13, [3, 2], batch=1)
        query, keys = torch.tensor(case.query), torch.tensor(case.keys)
        dense, mask = torch.tensor(case.dense_keys), torch.ones(1, 1, 7, dtype=torch.bool)
        before = [tensor.clone() for tensor in (query, keys, dense, mask)]
        rows = Rows.of(torch.tensor([0, 3, 5]))
        tiered_attention(query, keys, keys, rows, dense, dense, mask, scale=1.0, softcap=2.0, sinks=torch.zeros(4))
        for tensor, expected in zip((query, keys, dense, mask), before, strict=True):
            assert torch.equal(tensor, expected)


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest tensor created while active, in elements."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


class TestAttend:
    def test_blocks_bound_the_logits(self, monkeypatch):
        """64 queries with rows * G * n logits each make 32768; blocks stay within the limit, the keys or queries."""
        allowed = torch.ones(2, 1, 1, 128, dtype=torch.bool)

        def largest(dim):
            query, key = torch.randn(2, 2, 64, dim), torch.randn(2, 128, dim)
            with LargestTensor() as blocks:
                attend(query, key, key, allowed, scale=1.0)
            return blocks.numel

        assert largest(4) == 2 * 128 * 4
        assert largest(128) == 2 * 128 * 128
        monkeypatch.setattr("hardkv.kernels.attention.reference.MAX_LOGITS", 2048)
        assert largest(16) == 2 * 128 * 16  # the keys themselves, in logits of 4 queries at a time
        assert largest(4) == 2 * 128 * 4

    @pytest.mark.parametrize("shape", [(3, 1, 1, 6), (3, 2, 1, 6), (3, 1, 4, 6), (3, 2, 4, 6), (1, 1, 4, 6)], ids=str)
    @pytest.mark.parametrize("limit", [1, 1 << 26])
    def test_allowed_broadcasts(self, monkeypatch, shape, limit):
        monkeypatch.setattr("hardkv.kernels.attention.reference.MAX_LOGITS", limit)
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
        key, value = torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
        allowed = torch.rand(shape, generator=generator) < 0.7
        out, lse = attend(query, key, value, allowed, scale=0.5)
        logits = (query @ key[:, None].mT * 0.5).masked_fill(~allowed, -torch.inf)
        torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-12, atol=1e-12)
        weights = logits.softmax(-1).nan_to_num(0.0)
        torch.testing.assert_close(out, weights @ value[:, None], rtol=1e-12, atol=1e-12)

    def test_no_keys(self):
        out, lse = attend(
            torch.randn(2, 3, 1, 4),
            torch.randn(2, 0, 4),
            torch.randn(2, 0, 5),
            torch.ones(2, 1, 1, 0).bool(),
            scale=1.0,
        )
        assert torch.equal(out, torch.zeros(2, 3, 1, 5))
        assert torch.equal(lse, torch.full((2, 3, 1), -torch.inf))


class TestMerge:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32), st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def test_parts_equal_the_whole(self, seed, sizes):
        """Merge disjoint token sets, some empty, in any split."""
        rng = np.random.default_rng(seed)
        logits, values = [20 * rng.normal(size=n) for n in sizes], [rng.normal(size=(n, 3)) for n in sizes]
        parts = []
        for logit, value in zip(logits, values, strict=True):
            if not len(logit):
                parts.append((torch.zeros(3, dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64)))
                continue
            lse = np.logaddexp.reduce(logit)
            parts.append((torch.tensor(np.exp(logit - lse) @ value), torch.tensor(lse)))
        out, lse = merge(parts)
        flat = np.concatenate(logits)
        if not len(flat):
            assert torch.equal(out, torch.zeros(3, dtype=torch.float64))
            assert lse == -torch.inf
            return
        assert float(lse) == pytest.approx(np.logaddexp.reduce(flat), rel=1e-12, abs=1e-12)
        expected = np.exp(flat - np.logaddexp.reduce(flat)) @ np.concatenate(values)
        torch.testing.assert_close(out, torch.tensor(expected), rtol=1e-9, atol=1e-9)

    def test_far_apart_parts_do_not_overflow(self):
        parts = [(torch.ones(2), torch.tensor(300.0)), (torch.zeros(2), torch.tensor(-300.0))]
        out, lse = merge(parts)
        assert out.tolist() == [1.0, 1.0]
        assert float(lse) == 300.0


class TestDenseAllowed:
    def test_fill_and_causality(self):
        """Columns 3 and 5 are old, 7 and 8 new; sequence 1 holds only column 4 and the second new token."""
        positions = torch.tensor([[3, 5, 7, 8, 0], [4, 8, 1, 2, 6]], dtype=torch.int32)
        allowed = dense_allowed(positions, torch.tensor([4, 2]), 7, 2, None)
        assert allowed.int().tolist() == [
            [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
        ]

    def test_given_mask_rules_the_new_tokens_only(self):
        positions = torch.tensor([[3, 5, 7, 8, 0]], dtype=torch.int32)
        new_mask = torch.tensor([[[False, True], [True, False]]])
        allowed = dense_allowed(positions, torch.tensor([4]), 7, 2, new_mask)
        assert allowed.int().tolist() == [[[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]]]

    def test_one_mask_for_all_sequences(self):
        positions = torch.tensor([[7, 8, 0], [2, 7, 8]], dtype=torch.int32)
        allowed = dense_allowed(positions, torch.tensor([2, 3]), 7, 2, torch.ones(1, 2, 2, dtype=torch.bool))
        assert allowed.int().tolist() == [[[1, 1, 0]] * 2, [[1, 1, 1]] * 2]
