"""Format the sections `bits`, `peers` and `lukv` of the study of budgets, and the study of presses.

Every table gives the loss above the dense cache's in nats per token with its 95 % interval over texts, and the KL
divergence. Bytes are a fraction of the dense cache's (`eval.token_bytes`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.intervals import interval
from eval.markdown import line, table
from eval.token_bytes import share

Record = Mapping[str, Any]
ABSENT = "Not measured yet."
SPENDING = ("Risk at equal bytes", "Risk, bits auto")  # budgets that are the bytes of n tokens of 16 bits
LUKV = (
    "TopK",
    "DuoAttention style",
    "HeadKV style",
    "LU-KV style",
    "Risk, LU-KV's measure",
    "LU-KV style, Risk's measure",
    "Risk",
)


def all_tokens(records: Iterable[Record]) -> list[str]:
    """Show caches that keep every token with fewer bits, ours and transformers', most bytes first."""
    return _by_bytes([r for r in records if r["section"] in ("bits", "peers") and r["n"] == r["length"]])


def fewer_tokens(records: Iterable[Record]) -> list[str]:
    """Show caches that keep a part of the tokens, at 16 and fewer bits, most bytes first."""
    found = [r for r in records if r["section"] == "bits" and r["n"] < r["length"]]
    return _by_bytes([r for r in found if r["label"] not in SPENDING])


def equal_bytes(records: Iterable[Record]) -> list[str]:
    """Show tokens against bits: each column holds the bytes of n tokens at 16 bits."""
    found = [r for r in records if r["section"] == "bits"]
    found.sort(key=lambda r: (r["label"] != "TopK", -_coordinate(r)))
    shares = {r["n"]: share(r) for r in found if r["label"] == "Risk at equal bytes"}
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for record in found:
        bits = _bits(record)
        if record["label"] in SPENDING or (record["label"] in ("TopK", "Risk") and bits == "16"):
            budget = "TopK" if record["label"] == "TopK" else "Risk"
            cells.setdefault((budget, bits), {})[record["n"]] = loss(record)
    rows = [[name, bits, *(row.get(n, "") for n in sorted(shares))] for (name, bits), row in cells.items()]
    columns = [f"bytes of {n} tokens at 16 bits, {shares[n]:.3f} of dense" for n in sorted(shares)]
    return _table(["budget", "bits", *columns], rows if shares else [])


def lukv(records: Sequence[Record]) -> list[str]:
    """Show LU-KV beside Risk and others: one table per length and scorer."""
    groups = list(dict.fromkeys((r["length"], r["scorer"]) for r in records if r["section"] == "lukv"))
    lines: list[str] = []
    for length, scorer in groups:
        cells: dict[str, dict[int, Record]] = {}
        for section in ("main", "long", "lukv"):  # the last wins: all of its rows use the same texts to calibrate
            for r in records:
                if (r["section"], r["length"], r["scorer"]) == (section, length, scorer) and not r["options"]:
                    cells.setdefault(r["label"], {})[r["n"]] = r
        counts = sorted(cells["TopK"])
        head = [
            f"{scorer}, {length:,} tokens",
            *(f"{n:,} kept, {share(cells['TopK'][n]):.3f} of the bytes" for n in counts),
        ]
        rows = [
            [name, *(loss(cells[name][n]) if n in cells[name] else "" for n in counts)]
            for name in LUKV
            if name in cells
        ]
        lines += [*_table(head, rows), ""]
    return lines[:-1] or [ABSENT]


def presses(data: Mapping[str, Any] | None) -> list[str]:
    """Show kvpress and HardKVCache on compressed prompts; `data` is the JSON of `eval.presses`."""
    records = [] if data is None else data["records"]
    parts = sorted({r["part"] for r in records}, reverse=True)
    cells: dict[str, dict[int, str]] = {}
    for record in records:
        cells.setdefault(record["label"], {})[record["part"]] = loss(record)
    rows = [[name, *(row.get(part, "") for part in parts)] for name, row in cells.items()]
    return _table(["prompt", *(f"1/{part} of its bytes" for part in parts)], rows)


def loss(record: Record) -> str:
    """Format the excess NLL, its interval, and the KL divergence of a record."""
    found = interval(np.array(record["excess"]))
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}], KL {np.mean(record['kl']):.4f}"


def _by_bytes(records: list[Record]) -> list[str]:
    rows = []
    for record in sorted(records, key=share, reverse=True):
        tokens = f"{record['n']:,}"
        rows.append([record["label"], tokens, _bits(record), f"{share(record):.3f}", loss(record)])
    return _table(["cache", "tokens per head", "bits", "bytes of dense", "loss"], rows)


def _coordinate(record: Record) -> float:
    """Return the mean bits of a coordinate, 0 where they are chosen."""
    bits = record["options"].get("bits", 16)
    return 0.0 if bits == "auto" else float(np.mean(bits))


def _bits(record: Record) -> str:
    """Format the bits of a record; of keys and values, where they differ."""
    return str(record["options"].get("bits", 16)).strip("[]")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return table(line(head), rows) if rows else [ABSENT]
