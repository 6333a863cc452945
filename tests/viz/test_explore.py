"""The interactive view: every held token is a point."""

import sys

import pytest

from hardkv.cache.storage.tiers import TIERS
from hardkv.extras import MissingPackageError
from hardkv.viz import explore
from hardkv.viz.explore import draw

pytest.importorskip("plotly")


def points(scatter):
    return sorted(zip(scatter.z, scatter.y, scatter.x, strict=True))


def held(trace, place, tier, sequence=0):
    return sorted(
        (idx, head, position)
        for idx in trace.layers
        for head, positions in enumerate(trace.kept(idx, place, tier)[sequence])
        for position in positions.tolist()
    )


def test_points_are_tokens_of_their_tier(run):
    trace = run[1]
    figure = draw(trace, 1, -1, 10_000)
    assert len(figure.data) == 3
    for scatter, tier in zip(figure.data, TIERS, strict=True):
        assert scatter.name.startswith(tier)
        assert points(scatter) == held(trace, -1, tier, 1)
    assert len({scatter.marker.color for scatter in figure.data}) == 3
    count = sum(len(held(trace, -1, tier, 1)) for tier in TIERS)
    assert figure.layout.title.text == f"{count} tokens held after 34 seen"
    assert not figure.layout.sliders


def test_a_slider_goes_through_snapshots(run):
    trace = run[1]
    figure = draw(trace, 0, [0, 2, -1], 10_000)
    (slider,) = figure.layout.sliders
    last = len(trace) - 1
    assert [step.label for step in slider.steps] == [str(int(trace.seen[place])) for place in (0, 2, last)]
    for step, place in zip(slider.steps, (0, 2, last), strict=True):
        visible = [scatter for scatter, shown in zip(figure.data, step.args[0]["visible"], strict=True) if shown]
        assert [points(scatter) for scatter in visible] == [held(trace, place, tier) for tier in TIERS]
    assert [scatter.visible for scatter in figure.data] == [*[False] * 6, *[True] * 3]


def test_too_many_points_are_thinned_and_it_says_so(run):
    figure = draw(run[1], 0, -1, 20)
    total = sum(len(held(run[1], -1, tier)) for tier in TIERS)
    every = -(-total // 20)
    assert sum(len(scatter.x) for scatter in figure.data) <= 20 + len(TIERS)
    assert f"every {every}th is drawn" in figure.layout.title.text


def test_the_page_stands_alone_or_takes_plotly_from_elsewhere(run, tmp_path):
    alone = explore(run[0]).save(tmp_path / "alone.html")
    small = explore(run[0], include_plotlyjs="cdn").save(tmp_path / "small.html")
    assert alone.stat().st_size > 3_000_000
    assert small.stat().st_size < 100_000
    assert "cdn" in small.read_text(encoding="utf-8")


def test_what_does_not_exist_is_refused(run):
    with pytest.raises(IndexError):
        explore(run[1], snapshots=99)
    with pytest.raises(ValueError, match="ask for one at least"):
        explore(run[1], snapshots=[])
    with pytest.raises(TypeError, match="source=dict"):
        explore({})


def test_missing_plotly_is_said_with_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingPackageError, match=r"plotly.*pip install 'hardkv\[viz\]'"):
        explore(run[1])
