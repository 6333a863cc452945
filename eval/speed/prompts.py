"""Measure the cost of selection at the prompt: time to the first token with each scorer, beside DynamicCache.

    python -m eval.speed.prompts                                              # two small layers, on the CPU
    python -m eval.speed.prompts --device cuda --lengths 8192 32768 131072    # Qwen3-8B's shape, on a GPU

Weights and tokens are random. The caches take turns, so that a slow phase of the machine affects all; the median of
`--repeats` runs counts. Records of other machines and lengths stay in the file.
"""

import argparse
import json
from statistics import median
from typing import Any

import torch
from transformers import Qwen3Config

from eval.machine import cpu, gpu
from eval.speed.bench import REPEATS, Bench
from eval.speed.cases import MODELS
from hardkv.files import file_to_write, write_text

OUT = "eval/results/prompts.json"
WARM = 8192  # tokens
# Method and scorer, as in `Bench.first_token`; the first is the baseline.
CACHES = (("dynamic", ""), ("topk", "snapkv"), ("topk", "rkv"))
# On a CPU: the reasoner's width, and enough layers to run events of several layers together.
SMALL = Qwen3Config(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=1 << 17,
)


def measure(bench: Bench, length: int, repeats: int) -> list[dict[str, Any]]:
    """Return one record per cache: seconds, their ratio to DynamicCache's, and all times in order."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {cache: [] for cache in CACHES}
    for turn in range(repeats + 1):
        for cache in CACHES:
            # the first run builds kernels and takes memory: a short one does, where each takes minutes
            run = bench.first_token(*cache, length if turn else min(length, WARM), 1, repeats=1, warm=0)
            if turn:
                runs[cache].append(run)
    seconds = {cache: median(run["seconds"] for run in of) for cache, of in runs.items()}
    return [
        runs[cache][-1]
        | {
            "measure": "prompt",
            "seconds": seconds[cache],
            "ratio": seconds[cache] / seconds[CACHES[0]],
            "all_seconds": [run["seconds"] for run in runs[cache]],
        }
        for cache in CACHES
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed.prompts", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default=file_to_write(OUT))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b", help="on a GPU")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384], metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    device = torch.device(args.device)
    if args.device == "cuda":
        bench = Bench(args.model, MODELS[args.model](), device, torch.bfloat16)
    else:
        bench = Bench("two small layers", SMALL, device, torch.float32)
    found = json.loads(args.out.read_text())["records"] if args.out.exists() else []
    for length in args.lengths:
        for record in measure(bench, length, args.repeats):
            record["machine"] = gpu(device) if args.device == "cuda" else cpu()
            found = [old for old in found if _key(old) != _key(record)] + [record]
            print(f"{length} {record['scorer'] or record['method']}: {record['ratio']:.3f}, {record['seconds']:.3f} s")
        write_text(args.out, json.dumps({"records": found}, indent=1) + "\n")


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return (*tuple(record[name] for name in ("model", "context", "method", "scorer")), "cpu" in record["machine"])


if __name__ == "__main__":
    main()
