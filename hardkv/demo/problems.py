"""The demo on problems: how many problems a model solves with a dense cache and with compressed ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from hardkv.cache import HardKVCache
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
    tell_settings,
    warm_up,
)
from hardkv.files import check_writable, write_text
from hardkv.loading import load

# Tokens between two measurements of a cache.
SAMPLE = 16


@dataclass
class Score:
    """The result of one cache on all problems, as one batch. JSON has the same fields.

    Args:
        solved: how many problems were solved; answers: the content of each text's last box, None without a box.
        nbytes, dense_nbytes: bytes held, and bytes that a dense cache would hold, for all problems together, mean over
            the steps.
    """

    cache: str
    solved: int
    answers: list[str | None]
    nbytes: float
    dense_nbytes: float
    decode_tokens_per_second: float | None
    settings: dict[str, Any] | None = None  # HardKVConfig.to_dict(); None for DynamicCache

    @property
    def ratio(self) -> float:
        """Bytes held over bytes of a dense cache; both are means over the steps."""
        return self.nbytes / self.dense_nbytes


def boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` in a text; None without one."""
    _, found, rest = text.rpartition(r"\boxed{")
    return rest.partition("}")[0].strip() if found and "}" in rest else None


def build_prompts(tokenizer: Any, problems: Sequence[str]) -> dict[str, Tensor]:
    """Make a user message of every problem (plain text for models without a chat template), padded on the left."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        texts = [f"{problem}\n" for problem in problems]
    else:
        render = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
        texts = [render([{"role": "user", "content": problem}]) for problem in problems]
    return dict(
        tokenizer(
            texts,
            padding=True,
            padding_side="left",
            add_special_tokens=tokenizer.chat_template is None,
            return_tensors="pt",
        )
    )


def run_problems(
    model_name: str | None,
    problems: Sequence[Mapping[str, str]],
    configs: Mapping[str, HardKVConfig],
    max_new_tokens: int,
    out: Path,
    console: Console | None = None,
) -> list[Score]:
    r"""Solve problems with DynamicCache and with HardKVCache of every config. Print and write how many are right.

    Args:
        model_name: see `load`. problems: each with "problem" and "answer"; a text that ends in `\boxed{answer}` solves
            one.
        configs: of HardKVCache, by display name. max_new_tokens: longest solution.
        out: folder for `scores.json`, made if it does not exist.
        console: where to print; standard output by default.

    Raises:
        InputError: a config's calibration does not fit the model. OSError: see `load` and `check_writable`.
    """
    console = console or make_console()
    written = out / "scores.json"
    check_writable(written)  # before minutes of work
    say = partial(console.print, highlight=False, markup=False)
    say(f"Loading {model_name or 'SmolLM2-135M-Instruct'}")
    model, tokenizer = load(model_name)
    prompts = build_prompts(tokenizer, [problem["problem"] for problem in problems])
    inputs = {key: value.to(model.device) for key, value in prompts.items()}
    say(f"{len(problems)} problems, the first: {problems[0]['problem']}")
    tell_settings(say, configs)
    check_caches(model, configs)
    say()

    gold = [problem["answer"] for problem in problems]
    with make_progress(console) as progress:
        warm_up(model, inputs)
        solve = partial(_solve, model, tokenizer, inputs, gold, max_new_tokens, progress)
        scores = [solve("DynamicCache", DynamicCache(config=model.config))]
        for name, config in configs.items():
            scores.append(solve(f"HardKV {name}", HardKVCache(config=model, **config.to_dict())))
            scores[-1].settings = config.to_dict()

    console.print(_table(scores))
    report = environment(model, model_name) | {
        "problems": [dict(problem) for problem in problems],
        "scores": [asdict(score) | {"ratio": score.ratio} for score in scores],
    }
    write_text(written, json.dumps(report, indent=1) + "\n")
    say("Written:", written, sep="\n  ")
    return scores


def _solve(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    gold: Sequence[str],
    max_new_tokens: int,
    progress: Progress,
    label: str,
    cache: DynamicCache,
) -> Score:
    """Solve all problems at once, with a bar that counts steps."""
    task = progress.add_task(label, total=max_new_tokens)
    samples: list[tuple[int, int]] = []

    def on_token(count: int) -> None:
        progress.update(task, completed=count)
        if count % SAMPLE == 1:
            samples.append(held(cache))

    clock = Clock(on_token)
    tokens = generate(model, inputs, cache, max_new_tokens, clock)
    progress.update(task, total=tokens.shape[1])
    answers = [boxed(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    nbytes, dense_nbytes = (sum(part) / len(samples) for part in zip(*samples, strict=True))
    speed = clock.tokens_per_second
    return Score(
        cache=label,
        solved=sum(answer == right for answer, right in zip(answers, gold, strict=True)),
        answers=answers,
        nbytes=nbytes,
        dense_nbytes=dense_nbytes,
        decode_tokens_per_second=None if speed is None else speed * len(gold),
    )


def _table(scores: Sequence[Score]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption="Bytes are means over all steps.", caption_justify="left")
    table.add_column("cache", no_wrap=True, min_width=max(len(score.cache) for score in scores))
    for name in ("solved", "bytes held", "bytes dense", "ratio", "tokens/s"):
        table.add_column(name, justify="right")
    for score in scores:
        speed = score.decode_tokens_per_second
        table.add_row(
            score.cache,
            f"{score.solved} of {len(score.answers)}",
            format_bytes(score.nbytes),
            format_bytes(score.dense_nbytes),
            f"{score.ratio:.1%}",
            "-" if speed is None else f"{speed:.1f}",
        )
    return table
