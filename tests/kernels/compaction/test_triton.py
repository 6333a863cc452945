"""Test the Triton gather against indexing the concatenation: copies are equal bit by bit."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hardkv.kernels.compaction import triton as compaction
from hardkv.kernels.compaction.triton import gather_keys, gather_tiers
from hardkv.kernels.compaction.triton_in_place import compact
from tests.kernels.poison import poisoned

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16, torch.int64]
LAYOUTS = ["flat", "contiguous", "transposed", "sliced", "permuted"]

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


def tokens(*shape, dtype=torch.float32):
    return (torch.randn(shape, device=DEVICE) * 100).to(dtype)


def dense(layout, batch, heads, capacity, dim, dtype=torch.float32):
    """Make a dense buffer `[B, H, C, D]`, or `[n, D]`, with the memory layouts of models and tiers."""
    if layout == "flat":
        return tokens(batch * heads * capacity, dim, dtype=dtype)
    if layout == "contiguous":
        return tokens(batch, heads, capacity, dim, dtype=dtype)
    if layout == "transposed":  # the layout of a projection's output
        return tokens(batch, capacity, heads, dim, dtype=dtype).transpose(1, 2)
    if layout == "sliced":
        return tokens(batch, heads, capacity + 3, dim, dtype=dtype)[:, :, 2:-1]
    return tokens(heads, capacity, batch, dim + 1, dtype=dtype).permute(2, 0, 1, 3)[..., :dim]


def concatenated(buffers):
    return torch.cat([buffer.flatten(0, -2) for buffer in buffers])


def guarded(shape, dtype, sentinel=77):
    """Make a contiguous tensor between two stretches of sentinels, and a check that these are unchanged."""
    size = shape.numel()
    whole = torch.full((size + 128,), sentinel, dtype=dtype, device=DEVICE)

    def untouched():
        return bool((whole[:64] == sentinel).all() and (whole[size + 64 :] == sentinel).all())

    return whole[64 : size + 64].view(shape), untouched


def check(keys, values, address, index):
    """Compare both functions with indexing; they write into poisoned memory and into given memory."""
    total = address.shape[0]
    positions = torch.randint(0, 1 << 30, (total,), dtype=torch.int32, device=DEVICE)
    misses = torch.randint(0, 256, (total,), device=DEVICE).to(torch.uint8)
    sources = list(zip(keys, values, strict=True))
    chosen = address[index]
    expected = concatenated(keys)[chosen], concatenated(values)[chosen], positions[index], misses[index]
    with poisoned():
        found = gather_tiers(sources, address, index, positions, misses)
    for wanted, new in zip(expected, found, strict=True):
        assert new.dtype == wanted.dtype
        assert new.is_contiguous()
        assert torch.equal(new, wanted)
    assert torch.equal(gather_keys(keys, chosen), expected[0])
    out, untouched = guarded(expected[1].shape, expected[1].dtype)
    assert gather_keys(values, chosen, out=out) is out
    assert torch.equal(out, expected[1])
    assert untouched()


def shuffled(total, count):
    """Draw an address for each of `total` tokens, and which `count` of them to take."""
    return torch.randperm(total, device=DEVICE), torch.randint(0, total, (count,), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(3, 3), (64, 64), (80, 80), (96, 64), (64, 0)])
def test_three_tiers(dtype, dim, value_dim):
    sizes, shape = (37, 50), (2, 3, 11)
    keys = [*(tokens(size, dim, dtype=dtype) for size in sizes), dense("contiguous", *shape, dim, dtype)]
    values = [*(tokens(size, value_dim, dtype=dtype) for size in sizes), dense("contiguous", *shape, value_dim, dtype)]
    check(keys, values, *shuffled(37 + 50 + 66, 140))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value_layout", ["contiguous", "transposed"])
def test_layouts_of_the_dense_tier(layout, value_layout):
    keys = [tokens(5, 64), tokens(9, 64), dense(layout, 3, 2, 7, 64)]
    values = [tokens(5, 80), tokens(9, 80), dense(value_layout, 3, 2, 7, 80)]
    check(keys, values, *shuffled(5 + 9 + 42, 60))


@pytest.mark.parametrize(
    "sizes", [[6], [0], [0, 6], [6, 0], [4, 5], [0, 0, 6], [4, 0, 0], [0, 4, 5], [4, 5, 0]], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_source_may_be_empty_or_absent(sizes, layout):
    *flat, slots = sizes
    keys = [*(tokens(size, 8) for size in flat), dense(layout, 2, 1, slots // 2, 8)]
    values = [*(tokens(size, 8) for size in flat), dense(layout, 2, 1, slots // 2, 8)]
    total = sum(flat) + slots // 2 * 2
    check(keys, values, *(shuffled(total, 10) if total else shuffled(1, 0)))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_counts_around_a_tile(count):
    """Include one gather of few tokens from a giant buffer."""
    check(
        [tokens(20, 64), dense("transposed", 1, 2, 5, 64)],
        [tokens(20, 64), dense("flat", 1, 2, 5, 64)],
        *shuffled(30, count),
    )


def test_bits_of_special_values_survive():
    """Copies preserve NaN with a payload, infinities, negative zero and subnormal numbers."""
    bits = torch.tensor([0x7FC1, 0xFF81 - 0x10000, 0x7F80, -0x8000, 1, 0x3F80], dtype=torch.int16, device=DEVICE)
    keys = bits.view(torch.bfloat16)[:, None].expand(-1, 8).contiguous()
    found = gather_keys([keys], torch.arange(6, device=DEVICE))
    assert torch.equal(found.view(torch.int16), keys.view(torch.int16))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=2),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
    st.integers(1, 20),
    st.integers(1, 20),
    st.data(),
)
def test_by_address_over_the_concatenation(sizes, shape, layout, value_layout, dtype, dim, value_dim, data):
    keys = [*(tokens(size, dim, dtype=dtype) for size in sizes), dense(layout, *shape, dim, dtype)]
    values = [*(tokens(size, value_dim, dtype=dtype) for size in sizes), dense(value_layout, *shape, value_dim, dtype)]
    slots = concatenated(keys).shape[0]
    address = data.draw(st.lists(st.integers(0, slots - 1), max_size=9)) if slots else []
    index = data.draw(st.lists(st.integers(0, len(address) - 1), max_size=9)) if address else []
    check(keys, values, *(torch.tensor(numbers, dtype=torch.int64, device=DEVICE) for numbers in (address, index)))


def test_tiles_change_nothing(monkeypatch):
    keys, values = [tokens(9, 64), dense("sliced", 2, 2, 6, 64)], [tokens(9, 3), dense("sliced", 2, 2, 6, 3)]
    for size in (1, 512, 1 << 20):
        monkeypatch.setattr(compaction, "TILE_BYTES", size)
        check(keys, values, *shuffled(33, 41))


class TestErrors:
    def test_more_than_three_sources(self):
        with pytest.raises(ValueError, match="at most three"):
            gather_keys([tokens(1, 4)] * 4, torch.zeros(1, dtype=torch.int64, device=DEVICE))

    def test_strided_source_that_is_not_the_last(self):
        with pytest.raises(ValueError, match=r"contiguous \[n, D\]"):
            gather_keys([tokens(4, 3).T, tokens(1, 4)], torch.zeros(1, dtype=torch.int64, device=DEVICE))

    def test_last_dimension_strided(self):
        with pytest.raises(ValueError, match="last dimension must be contiguous"):
            gather_keys([tokens(1, 2, 4, 3).transpose(2, 3)], torch.zeros(1, dtype=torch.int64, device=DEVICE))

    def test_dtypes_differ(self):
        with pytest.raises(ValueError, match="agree in dtype"):
            gather_keys([tokens(1, 4), tokens(1, 4).half()], torch.zeros(1, dtype=torch.int64, device=DEVICE))

    @pytest.mark.parametrize("out", [(2, 4), (1, 5)], ids=str)
    def test_out_of_another_shape(self, out):
        with pytest.raises(ValueError, match=r"out is torch.float32 .* must be torch.float32 \(1, 4\)"):
            gather_keys([tokens(1, 4)], torch.zeros(1, dtype=torch.int64, device=DEVICE), out=tokens(*out))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(128, 128), (256, 256), (80, 128)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large(dtype, dim, value_dim, layout):
    shape = (4, 8, 1000)
    keys = [*(tokens(size, dim, dtype=dtype) for size in (50000, 30001)), dense(layout, *shape, dim, dtype)]
    values = [
        *(tokens(size, value_dim, dtype=dtype) for size in (50000, 30001)),
        dense(layout, *shape, value_dim, dtype),
    ]
    check(keys, values, *shuffled(80001 + 32000, 100_003))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_more_elements_than_int32_counts():
    size = (1 << 24) + 5
    keys = torch.empty(size, 128, dtype=torch.float16, device=DEVICE)
    keys[-5:] = tokens(5, 128, dtype=torch.float16)
    last = torch.arange(size - 5, size, device=DEVICE)
    assert torch.equal(gather_keys([keys], last), keys[-5:])
    assert torch.equal(gather_keys([keys, tokens(1, 128, dtype=torch.float16)], last), keys[-5:])
    strided = keys[:-1].view(1, -1, 2, 128).transpose(1, 2)
    flat = strided.shape[1] * strided.shape[2]
    assert torch.equal(gather_keys([strided], torch.tensor([flat - 1], device=DEVICE))[0], strided[0, -1, -1])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_in_a_captured_graph():
    """A replay uses the inputs' contents at replay, not at capture."""
    keys, values = (
        [tokens(99, 128), dense("transposed", 2, 4, 10, 128)],
        [tokens(99, 128), dense("flat", 2, 4, 10, 128)],
    )
    sources = list(zip(keys, values, strict=True))
    address, index = shuffled(179, 100)
    positions = torch.arange(179, dtype=torch.int32, device=DEVICE)
    misses = torch.zeros(179, dtype=torch.uint8, device=DEVICE)
    gather_tiers(sources, address, index, positions, misses)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gather_tiers(sources, address, index, positions, misses)
    keys[1].normal_()
    index.copy_(torch.randint(0, 179, (100,), device=DEVICE))
    graph.replay()
    assert torch.equal(found[0], concatenated(keys)[address[index]])
    assert torch.equal(found[1], concatenated(values)[address[index]])
    assert torch.equal(found[2], positions[index])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 300),
    st.integers(0, 90),
    st.sampled_from(LAYOUTS[1:]),
    st.sampled_from([(8, 8), (80, 80), (16, 0), (24, 5)]),
    st.randoms(use_true_random=False),
)
def test_compacting_rows_over_themselves(batch, heads, length, capacity, layout, dims, random):
    """Every row keeps its length, with any tokens of its own and of its dense slots, in order."""
    rows = batch * heads
    held = [tokens(rows * length, dim) for dim in dims]
    held += [torch.randint(0, 99, (rows * length,), dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.uint8)]
    newest = tuple(dense(layout, batch, heads, capacity, dim) for dim in dims)
    address, index = [], []
    for row in range(rows):
        own = [row * length + i for i in range(length)]
        slots = [rows * length + row * capacity + i for i in range(capacity)]
        chosen = sorted(random.sample(range(length + capacity), length))
        index += [len(address) + i for i in chosen]
        address += own + slots
    address, index = (torch.tensor(each, dtype=torch.int64, device=DEVICE) for each in (address, index))
    positions = torch.randint(0, 1 << 30, address.shape, dtype=torch.int32, device=DEVICE)
    misses = torch.randint(0, 256, address.shape, device=DEVICE).to(torch.uint8)
    expected = [concatenated([mine, new])[address[index]] for mine, new in zip(held, newest, strict=False)]
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * length
    compact(held, newest, cu_seqlens, address, index, positions, misses)
    for found, wanted in zip(held, [*expected, positions[index], misses[index]], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs many programs at once")
@pytest.mark.parametrize("rows", [(32, 8), (1, 8)])
def test_compacting_much(rows):
    """Use more tokens than a program can hold; most of them move a little or not at all."""
    length, capacity, dim = 2000, 160, 128
    number = rows[0] * rows[1]
    held = [tokens(number * length, dim, dtype=torch.bfloat16) for _ in range(2)]
    held += [torch.zeros(number * length, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.uint8)]
    newest = tuple(tokens(*rows, capacity, dim, dtype=torch.bfloat16) for _ in range(2))
    each = torch.arange(number, device=DEVICE)[:, None]
    own = each * length + torch.arange(length, device=DEVICE)
    address = torch.cat([own, number * length + each * capacity + torch.arange(capacity, device=DEVICE)], 1)
    lost = torch.rand(number, length + capacity, device=DEVICE)
    lost[:, : length // 3] += 1  # the oldest stay where they are
    chosen = lost.argsort(1)[:, capacity:].sort(1).values
    index = (chosen + each * (length + capacity)).flatten()
    address = address.flatten()
    positions = torch.arange(address.shape[0], dtype=torch.int32, device=DEVICE)
    misses = torch.zeros(address.shape[0], dtype=torch.uint8, device=DEVICE)
    expected = [concatenated([mine, new])[address[index]] for mine, new in zip(held, newest, strict=False)]
    cu_seqlens = torch.arange(number + 1, dtype=torch.int32, device=DEVICE) * length
    compact(held, newest, cu_seqlens, address, index, positions, misses)
    for found, wanted in zip(held, [*expected, positions[index]], strict=False):
        assert torch.equal(found, wanted)
