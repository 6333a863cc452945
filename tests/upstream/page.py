"""What `tests.upstream.run` found, as a page of the documentation."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.models.compatibility import first_sentence
from tests.upstream.hardkv_in_place import CACHES
from tests.upstream.reasons import EVICTED, REASONS, REFUSALS, UNEXPLAINED

RESULTS = Path(__file__).parents[2] / "docs" / "upstream.json"
PAGE = RESULTS.with_suffix(".md")
COUNTED = ("passed", "not touched", "skipped")
REFUSED, OTHER, ANYWAY = "refused", "differs", "fails anyway"
KINDS = ("passed", REFUSED, OTHER, ANYWAY, *COUNTED[1:])

ABOUT = """# Transformers' own tests

Transformers tests its caches and `generate()` with these tests. We run them with a HardKVCache wherever they make a
DynamicCache. In the first run, the cache has an event every few tokens and keeps all tokens, so that every expectation
of equality holds for it too. In the second run, the cache evicts, and generated tokens may differ.

The tests are those that every model inherits for generation (greedy, sampling, beams, assisted and prompt-lookup
decoding, continuing from a cache or from embeddings, left padding, position ids, offloading), and the general tests of
caches and generation.

- **passed**: attention went through a HardKVCache, and everything that the test asserts holds.
- **refused**: hardkv raised its own error, which names the reason.
- **differs**: the test expects something that a HardKVCache does not have. The reasons are below.
- **fails anyway**: the test also fails with DynamicCache, on the machine and with the versions of this run, or it fails
  before it makes a cache.
- **not touched**: the test passed, but attention never went through a layer of ours (tests without a cache or with a
  StaticCache, models without a full-attention layer). In the second run, also tests in which nothing was evicted.
- **skipped**: the test skipped itself, mostly because it needs a GPU or does not suit the model, or it is slow.

The setup differs from what users have in four ways:

- The encoder cache of an encoder-decoder stays a DynamicCache, as [Limits](limits.md) says.
- Tests of assisted decoding do not ask for attention weights, because a HardKVCache gives them for the first forward
  only.
- When a test reads a layer's keys and values, they are gathered from the layer's tiers. They are zero where a head has
  evicted a token.
- When a test passes keys and values to `update()` itself, they are attended at once.

We leave out tests that compile a model around a StaticCache. Without a network, checkpoints are tiny random ones and
SmolLM2-135M, which comes in a package. Tests that know what another checkpoint generates therefore fail anyway.
"""


def load() -> dict[str, Any]:
    """Results by what the cache did: "whole" and "evicting"."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def why(cache: str, family: str, name: str, test: dict[str, Any]) -> tuple[str, str]:
    """Kind and reason of a test that did not pass."""
    if test["dynamic"] == "failed" or not test["caches"]:
        return ANYWAY, ""
    error = test["errors"][0]
    if error["refused"]:
        words = first_sentence(f"{error['type']}: {error['message']}").partition(", so this model")[0]
        return REFUSED, ": ".join(filter(None, [words, REFUSALS.get(family)]))
    told = f"{name} {error['type']}: {error['message']} {error['at']}"
    reasons = REASONS | EVICTED if cache == "evicting" else REASONS
    return OTHER, next((reason for pattern, reason in reasons.items() if re.search(pattern, told)), UNEXPLAINED)


def group(file: str) -> str:
    """A model's folder, or the file."""
    parts = file.split("/")
    return parts[2] if parts[1] == "models" else file


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [ABOUT]
    titles = {"whole": "Nothing evicted", "evicting": "Evicting"}
    for cache, title in titles.items():
        if cache in results:
            lines += section(cache, title, results[cache])
    lines += [
        "`python -m tests.upstream.run --tests CHECKOUT` runs the tests again and writes this page from",
        "`upstream.json`. CHECKOUT is a copy of transformers' repository.",
    ]
    return "\n".join(lines) + "\n"


def section(cache: str, title: str, entry: dict[str, Any]) -> list[str]:
    """One run: counts by file and family, then reasons."""
    counts: dict[str, dict[str, int]] = {}
    reasons: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file, row in sorted(entry["files"].items()):
        if not row["others"] and not any(row[outcome] for outcome in COUNTED):  # no tests of generation
            continue
        total = counts.setdefault(group(file), dict.fromkeys(KINDS, 0))
        for outcome in COUNTED:
            total[outcome] += row[outcome]
        for name, test in row["others"].items():
            kind, reason = why(cache, group(file), name, test)
            total[kind] += 1
            if kind != ANYWAY:
                reasons[kind, reason][re.sub(r"_\d+(_\w+)?$", "", name.split("::")[-1])].add(group(file))
    general = {name: total for name, total in counts.items() if "/" in name}
    models = {name: total for name, total in counts.items() if "/" not in name}
    anyway = [test for row in entry["files"].values() for test in row["others"].values() if test["dynamic"] == "failed"]
    rows = {f"`{name}`": total for name, total in general.items()}
    rows[f"{len(models)} model families"] = {kind: sum(total[kind] for total in models.values()) for kind in KINDS}
    lines = [
        f"## {title}",
        "",
        f"{', '.join(f'`{name}={value}`' for name, value in CACHES[cache].items())}; transformers "
        f"{entry['transformers']}, torch {entry['torch']}, Python {entry['python']}, CPU. Tests: "
        f"{entry['source']}.",
        "",
        *table("tests", rows),
        "",
    ]
    if anyway:
        same = sum(test["same"] for test in anyway)
        lines += [f"Of {len(anyway)} tests that also fail with DynamicCache, {same} fail with the same message.", ""]
    if reasons:
        lines += ["| | because | tests | families |", "|---|---|---|---|"]
        for (kind, reason), tests in sorted(reasons.items()):
            where = sorted(set().union(*tests.values()))
            named = ", ".join(f"`{name.rpartition('/')[2]}`" for name in where[:12])
            more = f" and {len(where) - 12} more" if len(where) > 12 else ""
            lines.append(f"| {kind} | {reason} | {', '.join(f'`{test}`' for test in sorted(tests))} | {named}{more} |")
        lines.append("")
    return [*lines, *table("family", {f"`{name}`": total for name, total in models.items()}), ""]


def table(head: str, rows: dict[str, dict[str, int]]) -> list[str]:
    """Counts, with columns that have any."""
    kinds = [kind for kind in KINDS if any(row[kind] for row in rows.values())]
    lines = [f"| {head} | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    return [
        *lines,
        *(f"| {name} | {' | '.join(str(row[kind] or '') for kind in kinds)} |" for name, row in rows.items()),
    ]
