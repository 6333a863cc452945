"""Time every kernel and a whole event on a GPU, with their peers and the minimum time that memory allows.

    python -m eval.speed.kernels --out eval/results/kernels.json     # minutes, on one CUDA GPU
    python -m eval.speed.kernels_report eval/results/kernels.json    # tables, and the picture beside the JSON

Each operation runs on random bfloat16 inputs of the same ragged shapes with all its backends: hardkv's Triton kernel;
every installed `flash_attn_varlen_func`, as hardkv calls it on both tiers and alone on one contiguous tier of the same
tokens; and the PyTorch reference. `eager_us` is one call between two CUDA events, including the host if it is slower;
`graph_us` is a call within a captured graph. Calls rotate over copies of the inputs that exceed the L2 several times,
or over 48 copies: the data of small operations stays in the L2, as in a decode step. `bytes` are the bytes
that must be moved, reading each input once and writing each output once; `fraction` is their rate relative to the
bandwidth of a large copy. Outputs are checked against float64 before timing.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import hardkv
from eval.machine import device_name
from eval.speed.checks import TOLERANCE, reference_kernels
from eval.speed.events import QWEN, SMALL_EVENTS, Model, measure_events
from eval.speed.inputs import QUICK, SHAPES, Setting, Shape
from eval.speed.operation import Operation
from eval.speed.operations import KINDS
from eval.speed.timing import COPY_BYTES, CudaTimer, copy_bandwidth, describe
from hardkv.files import file_to_write, write_text
from hardkv.kernels.attention import packages
from hardkv.kernels.backends import why_not_triton

# Bytes that the calls of a round use, and the maximum number of copies; the L2 of an H200 holds 60 MB.
ROTATED, MAX_COPIES = 400_000_000, 48
OPERATIONS = ("attention", "event", *(kind.name for kind in KINDS[1:]))  # in this order


def measure(copies: Sequence[Operation], shape: Shape, backend: str, timer: CudaTimer, setting: Setting) -> dict:
    """Return the record of one backend; a failure gives an error in place of times, or of the graph's time only."""
    first = copies[0]
    record: dict[str, Any] = {
        "operation": first.name,
        "backend": backend,
        "shape": asdict(shape),
        "copies": len(copies),
        "bytes": round(sum(copy.nbytes for copy in copies) / len(copies)),
        "flops": round(sum(copy.flops for copy in copies) / len(copies)),
    }
    if backend == "torch" and shape.rows * shape.mean > first.reference_tokens:
        return record | {"error": f"not run: the reference takes shapes of up to {first.reference_tokens:,} tokens"}
    if backend == "triton" and (reason := why_not_triton(setting.device, setting.dtype)):
        return record | {"error": f"not run: {reason}"}
    calls = [partial(copy.run, backend) for copy in copies]
    try:
        with reference_kernels() if backend == "torch" else nullcontext():
            off = first.error(calls[0]())
            if not off <= TOLERANCE:
                raise ArithmeticError(f"wrong: a relative error of {off:.2g}")
            record["relative_error"] = off
            for call in calls[1:]:
                call()
            record["eager_us"] = timer.eager(calls)
            if backend != "torch":
                record["graph_us"] = timer.graph(calls, record["eager_us"])
    except Exception as error:  # an unsupported case or too little memory: continue with the others
        record["error"] = describe(error)
    return record


def measure_shape(kind: type[Operation], shape: Shape, timer: CudaTimer, setting: Setting) -> Iterator[dict]:
    """Return the records of all backends on the same inputs."""
    backends = kind.backends()
    try:
        first = kind(shape, 0, setting)
        count = min(MAX_COPIES, math.ceil(ROTATED / first.nbytes))
        copies = [first, *(kind(shape, seed, setting) for seed in range(1, count))]
    except Exception as error:
        for backend in backends:
            failed = {"operation": kind.name, "backend": backend, "shape": asdict(shape)}
            yield failed | {"error": f"no inputs: {describe(error)}"}
        return
    for backend in backends:
        yield measure(copies, shape, backend, timer, setting)
    del first, copies
    timer.release()


