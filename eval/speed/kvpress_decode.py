"""Decode one model with kvpress (https://github.com/NVIDIA/kvpress), in a process with an older transformers.

`eval.speed.bench` runs this file with the packages of `--kvpress-site` first on the path. It does not import
hardkv. The command line gives the cases as JSON; the last line of the output gives the records as JSON.

Like kvpress' own pipeline, a plain loop over the model's forward picks the token with the largest logit. The
cache begins with random keys and values of as many tokens as are kept, and SnapKVPress reduces it to this size every
`interval` tokens, the same number in every head.
"""

import json
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any


def decode(model: Any, cache: Any, batch: int, context: int, steps: int) -> list[float]:
    """Draw `steps` tokens per sequence after `context` columns; return the times at which they were known."""
    import torch

    device = model.device
    token = torch.randint(5, model.config.vocab_size, (batch, 1), device=device)
    times = []
    for step in range(steps):
        position = torch.full((batch, 1), context + step, device=device)
        with torch.no_grad():
            logits = model(input_ids=token, past_key_values=cache, position_ids=position).logits
        token = logits[:, -1:].argmax(-1)
        token.tolist()  # a caller checks every sequence for its end
        times.append(time.perf_counter())
    return times


def filled(config: Any, batch: int, kept: int, device: Any, dtype: Any) -> Any:
    """Create a DynamicCache of random keys and values."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    shape = batch, config.num_key_value_heads, kept, config.head_dim
    for idx in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)), idx)
    return cache


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of `request["cases"]`."""
    from importlib import metadata

    import torch
    from kvpress import DecodingPress, SnapKVPress
    from transformers import AutoConfig, AutoModelForCausalLM

    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    config = AutoConfig.for_model(**request["config"])
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    versions = {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    records = []
    for case in request["cases"]:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cache = filled(config, case["batch"], case["kept"], device, dtype)
        press = DecodingPress(
            base_press=SnapKVPress(window_size=request["window"]),
            compression_interval=request["interval"],
            target_size=case["kept"],
            hidden_states_buffer_size=request["interval"],
        )
        with press(model):
            times = decode(model, cache, case["batch"], case["context"], request["warm"] + request["steps"])
        times = times[request["warm"] - 1 :]
        each = [after - before for before, after in pairwise(times)]
        mean = (times[-1] - times[0]) / len(each)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        records.append(
            case
            | {"steps": len(each), "step_ms": mean * 1e3, "median_ms": median(each) * 1e3, "kv_bytes": held}
            | {"tokens_per_s": case["batch"] / mean, "versions": versions}
            | ({"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {})
        )
        del cache, press  # else they would count in the next case's peak
    return records


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
