"""Runs transformers' own tests with HardKVCache in DynamicCache's place; writes docs/upstream.json and .md.

    python -m tests.upstream.run --tests CHECKOUT [--cache whole|evicting] [--family llama ...] [--workers 2]
    python -m tests.upstream.run --page

CHECKOUT is a copy of transformers' repository whose tests fit the installed transformers. What a test needs besides
hardkv[dev] is in the extra `upstream`. A file's results replace those that the JSON file has of it. A test that does
not pass is run again with DynamicCache, so that what fails anyway is told apart.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name

from tests.models import compatibility
from tests.models.probe import NOTHING, SUPPORTED
from tests.upstream import checkpoints, page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GENERAL = (
    "tests/generation/test_utils.py",
    "tests/generation/test_candidate_generator.py",
    "tests/utils/test_cache_utils.py",
)
# Of pictures, sounds and text; the others are in docs/compatibility.json
OTHERS = (
    "gemma3n",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
)
TOGETHER = 8  # files that share a process
LIMIT = 3600  # seconds a process may take


def families() -> list[str]:
    """Folders of tests/models that hold what docs/compatibility.json says works, or has nothing to compress."""
    known = compatibility.committed() or {}
    types = [name for name, verdict in known.items() if verdict["status"] in (SUPPORTED, NOTHING)]
    return sorted({model_type_to_module_name(name) for name in types} | set(OTHERS))


def pytest_run(checkout: Path, home: Path, cache: str, files: list[str]) -> dict[str, Any]:
    """What the plugin tells of each test."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        path = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(ROOT), str(HERE)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
        options = ["-p", "hardkv_in_place", "--hardkv-cache", cache, "--hardkv-report", str(report)]
        quiet = ["-q", "--tb=no", "-W", "ignore", "-o", "log_cli=0", "-p", "no:cacheprovider", "--timeout=300"]
        quiet.append("--continue-on-collection-errors")
        command = [sys.executable, "-m", "pytest", *quiet, *options, *files]
        with log.open("w") as output:
            subprocess.run(command, cwd=checkout, env=environment, stdout=output, stderr=output, timeout=LIMIT)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report of {files}:\n{log.read_text()[-3000:]}")
        return json.loads(report.read_text())


def verdicts(checkout: Path, home: Path, cache: str, files: list[str]) -> dict[str, Any]:
    """Of each file: how many tests passed, never met a HardKVCache, or were skipped, and every other test."""
    found = pytest_run(checkout, home, cache, files)
    failing = {name.partition("::")[0] for name, record in found.items() if record["outcome"] == "failed"}
    without = pytest_run(checkout, home, "dynamic", sorted(failing)) if failing else {}
    table: dict[str, Any] = {file: dict.fromkeys(page.COUNTED, 0) | {"others": {}} for file in files}
    for name, record in found.items():
        file, _, test = name.partition("::")  # without a test, it could not be imported
        outcome = record["outcome"]
        if outcome == "failed":
            told = without.get(name, {"outcome": "not run", "errors": []})
            same = [error["message"] for error in told["errors"]] == [error["message"] for error in record["errors"]]
            table[file]["others"][test or "import"] = {
                "caches": record["caches"],
                "errors": record["errors"],
                "dynamic": told["outcome"],
                "same": same,
            }
        else:
            touched = outcome == "skipped" or record["attended" if cache == "whole" else "evicted"]
            table[file][outcome if touched else "not touched"] += 1
    return table


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream.run", description=str(__doc__).splitlines()[0])
    parser.add_argument("--tests", type=Path, help="a checkout of transformers")
    parser.add_argument("--source", default="", help="where its tests come from, for the page")
    parser.add_argument("--cache", choices=["whole", "evicting"], default="whole")
    parser.add_argument("--family", nargs="*", help="folders of tests/models, besides the general files")
    parser.add_argument("--skip-done", action="store_true", help="leave files alone of which there are results")
    parser.add_argument("--workers", type=int, default=1, help="files at a time")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page again")
    arguments = parser.parse_args(argv)
    results = page.load()
    if not arguments.page:
        if arguments.tests is None:
            parser.error("--tests: the path of a checkout of transformers is needed")
        chosen = families() if arguments.family is None else arguments.family
        folders = [arguments.tests / "tests" / "models" / family for family in chosen]
        found = [file for folder in folders for file in sorted(folder.glob("test_modeling_*.py"))]
        general = GENERAL if arguments.cache == "whole" else ()  # they know what is generated without eviction
        files = [*general, *(file.relative_to(arguments.tests).as_posix() for file in found)]
        entry = results.setdefault(arguments.cache, {"files": {}})
        entry |= {
            "source": arguments.source or entry.get("source", ""),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        if arguments.skip_done:
            files = [file for file in files if file not in entry["files"]]

        lock = Lock()

        def run(files: list[str]) -> None:
            try:
                table = verdicts(arguments.tests, Path(home), arguments.cache, files)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{files}: {error}", flush=True)
                return
            with lock:
                entry["files"] |= table
                page.save(results)
                for file, row in table.items():
                    print(file, row | {"others": list(row["others"])}, flush=True)

        with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(arguments.workers) as pool:
            checkpoints.write(Path(home))
            list(pool.map(run, (files[i : i + TOGETHER] for i in range(0, len(files), TOGETHER))))
    page.PAGE.write_text(page.page(page.load()))


if __name__ == "__main__":
    main()
