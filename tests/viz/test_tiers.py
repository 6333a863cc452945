"""Pictures of tiers over time: what is drawn is what the trace says."""

import sys

import pytest
import torch

from hardkv import HardKVCache, Trace
from hardkv.cache.record.snapshot import HeldByLayer, Positions, Snapshot
from hardkv.cache.storage.tiers import TIERS
from hardkv.extras import MissingPackageError
from hardkv.viz import plot_kept, plot_tiers, plot_token
from tests.viz.conftest import recorded

CODES = dict(zip(TIERS, (1, 2, 3), strict=True))


def drawn(axis, snapshots):
    """The codes of an image, `[rows, snapshots]`, however many pixels wide a snapshot is."""
    image = torch.as_tensor(axis.images[0].get_array().data)
    assert axis.images[0].get_extent()[1] == snapshots - 0.5
    each = image.shape[1] // snapshots
    assert all(torch.equal(image[:, start::each], image[:, ::each]) for start in range(each))
    return image[:, ::each]


def colour(axis, code):
    return axis.images[0].cmap(axis.images[0].norm(code))


def assert_is_kept(image, trace, layer_idx, head, sequence):
    for place in range(len(trace)):
        seen = int(trace.seen[place])
        for tier, code in CODES.items():
            positions = (image[:, place] == code).nonzero()[:, 0]
            assert torch.equal(positions, trace.kept(layer_idx, place, tier)[sequence][head])
        assert (image[seen:, place] == 4).all()
        assert not (image[:seen, place] == 4).any()


@pytest.mark.parametrize("sequence", [0, 1])
def test_every_position_has_the_colour_of_its_tier(run, sequence, tmp_path):
    trace = run[1]
    figure = plot_kept(trace, 3, sequence=sequence, path=tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == ["KV head 0", "KV head 1"]
    for head, axis in enumerate(figure.axes):
        image = drawn(axis, len(trace))
        assert set(image.unique().tolist()) == {0, 1, 2, 3, 4}
        assert_is_kept(image, trace, 3, head, sequence)
        assert len({colour(axis, code) for code in range(5)}) == 5
        for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True):
            assert int(label.get_text()) == trace.seen[int(place)]
    assert [text.get_text().split(":")[0] for text in figure.legends[0].get_texts()] == [
        *("given back", "condensed", "sparse", "dense")
    ]


def test_sinks_beside_codes_are_drawn_dense():
    """With bits they stay in the dense tier, far from its other tokens."""
    trace = recorded(bits=4)[1]
    for sequence, first in enumerate((4, 0)):  # columns of the first tokens; the first sequence begins with pads
        figure = plot_kept(trace, 3, sequence=sequence)
        for head, axis in enumerate(figure.axes):
            image = drawn(axis, len(trace))
            assert (image[first] == CODES["dense"]).all()
            assert_is_kept(image, trace, 3, head, sequence)
            assert (image[first + 1, 1:] != CODES["dense"]).all()


def test_the_legend_has_the_colours_of_the_image(run):
    figure = plot_kept(run[1], 1, heads=1)
    legend = {text.get_text().split(":")[0]: patch.get_facecolor() for text, patch in _entries(figure)}
    for tier, code in CODES.items():
        assert legend[tier] == pytest.approx(colour(figure.axes[0], code))


def _entries(figure):
    return zip(figure.legends[0].get_texts(), figure.legends[0].get_patches(), strict=True)


def test_many_positions_stay_exact_in_the_image():
    count = 900
    held = Positions(torch.arange(0, count, 7, dtype=torch.int32), torch.tensor([len(range(0, count, 7))]))
    none = Positions(torch.zeros(0, dtype=torch.int32), torch.tensor([0]))
    layer = HeldByLayer(1, {"condensed": held, "sparse": none, "dense": none})
    trace = Trace([0], {}, [Snapshot(count, 1, 1, 1, [layer]), Snapshot(count + 5, 2, 1, 1, [layer])])
    axis = plot_kept(trace, 0).axes[0]
    assert axis.images[0].get_array().shape[1] >= 600  # sharp from snapshot to snapshot
    assert_is_kept(drawn(axis, 2), trace, 0, 0, 0)


