"""Test the Triton kernel against one softmax over all tokens that a query sees, in float64."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from hardkv.kernels.attention import dense_allowed  # noqa: E402
from hardkv.kernels.attention.triton import launch  # noqa: E402
from hardkv.kernels.attention.triton_schedule import UNIT, Schedule, query_blocks  # noqa: E402
from hardkv.kernels.rows import cumulative  # noqa: E402
from tests.kernels.attention import test_reference as reference  # noqa: E402
from tests.kernels.poison import poisoned  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-3}
# The interpreter multiplies bfloat16 numbers as integers.
DTYPES = [dtype for dtype in TOLERANCE if GPU or dtype != torch.bfloat16]

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


def rounded(case, dtype):
    """Return the case with its inputs rounded to `dtype`."""

    def near(array):
        return torch.tensor(array).to(dtype).double().numpy()

    names = ("query", "keys", "values", "dense_keys", "dense_values")
    return replace(case, **{name: near(getattr(case, name)) for name in names})


def run(case, dtype=torch.float32, programs=5, schedule=None, **options):
    def tensor(array):
        return torch.tensor(array, dtype=dtype, device=DEVICE)

    q_len, capacity = case.query.shape[2], case.dense_keys.shape[2]
    group = case.query.shape[1] // case.dense_keys.shape[1]
    cu_seqlens = cumulative(torch.tensor(case.lengths, dtype=torch.int64, device=DEVICE))
    positions = torch.tensor(case.positions, dtype=torch.int32, device=DEVICE)
    fill = torch.tensor(case.fill, device=DEVICE)
    mask = None
    if case.new_mask is not None:
        new_mask = torch.tensor(case.new_mask, device=DEVICE)
        mask = dense_allowed(positions, fill, case.start, q_len, new_mask)
    schedule = schedule or Schedule.make(
        cu_seqlens,
        sum(case.lengths),
        capacity,
        programs,
        query_blocks(group, q_len, max(case.keys.shape[1], case.values.shape[1]), dtype.itemsize),
    )
    tensors = [tensor(each) for each in (case.query, case.keys, case.values, case.dense_keys, case.dense_values)]
    sinks = None if case.sinks is None else tensor(case.sinks)
    with poisoned():
        return launch(
            *tensors[:3],
            cu_seqlens,
            *tensors[3:],
            positions,
            fill,
            schedule,
            start=case.start,
            scale=case.scale,
            softcap=case.softcap,
            sinks=sinks,
            new_mask=mask,
            **options,
        )


def assert_matches(case, dtype=torch.float32, programs=5, **options):
    case = rounded(case, dtype)
    out, lse = (t.double().cpu() for t in run(case, dtype, programs, **options))
    expected_out, expected_lse = case.expected()
    assert (out - expected_out).norm() <= TOLERANCE[dtype] * expected_out.norm()
    empty = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    torch.testing.assert_close(lse[~empty], expected_lse[~empty], rtol=1e-5, atol=1e-5 if dtype.itemsize > 2 else 1e-3)


def make_case(seed, lengths, batch, *, dim=16, value_dim=None, **options):
    """Make a reference case with the given head dimension."""
    case = reference.make_case(seed, lengths, batch, **options)
    rng = np.random.default_rng(seed)

    def widened(array, width):
        return rng.normal(size=(*array.shape[:-1], width))

    value_dim = dim if value_dim is None else value_dim
    return replace(
        case,
        query=widened(case.query, dim),
        keys=widened(case.keys, dim),
        dense_keys=widened(case.dense_keys, dim),
        values=widened(case.values, value_dim),
        dense_values=widened(case.dense_values, value_dim),
        scale=dim**-0.5,
    )


class TestAgainstOneSoftmax:
    @settings(max_examples=25 if not GPU else 60, deadline=None)
    @given(st.data())
    def test_anything_ragged(self, data):
        case = reference.draw_case(data, make_case, batch=2, longest=300, group=6, q_len=4)
        assert_matches(case, programs=data.draw(st.sampled_from([1, 3, 5, 40])))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
    def test_head_dims(self, dim, value_dim, dtype):
        assert_matches(make_case(dim, [150, 0, 1, 33], 2, dim=dim, value_dim=value_dim, group=4), dtype)

    @pytest.mark.parametrize("group", [1, 3, 7, 16])
    def test_groups(self, group):
        assert_matches(make_case(group, [40, 3], 1, group=group))

    def test_more_queries_than_a_block_holds(self):
        assert_matches(make_case(0, [40, 3], 1, group=5, q_len=17, capacity=20))

    def test_many_queries_of_large_heads(self):
        assert_matches(make_case(6, [40, 3], 1, group=16, q_len=4, dim=256, capacity=5))

    def test_one_giant_row(self):
        assert_matches(make_case(1, [0, 700, 1, 0], 2))

    def test_nothing_to_see(self):
        case = make_case(2, [0, 5, 0, 0], 2, old=[0, 0], q_len=1, padding=1.0)
        out, lse = run(case)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert bool((lse[1] == -torch.inf).all())

    def test_what_lies_behind_the_fill_does_not_count(self):
        case = make_case(3, [20, 9], 1, old=[2])
        for array in (case.dense_keys, case.dense_values):
            array[:, :, case.fill[0] :] = np.nan
        assert_matches(case)

    def test_strided_query_and_dense_tier(self):
        case = make_case(4, [20, 9, 3, 60], 2, q_len=2)
        expected = run(case)
        columns_first = replace(
            case,
            **{
                name: np.swapaxes(np.ascontiguousarray(np.swapaxes(getattr(case, name), 1, 2)), 1, 2)
                for name in ("query", "dense_keys", "dense_values")
            },
        )
        out, lse = run(columns_first)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


class TestSchedule:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(0, 40), st.integers(1, 40))
    def test_shares_cover_every_row_once(self, lengths, capacity, programs):
        schedule = Schedule.make(cumulative(torch.tensor(lengths, device=DEVICE)), sum(lengths), capacity, programs)
        units = [max(1, -(-(length + capacity) // UNIT)) for length in lengths]
        line = [row for row, count in enumerate(units) for _ in range(count)]
        share, first_row = int(schedule.share), schedule.first_row.tolist()
        assert schedule.row_start.tolist() == [0, *np.cumsum(units)]
        assert len(first_row) <= programs
        assert len(first_row) * share >= len(line)
        for program, row in enumerate(first_row):
            assert row == (line[program * share] if program * share < len(line) else len(lengths))

    @settings(max_examples=50, deadline=None)
    @given(st.data(), st.integers(1, 8), st.integers(0, 40), st.integers(1, 40))
    def test_recut_in_place_is_as_made_anew(self, data, rows, capacity, programs):
        """Recutting for rows with as many programs equals a new schedule, and keeps the addresses."""
        lengths = [data.draw(st.lists(st.integers(0, 300), min_size=rows, max_size=rows)) for _ in range(2)]
        before, after = (cumulative(torch.tensor(each, device=DEVICE)) for each in lengths)
        schedule = Schedule.make(before, 300 * rows, capacity, programs)
        addresses = [tensor.data_ptr() for tensor in schedule.tensors()]
        schedule.recut(after, capacity)
        anew = Schedule.make(after, 300 * rows, capacity, programs)
        assert [tensor.data_ptr() for tensor in schedule.tensors()] == addresses
        for mine, new in zip(schedule.tensors(), anew.tensors(), strict=True):
            assert torch.equal(mine, new)

    def test_launches_leave_the_counters_at_zero(self):
        case = make_case(5, [100, 300], 1)
        cu_seqlens = cumulative(torch.tensor(case.lengths, device=DEVICE))
        schedule = Schedule.make(cu_seqlens, 400, case.dense_keys.shape[2], 5)
        first = run(case, schedule=schedule)
        again = run(case, schedule=schedule)
        assert torch.equal(first[0], again[0])
        assert not bool(schedule.arrived.any())
