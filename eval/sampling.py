"""Sample one batch of answers, and measure its cache; an answer does not depend on the rest of its batch."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hardkv import HardKVCache
from hardkv.cache.argument import CACHE

# Steps between two measurements of the cache; they do not depend on when sequences end.
LOOK_EVERY = 16


@dataclass
class Answer:
    """The result of one sequence of a batch; bytes are its share of the batch's bytes.

    Args:
        tokens: generated ids, including the one that ends the answer. truncated: the answer did not end in time.
        prompt_tokens: without padding. seconds: time of the whole batch, prompt included.
        tokens_per_second: of the whole batch, summed over its live sequences.
        held_mean, held_peak: bytes of the cache's tensors, over every 16th step while the sequence was alive.
        allocated_mean, allocated_peak: bytes that PyTorch's CUDA allocator added during the
            batch (activations included); None without CUDA. Mean over steps, peak of the whole batch.
        tokens_per_head: mean over steps of the tokens attention reads, `[layers][kv_heads]`; `[1][1]` for a full cache.
        rows: number of sequences in the batch.
    """

    tokens: list[int]
    truncated: bool
    prompt_tokens: int
    seconds: float
    tokens_per_second: float
    held_mean: float
    held_peak: float
    allocated_mean: float | None
    allocated_peak: float | None
    tokens_per_head: list[list[float]]
    rows: int


def seed_of(seed: int, problem: str, sample: int) -> int:
    """Return the seed of one sample of one problem; it does not depend on the rest of the run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}/{sample}".encode()).digest()[:6], "big")


