"""Time the attention of a decode step over codes beside that over 16 bits, by a captured graph.

    python -m eval.speed.codes --out eval/results/codes.json    # one CUDA GPU

Every row holds as many tokens whatever their bits, and the dense tier is half full.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch

from eval.machine import gpu
from eval.speed.inputs import Setting, coded, make_tiers
from eval.speed.timing import CudaTimer, copy_bandwidth
from hardkv import HardKVConfig
from hardkv.cache.storage.codec import Codec
from hardkv.files import file_to_write, write_text
from hardkv.kernels.attention import attend_tiers
from hardkv.kernels.codes import BITS


def measure(timer: CudaTimer, setting: Setting, bits: int, batch: int, length: int) -> dict[str, Any]:
    """Time attention over `length` condensed tokens in every row, each of its keys and values at these bits."""
    rows = torch.full((batch * setting.heads,), length)
    seen = 2 * length
    tiers = make_tiers(setting, rows, setting.half_full, seen, seed=bits)
    if bits != 16:
        tiers = coded(tiers, Codec((bits, bits), HardKVConfig.sinks, None))
    columns, dense = tiers.condensed.columns, tiers.dense
    query = setting.normal(1)(batch, setting.heads * setting.group, 1, setting.dim)
    call = partial(
        attend_tiers,
        *(query, columns.keys, columns.values, tiers.condensed.rows),
        *(dense.keys, dense.values, dense.positions, dense.fill),
        bound=dense.bound,
        start=seen,
        scale=setting.dim**-0.5,
        coding=tiers.coding(columns),
    )
    call()
    held = sum(each.nbytes for each in (columns.keys, columns.values, columns.scales))
    return {
        "bits": bits,
        "rows": rows.shape[0],
        "tokens": length,
        "bytes": held,
        "us": timer.graph([call], timer.eager([call])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.codes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default="eval/results/codes.json")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 2048, 16384], help="condensed tokens per row")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and PyTorch finds none: run it on a machine with an NVIDIA GPU")
    timer, setting = CudaTimer(), Setting(torch.device("cuda"), torch.bfloat16)
    found: dict[str, Any] = {
        "machine": gpu(setting.device),
        "copy_bytes_per_s": copy_bandwidth(timer, setting),
        "records": [],
    }
    for length in args.tokens:
        for bits in BITS:
            record = measure(timer, setting, bits, args.batch, length)
            found["records"].append(record)
            write_text(args.out, json.dumps(found, indent=1) + "\n")
            first = next(each for each in found["records"] if each["tokens"] == length)
            print({**record, "times as fast as 16 bits": round(first["us"] / record["us"], 2)}, flush=True)


if __name__ == "__main__":
    main()
