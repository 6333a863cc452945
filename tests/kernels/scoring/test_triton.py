"""Test Triton's scores from the window's queries, and their smoothing, against float64 loops."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hardkv.kernels.rows import Rows, cumulative
from hardkv.kernels.scoring import triton as module
from hardkv.kernels.scoring import window_attention_reference
from hardkv.kernels.scoring.triton import window_attention
from hardkv.kernels.scoring.triton_pooling import pool_rows
from tests.kernels.poison import poisoned
from tests.kernels.scoring import test_reference as reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}
LENGTHS = [0, 1, 150, 7, 70, 3]  # of two sequences
# G, W, D and dtype; the interpreter multiplies bfloat16 numbers as integers
SHAPES = [
    (1, 32, 64, torch.float16),
    (2, 3, 3, torch.float32),
    (2, 40, 16, torch.float32),  # several blocks of columns with every reduction
    (3, 5, 80, torch.float32),
    (4, 9, 96, torch.float16),
    (16, 9, 64, torch.float16),
]
GPU_SHAPES = [
    (group, window, dim, dtype)
    for dtype in TOLERANCE
    for group, window, dim in [(1, 32, 128), (3, 32, 64), (4, 32, 80), (4, 32, 256), (4, 150, 128), (16, 32, 96)]
]

pytestmark = [
    pytest.mark.skipif(
        not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
    ),
    # the interpreter's NumPy warns of log(0) (a query that sees nothing) and of rows that overflowed
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]


def make_case(seed, lengths, *, dim=3, dtype=torch.float32, **shape):
    """Make a case of the reference's tests, with equally large logits for every `dim` and inputs rounded to `dtype`."""
    case = reference.make_case(seed, lengths, dim=dim, **shape)
    for name, size in (("queries", dim**-0.25), ("keys", dim**-0.25), ("sinks", 1)):
        case[name] = torch.tensor(case[name] * size).to(dtype).double().numpy()
    return case


def run(case, reduce, *, exclude=False, softcap=None, sinks=False, dtype=torch.float32):
    """Return the kernels' scores, computed in poisoned memory."""

    def tensor(array, dtype=None):
        return torch.tensor(array, dtype=dtype, device=DEVICE)

    lengths = case["lengths"]
    arguments = (
        tensor(case["queries"], dtype),
        tensor(case["query_positions"]),
        tensor(case["query_valid"]),
        tensor(case["keys"], dtype),
        tensor(case["positions"]),
        cumulative(tensor(lengths)),
    )
    options = {
        "exclude": tensor(case["exclude"]) if exclude else None,
        "sinks": tensor(case["sinks"], dtype) if sinks else None,
    }
    heads = len(lengths) // len(case["queries"])
    with poisoned():
        found = window_attention(*arguments, num_kv_heads=heads, scale=0.7, softcap=softcap, reduce=reduce, **options)
    return found.double().cpu()


def assert_near(found, expected, tolerance):
    assert torch.isfinite(found).all()
    assert (found - expected).norm() <= tolerance * expected.norm()


def check(case, reduce, dtype=torch.float32, **options):
    expected = reference.expected(case, reduce, **options)
    assert_near(run(case, reduce, dtype=dtype, **options), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
@pytest.mark.parametrize(("group", "window", "dim", "dtype"), SHAPES, ids=str)
def test_shapes(reduce, group, window, dim, dtype):
    check(make_case(0, LENGTHS, batch=2, group=group, queries=window, dim=dim, dtype=dtype), reduce, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"exclude": True, "softcap": 1.5}], ids=str)
@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
@pytest.mark.parametrize(("group", "window", "dim", "dtype"), GPU_SHAPES, ids=str)
def test_large_shapes(reduce, group, window, dim, dtype, options):
    lengths = [700, 0, 1, 130, 64, 5]
    case = make_case(1, lengths, batch=2, group=group, queries=window, dim=dim, dtype=dtype)
    check(case, reduce, dtype, **options)


@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
@pytest.mark.parametrize("options", [{"exclude": True}, {"softcap": 1.5}, {"softcap": 40.0, "exclude": True}], ids=str)
def test_options(reduce, options):
    check(make_case(2, LENGTHS, batch=2, group=3, queries=4, dim=16), reduce, **options)


@pytest.mark.parametrize("reduce", ["mean", "max", "mean_square"])
@pytest.mark.parametrize("options", [{}, {"exclude": True, "softcap": 1.5}], ids=str)
def test_learned_sinks(reduce, options):
    check(make_case(3, LENGTHS, batch=2, group=3, queries=4, dim=16), reduce, sinks=True, **options)


