"""Which models HardKVCache works with: probes all of them and writes docs/compatibility.json and .md.

    python -m tests.models.compatibility

The installed transformers' results replace those of the same version; other versions' stay.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.probe import NO_CACHE, NOT_BUILT, NOTHING, REFUSED, SUPPORTED, YES, Verdict, probe, probe_graphed
from tests.models.tiny import TYPES, tiny_model

RESULTS = Path(__file__).parents[2] / "docs" / "compatibility.json"
PAGE = RESULTS.with_suffix(".md")

# Types that drop their cache where they begin to rotate keys otherwise; what holds of them is in test_switch.py.
SWITCHING = ["phi3", "phi4_multimodal", "phimoe"]

Table = dict[str, dict[str, Any]]  # a Verdict's fields by model type

SECTIONS = {
    REFUSED: "HardKVCache raises an error that names the reason before it stores anything. Use transformers' "
    "DynamicCache.",
    NOTHING: "HardKVCache works like DynamicCache and warns that it has nothing to compress. Some of these types have "
    "checkpoints without a sliding window (Mistral), which HardKVCache compresses.",
    NO_CACHE: "transformers' own DynamicCache does not work with these types, so HardKVCache cannot either. Most have "
    "no keys and values, or a cache of their own.",
    NOT_BUILT: "We could not build a tiny model of these types, so they are not tested.",
}


def load() -> dict[str, Table]:
    """Results by version of transformers, the newest first."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return dict(sorted(results.items(), key=lambda item: [int(part) for part in item[0].split(".")], reverse=True))


def committed() -> Table | None:
    """What the committed file says of the installed transformers."""
    return load().get(transformers.__version__)


def graphable() -> list[str]:
    """Types of which the committed file says whether static steps work."""
    return sorted(name for name, verdict in (committed() or {}).items() if verdict.get("graphed"))


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, bracket or semicolon."""
    return re.split(r"\. |; | \(note|: HardKVCache compresses nothing", text)[0].replace("|", "\\|").rstrip(".:")


def why_not_graphed(text: str) -> str:
    """The reason in an error of `graphed`."""
    text = re.sub(r"^\w+: (custom_generate=graphed does not work with )?|: leave .*", "", text)
    return text.replace("|", "\\|")


def differences(newest: Table, other: Table) -> list[str]:
    """Types of which an older version says something else than the newest does."""
    found = []
    for name in sorted(other.keys() & newest.keys()):
        new, old = newest[name], other[name]
        if new["status"] != old["status"]:
            found.append(f"`{name}` {old['status']}")
        elif (new["graphed"] == YES) != (old["graphed"] == YES):
            found.append(f"`{name}` {'works' if old['graphed'] == YES else 'does not work'} with `graphed`")
    return found


def page(results: dict[str, Table]) -> str:
    """The results as Markdown."""
    version, newest = next(iter(results.items()))
    by_status = {status: [name for name in sorted(newest) if newest[name]["status"] == status] for status in STATUSES}
    lines = [
        "# Models that HardKVCache works with",
        "",
        f"We test every type that transformers {version} lists as a causal language model, as a tiny random model. A "
        "left-padded batch brings the prompt, and then one token follows at a time. This page reports the results for "
        "text. Other tests run Gemma 3, LLaVA, Mllama and Qwen2.5-VL with pictures.",
        "",
        "*Supported* means:",
        "",
        "- without eviction, the logits equal those of DynamicCache;",
        "- with eviction, over several events, the logits equal those of plain attention in which every KV head sees "
        "only what `cache.kept()` says it holds;",
        "- in float16 and bfloat16, both hold within rounding.",
        "",
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
        *(
            f"| {status} | " + " | ".join(str(count(table, status)) for table in results.values()) + " |"
            for status in STATUSES
        ),
        "",
        "`python -m tests.models.compatibility` measures the types and writes this page and `compatibility.json`.",
        "",
        "## Supported",
        "",
        "In these types, all layers are compressed: "
        + listing(name for name in by_status[SUPPORTED] if is_whole(newest[name]))
        + ".",
        "",
        "In these types, layers with full attention are compressed. The others (sliding windows, linear attention, "
        "convolutions, keys of another layer or of a picture) stay as DynamicCache has them: "
        + listing(name for name in by_status[SUPPORTED] if not is_whole(newest[name]))
        + ".",
    ]
    lines += [
        "",
        "LongRoPE checkpoints of "
        + listing(SWITCHING)
        + " rotate all keys differently once a text exceeds `original_max_position_embeddings` tokens, and drop their "
        "cache at that point. A HardKVCache holds texts that stay on either side of this length. If a text grows "
        "beyond it, `generate()` first warns and then raises an error. `graphed` computes the text again instead, but "
        "not with `phimoe`, whose step the host waits for, and not with transformers 5.17 beyond that length.",
    ]
    stepped = [name for name in sorted(newest) if newest[name].get("graphed") == YES]
    refused = [name for name in sorted(newest) if newest[name].get("graphed", YES) not in (YES, "")]
    lines += [
        "",
        "## Graphed",
        "",
        "`custom_generate=graphed` decodes by replaying a CUDA graph. We compare it with generate()'s own loop and the "
        "same evicting cache: logits must be equal within rounding, and kept tokens, states and sliding windows must "
        "be equal. A CPU stands in for the GPU here: the test records the operators of one step and runs them again "
        "for the next steps up to the event. `graphed` works with " + listing(stepped) + ".",
        "",
        "It refuses the others:",
        "",
        "| type | reason |",
        "|---|---|",
        *(f"| `{name}` | {why_not_graphed(newest[name]['graphed'])} |" for name in refused),
    ]
    for status, meaning in SECTIONS.items():
        lines += ["", f"## {status[0].upper()}{status[1:]}", "", meaning, ""]
        lines += ["| type | reason |", "|---|---|"]
        lines += [f"| `{name}` | {first_sentence(newest[name]['reason'])} |" for name in by_status[status]]
    for other, table in list(results.items())[1:]:
        different = ", ".join(differences(newest, table)) or "none"
        lines += ["", f"## With transformers {other}", "", f"These types have a different result: {different}."]
    return "\n".join(lines) + "\n"


STATUSES = [SUPPORTED, *SECTIONS]


def count(table: Table, status: str) -> int:
    return sum(verdict["status"] == status for verdict in table.values())


def is_whole(verdict: dict[str, Any]) -> bool:
    return verdict["compressed"] == verdict["layers"]


def listing(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts: dict[str, Verdict] = {}
    for model_type in TYPES:
        verdict = probe(model_type)
        if verdict.status in (SUPPORTED, NOTHING):
            verdict = replace(verdict, graphed=probe_graphed(tiny_model(model_type)))
        verdicts[model_type] = verdict
        print(f"{model_type}: {verdict.status}; graphed: {verdict.graphed or '-'}")
    results = load() | {transformers.__version__: {name: asdict(verdict) for name, verdict in verdicts.items()}}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(load()))


if __name__ == "__main__":
    main()
