"""A text whose tokens are shaded by how many heads still hold them."""

from collections.abc import Sequence
from html import escape
from numbers import Integral
from typing import Any

from torch import Tensor

from hardkv.cache import HardKVCache, Trace
from hardkv.viz.figures import trace_of
from hardkv.viz.html import Html

# From no head to all heads: one hue, so that only lightness matters.
LIGHT, DARK = (255, 255, 255), (8, 69, 148)
STEPS = 5  # shades that the legend shows
DROPPED_TEXT = "#a8a8a8"
STYLE = (
    "background:#fff;color:#000;padding:8px;max-width:62em;line-height:1.55;"
    "font:13px/1.55 ui-monospace,Menlo,Consolas,monospace"
)


def show_tokens(
    source: "Trace | HardKVCache",
    tokens: "Sequence[str] | Sequence[int] | Tensor",
    tokenizer: Any = None,
    sequence: int = 0,
    snapshot: int = -1,
) -> Html:
    """A text as HTML, each token shaded by the share of KV heads, of all compressed layers, that still read it.

    Tokens that no head reads are grey on white, tokens that the cache has not seen (the last one generated, for one)
    are in brackets; pointing at a token tells its position and its heads. Text is escaped. Needs no extra.

    Args:
        source: a cache, or a trace of `cache.record()`.
        tokens: of the sequence, pads included: strings, or ids `[columns]` with their `tokenizer`. What
            `generate()` returned for the sequence does: `out[sequence]`.
        sequence: of the batch.
        snapshot: which of the trace, the newest by default.

    Returns:
        `Html`: shown by notebooks, `save(path)` writes a page.

    Raises:
        TypeError, ValueError: nothing recorded, ids without a tokenizer, or fewer tokens than the cache has seen.
        IndexError: no such sequence or snapshot.
    """
    trace = trace_of(source)
    texts = _texts(tokens, tokenizer)
    holders, total = trace.holders(sequence, snapshot).tolist(), trace.num_heads
    if len(texts) < len(holders):
        raise ValueError(
            f"got {len(texts)} tokens, and the cache has seen {len(holders)}: pass the prompt's and the answer's, pads "
            "included"
        )
    spans = [_span(place, text, count, total) for place, (text, count) in enumerate(zip(texts, holders, strict=False))]
    rest = "".join(map(_visible, texts[len(holders) :]))
    if rest:
        spans.append(f'<span title="not in the cache yet">[{rest}]</span>')
    legend = "".join(
        f'<span style="{_shade(step / STEPS)};padding:1px 7px">{round(step / STEPS * 100)}%</span>'
        for step in range(STEPS + 1)
    )
    text = "".join(spans)
    body = (
        f'<div style="{STYLE}"><div style="margin-bottom:6px">read by {legend} of {total} KV heads, '
        f"after {len(holders):,} tokens</div>"
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{text}</div></div>'
    )
    return Html(body, f"Tokens that {total} KV heads read after {len(holders):,} tokens")


def _texts(tokens: Any, tokenizer: Any) -> list[str]:
    """What every token says."""
    ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if all(isinstance(token, str) for token in ids):
        return ids
    if tokenizer is None or not all(isinstance(token, Integral) for token in ids):
        raise TypeError("tokens must be strings, or the ids of one sequence together with their tokenizer")

    def decode(some: list[int]) -> str:
        return tokenizer.decode(some, clean_up_tokenization_spaces=False)

    texts = []
    for place, token in enumerate(ids):
        # behind its neighbour: alone, a tokenizer of pieces loses the space before a word
        before = decode(ids[max(place - 1, 0) : place]) if place else ""
        both = decode(ids[max(place - 1, 0) : place + 1])
        texts.append(both[len(before) :] if both.startswith(before) else decode([token]))
    return texts


def _visible(text: str) -> str:
    """Escaped, with a sign where a line ends."""
    return escape(text).replace("\n", "&#8629;<br>")


def _span(place: int, text: str, count: int, total: int) -> str:
    style = _shade(count / total) if count else f"color:{DROPPED_TEXT}"
    return f'<span style="{style}" title="position {place}: {count} of {total} heads">{_visible(text)}</span>'


def _shade(share: float) -> str:
    """Background and a text colour that can be read on it."""
    red, green, blue = (round(light + (dark - light) * share) for light, dark in zip(LIGHT, DARK, strict=True))
    text = "#fff" if share > 0.55 else "#000"
    return f"background:rgb({red},{green},{blue});color:{text}"
