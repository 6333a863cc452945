r"""Generate problems with a short statement and a long solution that repeatedly uses its own earlier results.

A *cell* has a name and a value, each a letter a-p and a digit: in `c7k2`, cell c7 holds k2. Cells are computed in
the order of their names, a0 ... a9, b0 ... p9; the statement gives the first three and the name of the last. Each cell
is the sum of the cell before it and an earlier one, letters added modulo 16 and digits modulo 10 without carry. The
choice of the earlier cell depends on the value of the cell before:

- in block a, the cell three before the new one;
- `Walk`: with the newest cell `h l` holding `x y`, cell (x mod h, y + l²), letters counted from 0. So anything computed
  so far, up to the last whole block, may be needed next (the square prevents cycles);
- `Table m`: (x mod min(h, m), y + l²): only the first m blocks are ever needed, m from 1 to 3;
- `Back k`: (h - k, l), or block a if there is none: 10 k cells back, known in advance, k from 1 to 3.

The solution writes one line per cell, and ends with the last value as a number, ten times the letter's plus the
digit. A line restates the newest cell, looks up the earlier one, adds, and checks the sum by subtracting, which adds
no information:

    Walk: a0k0 a1j3 a2b5 to c2
    a2b5+a0k0=a3l5;l5-k0=b5
    a3l5+a1j3=a4e8;e8-j3=l5
    ...
    \boxed{128}

Arithmetic is easy on purpose, and only two of a line's 24 tokens, the new value, are needed later. The difficulty is
to find them again.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass

LETTERS = "abcdefghijklmnop"
DIGITS = "0123456789"
KINDS = ("Walk", "Table", "Back")
GIVEN = 3  # cells in the statement
MAX_LINES = len(LETTERS) * len(DIGITS) - GIVEN
LINE_TOKENS = 24

Value = tuple[int, int]  # letter, digit


@dataclass(frozen=True)
class Problem:
    """A puzzle as text, with a number in digits as the answer."""

    id: str
    problem: str
    answer: str
    difficulty: int


@dataclass(frozen=True)
class Puzzle:
    """The parameters that define a problem.

    Args:
        kind: one of `KINDS`. parameter: m of Table or k of Back, 1 to 15 (`draw` uses 1 to 3); 0 for Walk.
        given: values of the first three cells.
        lines: cells to compute, 1 to 157.
    """

    kind: str
    parameter: int
    given: tuple[Value, Value, Value]
    lines: int

    @property
    def statement(self) -> str:
        head = f"{self.kind} {LETTERS[self.parameter]}" if self.parameter else self.kind
        cells = " ".join(_name(index) + _write(value) for index, value in enumerate(self.given))
        return f"{head}: {cells} to {_name(GIVEN + self.lines - 1)}"

    def operand(self, values: list[Value]) -> int:
        """Return the index of the cell to add to the newest of `values`."""
        block, place = divmod(len(values) - 1, len(DIGITS))
        letter, digit = values[-1]
        if block == 0:
            return len(values) - GIVEN
        if self.kind == "Back":
            return max(block - self.parameter, 0) * len(DIGITS) + place
        blocks = min(block, self.parameter) if self.kind == "Table" else block
        return letter % blocks * len(DIGITS) + (digit + place * place) % len(DIGITS)

    def solve(self) -> tuple[str, str]:
        r"""Return the whole solution, `\boxed{}` included, and its answer."""
        values: list[Value] = list(self.given)
        text = []
        for index in range(GIVEN, GIVEN + self.lines):
            newest = values[-1]
            other = self.operand(values)
            added = values[other]
            result = (newest[0] + added[0]) % len(LETTERS), (newest[1] + added[1]) % len(DIGITS)
            values.append(result)
            new, old, plus = _write(result), _write(newest), _write(added)
            text.append(f"{_name(index - 1)}{old}+{_name(other)}{plus}={_name(index)}{new};{new}-{plus}={old}\n")
        letter, digit = values[-1]
        answer = str(letter * 10 + digit)
        return "".join(text) + rf"\boxed{{{answer}}}", answer


def draw(rng: random.Random, lines: int, split: str) -> Puzzle:
    """Draw a random puzzle of one split.

    Raises:
        ValueError: `lines` is not 1 to 157, or `split` is neither "train" nor "test".
    """
    if not 1 <= lines <= MAX_LINES:
        raise ValueError(f"lines={lines}: a problem has 1 to {MAX_LINES} lines")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'")
    kind = rng.choice(KINDS)
    parameter = {"Walk": 0, "Table": rng.randint(1, 3), "Back": rng.randint(1, 3)}[kind]
    while True:
        given = tuple((rng.randrange(len(LETTERS)), rng.randrange(len(DIGITS))) for _ in range(GIVEN))
        if is_test(given) == (split == "test"):
            return Puzzle(kind, parameter, given, lines)


def is_test(given: tuple[Value, ...]) -> bool:
    """Return whether problems with this beginning are excluded from training; this holds for a tenth of beginnings."""
    return sum(letter for letter, _ in given) * 3 % 10 == sum(digit for _, digit in given) % 10


def problems(count: int, difficulty: int = 80, seed: int = 0, split: str = "test") -> list[Problem]:
    """Generate problems of one difficulty.

    Args:
        count: number of problems. difficulty: solution lines, 1 to 157; each has 24 tokens, so 21 lines are about 500
            tokens and 157 about 3,800. seed: the same seed gives the same problems. split: "test" problems begin
            differently from every "train" problem, so training has not seen them or a part of their solutions. The
            committed model was trained on 10 or more lines.

    Raises:
        ValueError: see `draw`.
    """
    rng = random.Random(f"{split}-{difficulty}-{seed}")
    puzzles = [draw(rng, difficulty, split) for _ in range(count)]
    return [
        Problem(f"{split}-{difficulty}-{seed}-{index}", puzzle.statement, puzzle.solve()[1], difficulty)
        for index, puzzle in enumerate(puzzles)
    ]


def _name(index: int) -> str:
    block, place = divmod(index, len(DIGITS))
    return LETTERS[block] + DIGITS[place]


def _write(value: Value) -> str:
    return LETTERS[value[0]] + DIGITS[value[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints problems, a JSON object a line.")
    parser.add_argument("--count", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--difficulty", type=int, default=80, help="lines of the solution (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    try:
        found = problems(args.count, args.difficulty, args.seed)
    except ValueError as error:
        parser.error(str(error))
    for problem in found:
        print(json.dumps(asdict(problem)))


if __name__ == "__main__":
    main()
