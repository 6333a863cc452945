"""The kernels as torch.library operators: schema, fake implementations, and what torch.compile makes of them."""

import os

import pytest
import torch

pytest.importorskip("triton")

from hardkv.kernels import append, attention, compaction, scoring, similarity
from hardkv.kernels.rows import Rows, cumulative
from hardkv.kernels.triton import ops  # noqa: F401  # registers them
from hardkv.kernels.triton.schedule import schedule_for

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)

LENGTHS = [40, 0, 1, 133]
DIM = 16


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


@pytest.fixture
def inputs():
    """Two sequences of two KV heads, two query heads each, a dense tier of 8 slots with 5 and 3 filled."""
    torch.manual_seed(0)
    rows = Rows(cumulative(torch.tensor(LENGTHS, device=DEVICE)), sum(LENGTHS), max(LENGTHS))
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in LENGTHS]).to(torch.int32)
    return {
        "rows": rows,
        "keys": draw(rows.total, DIM),
        "values": draw(rows.total, DIM),
        "positions": positions,
        "query": draw(2, 4, 1, DIM),
        "dense": (
            draw(2, 2, 8, DIM),
            draw(2, 2, 8, DIM),
            torch.full((2, 8), 200, dtype=torch.int32, device=DEVICE),
            torch.tensor([5, 3], device=DEVICE),
        ),
        "window": draw(2, 4, 5, DIM),
        "columns": torch.arange(196, 201, device=DEVICE),
        "valid": torch.ones(2, 5, dtype=torch.bool, device=DEVICE),
        "exclude": torch.rand(rows.total, device=DEVICE) < 0.3,
    }


def calls(inputs):
    """Arguments of every operator."""
    rows, keys, values = inputs["rows"], inputs["keys"], inputs["values"]
    schedule = schedule_for(rows, 5, 8, 1)
    address = torch.arange(rows.total - 1, -1, -1, device=DEVICE)
    sources = [keys, inputs["dense"][0]]
    misses = torch.zeros(rows.total, dtype=torch.uint8, device=DEVICE)
    new = draw(2, 2, 3, DIM), draw(2, 2, 3, DIM)
    return {
        "cut": (schedule.row_start, schedule.first_row, schedule.share, rows.cu_seqlens, 5),
        "ragged_attention": (
            *(inputs["query"], keys, values, rows.cu_seqlens, *inputs["dense"], *schedule.tensors()),
            *(300, 0.25, None, draw(4), None),
        ),
        "window_attention": (
            *(inputs["window"], inputs["columns"], inputs["valid"], keys, inputs["positions"], rows.cu_seqlens),
            *(2, 0.25, 3.0, "mean", inputs["exclude"], None),
        ),
        "pool_rows": (draw(rows.total).abs(), inputs["exclude"], rows.cu_seqlens, 7, "max"),
        "mean_cosine": (keys, rows.cu_seqlens, rows.longest, 0.5, 1e-8),
        "gather_tokens": (sources, address),
        "gather_tiers": (sources, sources, address, address[:9], inputs["positions"], misses),
        "compact": (
            *(keys, values, inputs["positions"], misses, *inputs["dense"][:2], rows.cu_seqlens),
            *(torch.arange(rows.total + 32, device=DEVICE), torch.arange(rows.total, device=DEVICE)),
            *(inputs["positions"].clone(), misses.clone()),
        ),
        "append_step": (
            *(*inputs["dense"], inputs["window"], torch.tensor([7], device=DEVICE)),
            *(inputs["query"], *(tensor[:, :, :1] for tensor in new)),
        ),
        "append": (*inputs["dense"], *new, 200, torch.tensor([[True, False, True]] * 2, device=DEVICE)),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("cut", "ragged_attention", "window_attention", "pool_rows", "mean_cosine"),
        *("gather_tokens", "gather_tiers", "compact", "append", "append_step"),
    ],
)
def test_schema_and_fake_implementation(name, inputs):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.hardkv, name).default, calls(inputs)[name], test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the interpreter cannot be compiled")
def test_compiled_without_graph_breaks(inputs):
    rows, keys = inputs["rows"], inputs["keys"]

    def everything(query, keys, values, dense_keys, dense_values, positions, fill):
        fill = append.append(dense_keys, dense_values, positions, fill, dense_keys[:, :, :1], dense_values[:, :, :1], 9)
        dense = dense_keys, dense_values, positions, fill
        out, lse = attention.attend_tiers(query, keys, values, rows, *dense, bound=6, start=300, scale=0.25)
        received = scoring.window_attention(
            *(inputs["window"], inputs["columns"], inputs["valid"], keys, inputs["positions"], rows),
            num_kv_heads=2,
            scale=0.25,
        )
        pooled = scoring.pool_rows(received, inputs["exclude"], rows, kernel_size=7, pooling="max")
        gathered = compaction.gather_tokens([keys, dense_keys], torch.arange(5, device=DEVICE))
        same = torch.arange(rows.total, device=DEVICE)
        held = keys.clone(), values.clone(), inputs["positions"].clone(), same.to(torch.uint8)
        newest = rows.total + torch.arange(rows.total, device=DEVICE) % 32  # rows take dense tokens in their places
        compaction.compact(held, (dense_keys, dense_values), rows.cu_seqlens, newest, same, held[2] + 1, held[3] + 1)
        ring, step = inputs["window"].clone(), (query, dense_keys[:, :, :1] + 1, dense_values[:, :, :1] + 1)
        append.append_step(dense_keys, dense_values, positions, fill, ring, fill[:1].clone(), *step)
        changed = *held, ring, dense_keys, dense_values, positions
        return out, lse, pooled, similarity.mean_cosine(keys, rows), gathered, fill, *changed

    def arguments():
        return inputs["query"], keys, inputs["values"], *(tensor.clone() for tensor in inputs["dense"])

    expected = everything(*arguments())
    actual = torch.compile(everything, fullgraph=True)(*arguments())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
