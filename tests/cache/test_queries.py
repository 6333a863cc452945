"""Test the ring of queries against a dictionary of columns."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.cache.storage.queries import QueryRing

BATCH, HEADS, DIM = 2, 2, 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_against_a_dictionary(data):
    """Chunks, pads among them or not; columns taken back; tokens that a captured step wrote by itself."""
    capacity = data.draw(st.integers(1, 6), "capacity")
    ring = QueryRing(torch.zeros(BATCH, HEADS, 1, DIM), capacity)
    columns: dict[int, tuple[float, torch.Tensor]] = {}
    end = 0
    for number in range(data.draw(st.integers(1, 12), "calls")):
        end -= data.draw(st.integers(0, min(end, 2)), "taken back") if number else 0
        columns = {column: held for column, held in columns.items() if column < end}
        count = data.draw(st.integers(1, 4), "tokens")
        queries = torch.arange(end, end + count) + 100.0 * number
        kind = data.draw(st.sampled_from(["all", "some", "captured"]), "kind")
        valid = torch.ones(BATCH, count, dtype=torch.bool)
        if kind == "captured":
            for i in range(count):
                ring.buffer[:, :, (end + i) % capacity] = queries[i]
            ring.appended(count, end + count)
        else:
            if kind == "some":
                bits = st.lists(st.booleans(), min_size=BATCH * count, max_size=BATCH * count)
                valid = torch.tensor(data.draw(bits, "valid")).view(BATCH, count)
            given_valid = None if kind == "all" else valid
            ring.append(queries.expand(BATCH, HEADS, -1)[..., None], given_valid, end)
        columns |= {end + i: (queries[i].item(), valid[:, i]) for i in range(count)}
        end += count

        held = ring.available(end)
        assert held >= min(capacity, count)
        assert held <= capacity
        found, found_valid = ring.newest(capacity, end)
        assert found.shape == (BATCH, HEADS, held, DIM)
        for i, column in enumerate(range(end - held, end)):
            query, expected = columns[column]
            assert (found[:, :, i] == query).all()
            assert (found_valid[:, i] == expected).all()
