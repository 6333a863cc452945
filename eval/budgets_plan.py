"""Plan the study of budgets: list its caches by sections, each of which answers one question."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

BUDGETS = {2048: (128, 256, 512), 6144: (256, 512, 1024)}
EQUAL_BYTES = (64, 128, 256)
MASSES = (0.5, 0.7, 0.85, 0.93, 0.97, 0.99, 0.999)
SCORERS = ("attention", "snapkv", "rkv")


@dataclass(frozen=True)
class Source:
    """Describe the texts that a calibration uses."""

    scorer: str = "attention"
    texts: str = "all"  # substring of the names of shipped texts, or "all"
    count: int = 6  # maximum number of texts
    length: int = 2048
    measure: str = "squared attention"

    @property
    def file(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in asdict(self).values()) + ".safetensors"


@dataclass(frozen=True)
class Entry:
    """Describe one cache on one set of texts."""

    section: str
    label: str
    n: int  # tokens per head, or thousandths of mass for TopP
    texts: str = "choose"
    length: int = 2048
    scorer: str = "attention"
    seed: int | None = None
    source: Source | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def apart(self) -> bool:
        """Return whether the texts run one by one: groups of QuantizedCache may span the texts of a batch."""
        return "backend" in self.options or (self.source is not None and self.source.texts == "self")

    @property
    def group(self) -> tuple[str, int]:
        """Return the key of entries that can run in one pass over the texts."""
        return self.texts, self.length


def seeded(entry: Entry, seed: int, measure: str = Source.measure) -> Entry:
    """Return entries calibrated on one half of the shipped texts, one of each kind."""
    length = entry.source.length if entry.source is not None else entry.length
    return replace(entry, seed=seed, source=Source(entry.scorer, f"-{seed + 1}-", 3, length, measure))


def _baselines(entry: Entry) -> list[Entry]:
    plain = [replace(entry, label=label) for label in ("TopK", "AdaKV", "Pyramid", "Adaptive")]
    static = [seeded(replace(entry, label=label), 0) for label in ("HeadKV style", "DuoAttention style")]
    both = [seeded(replace(entry, label=label), seed) for label in ("Adaptive, calibrated", "Risk") for seed in (0, 1)]
    return [*plain, *static, *both, seeded(replace(entry, label="Risk", options={"scope": "layer"}), 0)]


def _main() -> list[Entry]:
    entries = []
    for scorer in SCORERS:
        base = Entry("main", "", 0, "report", 2048, scorer)
        for n in BUDGETS[2048]:
            found = _baselines(replace(base, n=n))
            if scorer == "rkv" and n != 256:
                found = [entry for entry in found if entry.label in ("TopK", "Risk") and not entry.options]
            entries += found
        for mass in MASSES if scorer != "rkv" else ():
            masses = replace(base, label="TopP", n=round(1000 * mass))
            entries += [masses, seeded(replace(masses, label="TopP, calibrated"), 0)]
    return entries


def _long() -> list[Entry]:
    entries = []
    for n in BUDGETS[6144]:
        base = Entry("long", "", n, "report", 6144)
        entries += _baselines(base)
        short = replace(base, label="Risk", source=Source(length=2048), options={"from": 2048})
        entries += [seeded(short, seed) for seed in (0, 1)]
    return entries


def _measure() -> list[Entry]:
    names = ("squared attention", "squared value", "output error", "relative output error", "gradient")
    return [
        Entry("measure", name, n, source=Source(texts="-1-", count=3, measure=name))
        for name in names
        for n in BUDGETS[2048]
    ]


def _floor() -> list[Entry]:
    return [
        Entry("floor", f"floor {floor}", n, source=Source(), options={"floor": floor})
        for floor in (0.0, 0.05, 0.1, 0.2, 0.4)
        for n in BUDGETS[2048]
    ]


def _tokens() -> list[Entry]:
    sizes = ((1, 512), (1, 1024), (1, 2048), (3, 2048), (6, 2048))
    return [
        Entry("tokens", f"{count * length:,} tokens", n, source=Source("attention", "all", count, length))
        for count, length in sizes
        for n in (256, 512)
    ]


def _transfer() -> list[Entry]:
    kinds = [
        Entry("transfer", f"from {kind}", n, source=Source(texts=kind, count=2))
        for kind in ("prose", "code", "mathematics")
        for n in (256, 512)
    ]
    lengths = [
        Entry(
            "transfer", f"from {length:,} tokens", 512, length=6144, source=Source(texts="-1-", count=3, length=length)
        )
        for length in (1024, 2048, 6144)
    ]
    return [*kinds, *lengths, Entry("transfer", "TopK", 512, length=6144)]


def _prompt() -> list[Entry]:
    sources = {"TopK": None, "its own first quarter": Source(texts="self", length=512), "Risk": Source()}
    return [Entry("prompt", label, n, source=source) for n in (256, 512) for label, source in sources.items()]


def _dynamic() -> list[Entry]:
    return [
        Entry("dynamic", f"{share:.0%} dynamic{tempered}", n, source=Source(), options={"dynamic": share})
        for share in (0.1, 0.25, 0.5)
        for tempered in ("", ", calibrated")
        for n in (256, 512)
    ]


def _patience() -> list[Entry]:
    return [
        Entry("patience", f"{label}, patience {patience}", n, source=source, options={"patience": patience})
        for label, source in (("TopK", None), ("Risk", Source()))
        for patience, counts in ((0, (256,)), (1, (160, 208)), (2, (112, 160)))
        for n in counts
    ]


def _shares() -> list[Entry]:
    return [
        Entry("shares", label, n, source=source, options=options)
        for n in BUDGETS[2048]
        for label, source, options in (
            ("TopK", None, {}),
            ("heads of a layer", Source(), {"scope": "layer"}),
            ("layers only", Source(), {}),
            ("Risk", Source(), {}),
        )
    ]


def _bits() -> list[Entry]:
    """Bits and tokens: one is calibrated on texts, which gives the centres, and one centres on its own tokens.

    "Risk at equal bytes" keeps as many tokens as take the bytes of n tokens at 16 bits. "Risk, bits auto" has these
    bytes too.
    """
    base = Entry("bits", "all tokens", 2048, "report")
    choices: list[Any] = [8, 4, 3, 2, [4, 3], [3, 4], [4, 2], [2, 4]]
    entries = [seeded(replace(base, options={"bits": bits}), 0) for bits in choices]
    entries += [replace(base, label="all tokens, centred on their own", options={"bits": bits}) for bits in (4, 3, 2)]
    for n in BUDGETS[2048]:
        entries.append(replace(base, label="TopK", n=n))
        for bits in (16, 4, 3):
            entries.append(seeded(replace(base, label="Risk", n=n, options={"bits": bits}), 0))
        entries.append(seeded(replace(base, label="TopK", n=n, options={"bits": 4}), 0))
    for n in EQUAL_BYTES:
        for bits in (8, 4, 3, 2, [4, 3], [4, 2], [3, 2]):
            entries.append(seeded(replace(base, label="Risk at equal bytes", n=n, options={"bits": bits}), 0))
        entries.append(seeded(replace(base, label="Risk, bits auto", n=n, options={"bits": "auto"}), 0))
        if n not in BUDGETS[2048]:
            entries.append(seeded(replace(base, label="Risk", n=n, options={"bits": 16}), 0))
    return entries


def _lukv() -> list[Entry]:
    """LU-KV beside Risk: each rule on each measure of loss."""
    entries = []
    for scorer, length in (("attention", 2048), ("snapkv", 2048), ("attention", 6144)):
        for n in BUDGETS[length]:
            base = Entry("lukv", "TopK", n, "report", length, scorer)
            ours = [seeded(replace(base, label=label), 0) for label in ("Risk", "LU-KV style, Risk's measure")]
            theirs = [
                seeded(replace(base, label=label), 0, "long-horizon utility")
                for label in ("Risk, LU-KV's measure", "LU-KV style")
            ]
            entries += [base, *ours, *theirs]
    return entries


def _peers() -> list[Entry]:
    """transformers' QuantizedCache, first with its defaults: axis 0 of keys and values, groups of 64, and a residual of
    128 tokens, which is the study's interval.

    quanto's axis -1 groups the tokens of a channel, as KIVI does for keys. Its axis 0 and hqq's axis 1 group neighbours
    in memory, which are a token's 64 coordinates; hqq's axis 0 groups coordinates far from each other. hqq cannot
    decode 3 bits along axis 1.
    """
    choices: list[tuple[str, str, tuple[int, ...], list[int]]] = [
        ("quanto", "", (4, 2), [0, 0]),
        ("quanto", ", keys by channel", (4, 2), [-1, 0]),
        ("hqq", "", (8, 4, 3, 2, 1), [0, 0]),
        ("hqq", ", groups of a token", (8, 4, 2, 1), [1, 1]),
    ]
    return [
        Entry(
            "peers",
            f"QuantizedCache, {backend}{variant}",
            2048,
            "report",
            options={"backend": backend, "bits": bits, "axes": axes},
        )
        for backend, variant, widths, axes in choices
        for bits in widths
    ]


# Every section of the study, and the function that lists its caches.
SECTIONS: dict[str, Callable[[], list[Entry]]] = {
    "main": _main,
    "long": _long,
    "measure": _measure,
    "floor": _floor,
    "tokens": _tokens,
    "transfer": _transfer,
    "prompt": _prompt,
    "dynamic": _dynamic,
    "patience": _patience,
    "shares": _shares,
    "bits": _bits,
    "lukv": _lukv,
    "peers": _peers,
}


def plan(sections: Iterable[str]) -> list[Entry]:
    """Return every cache of these sections."""
    return [entry for section in sections for entry in SECTIONS[section]()]
