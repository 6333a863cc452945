"""Generate needles in a haystack: facts hidden in a long text, with a question at its end. Nothing is downloaded.

This follows https://github.com/gkamradt/LLMTest_NeedleInAHaystack and, for several needles, RULER
(https://arxiv.org/abs/2404.06654).
"""

import random
import re
from pathlib import Path
from typing import Any

from eval.problem import Problem

TEXTS = Path(__file__).parent / "texts" / "report"
PROSE = ("novel-persuasion", "natural-science-opticks", "scripture-first-samuel", "stage-play-as-you-like-it")
CITIES = """
Ankara Athens Bern Bogota Cairo Dakar Dublin Hanoi Havana Helsinki Jakarta Lima Lisbon Madrid Manila Nairobi Oslo Prague
Quito Riga Seoul Tunis Vienna Warsaw
""".split()  # noqa: SIM905
DIGITS = 5


def needles(count: int, length: int, facts: int, asked: int, seed: int, tokenizer: Any) -> list[Problem]:
    """Generate problems whose text has about `length` tokens (at most one sentence fewer) and hides `facts` numbers.

    Args:
        count: number of problems. length: tokens per text, counted by `tokenizer` without the chat template.
        facts: numbers hidden per text. asked: how many of them the question asks for.
        seed: seed of the generator; the first n problems of a seed are the same for every count.

    Raises:
        ValueError: the facts do not fit, or the texts that come with the harness are too short.
    """
    if not 1 <= asked <= facts <= len(CITIES):
        raise ValueError(f"--asked {asked} of --needles {facts}: 1 to all of at most {len(CITIES)} needles")
    sentences = [sentence for name in PROSE for sentence in _sentences(name)]
    sizes = [len(ids) for ids in tokenizer([f" {sentence}" for sentence in sentences]).input_ids]
    problems = []
    for number in range(count):
        rng = random.Random(f"needle/{seed}/{number}")
        cities = rng.sample(CITIES, facts)
        values = [str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in cities]
        hidden = [f"The secret number of {city} is {value}." for city, value in zip(cities, values, strict=True)]
        question = _question(cities[:asked])
        room = length - len(tokenizer(" ".join([*hidden, question])).input_ids)
        start = rng.randrange(len(sentences))
        body: list[str] = []
        for place in range(len(sentences)):
            at = (start + place) % len(sentences)
            if sizes[at] <= room:
                body.append(sentences[at])
                room -= sizes[at]
            elif len(body) >= facts:
                break
        if len(body) < facts:
            raise ValueError(f"--length {length} cannot be made: {facts} needles leave no room for a haystack")
        if len(body) == len(sentences):
            raise ValueError(f"--length {length} cannot be made: the texts have {sum(sizes)} tokens")
        for fact, place in zip(hidden, rng.sample(range(len(body)), facts), strict=True):
            body[place] = f"{fact} {body[place]}"
        problems.append(
            Problem(f"{length}-{facts}-{asked}-{number}", f"{' '.join(body)}\n\n{question}", " ".join(values[:asked]))
        )
    return problems


def _question(cities: list[str]) -> str:
    if len(cities) == 1:
        return f"What is the secret number of {cities[0]} that the text above mentions? Answer with the number."
    names = f"{', '.join(cities[:-1])} and {cities[-1]}"
    return f"What are the secret numbers of {names} that the text above mentions? Answer with each city's number."


def _sentences(name: str) -> list[str]:
    text = re.sub(r"\s+", " ", (TEXTS / f"{name}.txt").read_text(encoding="utf-8"))
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text.strip())
