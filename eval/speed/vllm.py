"""Time the decode step of stock vLLM, for comparison with the steps that eval.speed.generate measures.

    python -m eval.speed.vllm --case 8192x32 --kv-cache-dtype auto fp8 --out eval/results/vllm.json    # one CUDA GPU

Models have the shapes of eval.speed.generate and random weights, of 16 bits; `--kv-cache-dtype` is vLLM's own option
for keys and values ("auto": 16 bits). Each of these dtypes is measured in a separate process, since vLLM holds its GPU
memory (eval/speed/vllm_decode.py). `--site` names the folder of vLLM if it was installed by `pip install --target`.

`step_ms` is the median of windows of 100 steps, `all_step_ms` has them all, and `kv_tokens` counts the tokens in the
cache of all sequences at the middle of the windows.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eval.speed.cases import MODELS
from eval.speed.vllm_decode import MOST_SEQUENCES, MOST_TOKENS
from hardkv.files import file_to_write, write_text

ROOT = Path(__file__).parents[2]


def context_and_batch(text: str) -> tuple[int, int]:
    """Read "8192x32": tokens of every prompt, and number of sequences."""
    try:
        context, batch = map(int, text.split("x"))
    except ValueError:
        context, batch = 0, 0
    if not (0 < context <= MOST_TOKENS and 0 < batch <= MOST_SEQUENCES):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no case: give CONTEXTxBATCH, such as 8192x32, of at most {MOST_TOKENS}x{MOST_SEQUENCES}"
        )
    return context, batch


def write_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write the config.json of a model whose class vLLM finds by its name."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.to_json_file(folder / "config.json", use_diff=False)


def measure(model: str, kv_cache_dtype: str, cases: list[tuple[int, int]], site: Path | None) -> dict[str, Any]:
    """Measure cases in a process of their own; return its machine and records.

    Raises:
        RuntimeError: the process failed; its messages say why.
    """
    config = MODELS[model]()
    path = [str(each) for each in (site, os.environ.get("PYTHONPATH")) if each]
    environment = {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_config(config, folder)
        asked = {"folder": name, "model": model, "kv_cache_dtype": kv_cache_dtype, "cases": cases}
        asked |= {"vocabulary": config.vocab_size, "out": str(folder / "records.json")}
        program = [sys.executable, "-m", "eval.speed.vllm_decode", json.dumps(asked)]
        if subprocess.run(program, cwd=ROOT, env=os.environ | environment).returncode:
            raise RuntimeError(f"vLLM failed with --kv-cache-dtype {kv_cache_dtype}: see its messages above")
        return json.loads(Path(asked["out"]).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=file_to_write, default="eval/results/vllm.json")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--case", nargs="+", type=context_and_batch, default=[(8192, 32)], metavar="CONTEXTxBATCH")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto", "fp8"], metavar="DTYPE")
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="packages for vLLM (see above)")
    args = parser.parse_args()
    site = args.site and args.site.resolve()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and PyTorch finds none: run it on a machine with an NVIDIA GPU")
    if PathFinder.find_spec("vllm", [*([str(site)] if site else []), *sys.path]) is None:
        parser.error("vLLM is not installed: pip install vllm, or name a folder that has it by --site FOLDER")
    records: list[dict[str, Any]] = []
    for kv_cache_dtype in args.kv_cache_dtype:
        run = measure(args.model, kv_cache_dtype, args.case, site)
        records += run["records"]
        write_text(args.out, json.dumps({"machine": run["machine"], "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
