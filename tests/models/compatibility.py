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
    REFUSED: "An error names the reason before anything is stored; use transformers' DynamicCache.",
    NOTHING: "HardKVCache works as DynamicCache does and warns that there is nothing for it to compress. Some of these "
    "types have checkpoints without a sliding window (Mistral), which are compressed.",
    NO_CACHE: "transformers' own DynamicCache does not serve these types (most have no keys and values, or a cache of "
    "their own), so HardKVCache cannot either.",
    NOT_BUILT: "Not tested: no tiny model could be built.",
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
        f"Every type that transformers {version} lists as a causal language model, as a tiny random model, prompt in a "
        "left-padded batch, then one token at a time. *Supported* means: without eviction the logits are those of "
        "DynamicCache; with it, over several selections, those of plain attention in which every KV head sees what "
        "`cache.kept()` says it holds; in float16 and bfloat16 the same within rounding. Models of pictures and text "
        "are tested on text here, and Gemma 3, LLaVA, Mllama and Qwen2.5-VL with pictures elsewhere.",
        "",
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
        *(
            f"| {status} | " + " | ".join(str(count(table, status)) for table in results.values()) + " |"
            for status in STATUSES
        ),
        "",
        "Written by `python -m tests.models.compatibility` from what it measured, which is in `compatibility.json`.",
        "",
        "## Supported",
        "",
        "All layers are compressed: " + listing(name for name in by_status[SUPPORTED] if is_whole(newest[name])) + ".",
        "",
        "Layers with full attention are compressed, others (sliding windows, linear attention, convolutions, "
        "keys of another layer or of a picture) stay as DynamicCache has them: "
        + listing(name for name in by_status[SUPPORTED] if not is_whole(newest[name]))
        + ".",
    ]
    lines += [
        "",
        "Checkpoints with LongRoPE of "
        + listing(SWITCHING)
        + " rotate all keys otherwise once a text exceeds `original_max_position_embeddings` tokens, and drop their "
        "cache for that. A HardKVCache holds texts on either side. `generate()` ends with an error where a text that "
        "began below gets there, and warns before; `graphed` then computes it again, where it works with the model "
        "(not with `phimoe`, whose step the host waits for, nor with transformers 5.17 beyond that length).",
    ]
    stepped = [name for name in sorted(newest) if newest[name].get("graphed") == YES]
    refused = [name for name in sorted(newest) if newest[name].get("graphed", YES) not in (YES, "")]
    lines += [
        "",
        "## Graphed",
        "",
        "`custom_generate=graphed` decodes by replays of a CUDA graph. Compared with generate()'s own loop and the "
        "same evicting cache: the same logits within rounding, the same tokens kept, the same states and sliding "
        "windows. A CPU stands in for the GPU here: the operators of one step are recorded and run again for the next "
        "steps up to the event. It is so with " + listing(stepped) + ".",
        "",
        "The others are refused:",
        "",
        "| type | because of |",
        "|---|---|",
        *(f"| `{name}` | {why_not_graphed(newest[name]['graphed'])} |" for name in refused),
    ]
    for status, meaning in SECTIONS.items():
        lines += ["", f"## {status[0].upper()}{status[1:]}", "", meaning, ""]
        lines += ["| type | reason |", "|---|---|"]
        lines += [f"| `{name}` | {first_sentence(newest[name]['reason'])} |" for name in by_status[status]]
    for other, table in list(results.items())[1:]:
        different = ", ".join(differences(newest, table)) or "none"
        lines += ["", f"## With transformers {other}", "", f"Types with another result than above: {different}."]
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
