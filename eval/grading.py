"""Grade the final answer of a text: mathematics with math-verify, strings exactly.

Only the functions that need math-verify import it; needles and the reasoner are graded without it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
# Escaped braces, as in sets, are no delimiters.
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# A text with LaTeX between dollars is parsed as text; anything else is parsed as one expression.
INLINE = re.compile(r"(?<!\\)\$|\\\(|\\\[")


def final_answer(text: str) -> str | None:
    r"""Return the content of the last complete \boxed{...} of a text, after its reasoning (`</think>`) if marked."""
    text = text.rpartition("</think>")[2]
    for start in reversed([match.end() for match in BOXED.finditer(text)]):
        depth = 1
        for mark in BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(mark.group(), 0)
            if depth == 0:
                return text[start : mark.start()].strip()
    return None


def grade(prediction_text: str, gold: str) -> bool:
    r"""Return whether a text's final answer equals the gold answer.

    The answer is the last \boxed{...}, else what math-verify (https://github.com/huggingface/Math-Verify)
    finds in the last line. Both sides are parsed once and their values compared, so that 025 is 25, 1/2 is 0.5,
    and sets have no order. An answer that cannot be parsed is right if it is the same string except for spaces.

    Args:
        prediction_text: the text that a model wrote.
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
    """Hold the results of a self-check: answers by problem id."""

    failed: dict[str, str] = field(default_factory=dict)  # wrong even when written exactly like the gold answer
    exact_only: dict[str, str] = field(default_factory=dict)  # math-verify cannot parse them


def check_golds(golds: Iterable[tuple[str, str]]) -> GoldCheck:
    """Grade every gold answer against itself.

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
    """Return whether the text contains every number of `gold` (separated by spaces), digit by digit."""
    found = set(re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}\b)", "", prediction_text)))
    return bool(gold.split()) and set(gold.split()) <= found


def boxed_exactly(prediction_text: str, gold: str) -> bool:
    r"""Return whether the last \boxed{...} of the text holds exactly the gold answer."""
    return final_answer(prediction_text) == gold


def _parse(expression: str) -> list:
    from math_verify import parse

    return parse(expression if INLINE.search(expression) else rf"\boxed{{{expression}}}")


def _spaceless(text: str) -> str:
    return re.sub(r"\s+", "", text)
