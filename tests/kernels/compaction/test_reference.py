import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels.compaction import gather_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_by_address_over_the_concatenation(sizes, shape, dtype, data):
    """Addresses may repeat, skip and run backwards; empty buffers take up no addresses."""
    total = sum(sizes)
    address = data.draw(st.lists(st.integers(0, total - 1), max_size=12)) if total else []
    sources, number = [], 0
    for size in sizes:
        tokens = [torch.full(shape, number + i).to(dtype) for i in range(size)]
        sources.append(torch.stack(tokens) if tokens else torch.zeros(0, *shape).to(dtype))
        number += size
    gathered = gather_tokens(sources, torch.tensor(address, dtype=torch.int64))
    assert gathered.dtype == dtype
    assert gathered.shape == (len(address), *shape)
    for place, token in enumerate(address):
        assert torch.all(gathered[place] == token)


@pytest.mark.parametrize("sizes", [[4], [4, 0], [0, 4], [2, 2]], ids=str)
def test_result_is_new_and_exactly_sized(sizes):
    """The result is no view of a source: the sources can be freed, and writing to them does not change it."""
    sources = [torch.ones(size, 8) for size in sizes]
    gathered = gather_tokens(sources, torch.arange(3))
    for source in sources:
        source.zero_()
    assert torch.all(gathered == 1)
    assert gathered.is_contiguous()
    assert gathered.untyped_storage().nbytes() == 3 * 8 * 4


def test_sources_may_be_strided():
    dense = torch.arange(24).reshape(2, 3, 4).transpose(0, 1)  # [3, 2, 4]
    gathered = gather_tokens([dense, torch.zeros(1, 2, 4, dtype=torch.int64)], torch.tensor([2, 3]))
    assert gathered[0].tolist() == [[8, 9, 10, 11], [20, 21, 22, 23]]
    assert gathered[1].tolist() == [[0] * 4] * 2