def sampling_parameters(model: Any, greedy: bool) -> dict[str, Any]:
    """Return the sampling parameters of the model's generation config; none for greedy decoding.

    Raises:
        ValueError: the config needs sampling that cannot be done per sequence.
    """
    config = model.generation_config
    if greedy or not config.do_sample:
        return {"do_sample": False}
    unknown = [name for name in ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h") if _active(config, name)]
    if unknown or (config.num_beams or 1) > 1:
        raise ValueError(f"the model's generation config asks for {', '.join(unknown) or 'beams'}: run with --greedy")
    names = ("temperature", "top_k", "top_p", "min_p")
    return {"do_sample": True} | {name: getattr(config, name, None) for name in names}


def _active(config: Any, name: str) -> bool:
    return getattr(config, name, None) not in (None, 0.0, 1.0)


class SeededSampling(LogitsProcessor):
    """Draw each sequence's token from its own stream of random numbers, and mask all other tokens.

    `generate` draws a batch's tokens from one stream, so that sequences depend on each other. Here the next number of a
    sequence's stream picks the token at that quantile of the distribution (inverse transform sampling).

    Args:
        seeds: one per sequence. prompt: columns of the prompts. steps: maximum number of tokens to draw.
        parameters: temperature, top_k, top_p, min_p; None or absent skips a step.
    """

    def __init__(self, seeds: Sequence[int], prompt: int, steps: int, parameters: dict[str, Any], device: Any):
        # drawn on the CPU, so that every device gets the same numbers
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        numbers = [torch.rand(steps, generator=stream, dtype=torch.float64) for stream in streams]
        self.numbers = torch.stack(numbers).to(device)  # [B, steps]
        self.prompt = prompt
        self.warpers = LogitsProcessorList()
        if (temperature := parameters.get("temperature")) not in (None, 1.0):
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k := parameters.get("top_k"):
            self.warpers.append(TopKLogitsWarper(top_k))
        if (top_p := parameters.get("top_p")) not in (None, 1.0):
            self.warpers.append(TopPLogitsWarper(top_p))
        if min_p := parameters.get("min_p"):
            self.warpers.append(MinPLogitsWarper(min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Replace scores `[B, V]` by 0 at the drawn token and -inf elsewhere."""
        mass = self.warpers(input_ids, scores).double().softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt, None].to(mass.device) * mass[:, -1:]
        token = torch.searchsorted(mass, number, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class Meter(StoppingCriteria):
    """Measure the cache while `generate` runs; never stop it.

    Args:
        cache: cache of the batch. lengths: tokens per prompt, `[B]`. devices: CUDA devices of the model.
        on_step: called with the number of tokens generated so far.
    """

    def __init__(
        self, cache: DynamicCache, lengths: Sequence[int], devices: Sequence[Any], on_step: Callable[[int], None]
    ):
        self.cache, self.lengths, self.devices, self.on_step = cache, torch.tensor(lengths), devices, on_step
        self.steps = 0
        self.looks: list[tuple[int, int, int, Tensor]] = []  # step, bytes held, allocated, tokens [L, B, H]
        self.baseline = allocated(devices)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.steps += 1
        if self.steps % LOOK_EVERY == 1:
            self.look()
        self.on_step(self.steps)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def look(self) -> None:
        """Record the bytes and tokens held now."""
        if isinstance(self.cache, HardKVCache):
            tokens = self.cache.lengths()
        else:  # the last token has no keys yet
            tokens = (self.lengths + self.steps - 1)[None, :, None]
        self.looks.append((self.steps, held_bytes(self.cache), allocated(self.devices) - self.baseline, tokens))

    def of_row(self, row: int, steps: int) -> tuple[float, float, float, list[list[float]]]:
        """Return mean and peak bytes held, mean bytes allocated, and mean tokens per head, while a row was alive."""
        looks = [look for look in self.looks if look[0] <= steps]
        held = torch.tensor([look[1] for look in looks], dtype=torch.float64) / len(self.lengths)
        given = torch.tensor([look[2] for look in looks], dtype=torch.float64) / len(self.lengths)
        tokens = torch.stack([look[3][:, row] for look in looks]).double().mean(0)
        rounded = [[round(value, 1) for value in layer] for layer in tokens.tolist()]
        return float(held.mean()), float(held.max()), float(given.mean()), rounded


def held_bytes(cache: DynamicCache) -> int:
    """Return the bytes of the tensors in a cache."""
    if isinstance(cache, HardKVCache):
        return cache.nbytes()
    values = [value for layer in cache.layers for value in vars(layer).values()]
    flat = [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]
    return sum(part.nbytes for part in flat if isinstance(part, Tensor))


def allocated(devices: Sequence[Any]) -> int:
    """Return the bytes that this process holds on CUDA devices."""
    return sum(torch.cuda.memory_allocated(device) for device in devices)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """Return input ids and attention mask, int64 `[B, longest]`."""
    longest = max(len(ids) for ids in prompts)
    padding = [longest - len(ids) for ids in prompts]
    ids = [[pad] * gap + list(ids) for gap, ids in zip(padding, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in padding]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer, from the generation config or else the tokenizer."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@torch.inference_mode()
def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    cache: DynamicCache,
    *,
    seeds: Sequence[int],
    parameters: dict[str, Any],
    max_new_tokens: int,
    on_step: Callable[[int], None] = lambda steps: None,
) -> list[Answer]:
    """Answer a batch of prompts with a new cache.

    Args:
        prompts: token ids per prompt. seeds: one per prompt. parameters: from `sampling_parameters`.
        max_new_tokens: longest answer. on_step: called at every step with the number of tokens generated so far.
    """
    end = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or [0])[0]
    inputs = pad_left(prompts, pad, model.device)
    columns = inputs["input_ids"].shape[1]
    processors = LogitsProcessorList()
    if parameters["do_sample"]:
        processors.append(SeededSampling(seeds, columns, max_new_tokens, parameters, model.device))
    devices = list({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"})
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    meter = Meter(cache, [len(ids) for ids in prompts], devices, on_step)
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the processor above has already drawn
        temperature=None,
        top_p=None,
        top_k=None,
        min_p=None,
        num_beams=1,
        eos_token_id=end or None,
        pad_token_id=pad,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([meter]),
    )
    new = out[:, columns:].tolist()  # waits for the device
    seconds = time.perf_counter() - start
    peak = sum(torch.cuda.max_memory_allocated(device) for device in devices) - meter.baseline
    lengths = [next((place + 1 for place, token in enumerate(row) if token in end), len(row)) for row in new]
    answers = []
    for row, (tokens, length) in enumerate(zip(new, lengths, strict=True)):
        held_mean, held_peak, allocated_mean, tokens_per_head = meter.of_row(row, length)
        answers.append(
            Answer(
                tokens=tokens[:length],
                truncated=tokens[length - 1] not in end,
                prompt_tokens=len(prompts[row]),
                seconds=seconds,
                tokens_per_second=sum(lengths) / seconds,
                held_mean=held_mean,
                held_peak=held_peak,
                allocated_mean=allocated_mean if devices else None,
                allocated_peak=peak / len(prompts) if devices else None,
                tokens_per_head=tokens_per_head,
                rows=len(prompts),
            )
        )
    return answers