def test_of_heads_those_asked_for(run):
    assert [axis.get_title() for axis in plot_kept(run[1], 1, heads=[1]).axes] == ["KV head 1"]
    with pytest.raises(ValueError, match=r"layer_idx=0 is not in this trace; layers: \[1, 3\]"):
        plot_kept(run[1], 0)
    with pytest.raises(IndexError):
        plot_kept(run[1], 1, heads=2)


@pytest.mark.parametrize("position", [0, 9, 20, 33])
def test_a_tokens_life_in_every_head(run, position, tmp_path):
    trace = run[1]
    figure = plot_token(trace, position, sequence=1, path=tmp_path / "token.png", text="<a>")
    axis = figure.axes[0]
    image = drawn(axis, len(trace))
    assert image.shape == (trace.num_heads, len(trace))
    for row, (layer_idx, head) in enumerate([(1, 0), (1, 1), (3, 0), (3, 1)]):
        for place in range(len(trace)):
            tiers = [t for t in TIERS if position in trace.kept(layer_idx, place, t)[1][head].tolist()]
            expected = 4 if trace.seen[place] <= position else CODES[tiers[0]] if tiers else 0
            assert image[row, place] == expected
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "3"]
    assert axis.get_yticks().tolist() == [0.5, 2.5]
    assert axis.get_title() == f"The life of token {position}, '<a>'"


def test_positions_that_nobody_saw_have_no_life(run):
    for position in (-1, run[1].columns):
        with pytest.raises(IndexError, match=f"position={position}: .* 0 to {run[1].columns - 1}"):
            plot_token(run[1], position)


def test_bars_are_means_over_all_heads(run, tmp_path):
    trace = run[1]
    axis = plot_tiers(trace, sequence=1, path=tmp_path / "tiers.png").axes[0]
    bars = {container.get_label().split(":")[0]: container for container in axis.containers}
    assert set(bars) == set(TIERS)
    below = torch.zeros(len(trace), dtype=torch.float64)
    for tier in TIERS:
        mean = trace.lengths(tier)[:, :, 1].double().mean((1, 2))
        assert [bar.get_height() for bar in bars[tier]] == pytest.approx(mean.tolist())
        assert [bar.get_y() for bar in bars[tier]] == pytest.approx(below.tolist())
        below += mean
    assert axis.lines[0].get_ydata().tolist() == trace.seen.tolist()


@pytest.mark.parametrize("draw", [lambda x: plot_kept(x, 1), lambda x: plot_token(x, 3), plot_tiers])
def test_a_cache_shows_its_present_and_nothing_else_will_do(draw, run):
    cache, trace = run
    present, newest = (draw(each).axes[0] for each in (cache, Trace(trace.layers, {}, trace.snapshots[-1:])))
    if present.images:
        assert (present.images[0].get_array() == newest.images[0].get_array()).all()
    else:
        assert [bar.get_height() for bar in present.patches] == [bar.get_height() for bar in newest.patches]
    with pytest.raises(ValueError, match="empty: run the model"):
        draw(Trace([0], {}))
    with pytest.raises(ValueError, match="empty: run the model"):
        draw(HardKVCache())
    with pytest.raises(TypeError, match=r"int must be a HardKVCache, or the Trace of cache.record\(\)"):
        draw(3)


def test_missing_matplotlib_is_said_with_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: plot_kept(run[1], 1), lambda: plot_token(run[1], 0), lambda: plot_tiers(run[1])):
        with pytest.raises(MissingPackageError, match=r"pip install 'hardkv\[viz\]'"):
            draw()


def test_the_lowest_panel_of_every_column_is_labelled(run):
    panels = [axis for axis in plot_kept(run[1], 3, heads=[0, 1] * 3).axes if axis.get_visible()]
    assert [axis.get_xlabel() for axis in panels] == ["", "", *["tokens seen"] * 4]
    named = [axis.xaxis.get_tick_params()["labelbottom"] for axis in panels]
    assert named == [bool(axis.get_xlabel()) for axis in panels]
