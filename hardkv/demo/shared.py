"""What the demos share: timed generation, progress bars, and the data of their reports."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from hardkv.cache import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.config import HardKVConfig
from hardkv.extras import InputError
from hardkv.loading import DEFAULT_MODEL


class Clock(BaseStreamer):
    """Note when tokens arrive. `generate` passes the prompt first, then every token."""

    def __init__(self, on_token: Callable[[int], None]):
        self.ticks: list[float] = []
        self.on_token = on_token

    def put(self, value: Tensor) -> None:
        self.ticks.append(time.perf_counter())
        self.on_token(len(self.ticks) - 1)

    def end(self) -> None:
        """Do nothing: there is nothing to flush."""

    @property
    def prefill_seconds(self) -> float:
        return self.ticks[1] - self.ticks[0]

    @property
    def tokens_per_second(self) -> float | None:
        steps = len(self.ticks) - 2
        return steps / (self.ticks[-1] - self.ticks[1]) if steps > 0 else None


def generate(model: Any, inputs: dict[str, Tensor], cache: Cache, max_new_tokens: int, clock: Clock) -> Tensor:
    """Return the tokens of the greedy answers, `[batch, new]`."""
    out = model.generate(
        **inputs,
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,  # the checkpoint's sampling defaults would only raise warnings
        top_p=None,
        top_k=None,
        streamer=clock,
    )
    return out[:, inputs["input_ids"].shape[1] :]


def make_console() -> Console:
    """Return a console for standard output."""
    console = Console()
    if not console.is_terminal:
        console.width = 120  # for pipes and logs rich assumes 80
    return console


def make_progress(console: Console) -> Progress:
    """Return progress bars that count tokens."""
    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
        console=console,
    )


def tell_settings(say: Callable[[str], None], configs: Mapping[str, HardKVConfig]) -> None:
    """Print one line per config."""
    for name, config in configs.items():
        say(f"HardKV {name}: {selection(config)}, window {config.window}, sinks {config.sinks}")


def check_caches(model: Any, configs: Mapping[str, HardKVConfig]) -> None:
    """Make every cache once, before minutes of work. calibration="auto" calibrates here, outside the measured times.

    Raises:
        InputError: a calibration does not fit the model.
    """
    try:
        for config in configs.values():
            HardKVCache(config=model, **config.to_dict())
    except ValueError as error:
        raise InputError(str(error)) from error


def warm_up(model: Any, inputs: dict[str, Tensor]) -> None:
    """Generate two tokens, so that threads and kernels start outside the measured times."""
    start = {key: value[:, :64] for key, value in inputs.items()}
    generate(model, start, DynamicCache(config=model.config), 2, Clock(lambda count: None))


def held(cache: DynamicCache) -> tuple[int, int]:
    """Return the bytes held, and the bytes that a dense cache would hold."""
    if isinstance(cache, HardKVCache):
        return cache.nbytes(), cache.dense_nbytes()
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    dense = sum(tensor.nbytes for tensor in tensors)
    return dense, dense


def selection(config: HardKVConfig) -> str:
    """Return scorer, budget and, below 16, bits as text."""
    bits = "" if config.bits == 16 else f", bits {str(config.bits).strip('()')}"
    return f"scorer {config.to_dict()['scorer']['name']}, budget {config.budget}{bits}"


def environment(model: Any, model_name: str | None) -> dict[str, str]:
    """Return the environment that numbers depend on, for JSON."""
    on_gpu = model.device.type == "cuda"
    return {
        "model": model_name or DEFAULT_MODEL,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
