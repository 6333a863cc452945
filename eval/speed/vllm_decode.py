"""Decode with vLLM (https://github.com/vllm-project/vllm), in a process of its own that eval.speed.vllm starts.

The command line gives what to measure as JSON; the process writes its records into the file that this names.

A batch decodes through `LLM.generate`, with prompts of random tokens and no prefix caching. The engine stamps the
outputs of every step with its time. Only the steps in which every sequence made one token count: before them, prompts
are still computed; after them, sequences have ended.
"""

import json
import random
import sys
from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from statistics import median
from typing import Any

WARM, WINDOW, WINDOWS = 20, 100, 3  # untimed steps; timed steps, and how often in one call of generate()
REPEATS = 2  # calls of generate()
MOST_SEQUENCES, MOST_TOKENS = 64, 32768
ENGINE: dict[str, Any] = {
    "max_num_seqs": MOST_SEQUENCES,
    "max_model_len": 34000,  # the longest prompt and all that is generated
    "gpu_memory_utilization": 0.92,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]},
}

Trace = list[tuple[float, int, int]]


def record_steps(processor: Any) -> Trace:
    """Let vLLM's output processor record every step: its time in seconds, its number of outputs, and of new tokens."""
    trace: Trace = []
    process = processor.process_outputs

    def recording(outputs: Sequence[Any], engine_core_timestamp: float, **options: Any) -> Any:
        trace.append((engine_core_timestamp, len(outputs), sum(len(each.new_token_ids) for each in outputs)))
        return process(outputs, engine_core_timestamp=engine_core_timestamp, **options)

    processor.process_outputs = recording
    return trace


def steady(trace: Trace, batch: int) -> list[tuple[float, int]]:
    """Return the longest run of steps in which each of `batch` sequences made exactly one token.

    A step is its time in seconds and the number of tokens generated so far, by all steps of the trace.
    """
    made = accumulate(tokens for _, _, tokens in trace)
    steps = [(outputs == tokens == batch, (time, next(made))) for time, outputs, tokens in trace]
    runs = ([step for _, step in run] for full, run in groupby(steps, key=lambda step: step[0]) if full)
    return max(runs, key=len, default=[])


def windows(steps: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return the mean time of a step, in ms, of every window, and the tokens generated until its middle.

    Raises:
        ValueError: there are too few steps.
    """
    needed = WARM + WINDOWS * WINDOW + 1
    if len(steps) < needed:
        raise ValueError(
            f"all sequences made a token in {len(steps)} steps in a row, and {needed} are needed: "
            "if vLLM's cache has no room for all of them, choose a smaller case"
        )
    found = []
    for start in range(WARM, WARM + WINDOWS * WINDOW, WINDOW):
        (begin, _), (end, _) = steps[start], steps[start + WINDOW]
        found.append(((end - begin) / WINDOW * 1e3, steps[start + WINDOW // 2][1]))
    return found


def generate(llm: Any, trace: Trace, vocabulary: int, context: int, batch: int, seed: int) -> list[tuple[float, int]]:
    """Decode a batch of random prompts; return the windows of steady steps, with all tokens that the cache holds."""
    from vllm import SamplingParams

    trace.clear()
    chunk = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens - batch
    ramp = -(-batch * context // chunk)  # steps in which the first sequences decode and the last prompts are computed
    draw = random.Random(batch * 1000003 + context + seed)
    prompts = [{"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(context)]} for _ in range(batch)]
    new = 1 + WARM + WINDOWS * WINDOW + 8 + ramp
    sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate(prompts, sampling, use_tqdm=False)
    return [(ms, batch * context + made) for ms, made in windows(steady(trace, batch))]


def main(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of `asked["cases"]`; a failed one has its error."""
    import vllm

    from eval.speed.timing import describe

    llm = vllm.LLM(
        model=asked["folder"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        kv_cache_dtype=asked["kv_cache_dtype"],
        enable_prefix_caching=False,
        **ENGINE,
    )
    trace = record_steps(llm.llm_engine.output_processor)
    generate(llm, trace, asked["vocabulary"], 128, 1, 0)  # the first call is slower
    records = []
    for context, batch in asked["cases"]:
        record = {"measure": "decode", "method": "vllm", "kv_cache_dtype": asked["kv_cache_dtype"]}
        record |= {"model": asked["model"], "context": context, "batch": batch, "vllm": vllm.__version__}
        try:
            calls = [generate(llm, trace, asked["vocabulary"], context, batch, seed) for seed in range(REPEATS)]
            found = [window for call in calls for window in call]
            record |= {"step_ms": median(ms for ms, _ in found), "all_step_ms": [ms for ms, _ in found]}
            record["kv_tokens"] = round(median(held for _, held in found))
        except Exception as error:
            record["error"] = describe(error)
        records.append(record)
        print(record, flush=True)
    return records


def machine() -> dict[str, Any]:
    """Describe the GPU, or the CPU, and the packages of this process."""
    import torch

    from eval.machine import cpu, gpu

    return gpu(torch.device("cuda")) if torch.cuda.is_available() else cpu()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = {"records": main(asked), "machine": machine()}
    Path(asked["out"]).write_text(json.dumps(found))
