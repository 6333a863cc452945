"""The tables of bits, peers, LU-KV and presses, and the bytes in them."""

from dataclasses import asdict

import pytest
import torch

from eval import bits_report
from eval.budgets import make_cache
from eval.budgets_plan import Entry, plan
from eval.peers import missing_package
from eval.token_bytes import DENSE, HEAD_DIM, ours, quantized, share
from hardkv import HardKVCache
from hardkv.selectors import TopK
from tests.cache import conftest as tiny

# ---------------------------------------------------------------- bytes


def model_of_16_bits():
    return tiny.make_model("llama", head_dim=HEAD_DIM, num_hidden_layers=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2, [4, 2]])
def test_tokens_of_our_cache_take_the_bytes_counted(bits):
    """Queries and the dense tier are the same whatever is kept, so they cancel."""
    model, ids = model_of_16_bits(), tiny.make_prompts(1, 256)["input_ids"]

    pair = tuple(bits) if isinstance(bits, list) else bits

    def nbytes(n):
        cache = HardKVCache(config=model.config, scorer="attention", budget=TopK(n), bits=pair)
        with torch.no_grad():
            model(input_ids=ids, **{tiny.CACHE: cache})
        return cache.nbytes()

    assert nbytes(256) - nbytes(100) == 2 * 2 * 156 * ours(bits)  # layers, heads


@pytest.mark.parametrize("entry", plan(["peers"]), ids=lambda e: f"{e.label}, {e.options['bits']}")
def test_tokens_of_quantized_cache_take_the_bytes_counted(entry):
    if missing_package(entry.options["backend"]) is not None:
        pytest.skip("not installed")
    model = model_of_16_bits()
    cache = make_cache(model, entry, None)
    with torch.no_grad():
        model(input_ids=tiny.make_prompts(1, 256)["input_ids"], **{tiny.CACHE: cache})
    assert cache.nbytes() == 2 * 2 * 256 * quantized(entry.options["bits"])


def make_record(section, label, n, excess, length=2048, kl=0.1, **options):
    made = asdict(Entry(section, label, n, "report", length, options=options))
    return made | {"excess": excess, "kl": [kl] * len(excess)}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (make_record("bits", "TopK", 128, []), 128 * 261 / (2048 * 256)),
        (make_record("bits", "Risk at equal bytes", 128, [], bits=2), 128 * 261 / (2048 * 256)),
        (make_record("bits", "Risk", 128, [], bits=4), (36 * 261 + 92 * (64 + 4 + 5)) / (2048 * 256)),
        (make_record("bits", "Risk", 128, [], bits=[4, 2]), (36 * 261 + 92 * (48 + 4 + 5)) / (2048 * 256)),
        (make_record("peers", "QuantizedCache, quanto", 2048, [], backend="quanto", bits=4), 4.5 / 16),
        (make_record("peers", "QuantizedCache, hqq", 2048, [], backend="hqq", bits=3), 4 / 16),
    ],
)
def test_share_of_the_dense_cache(record, expected):
    assert DENSE == 256
    assert share(record) == pytest.approx(expected)


# ---------------------------------------------------------------- tables

RECORDS = [
    make_record("bits", "all tokens", 2048, [0.01, 0.03], bits=4),
    make_record("bits", "all tokens", 2048, [0.02, 0.06], bits=[2, 4]),
    make_record("peers", "QuantizedCache, hqq", 2048, [0.2, 0.2], backend="hqq", bits=8, axes=[0, 0]),
    make_record("bits", "TopK", 128, [0.5, 0.7]),
    make_record("bits", "Risk", 128, [0.3, 0.3], bits=16),
    make_record("bits", "Risk", 128, [0.4, 0.4], bits=4),
    make_record("bits", "Risk at equal bytes", 64, [0.8, 0.8], bits=8),
    make_record("bits", "Risk at equal bytes", 128, [0.1, 0.1], bits=4),
    make_record("bits", "Risk at equal bytes", 128, [0.2, 0.2], bits=[4, 2]),
    make_record("main", "HeadKV style", 128, [0.4, 0.4]),
    make_record("main", "TopK", 128, [9.0, 9.0]),
    make_record("main", "Risk", 128, [9.0, 9.0], scope="layer"),
    make_record("lukv", "TopK", 128, [0.6, 0.6]),
    make_record("lukv", "LU-KV style", 128, [0.35, 0.35]),
    make_record("lukv", "Risk", 128, [0.3, 0.3]),
]


def cells(lines):
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_all_tokens_by_their_bytes():
    rows = cells(bits_report.all_tokens(RECORDS))
    assert [row[:3] for row in rows] == [
        ["QuantizedCache, hqq", "2,048", "8"],
        ["all tokens", "2,048", "4"],
        ["all tokens", "2,048", "2, 4"],
    ]
    assert rows[0][3] == f"{8.5 / 16:.3f}"
    assert rows[1][4] == "0.0200 [0.0100, 0.0300], KL 0.1000"


def test_fewer_tokens_by_their_bytes():
    rows = cells(bits_report.fewer_tokens(RECORDS))
    assert [(row[0], row[2]) for row in rows] == [("TopK", "16"), ("Risk", "16"), ("Risk", "4")]


def test_equal_bytes_in_columns():
    lines = bits_report.equal_bytes(RECORDS)
    columns = [f"bytes of {n} tokens at 16 bits, {share} of dense" for n, share in ((64, "0.032"), (128, "0.064"))]
    assert lines[0] == f"| budget | bits | {' | '.join(columns)} |"
    rows = [row.strip("|").split("|") for row in lines[2:]]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        ("TopK", "16"),
        ("Risk", "16"),
        ("Risk", "8"),
        ("Risk", "4"),
        ("Risk", "4, 2"),
    ]
    assert [bool(row[2].strip()) for row in rows] == [False, False, True, False, False]
    assert rows[3][3].startswith(" 0.1000 [")


def test_lukv_beside_others():
    lines = bits_report.lukv(RECORDS)
    assert lines[0].startswith("| attention, 2,048 tokens | 128 kept, 0.064 of the bytes |")
    assert [(row[0], row[1][:6]) for row in cells(lines)] == [
        ("TopK", "0.6000"),  # of the section itself
        ("HeadKV style", "0.4000"),
        ("LU-KV style", "0.3500"),
        ("Risk", "0.3000"),
    ]


def test_presses_in_columns():
    data = {"records": [{"label": "TopK", "part": part, "excess": [0.1, 0.1], "kl": [0.2]} for part in (4, 16)]}
    lines = bits_report.presses(data)
    assert lines[0] == "| prompt | 1/16 of its bytes | 1/4 of its bytes |"
    assert cells(lines) == [["TopK", *["0.1000 [0.1000, 0.1000], KL 0.2000"] * 2]]


@pytest.mark.parametrize("part", ["all_tokens", "fewer_tokens", "equal_bytes", "lukv"])
def test_what_is_not_measured_says_so(part):
    assert getattr(bits_report, part)([]) == [bits_report.ABSENT]
    assert bits_report.presses(None) == [bits_report.ABSENT]