def test_sinks_of_every_size():
    """A sink far below every logit has no effect; a sink far above takes everything."""
    case = make_case(4, [7, 5], batch=1, group=2)
    case["sinks"][:] = [1e4, 1e4, -1e4, -1e4]
    found = run(case, "mean", sinks=True)
    assert torch.all(found[:7] == 0)
    torch.testing.assert_close(found[7:], run(case, "mean")[7:])


def test_sinks_of_heads_that_share_a_softmax():
    with pytest.raises(ValueError, match="sinks .* leave out sinks or choose another reduce"):
        run(make_case(4, [7, 5]), "max_logits", sinks=True)
    check(make_case(4, [7, 5], group=1), "max_logits", sinks=True)  # one head, so nothing is shared


@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
@pytest.mark.parametrize("lengths", [[0, 0], [1, 0], [0, 33], [32, 64]], ids=str)
def test_lengths(reduce, lengths):
    check(make_case(5, lengths), reduce)


@pytest.mark.parametrize("chunk", [32, 128])
@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_chunks(monkeypatch, reduce, chunk):
    """Cut a row into many chunks, or a chunk into many tiles; the queries are far from each other."""
    monkeypatch.setattr(module, "_chunk", lambda tokens, tile: max(chunk, tile))
    case = make_case(6, [3, 0, 290, 1, 0, 64], batch=2, group=3, queries=4, dim=16)
    case["query_positions"] = np.array([50, 150, 200, 293])
    check(case, reduce)


@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_no_valid_query_or_all_excluded(reduce):
    case = make_case(7, [40, 2, 33, 0], batch=2)
    case["query_valid"][:] = [[False] * 3, [True, False, True]]
    check(case, reduce)
    assert torch.all(run(case, reduce)[:42] == 0)
    case["exclude"][:] = True
    assert torch.all(run(case, reduce, exclude=True) == 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_what_does_not_count_may_hold_anything(reduce, value):
    case = make_case(8, [70, 5], batch=1)
    case["query_valid"][:] = [[True, False, True]]
    clean = run(case, reduce, exclude=True)
    case["queries"][:, :, 1] = value
    case["keys"][case["exclude"]] = value
    torch.testing.assert_close(run(case, reduce, exclude=True), clean, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_a_row_that_overflowed_does_not_reach_the_others(reduce):
    case = make_case(9, [40, 5, 6, 4], batch=2)
    clean = run(case, reduce)
    case["keys"][0] = np.inf
    found = run(case, reduce)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[40:], clean[40:], rtol=0, atol=0)


def test_no_tokens_and_a_new_output():
    case = make_case(10, [0, 0])
    assert run(case, "mean").shape == (0,)
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE)
    keys, positions = torch.zeros(3, 4, device=DEVICE), torch.arange(3, dtype=torch.int32, device=DEVICE)
    queries = torch.zeros(1, 4, 2, 4, device=DEVICE).transpose(1, 2).contiguous().transpose(1, 2)  # any strides
    seen, valid = torch.tensor([5, 6], device=DEVICE), torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    found = window_attention(queries, seen, valid, keys, positions, cu_seqlens, num_kv_heads=2, scale=1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), torch.tensor([1, 0.5, 0.5]))


def pooled(score, exclude, lengths, kernel_size, pooling):
    """Token by token."""
    result, start = torch.zeros_like(score), 0
    score = score.masked_fill(exclude, 0.0)
    for length in lengths:
        for t in range(length):
            near = score[start + max(t - kernel_size // 2, 0) : start + min(t + kernel_size // 2 + 1, length)]
            result[start + t] = near.max() if pooling == "max" else near.sum() / kernel_size
        start += length
    return result.masked_fill(exclude, 0.0)


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 63])
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 5, 0, 700, 2], [512, 513, 0]], ids=str)
def test_pool(pooling, kernel_size, lengths):
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(sum(lengths), generator=generator).double()
    exclude = torch.rand(sum(lengths), generator=generator) < 0.2
    cu_seqlens = cumulative(torch.tensor(lengths, dtype=torch.int64)).to(DEVICE)
    given = score.float().to(DEVICE), exclude.to(DEVICE), cu_seqlens
    with poisoned():
        found = pool_rows(*given, kernel_size=kernel_size, pooling=pooling)
    expected = pooled(score, exclude, lengths, kernel_size, pooling)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-6, atol=1e-7)


