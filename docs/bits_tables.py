"""Tables of quantised caches: the speed of reading codes, and the reasoner's accuracy by bits."""

from typing import Any

from docs.table_parts import markdown, read

# Reports of the harness that compare bits, and the budget that keeps every token there.
REASONERS = {"40": ("reasoner-40-bits", "1200"), "157": ("reasoner-157-bits", "4096")}


def step() -> str:
    """Show a decode step whose cache holds codes, beside one that holds 16 bits."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read("generate-bits")["records"]:
        bits = {"8bit": "8", "4bit": "4"}.get(record["method"].removesuffix("-compile").split("-")[-1], "16")
        found.setdefault(bits, []).append(record)
    vllm = {}
    for record in read("vllm")["records"]:
        if (record["context"], record["batch"]) == (8192, 32):
            bits, name = {"auto": ("16", ""), "fp8": ("8", " (fp8)")}[record["kv_cache_dtype"]]
            vllm[bits] = f"{record['step_ms']:.1f} ms{name}"
    rows = []
    for bits, records in found.items():
        times = (f"{each['median_ms']:.1f} ms, {each['step_ms']:.1f} ms" for each in records)
        rows.append([bits, f"{records[0]['kv_bytes'] / 1e9:.1f} GB", *times, vllm.get(bits, "")])
    return markdown(["bits", "bytes held", "graphed", "graphed and compiled", "vLLM"], rows)


def attention() -> str:
    """Show the time of attention over codes, and how many times as fast it is as over 16 bits."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for record in read("codes")["records"]:
        found.setdefault(record["bits"], {})[record["tokens"]] = record
    lengths = sorted(found[16])
    rows = []
    for bits, records in found.items():
        cells = [f"{records[n]['us']:.0f} us, {found[16][n]['us'] / records[n]['us']:.2f}" for n in lengths]
        rows.append([f"{bits}", f"{records[lengths[0]]['bytes'] / found[16][lengths[0]]['bytes']:.2f}", *cells])
    return markdown(["bits", "bytes of 16 bits", *(f"{n:,} tokens per row" for n in lengths)], rows)


def solved() -> str:
    """Show the reasoner's problems solved, and bytes beside the full cache's, where bits are the only loss."""
    found: dict[str, dict[str, str]] = {}
    for difficulty, (name, budget) in REASONERS.items():
        full, *rows = read(name)["configurations"]
        kept = sorted((row for row in rows if row["budget"] == budget), key=lambda row: -row["bytes_mean"])
        for row in (full, *kept):
            bits = "the full cache" if row is full else row["bits"].replace(":", " and ")
            share = f"{row['bytes_mean'] / full['bytes_mean']:.2f}"
            found.setdefault(bits, {})[difficulty] = f"{100 * row['accuracy']['mean']:.0f} %, {share}"
    head = ["bits of keys and values", *(f"{difficulty} lines" for difficulty in REASONERS)]
    return markdown(head, [[bits, *(cells.get(each, "") for each in REASONERS)] for bits, cells in found.items()])
