"""The demo on a text: one question about it, answered with a dense cache and with compressed ones, side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import DynamicCache

from hardkv.cache import HardKVCache
from hardkv.cache.model import Traits
from hardkv.cache.record.stats import format_bytes
from hardkv.config import HardKVConfig
from hardkv.demo.shared import (
    Clock,
    check_caches,
    environment,
    generate,
    held,
    make_console,
    make_progress,
    selection,
    tell_settings,
    warm_up,
)
from hardkv.files import check_writable, write_text
from hardkv.loading import load
from hardkv.viz import plot_lengths


@dataclass
class Run:
    """One answer, and what its cache held at the end. JSON has the same fields."""

    cache: str
    answer: str
    new_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float | None  # None if there is only one token
    nbytes: int = 0
    dense_nbytes: int = 0
    settings: dict[str, Any] | None = None  # HardKVConfig.to_dict(); None for DynamicCache
    lengths: list[list[list[int]]] = field(default_factory=list, repr=False)  # [layers][batch][kv_heads]

    @property
    def ratio(self) -> float:
        """Bytes held over bytes of a dense cache of the same length."""
        return self.nbytes / self.dense_nbytes


def build_prompt(tokenizer: Any, text: str, question: str) -> dict[str, Tensor]:
    """Make one user message of the text and then the question (plain text for models without a chat template)."""
    content = f"{text.strip()}\n\n{question}"
    if tokenizer.chat_template is None:
        return dict(tokenizer(f"{content}\n", return_tensors="pt"))
    message = [{"role": "user", "content": content}]
    return dict(
        tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    )


def run_demo(
    model_name: str | None,
    text_file: Path | None,
    question: str,
    configs: Mapping[str, HardKVConfig],
    max_new_tokens: int,
    out: Path,
    console: Console | None = None,
) -> list[Run]:
    """Answer with DynamicCache and with HardKVCache of every config. Print, draw and write the results.

    Args:
        model_name: see `load`. text_file: the long text; None is the Apache License.
        question: asked after the text. configs: of HardKVCache, by display name. max_new_tokens: longest answer.
        out: folder for `demo.json` and one picture per config, made if it does not exist.
        console: where to print; standard output by default.

    Raises:
        InputError: a config's calibration does not fit the model. OSError: see `load` and `check_writable`.
    """
    console = console or make_console()
    written = [out / "demo.json", *(out / f"lengths-{name.replace(' ', '-')}.png" for name in configs)]
    for path in written:  # before minutes of work
        check_writable(path)
    text = (text_file or resources.files("hardkv") / "data" / "apache-2.0.txt").read_text(encoding="utf-8")
    say = partial(console.print, highlight=False, markup=False)  # brackets in a question are not markup
    say(f"Loading {model_name or 'SmolLM2-135M-Instruct'}")
    model, tokenizer = load(model_name)
    inputs = {key: value.to(model.device) for key, value in build_prompt(tokenizer, text, question).items()}
    prompt_tokens = inputs["input_ids"].shape[1]
    say(f"Prompt: {prompt_tokens:,} tokens, which end with the question: {question}")
    tell_settings(say, configs)
    room = Traits.of(model.config).max_positions
    if room is not None and prompt_tokens + max_new_tokens > room:
        say(f"This model was made for at most {room:,} tokens: expect nonsense.", style="yellow")
    check_caches(model, configs)
    say()

    with make_progress(console) as progress:
        warm_up(model, inputs)
        answer = partial(_answer, model, tokenizer, inputs, max_new_tokens, progress)
        runs = [answer("DynamicCache", DynamicCache(config=model.config))]
        for name, config in configs.items():
            runs.append(answer(f"HardKV {name}", HardKVCache(config=model, **config.to_dict())))
            runs[-1].settings = config.to_dict()

    console.print(_table(runs))
    console.print(_answers(runs))
    write_text(written[0], json.dumps(_report(model, model_name, prompt_tokens, question, runs), indent=1) + "\n")
    for config, path, run in zip(configs.values(), written[1:], runs[1:], strict=True):
        seen = prompt_tokens + run.new_tokens
        plot_lengths(run.lengths, path, f"{selection(config)}: tokens kept of {seen:,} seen")
    say("Written:", *written, sep="\n  ")
    return runs


def _answer(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    progress: Progress,
    label: str,
    cache: DynamicCache,
) -> Run:
    """Generate one answer, with a bar that counts its tokens."""
    task = progress.add_task(f"{label}: reading", total=max_new_tokens)

    def on_token(count: int) -> None:
        progress.update(task, completed=count, description=f"{label}: answering" if count else None)

    clock = Clock(on_token)
    tokens = generate(model, inputs, cache, max_new_tokens, clock)[0]
    progress.update(task, total=len(tokens), description=label)  # the answer may be shorter than allowed
    run = Run(
        cache=label,
        answer=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        new_tokens=len(tokens),
        prefill_seconds=clock.prefill_seconds,
        decode_tokens_per_second=clock.tokens_per_second,
    )
    run.nbytes, run.dense_nbytes = held(cache)
    if isinstance(cache, HardKVCache):
        run.lengths = cache.lengths().tolist()
    return run


def _table(runs: Sequence[Run]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("cache", no_wrap=True, min_width=max(len(run.cache) for run in runs))
    for name in ("bytes held", "bytes dense", "ratio", "prefill", "tokens/s", "new tokens"):
        table.add_column(name, justify="right")
    for run in runs:
        speed = run.decode_tokens_per_second
        table.add_row(
            run.cache,
            format_bytes(run.nbytes),
            format_bytes(run.dense_nbytes),
            f"{run.ratio:.1%}",
            f"{run.prefill_seconds:.1f} s",
            "-" if speed is None else f"{speed:.1f}",
            str(run.new_tokens),
        )
    return table


def _answers(runs: Sequence[Run]) -> Table:
    table = Table("cache", "answer", box=box.SIMPLE_HEAD, show_lines=True)
    for run in runs:
        table.add_row(run.cache, Text(run.answer))
    return table


def _report(model: Any, model_name: str | None, prompt_tokens: int, question: str, runs: Sequence[Run]) -> dict:
    return environment(model, model_name) | {
        "prompt_tokens": prompt_tokens,
        "question": question,
        "runs": [asdict(run) | {"ratio": run.ratio} for run in runs],
    }
