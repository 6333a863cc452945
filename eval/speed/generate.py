"""Decode a full-size model end to end: hardkv and its peers in one run, and the minimum time that memory allows.

    python -m eval.speed.generate --out eval/results/generate.json    # one CUDA GPU
    python -m eval.speed.generate_report eval/results/generate.json   # tables, and the picture beside the JSON
    python -m eval.speed.generate --profile    # also where the time of each step and prompt goes

Models have their real shapes and random weights. Every method decodes through `model.generate`; a step is the time
between two calls of a stopping criterion. If only decoding is timed, the context is not computed but filled with
random keys and values ("synthetic fill"); hardkv's caches get as many as the budget keeps. `limit_ms` is the time in
which a large copy moves the bytes that a step must read: weights without the input embedding, keys and values.

kvpress needs an older transformers, so it decodes in a separate process, with packages from a folder that
`--kvpress-site` names: `pip install --no-deps --target FOLDER` of kvpress, transformers 5.2, and missing dependencies.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.machine import gpu
from eval.speed.bench import Bench
from eval.speed.cases import CASES, METHODS, MODELS, Case
from eval.speed.inputs import Setting
from eval.speed.timing import CudaTimer, copy_bandwidth, describe
from hardkv.files import file_to_write, write_text


def run(
    bench: Bench, methods: list[str], cases: list[Case], lengths: list[int], profile: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the records of a model one by one; a failed measurement records its error."""
    for length in lengths:
        for method, scorer in (("dynamic", ""), ("topk", "snapkv"), ("topk", "attention")):
            what = {"method": method, "scorer": scorer, "context": length, "batch": 1}
            yield _tried(partial(bench.first_token, method, scorer, length, 1), measure="first token", **what)
            if profile:
                call = partial(bench.profile_prompt, method, scorer, length, 1)
                yield _tried(call, measure="profile", of="prompt", **what)
    for case in cases:
        for method in methods:
            if method == "kvpress" and not case.batch:
                continue  # the number of sequences that fit is unknown
            what = {"method": method, **asdict(case)}
            yield _tried(partial(bench.decode, method, case), measure="decode", **what)
            if profile and case.batch and method != "kvpress":
                yield _tried(partial(bench.profile_step, method, case), measure="profile", of="step", **what)


def _tried(call: Callable[[], dict[str, Any]], **what: Any) -> dict[str, Any]:
    try:
        return call()
    except Exception as error:
        return what | {"error": describe(error)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default="eval/results/generate.json")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--cases", nargs="+", metavar="CONTEXTxBATCH", help="such as 2048x32; 32768x0: what fits")
    parser.add_argument("--first-token", nargs="*", type=int, default=[8192], metavar="LENGTH")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, of every case and prompt")
    parser.add_argument("--kvpress-site", type=Path, metavar="FOLDER", help="packages for kvpress (see above)")
    args = parser.parse_args()
    methods = [name for name in args.methods or METHODS if name != "kvpress" or args.kvpress_site is not None]
    if "kvpress" in (args.methods or ()) and "kvpress" not in methods:
        parser.error("kvpress needs --kvpress-site FOLDER: a folder with it and a transformers that it takes")
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and PyTorch finds none: run it on a machine with an NVIDIA GPU")
    cases = [Case(*map(int, case.split("x"))) for case in args.cases] if args.cases else list(CASES)
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(CudaTimer(), Setting(device, torch.bfloat16))
    bench = Bench(args.model, MODELS[args.model](), device, torch.bfloat16, args.kvpress_site)
    found: dict[str, Any] = {"machine": gpu(device), "copy_bytes_per_s": bandwidth, "records": []}
    if args.out.exists():
        earlier = json.loads(args.out.read_text())
        found["records"] = earlier["records"] if earlier["machine"] == found["machine"] else []
    for record in run(bench, methods, cases, args.first_token, args.profile):
        if "read_bytes" in record:
            record["limit_ms"] = record["read_bytes"] / bandwidth * 1e3
        found["records"] = [old for old in found["records"] if _key(old) != _key(record)] + [record]
        write_text(args.out, json.dumps(found, indent=1) + "\n")
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in record.items()}
        print(shown, flush=True)


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        record.get(name) for name in ("measure", "of", "model", "method", "scorer", "context", "batch", "kept")
    )


if __name__ == "__main__":
    main()
