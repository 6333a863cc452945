"""A text shaded by how many heads read its tokens."""

import re
import sys

import pytest
import torch

from hardkv.viz import show_tokens

SPAN = re.compile(r'<span style="([^"]*)" title="position (\d+): (\d+) of (\d+) heads">(.*?)</span>', re.S)


def spans(html):
    return [(style, int(place), int(count), text) for style, place, count, _, text in SPAN.findall(html.body)]


def darkness(style):
    red, green, blue = map(int, re.search(r"rgb\((\d+),(\d+),(\d+)\)", style).groups())
    return -(red + green + blue)


@pytest.mark.parametrize("snapshot", [0, 2, -1])
def test_every_token_has_its_heads_and_their_shade(run, snapshot):
    trace = run[1]
    html = show_tokens(trace, [f"w{i} " for i in range(40)], sequence=1, snapshot=snapshot)
    found = spans(html)
    assert [place for _, place, _, _ in found] == list(range(int(trace.seen[snapshot])))
    for style, place, count, text in found:
        assert text == f"w{place} "
        read = [
            place in rows[1][head] for idx in trace.layers for rows in [trace.kept(idx, snapshot)] for head in (0, 1)
        ]
        assert count == sum(read)
        assert ("background" in style) == (count > 0)
    shades = {count: darkness(style) for style, _, count, _ in found if count}
    assert sorted(shades) == sorted(shades, key=shades.get)  # more heads, darker
    assert len(set(shades.values())) == len(shades)
    assert f"[{''.join(f'w{i} ' for i in range(int(trace.seen[snapshot]), 40))}]" in html.body


def test_text_cannot_become_markup(run, tmp_path):
    texts = ["<script>alert(1)</script>", "a&b", "\"'", "x\ny", *["."] * 36]
    html = show_tokens(run[0], texts)
    assert "<script" not in html._repr_html_()
    assert [text for *_, text in spans(html)[:4]] == [
        *("&lt;script&gt;alert(1)&lt;/script&gt;", "a&amp;b", "&quot;&#x27;", "x&#8629;<br>y")
    ]
    page = html.save(tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert html.body in page
    assert "<script" not in repr(html)


class Pieces:
    """Decodes as tokenizers of word pieces do: the space before the first word is lost."""

    def decode(self, ids, clean_up_tokenization_spaces=None):
        assert clean_up_tokenization_spaces is False
        return " ".join(f"n{i}" for i in ids)


def test_ids_are_decoded_with_the_space_before_them(run):
    found = spans(show_tokens(run[0], torch.arange(40), Pieces()))
    assert [text for *_, text in found[:3]] == ["n0", " n1", " n2"]


@pytest.mark.parametrize("tokens", [torch.arange(40), list(range(40)), torch.zeros(1, 40, dtype=torch.long)])
def test_ids_need_their_tokenizer_and_one_sequence(run, tokens):
    with pytest.raises(TypeError, match="together with their tokenizer"):
        show_tokens(run[0], tokens)


def test_too_few_tokens_are_refused(run):
    with pytest.raises(ValueError, match="got 3 tokens, and the cache has seen 34"):
        show_tokens(run[0], ["a", "b", "c"])


def test_it_needs_no_extra(run, monkeypatch):
    for package in ("matplotlib", "plotly"):
        monkeypatch.setitem(sys.modules, package, None)
    assert spans(show_tokens(run[1], ["."] * 40))