def run(
    out: Path,
    operations: Sequence[str],
    timer: CudaTimer,
    setting: Setting,
    *,
    shapes: Sequence[Shape] = SHAPES,
    model: Model = QWEN,
    quick: bool = False,
    copy_bytes: int = COPY_BYTES,
) -> dict[str, Any]:
    """Measure operations and add them to `out` one by one, beside its records from the same setup.

    Args:
        shapes: for the operations. model: for the event. copy_bytes: size of the copy that measures bandwidth.
    """
    started = time.perf_counter()
    bandwidth = copy_bandwidth(timer, setting, copy_bytes)
    timer.release()
    data = {**machine(setting), "quick": quick, "copy_bandwidth": bandwidth, "records": []}
    before = json.loads(out.read_text()) if out.exists() else {}
    if all(before.get(name) == data[name] for name in ("machine", "versions", "quick")):
        data["records"] = before["records"]
    print(f"{data['machine']}: copies at {bandwidth / 1e12:.3f} TB/s", flush=True)
    kinds = {kind.name: kind for kind in KINDS}
    for name in (name for name in OPERATIONS if name in operations):
        if name == "event":
            small = measure_events(timer, setting, replace(model, batch=1), bandwidth, SMALL_EVENTS)
            found: Iterator[dict] = chain(measure_events(timer, setting, model, bandwidth), small)
        else:
            kind = kinds[name]
            own = shapes[: kind.most_shapes]
            found = (record for shape in own for record in measure_shape(kind, shape, timer, setting))
        records = []
        for record in found:
            best = record.get("graph_us") or record.get("eager_us")
            if best and "bytes" in record:
                record["fraction"] = record["bytes"] / (best * 1e-6) / bandwidth
            print(line(record), flush=True)
            records.append(record)
        others = [record for record in data["records"] if record["operation"] != name]
        data["records"] = sorted(others + records, key=lambda record: OPERATIONS.index(record["operation"]))
        write(out, data)
    print(f"{time.perf_counter() - started:.0f} s")
    return data


def line(record: dict[str, Any]) -> str:
    """Format a record for the terminal."""
    shape = Shape(*(record["shape"][name] for name in ("rows", "mean", "lengths")))
    backend = record["backend"] if "scorer" not in record else record["scorer"] + (", alike" * record["alike"])
    times = [f"{record[name]:.1f}" if name in record else "-" for name in ("eager_us", "graph_us")]
    share = record.get("fraction", record.get("share"))
    end = "" if share is None else f"{share:.3f}"
    end += f" batch {record['shape']['batch']}" if "scorer" in record else ""
    error = f"  {record['error'][:80]}" if "error" in record else ""
    return f"{record['operation']:18} {shape!s:18} {backend:22} {times[0]:>9} {times[1]:>8} us {end}{error}"


def machine(setting: Setting) -> dict[str, Any]:
    """Describe the hardware and software of the records."""
    distributions = metadata.packages_distributions()
    versions = {"torch": torch.__version__, "hardkv": hardkv.__version__}
    tops = {name: packages.PACKAGES[name].module.split(".")[0] for name in packages.installed()}
    for name, top in {"triton": "triton", **tops}.items():
        found = [f"{dist} {metadata.version(dist)}" for dist in sorted(set(distributions.get(top, ())))]
        versions[name] = ", ".join(found) or "not installed"
    return {"machine": device_name(setting.device), "versions": versions}


def write(out: Path, data: dict[str, Any]) -> None:
    """Write the JSON atomically, one record per line."""
    head = {name: value for name, value in data.items() if name != "records"}
    lines = ",\n".join(json.dumps(record) for record in data["records"])
    write_text(out, json.dumps(head)[:-1] + ',\n"records": [\n' + lines + "\n]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default="eval/results/kernels.json")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, and an event of 6 layers")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS, metavar="OPERATION")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and PyTorch finds none: run it on a machine with an NVIDIA GPU")
    from eval.speed.kernels_report import summary

    setting = Setting(torch.device("cuda"), torch.bfloat16)
    quick = {"shapes": QUICK, "model": replace(QWEN, layers=6, weights=QWEN.weights / 6)} if args.quick else {}
    print(summary(run(args.out, args.only, CudaTimer(), setting, quick=args.quick, **quick)))


if __name__ == "__main__":
    main()
