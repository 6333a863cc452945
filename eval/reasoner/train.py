"""Trains the reasoner from scratch: `python -m eval.reasoner.train --out eval/reasoner/model`, minutes on one GPU.

Writes a folder that transformers loads: weights in bfloat16, configuration, tokenizer, and `training.json`, which says
what was done and what came of it. Random numbers are seeded; GPUs still round differently from run to run.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from eval.reasoner.problems import KINDS, LINE_TOKENS, MAX_LINES, Puzzle, draw
from eval.reasoner.tokenizer import build_tokenizer

PROMPT_ROOM = 34  # tokens of a statement and an answer at most
IGNORED = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        steps: of the optimiser. batch_tokens: padding included, in every step. learning_rate: its peak, after `warmup`
            steps; then linearly down to a hundredth.
        stages: (up to this fraction of the steps, lengths in tokens that steps take at random): long solutions are
            learned sooner once short ones work. compile: torch.compile the layers.
        hidden, intermediate, layers, heads, kv_heads: of the model; heads have 64 dimensions.
    """

    steps: int = 4600
    batch_tokens: int = 131072
    learning_rate: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.05
    stages: tuple[tuple[float, tuple[int, ...]], ...] = (
        (0.25, (1024,)),
        (0.5, (1024, 2048)),
        (1.0, (1024, 2048, 4096, 4096)),
    )
    seed: int = 0
    compile: bool = True
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4


