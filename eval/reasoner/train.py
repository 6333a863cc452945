"""Train the reasoner from scratch: `python -m eval.reasoner.train --out eval/reasoner/model`, minutes on one GPU.

Write a folder that transformers loads: bfloat16 weights, configuration, tokenizer, and `training.json` as a record of
the training. Random numbers are seeded; GPUs still round differently from run to run.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from eval.machine import device_name, with_versions
from eval.reasoner.encoding import IGNORED, encode, encode_hiding, room_for
from eval.reasoner.problems import MAX_LINES, draw
from eval.reasoner.tokenizer import build_tokenizer
from hardkv.files import check_writable, write_text


@dataclass(frozen=True)
class Settings:
    """Settings of the training.

    Args:
        steps: optimiser steps. batch_tokens: per step, padding included. learning_rate: peak, reached after `warmup`
            steps; then it falls linearly to a hundredth. hiding_rate: fraction of this peak for the steps that hide
            old tokens; these have their own warm-up and decay, because the first schedule ends too low to learn.
        stages: (up to this fraction of the steps, lengths in tokens to draw from): long solutions are
            learned faster once short ones work. hide_from: from this fraction on, batches come from `encode_hiding`,
            with `hidden_lengths`, so that the model needs only the results of older lines.
        fewest_lines: minimum lines per problem; the number is drawn from here up to what fits. At the longest
            length the larger of two draws counts, because only the longest problems look up some of the cells.
        compile: torch.compile the layers.
        hidden, intermediate, layers, heads, kv_heads: sizes of the model; heads have 64 dimensions.
    """

    steps: int = 8000
    batch_tokens: int = 131072
    learning_rate: float = 1.5e-3
    hiding_rate: float = 0.4
    warmup: int = 200
    weight_decay: float = 0.05
    stages: tuple[tuple[float, tuple[int, ...]], ...] = (
        (0.2, (1024,)),
        (0.4, (1024, 2048)),
        (1.0, (1024, 2048, 4096, 4096)),
    )
    hide_from: float = 0.72
    hidden_lengths: tuple[int, ...] = (1024, 1024, 4096)
    fewest_lines: int = 10
    seed: int = 0
    compile: bool = True
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4

    @property
    def first_hiding(self) -> int:
        """Return the first step that hides old tokens."""
        return math.ceil(self.hide_from * self.steps)

    @property
    def longest(self) -> int:
        """Return the longest length, in tokens."""
        return max(length for _, lengths in self.stages for length in lengths)


class Batches(Dataset):
    """Make one batch per step; step and seed determine it, in any process.

    An item is `(ids, positions, labels)`, int64 `[batch, length]`, right-padded, labels only for solutions. Elements
    do not share memory, because pinning does not support that.
    """

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast):
        self.settings = settings
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.settings
        rng = random.Random(f"{settings.seed}-{step}")
        hiding = step >= settings.first_hiding
        lengths = next(lengths for end, lengths in settings.stages if step < end * settings.steps)
        length = rng.choice(settings.hidden_lengths if hiding else lengths)
        most = min(room_for(length, hiding), MAX_LINES)
        count = settings.batch_tokens // length
        fewest, draws = min(settings.fewest_lines, most), 2 if length == settings.longest else 1
        lines = [max(rng.randint(fewest, most) for _ in range(draws)) for _ in range(count)]
        puzzles = [draw(rng, each, "train") for each in lines]
        if hiding:
            return encode_hiding(self.tokenizer, puzzles, length, rng)
        ids, labels = encode(self.tokenizer, puzzles, length)
        return ids, torch.arange(length).repeat(count, 1), labels


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build the untrained model, float32."""
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,  # tensor cores need a multiple of 16
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def predict(model: Qwen3ForCausalLM, ids: Tensor, positions: Tensor) -> Tensor:
    """Return logits `[batch, length - 1, vocabulary]` for the token after each token but the last.

    Activations are bfloat16 from the embedding on, as when the saved model runs in bfloat16. The mask is
    causal and explicit, because transformers would otherwise treat gaps in the positions as ends of packed sequences.
    """
    embedded = model.get_input_embeddings()(ids[:, :-1]).bfloat16()
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(
            inputs_embeds=embedded,
            position_ids=positions[:, :-1],
            attention_mask={"full_attention": None},
            use_cache=False,
        ).logits


