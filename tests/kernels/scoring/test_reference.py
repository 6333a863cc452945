"""Test the attention received from the window's queries against float64 loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels.rows import Rows
from hardkv.kernels.scoring import window_attention

REDUCTIONS = ["mean", "max", "max_logits", "mean_square"]


def make_case(seed, lengths, *, batch=1, group=2, queries=3, dim=3, columns=None):
    """Make the arrays of one call; rows hold random ascending columns, and some queries are invalid."""
    rng = np.random.default_rng(seed)
    columns = max(lengths) + 4 if columns is None else columns
    held = [np.sort(rng.choice(columns, size=length, replace=False)) for length in lengths]
    return {
        "queries": 2 * rng.normal(size=(batch, len(lengths) // batch * group, queries, dim)),
        "query_positions": np.arange(columns - queries, columns),
        "query_valid": rng.random((batch, queries)) < 0.8,
        "keys": rng.normal(size=(sum(lengths), dim)),
        "positions": np.concatenate(held).astype(np.int32),
        "lengths": lengths,
        "exclude": rng.random(sum(lengths)) < 0.3,
        "sinks": rng.normal(size=len(lengths) // batch * group),
    }


def run(case, reduce, *, exclude=False, softcap=None, sinks=False, dtype=torch.float64):
    return window_attention(
        torch.tensor(case["queries"], dtype=dtype),
        torch.tensor(case["query_positions"]),
        torch.tensor(case["query_valid"]),
        torch.tensor(case["keys"], dtype=dtype),
        torch.tensor(case["positions"]),
        Rows.of(torch.tensor([0, *np.cumsum(case["lengths"])], dtype=torch.int32)),
        num_kv_heads=len(case["lengths"]) // len(case["queries"]),
        scale=0.7,
        softcap=softcap,
        reduce=reduce,
        exclude=torch.tensor(case["exclude"]) if exclude else None,
        sinks=torch.tensor(case["sinks"], dtype=dtype) if sinks else None,
    )


def expected(case, reduce, *, exclude=False, softcap=None, sinks=False):
    queries, lengths = case["queries"], case["lengths"]
    batch, num_heads, window, _ = queries.shape
    heads = len(lengths) // batch
    group = num_heads // heads
    starts = np.cumsum([0, *lengths])
    received = np.zeros(sum(lengths))
    for row in range(len(lengths)):
        b, h = divmod(row, heads)
        valid = [i for i in range(window) if case["query_valid"][b, i]]
        shares = np.zeros((1 if reduce == "max_logits" else group, sum(lengths)))
        for i in valid:
            seen = [
                t
                for t in range(starts[row], starts[row + 1])
                if case["positions"][t] <= case["query_positions"][i] and not (exclude and case["exclude"][t])
            ]
            if not seen:
                continue
            logits = np.array([[queries[b, h * group + g, i] @ case["keys"][t] for t in seen] for g in range(group)])
            logits = 0.7 * logits
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            if reduce == "max_logits":
                logits = logits.max(0, keepdims=True)
            weights = np.exp(logits)
            total = weights.sum(1, keepdims=True)
            if sinks:
                total += np.exp(case["sinks"][h * group : (h + 1) * group, None])
            power = 2 if reduce == "mean_square" else 1
            shares[:, seen] += (weights / total) ** power / len(valid)
        received += shares.max(0) if reduce == "max" else shares.mean(0)
    return torch.tensor(received)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 8), min_size=2, max_size=2),
    group=st.integers(1, 4),
    queries=st.integers(1, 5),
    exclude=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
)
def test_ragged(reduce, seed, lengths, group, queries, exclude, softcap):
    case = make_case(seed, lengths * 2, batch=2, group=group, queries=queries)
    found = run(case, reduce, exclude=exclude, softcap=softcap)
    assert found.dtype == torch.float64
    reference = expected(case, reduce, exclude=exclude, softcap=softcap)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduce", ["mean", "max", "mean_square"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    group=st.integers(1, 4),
    exclude=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
)
def test_learned_sinks(reduce, seed, lengths, group, exclude, softcap):
    """A sink is one logit per query head that takes its part of every softmax and receives nothing."""
    case = make_case(seed, lengths * 2, batch=2, group=group)
    found = run(case, reduce, exclude=exclude, softcap=softcap, sinks=True)
    reference = expected(case, reduce, exclude=exclude, softcap=softcap, sinks=True)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduce", ["mean", "mean_square"])
def test_sinks_of_every_size(reduce, dtype):
    """A sink far below every logit has no effect; a sink far above takes everything."""
    case = make_case(6, [7, 5, 6, 4], batch=2)
    case["sinks"][:] = -1e4
    torch.testing.assert_close(run(case, reduce, sinks=True, dtype=dtype), run(case, reduce, dtype=dtype))
    case["sinks"][:] = 1e4
    assert torch.all(run(case, reduce, sinks=True, dtype=dtype) == 0)
    case["sinks"][:4] = [1e4, 1e4, -1e4, -1e4]  # only both query heads of the first KV head
    mixed = run(case, reduce, sinks=True, dtype=dtype)
    first = torch.tensor([True] * 7 + [False] * 5 + [True] * 6 + [False] * 4)
    assert torch.all(mixed[first] == 0)
    torch.testing.assert_close(mixed[~first], run(case, reduce, dtype=dtype)[~first])


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("lengths", [[0, 0], [1, 0], [1, 1], [0, 33], [16, 15]], ids=str)
def test_lengths(reduce, lengths):
    case = make_case(1, lengths)
    torch.testing.assert_close(run(case, reduce), expected(case, reduce), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_excluded_tokens_receive_nothing_and_take_nothing(reduce):
    case = make_case(2, [9, 5])
    found = run(case, reduce, exclude=True)
    assert torch.all(found[torch.tensor(case["exclude"])] == 0)
    without = case["keys"].copy()
    without[case["exclude"]] = 1e6  # their values do not matter
    torch.testing.assert_close(run({**case, "keys": without}, reduce, exclude=True), found, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_no_valid_query_or_all_excluded(reduce):
    case = make_case(3, [6, 2])
    case["query_valid"][:] = False
    assert torch.all(run(case, reduce) == 0)
    case["query_valid"][:] = True
    case["exclude"][:] = True
    assert torch.all(run(case, reduce, exclude=True) == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_accumulates_in_float32(dtype):
    case = make_case(4, [9, 5])
    for name in ("queries", "keys"):
        case[name] = torch.tensor(case[name]).to(dtype).double().numpy()
    found = run(case, "mean", dtype=dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(case, "mean"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_row_that_overflowed_does_not_reach_the_others(reduce):
    case = make_case(5, [7, 5, 6, 4], batch=2)
    clean = run(case, reduce)
    case["keys"][0] = np.inf
    torch.testing.assert_close(run(case, reduce)[7:], clean[7:], rtol=0, atol=0)