def test_pool_of_more_rows_than_a_program_compares_at_once():
    lengths = [0] * 1000 + [2, 0, 1, 3] * 10
    score = torch.arange(sum(lengths), dtype=torch.float32, device=DEVICE)
    cu_seqlens = cumulative(torch.tensor(lengths)).to(DEVICE)
    found = pool_rows(score, score < 0, cu_seqlens, kernel_size=3, pooling="max")
    expected = pooled(score.cpu(), score.cpu() < 0, lengths, 3, "max")
    assert torch.equal(found.cpu(), expected)


def random_rows(seed, lengths, *, num_kv_heads, group, window=32, dim=128, dtype=torch.bfloat16):
    """Make the arguments of a call on the GPU; a row's tokens are spread over twice its length."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, total, longest = len(lengths) // num_kv_heads, sum(lengths), max(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    lengths = torch.tensor(lengths, device="cuda")
    rows = Rows(cumulative(lengths), total, longest)
    offset = torch.arange(total, device="cuda") - rows.cu_seqlens[:-1].long()[rows.ids]
    positions = (2 * (offset + longest - lengths[rows.ids])).int()
    query_positions = torch.arange(2 * longest - window, 2 * longest, device="cuda")
    query_valid = torch.rand(batch, window, generator=generator, device="cuda") < 0.9
    queries, keys = normal(batch, num_kv_heads * group, window, dim), normal(total, dim)
    return (queries, query_positions, query_valid, keys, positions), rows


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_real_shape(reduce):
    """Compare with the float32 reference: 256 rows of 2176 tokens on average, one of them much longer."""
    lengths = np.random.default_rng(0).integers(544, 3808, 256)
    lengths[77] = 60_000
    arguments, rows = random_rows(11, lengths.tolist(), num_kv_heads=8, group=4)
    exclude = torch.rand(rows.total, device="cuda") < 0.01
    for mask in (None, exclude):
        options = {"num_kv_heads": 8, "scale": 128**-0.5, "reduce": reduce, "softcap": None, "exclude": mask}
        with poisoned():
            found = window_attention(*arguments, rows.cu_seqlens, **options)
        queries, query_positions, query_valid, keys, positions = arguments
        exact = queries.float(), query_positions, query_valid, keys.float(), positions
        assert_near(found, window_attention_reference(*exact, rows, **options, sinks=None), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_more_elements_than_int32_counts():
    length, dim = 1000, 128
    last, _ = random_rows(12, [length], num_kv_heads=1, group=4, dim=dim)
    before = (1 << 31) // dim + 64
    queries, query_positions, query_valid, keys, positions = last
    many = torch.zeros(before + length, dim, dtype=keys.dtype, device="cuda")
    many[before:] = keys
    options = {"num_kv_heads": 1, "scale": dim**-0.5}
    alone = window_attention(*last, cumulative(torch.tensor([length], device="cuda")), **options)
    found = window_attention(
        queries.repeat(1, 2, 1, 1),
        query_positions,
        query_valid,
        many,
        torch.cat([torch.zeros(before, dtype=torch.int32, device="cuda"), positions]),
        cumulative(torch.tensor([before, length], device="cuda")),
        **{**options, "num_kv_heads": 2},
    )
    torch.testing.assert_close(found[before:], alone, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[:before].double().mean().item() * before, 1.0, rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_in_a_captured_graph(reduce):
    """A replay uses the contents of the inputs and the row bounds at replay."""
    arguments, rows = random_rows(13, [300, 0, 200, 1012], num_kv_heads=2, group=4)
    others, bounds = random_rows(14, [1200, 12, 300, 0], num_kv_heads=2, group=4)
    exclude = torch.rand(rows.total, device="cuda") < 0.1

    def score(arguments, cu_seqlens):
        received = window_attention(*arguments, cu_seqlens, num_kv_heads=2, scale=0.1, reduce=reduce, exclude=exclude)
        return pool_rows(received, exclude, cu_seqlens, kernel_size=7, pooling="max")

    score(arguments, rows.cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = score(arguments, rows.cu_seqlens)
    for held, new in zip((*arguments, rows.cu_seqlens), (*others, bounds.cu_seqlens), strict=True):
        held.copy_(new)
    graph.replay()
    assert torch.equal(found, score(others, bounds.cu_seqlens))