def learning_rate(settings: Settings, step: int) -> float:
    """Return the rate at a step, counted from 0: it rises and falls once before hiding old tokens, and once after."""
    turn = settings.first_hiding
    start, end = (0, turn) if step < turn else (turn, settings.steps)
    peak = settings.learning_rate * (settings.hiding_rate if start > 0 else 1)
    if step - start < settings.warmup:
        return peak * (step - start + 1) / settings.warmup
    left = (end - step) / (end - start - settings.warmup)
    return peak * max(left, 0.01)


def fit(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, device: torch.device
) -> Iterator[dict[str, float]]:
    """Train in place; yield the loss curve's data at every hundredth step and at the last.

    `loss` is in nats per solution token; `wrong` is the fraction of these that are not the most likely; `exact` is the
    fraction of solutions without a wrong token, teacher-forced; `seconds` and `tokens` (padding included) since the
    first step.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    if settings.compile:
        for layer in model.model.layers:
            layer.compile()
    workers = min(12, (os.cpu_count() or 1) - 2)
    batches = DataLoader(
        Batches(settings, tokenizer),
        batch_size=None,
        num_workers=max(workers, 0),
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers > 0 else None,
    )
    model.to(device).train()
    start, tokens = time.perf_counter(), 0
    for step, batch in enumerate(batches):
        ids, positions, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        labels = labels[:, 1:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        logits = predict(model, ids, positions)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            asked = labels != IGNORED
            missed = (logits.argmax(-1) != labels) & asked
            yield {
                "step": step + 1,
                "length": ids.shape[1],
                "loss": loss.item(),
                "wrong": (missed.sum() / asked.sum()).item(),
                "exact": (~missed.any(1)).float().mean().item(),
                "seconds": round(time.perf_counter() - start, 1),
                "tokens": tokens,
            }


def run(settings: Settings, out: Path, device: torch.device, start: Path | None = None) -> dict[str, Any]:
    """Train from scratch or from a trained model's folder, and save; return the content of `training.json`."""
    check_writable(out / "training.json")
    tokenizer = build_tokenizer()
    model = build_model(settings, tokenizer)
    before = None
    if start is not None:
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
        before = json.loads((start / "training.json").read_text())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {settings.steps:,} steps on {device_name(device)}", flush=True)
    curve = []
    for entry in fit(model, tokenizer, settings, device):
        curve.append(entry)
        print(*(f"{name} {value:.4g}" for name, value in entry.items()), sep="  ", flush=True)

    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=4000,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = {
        "settings": asdict(settings),
        "parameters": parameters,
        "seconds": curve[-1]["seconds"],
        "tokens": curve[-1]["tokens"],
        **with_versions(device),
        "curve": curve,
        "before": before,
    }
    write_text(out / "training.json", json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="default: %(default)s")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from this model, with the longest length only")
    parser.add_argument(
        "--hide-from",
        type=float,
        default=Settings.hide_from,
        metavar="FRACTION",
        help="of the steps, from which on old tokens are hidden, 1: never (default: %(default)s)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    settings = Settings(
        steps=args.steps,
        learning_rate=args.learning_rate,
        hide_from=args.hide_from,
        seed=args.seed,
        compile=device.type == "cuda",
    )
    if args.start:
        settings = replace(settings, stages=((1.0, settings.stages[-1][1][-1:]),))
    run(settings, args.out, device, args.start)
    print("Saved. How good it is: python -m eval.reasoner.accuracy --model", args.out)


if __name__ == "__main__":
    main()
