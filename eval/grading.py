"""Is the final answer of a text right? Mathematics by math-verify, strings exactly.

math-verify is imported by the functions that need it: needles and the reasoner are graded without.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
# Escaped braces, as of sets, delimit nothing.
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# A text that holds LaTeX between dollars is parsed as a text; anything else as one expression.
INLINE = re.compile(r"(?<!\\)\$|\\\(|\\\[")


def final_answer(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...} of a text, after its reasoning (`</think>`) if that is marked."""
    text = text.rpartition("</think>")[2]
    for start in reversed([match.end() for match in BOXED.finditer(text)]):
        depth = 1
        for mark in BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(mark.group(), 0)
            if depth == 0:
                return text[start : mark.start()].strip()
    return None


def grade(prediction_text: str, gold: str) -> bool:
    r"""Whether a text's final answer equals the gold one.

    The answer is the last \boxed{...}; without one, what math-verify (https://github.com/huggingface/Math-Verify)
    finds in the last line. Both sides are parsed once, and the parsed values compared, so that 025 is 25, 1/2 is 0.5,
    and sets have no order. What cannot be parsed counts when it is the same string but for spaces.

    Args:
        prediction_text: what a model wrote.
        gold: an expression (`025`, `\frac{1}{2}`, `\text{Evelyn}`), or a sentence with LaTeX between dollars, whose
            last formula counts.
    """
    from math_verify import parse, verify

    answer = final_answer(prediction_text)
    if answer is None:
        lines = prediction_text.rpartition("</think>")[2].strip().splitlines()
        parsed = parse(lines[-1]) if lines else []
    elif _spaceless(answer) == _spaceless(gold) != "":
        return True
    else:
        parsed = _parse(answer)
    return bool(parsed) and bool(verify(_parse(gold), parsed))


@dataclass
class GoldCheck:
    """What a self-check found: answers by problem id."""

    failed: dict[str, str] = field(default_factory=dict)  # not even right when written as they stand
    exact_only: dict[str, str] = field(default_factory=dict)  # math-verify does not understand them


def check_golds(golds: Iterable[tuple[str, str]]) -> GoldCheck:
    """Grade every gold answer by itself.

    Args:
        golds: (problem id, gold answer).
    """
    from math_verify import verify

    check = GoldCheck()
    for name, gold in golds:
        parsed = _parse(gold)
        if not grade(rf"\boxed{{{gold}}}", gold):
            check.failed[name] = gold
        elif not (parsed and verify(parsed, parsed)):
            check.exact_only[name] = gold
    return check


def contains_all(prediction_text: str, gold: str) -> bool:
    """Whether every number of `gold` (with spaces between them) stands in the text, digit by digit."""
    found = set(re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}\b)", "", prediction_text)))
    return bool(gold.split()) and set(gold.split()) <= found


def boxed_exactly(prediction_text: str, gold: str) -> bool:
    r"""Whether the last \boxed{...} of the text holds just that."""
    return final_answer(prediction_text) == gold


def _parse(expression: str) -> list:
    from math_verify import parse

    return parse(expression if INLINE.search(expression) else rf"\boxed{{{expression}}}")


def _spaceless(text: str) -> str:
    return re.sub(r"\s+", "", text)
