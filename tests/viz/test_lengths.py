"""Heat maps of kept lengths."""

import sys

import pytest
import torch

from hardkv.extras import MissingPackageError
from hardkv.viz import plot_lengths


def panels(figure):
    return [axis for axis in figure.axes if axis.images and axis.get_ylabel().startswith("KV head")]


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 3), (30, 3, 2), (64, 1, 8), (4, 2, 33)])
def test_every_count_is_drawn_where_it_belongs(shape, tmp_path):
    lengths = torch.randint(0, 900, shape)
    figure = plot_lengths(lengths, tmp_path / "lengths.png", title="a title")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    drawn = panels(figure)
    assert len(drawn) == shape[1]
    for sequence, axis in enumerate(drawn):
        assert torch.equal(torch.as_tensor(axis.images[0].get_array()), lengths[:, sequence].T)
        for text in axis.texts:
            layer, head = map(int, text.get_position())
            assert int(text.get_text()) == lengths[layer, sequence, head]
        roomy = shape[0] <= 30 and shape[2] <= 32  # narrower and lower cells have no numbers
        assert len(axis.texts) == (shape[0] * shape[2] if roomy else 0)
        assert len(axis.get_yticks()) == min(shape[2], 11)  # 33 heads: every third is named
    assert drawn[0].get_title(loc="left") == "a title"
    assert drawn[-1].get_xlabel() == "compressed layer"


def test_panels_share_one_scale_that_starts_at_zero():
    figure = plot_lengths(torch.tensor([[[10], [500]], [[20], [90]]]))
    assert {axis.images[0].get_clim() for axis in panels(figure)} == {(0, 500)}


def test_nested_lists_of_a_json_file_do_as_well():
    figure = plot_lengths([[[3, 4]], [[5, 6]]])
    assert panels(figure)[0].images[0].get_array().tolist() == [[3, 5], [4, 6]]


def test_caches_stats_and_traces_bring_their_lengths(run):
    cache, trace = run
    for source in (cache, cache.stats(), trace):
        drawn = [torch.as_tensor(axis.images[0].get_array()) for axis in panels(plot_lengths(source))]
        assert torch.equal(torch.stack(drawn), cache.lengths().permute(1, 2, 0))


@pytest.mark.parametrize("shape", [(4, 2), (0, 0, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[layers, batch, kv_heads\]"):
        plot_lengths(torch.zeros(shape))


def test_missing_matplotlib_is_said_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib.*pip install 'hardkv\[viz\]'"):
        plot_lengths(torch.ones(1, 1, 1))