class Batches(Dataset):
    """One batch a step, the same for the same step and seed whichever process makes it.

    An item is `(ids, labels)`, int64 `[batch, length]`: right-padded, labels only for solutions.
    """

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast):
        self.settings = settings
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        settings = self.settings
        rng = random.Random(f"{settings.seed}-{step}")
        lengths = next(lengths for end, lengths in settings.stages if step < end * settings.steps)
        length = rng.choice(lengths)
        most = min((length - PROMPT_ROOM) // LINE_TOKENS, MAX_LINES)
        puzzles = [draw(rng, rng.randint(most * 2 // 3, most), "train") for _ in range(settings.batch_tokens // length)]
        return encode(self.tokenizer, puzzles, length)


def encode(tokenizer: Any, puzzles: Sequence[Puzzle], length: int) -> tuple[Tensor, Tensor]:
    """Statements with their solutions, and the labels, int64 `[puzzles, length]` each, right-padded."""
    prompts = [f"{puzzle.statement}\n" for puzzle in puzzles]
    texts = [prompt + puzzle.solve()[0] for prompt, puzzle in zip(prompts, puzzles, strict=True)]
    ids = torch.full((len(puzzles), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, text) in enumerate(zip(tokenizer(prompts).input_ids, tokenizer(texts).input_ids, strict=True)):
        tokens = torch.tensor([*text, tokenizer.eos_token_id])
        ids[row, : len(tokens)] = tokens
        labels[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return ids, labels


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The untrained model, float32."""
    torch.manual_seed(settings.seed)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,  # tensor cores want a round number
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


def predict(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Logits `[batch, length - 1, vocabulary]` of what follows each token but the last.

    Activations are bfloat16 from the embedding on, as they are when the saved model runs in bfloat16.
    """
    embedded = model.get_input_embeddings()(ids[:, :-1]).bfloat16()
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(inputs_embeds=embedded, use_cache=False).logits


def learning_rate(settings: Settings, step: int) -> float:
    """At a step, counted from 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    left = (settings.steps - step) / (settings.steps - settings.warmup)
    return settings.learning_rate * max(left, 0.01)


def fit(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, device: torch.device
) -> Iterator[dict[str, float]]:
    """Train in place; yields, every hundredth step and at the last, what the loss curve is made of.

    `loss` is in nats a token of the solution; `wrong` the fraction of them that is not the most likely one; `exact` the
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
    for step, (ids, labels) in enumerate(batches):
        ids, labels = ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)[:, 1:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        logits = predict(model, ids)
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


@torch.no_grad()
def exact(model: Any, tokenizer: Any, puzzles: Sequence[Puzzle]) -> Tensor:
    """Bool `[puzzles]`: whether every token of the solution, end of text included, is the most likely one.

    That is what makes greedy decoding write exactly this solution, found in one forward instead of thousands.
    """
    length = PROMPT_ROOM + LINE_TOKENS * max(puzzle.lines for puzzle in puzzles)
    ids, labels = (tensor.to(model.device) for tensor in encode(tokenizer, puzzles, length))
    guess = model(ids[:, :-1], use_cache=False).logits.argmax(-1)
    return ((guess == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(1).cpu()


@torch.no_grad()
def generated(model: Any, tokenizer: Any, puzzles: Sequence[Puzzle]) -> Tensor:
    """Bool `[puzzles]`: whether greedy `generate` writes the whole solution, token by token, and stops."""
    prompts = [f"{puzzle.statement}\n" for puzzle in puzzles]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    room = LINE_TOKENS * max(puzzle.lines for puzzle in puzzles) + 8
    out = model.generate(**inputs, max_new_tokens=room, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    stopped = (out == tokenizer.eos_token_id).any(1).cpu()
    right = [text == puzzle.solve()[0] for text, puzzle in zip(texts, puzzles, strict=True)]
    return torch.tensor(right) & stopped


def evaluate(model: Any, tokenizer: Any, difficulties: Sequence[int], count: int) -> list[dict[str, Any]]:
    """`exact` on test problems: count and correct, by difficulty and kind."""
    rows = []
    for lines in difficulties:
        rng = random.Random(f"evaluate-{lines}")
        puzzles = [draw(rng, lines, "test") for _ in range(count)]
        right = torch.cat([exact(model, tokenizer, puzzles[at : at + 32]) for at in range(0, count, 32)])
        for kind in KINDS:
            mine = torch.tensor([puzzle.kind == kind for puzzle in puzzles])
            rows.append(
                {"difficulty": lines, "kind": kind, "count": int(mine.sum()), "correct": int(right[mine].sum())}
            )
    return rows


def run(settings: Settings, out: Path, device: torch.device, count: int) -> dict[str, Any]:
    """Train, save, load what was saved, evaluate it with `count` problems a difficulty; what `training.json` holds."""
    tokenizer = build_tokenizer()
    model = build_model(settings, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {settings.steps:,} steps on {_machine(device)}", flush=True)
    curve = []
    for entry in fit(model, tokenizer, settings, device):
        curve.append(entry)
        print(*(f"{name} {value:.4g}" for name, value in entry.items()), sep="  ", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=4000,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)

    # As it will be used: loaded, in bfloat16 on a GPU, in float32 on a CPU.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).to(device).eval()
    longest = min((max(settings.stages[-1][1]) - PROMPT_ROOM) // LINE_TOKENS, MAX_LINES)
    rows = evaluate(saved, tokenizer, sorted({longest * part // 8 for part in (1, 2, 4, 6, 8)}), count)
    rng = random.Random("generated")
    puzzles = [draw(rng, min(longest, 40), "test") for _ in range(min(count, 128))]
    written = generated(saved, tokenizer, puzzles)
    report = {
        "settings": asdict(settings),
        "parameters": parameters,
        "seconds": curve[-1]["seconds"],
        "tokens": curve[-1]["tokens"],
        "machine": _machine(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accuracy": {
            "exact, teacher-forced": rows,
            "exact, generated": {
                "difficulty": puzzles[0].lines,
                "count": len(puzzles),
                "correct": int(written.sum()),
            },
        },
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=512, help="test problems a difficulty (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    settings = Settings(steps=args.steps, seed=args.seed, compile=device.type == "cuda")
    report = run(settings, args.out, device, args.count)
    for row in report["accuracy"]["exact, teacher-forced"]:
        print("{difficulty:4} lines  {kind:6} {correct:5} of {count:5} exact".format(**row))
    print("generated, {difficulty} lines: {correct} of {count} exact".format(**report["accuracy"]["exact, generated"]))


if __name__ == "__main__":
    main()
