"""Shows a text whose tokens are shaded by the share of heads that still read them."""

from collections.abc import Sequence
from html import escape
from numbers import Integral
from typing import Any

from torch import Tensor

from hardkv.cache import HardKVCache, Trace
from hardkv.viz.html import Html
from hardkv.viz.traces import trace_of

# Colours of a token that no head reads and of one that all heads read: one hue, so that only lightness differs.
LIGHT, DARK = (255, 255, 255), (8, 69, 148)
STEPS = 5  # the legend shows this many shades beside white
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
    """Return a text as HTML, each token shaded by the share of KV heads, in all compressed layers, that read it.

    Tokens that no head reads are grey on white. Tokens that the cache has not seen, such as the last one generated, are
    in brackets. Pointing at a token shows its position and its number of heads. The text is escaped. This needs no
    extra packages.

    Args:
        source: a cache, or a trace from `cache.record()`.
        tokens: the tokens of the sequence, pads included: strings, or ids `[columns]` with their `tokenizer`, such as
            `out[sequence]` for what `generate()` returned.
        sequence: index of the sequence in the batch.
        snapshot: index of a snapshot of the trace, by default the newest.

    Returns:
        `Html`: notebooks show it, and `save(path)` writes a page.

    Raises:
        TypeError, ValueError: nothing was recorded, ids have no tokenizer, or the cache has seen more tokens.
        IndexError: there is no such sequence or snapshot.
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
    """Return the text of each token."""
    ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if all(isinstance(token, str) for token in ids):
        return ids
    if tokenizer is None or not all(isinstance(token, Integral) for token in ids):
        raise TypeError("tokens must be strings, or the ids of one sequence together with their tokenizer")

    def decode(some: list[int]) -> str:
        return tokenizer.decode(some, clean_up_tokenization_spaces=False)

    texts = []
    for place, token in enumerate(ids):
        # decoded after its neighbour: alone, a token may lose the space before a word
        before = decode(ids[max(place - 1, 0) : place]) if place else ""
        both = decode(ids[max(place - 1, 0) : place + 1])
        texts.append(both[len(before) :] if both.startswith(before) else decode([token]))
    return texts


def _visible(text: str) -> str:
    """Escape a text, and mark the ends of lines."""
    return escape(text).replace("\n", "&#8629;<br>")


def _span(place: int, text: str, count: int, total: int) -> str:
    style = _shade(count / total) if count else f"color:{DROPPED_TEXT}"
    return f'<span style="{style}" title="position {place}: {count} of {total} heads">{_visible(text)}</span>'


def _shade(share: float) -> str:
    """Return the style of a background and a text colour that is readable on it."""
    red, green, blue = (round(light + (dark - light) * share) for light, dark in zip(LIGHT, DARK, strict=True))
    text = "#fff" if share > 0.55 else "#000"
    return f"background:rgb({red},{green},{blue});color:{text}"
