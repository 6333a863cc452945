"""Solved problems as token ids and labels."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.reasoner.problems import LINE_TOKENS, Puzzle

PROMPT_ROOM = 34  # tokens of a statement and an answer at most
IGNORED = -100  # cross_entropy's ignore_index
RESULT = range(9, 14)  # where a line has "=", the new cell and its value
TAIL = (4, 12)  # lines that `encode_hiding` leaves whole, at least and at most


def tokens_of(tokenizer: Any, puzzles: Sequence[Puzzle]) -> tuple[list[list[int]], list[int]]:
    """Every puzzle's statement, solution and end of text, and how many tokens of it are the statement."""
    prompts = [f"{puzzle.statement}\n" for puzzle in puzzles]
    texts = [prompt + puzzle.solve()[0] for prompt, puzzle in zip(prompts, puzzles, strict=True)]
    whole = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
    return whole, [len(ids) for ids in tokenizer(prompts).input_ids]


def encode(tokenizer: Any, puzzles: Sequence[Puzzle], length: int) -> tuple[Tensor, Tensor]:
    """Statements with their solutions, and the labels, int64 `[puzzles, length]` each, right-padded."""
    ids = torch.full((len(puzzles), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt) in enumerate(zip(*tokens_of(tokenizer, puzzles), strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
    return ids, labels


def room_for(length: int, hiding: bool = False) -> int:
    """The most lines of a solution that `encode`, or `encode_hiding`, gets into a length."""
    if hiding:
        return (length - PROMPT_ROOM - TAIL[0] * (LINE_TOKENS - len(RESULT))) // len(RESULT)
    return (length - PROMPT_ROOM) // LINE_TOKENS


def encode_hiding(
    tokenizer: Any, puzzles: Sequence[Puzzle], length: int, rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Solutions whose older lines lack a random part of their scratch work, as if it had been evicted.

    The statement, every line's result and the last lines stay, all at their true positions. Half of the problems for
    which `length` has room stay whole.

    Returns:
        ids, positions and labels, int64 `[puzzles, length]`, right-padded; labels only for what stays whole.
    """
    ids = torch.full((len(puzzles), length), tokenizer.pad_token_id)
    positions = torch.arange(length).expand(len(puzzles), length).clone()
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt) in enumerate(zip(*tokens_of(tokenizer, puzzles), strict=True)):
        lines = puzzles[row].lines
        most = (length - PROMPT_ROOM - lines * len(RESULT)) // (LINE_TOKENS - len(RESULT))  # there is room for
        older = max(lines - min(rng.randint(*TAIL), most), 0)
        tail = prompt + older * LINE_TOKENS
        room = length - prompt - (len(tokens) - tail) - older * len(RESULT)
        scratch = older * (LINE_TOKENS - len(RESULT))
        if room >= scratch and rng.random() < 0.5:
            kept, first = list(range(len(tokens))), prompt
        else:
            visible = set(rng.sample(range(scratch), int(rng.random() * min(room, scratch))))
            kept, first, count = list(range(prompt)), tail + 1, 0  # what follows the hidden part cannot be known
            for index in range(prompt, tail):
                if (index - prompt) % LINE_TOKENS in RESULT:
                    kept.append(index)
                else:
                    if count in visible:
                        kept.append(index)
                    count += 1
            kept += range(tail, len(tokens))
        index = torch.tensor(kept)
        ids[row, : len(kept)] = torch.tensor(tokens)[index]
        positions[row, : len(kept)] = index
        labels[row, : len(kept)] = torch.where(index >= first, ids[row, : len(kept)], IGNORED)
    return ids, positions, labels
