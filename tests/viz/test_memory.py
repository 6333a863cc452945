"""Bytes over time."""

import pytest
import torch

from hardkv import Trace
from hardkv.viz import plot_bytes


def test_bytes_are_steps_and_the_dense_cache_a_line(run, tmp_path):
    trace = run[1]
    axis = plot_bytes(trace, tmp_path / "bytes.png").axes[0]
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")
    dense, held = axis.lines
    assert axis.get_ylabel() == "held (KiB)"
    assert dense.get_label() == "DynamicCache"
    assert dense.get_xdata().tolist() == [0, *trace.seen.tolist()]
    assert (torch.as_tensor(dense.get_ydata()) * 1024).tolist() == [0, *trace.dense_nbytes.tolist()]
    assert held.get_drawstyle() == "steps-post"
    assert held.get_xdata().tolist() == trace.seen.tolist()
    assert (torch.as_tensor(held.get_ydata()) * 1024).tolist() == trace.nbytes.tolist()
    ratio = float(trace.nbytes[-1]) / float(trace.dense_nbytes[-1])
    assert [text.get_text() for text in axis.texts] == [f"{ratio:.0%}"]


def test_several_traces_have_names_and_colours(run):
    half = Trace(run[1].layers, {}, run[1].snapshots[:2])
    axis = plot_bytes({"half": half, "whole": run[1]}).axes[0]
    assert [line.get_label() for line in axis.lines] == ["DynamicCache", "half", "whole"]
    assert len({line.get_color() for line in axis.lines}) == 3
    assert axis.lines[0].get_xdata()[-1] == run[1].seen[-1]  # of the longest
    with pytest.raises(ValueError, match="got 9 traces"):
        plot_bytes({str(name): half for name in range(9)})
    with pytest.raises(TypeError, match="traces=str"):
        plot_bytes({"one": "two"})
