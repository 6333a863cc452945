"""Solved problems as token ids and labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.reasoner.problems import Puzzle

PROMPT_ROOM = 34  # tokens of a statement and an answer at most
IGNORED = -100  # cross_entropy's ignore_index


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
