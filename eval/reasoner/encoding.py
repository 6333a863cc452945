"""Encode solved problems as token ids and labels."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.reasoner.problems import LINE_TOKENS, MAX_LINES, Puzzle

PROMPT_ROOM = 34  # maximum tokens of a statement and an answer
IGNORED = -100  # cross_entropy's ignore_index
CELLS = (0, 5, 10)  # where a line writes a cell (name and value, 4 tokens): the newest, the looked-up, the new one
TAIL = (2, 10)  # minimum and maximum lines that `encode_hiding` leaves whole


def tokens_of(tokenizer: Any, puzzles: Sequence[Puzzle]) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of every puzzle's statement, solution and end of text, and the length of its statement."""
    prompts = [f"{puzzle.statement}\n" for puzzle in puzzles]
    texts = [prompt + puzzle.solve()[0] for prompt, puzzle in zip(prompts, puzzles, strict=True)]
    whole = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
    return whole, [len(ids) for ids in tokenizer(prompts).input_ids]


def encode(tokenizer: Any, puzzles: Sequence[Puzzle], length: int) -> tuple[Tensor, Tensor]:
    """Return statements with solutions, and labels, int64 `[puzzles, length]` each, right-padded."""
    ids = torch.full((len(puzzles), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt) in enumerate(zip(*tokens_of(tokenizer, puzzles), strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
    return ids, labels


def room_for(length: int, hiding: bool = False) -> int:
    """Return the most solution lines that always fit in a length, with `encode` or with `encode_hiding`."""
    if hiding and length >= PROMPT_ROOM + TAIL[1] * LINE_TOKENS + 4 * (TAIL[1] + 1):
        return MAX_LINES
    return (length - PROMPT_ROOM) // LINE_TOKENS


def encode_hiding(
    tokenizer: Any, puzzles: Sequence[Puzzle], length: int, rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode solutions whose older lines lack a random part of their tokens, as if these had been evicted.

    The statement and the last lines stay. For each older cell that the last lines look up, one random place where it is
    written stays too. All tokens keep their true positions. Half of the problems that fit in `length` stay whole.

    Returns:
        ids, positions and labels, int64 `[puzzles, length]`, right-padded; only whole parts have labels.
    """
    ids = torch.full((len(puzzles), length), tokenizer.pad_token_id)
    positions = torch.arange(length).expand(len(puzzles), length).clone()
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt) in enumerate(zip(*tokens_of(tokenizer, puzzles), strict=True)):
        older = max(puzzles[row].lines - rng.randint(*TAIL), 0)
        tail = prompt + older * LINE_TOKENS
        room = length - (len(tokens) - (tail - prompt))
        if len(tokens) <= length and rng.random() < 0.5:
            kept, first = list(range(len(tokens))), prompt
        else:
            shown = {prompt + index for index in needed(puzzles[row].solve()[0], older, rng)}
            others = [index for index in range(prompt, tail) if index not in shown]
            shown.update(rng.sample(others, int(rng.random() * min(room - len(shown), len(others)))))
            kept = [*range(prompt), *sorted(shown), *range(tail, len(tokens))]
            first = tail + 1  # do not label the tail's first token: its predecessor may be hidden
        index = torch.tensor(kept)
        ids[row, : len(kept)] = torch.tensor(tokens)[index]
        positions[row, : len(kept)] = index
        labels[row, : len(kept)] = torch.where(index >= first, ids[row, : len(kept)], IGNORED)
    return ids, positions, labels


def needed(solution: str, older: int, rng: random.Random) -> set[int]:
    """Return the tokens of the first `older` lines that the other lines need, counted from the solution's start.

    These are the name and value, at one place, of each cell that the first lines compute and the others mention.
    """
    lines = solution.split("\n")[:-1]
    computed = {line[CELLS[-1] :][:2] for line in lines[:older]}
    places = defaultdict(list)
    for number, line in enumerate(lines):
        for start in CELLS:
            places[line[start : start + 2]].append((number, start))
    asked = {name for name, found in places.items() if name in computed and found[-1][0] >= older}
    chosen = [rng.choice([place for place in places[name] if place[0] < older]) for name in sorted(asked)]
    return {number * LINE_TOKENS + start + offset for number, start in chosen for offset in range(4)}
