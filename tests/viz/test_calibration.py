"""The table and the picture of a calibration."""

import sys

import pytest
import torch

from hardkv import Calibration
from hardkv.extras import MissingPackageError
from hardkv.selectors import Risk
from hardkv.viz import plot_calibration

COUNTS = torch.tensor([36, 50, 100, 400, 1000, 2000])
TITLES = ["Temperatures", "Tokens kept under", "Tokens that top-p keeps", "Risk"]


def make(layers=3, heads=2, **changes):
    """A calibration with everything, on counts that window 32 and sinks 4 explain."""
    generator = torch.Generator().manual_seed(layers)
    values = {
        "temperatures": torch.randn(layers, heads, generator=generator).exp(),
        "residuals": torch.rand(layers, heads, generator=generator),
        "counts": COUNTS,
        "risk": torch.rand(layers, heads, 1, generator=generator) ** 3 * torch.tensor([5.0, 4, 3, 2, 1, 0]) ** 3,
        "kept": torch.randint(0, 1500, (3, layers, heads), generator=generator),
        "provenance": {
            "name": "org/small-model",
            "geometry": {"num_hidden_layers": 2 * layers},
            "layers": list(range(1, 2 * layers, 2)),
            "scorer": {"name": "snapkv", "kernel_size": 7},
            "window": 32,
            "sinks": 4,
            "interval": 128,
            "p": 0.9,
            "tokens": 12_000,
            "length": 2000,
            "versions": {"torch": "2.99"},
        },
    }
    return Calibration(**values | changes)


ABSENT = {"all": (), "no kept": ("kept",), "no risk": ("counts", "risk"), "temperatures": ("counts", "risk", "kept")}
absent = pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)


def panels(figure):
    """Axes by the beginnings of their titles, in the order of `TITLES`."""
    titled = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}
    assert len(titled) == len(TITLES)
    return [next(axis for title, axis in titled.items() if title.startswith(start)) for start in TITLES]


def table(summary):
    """Numbers of the summary's rows, by what stands in the column "layer"."""
    lines = summary.splitlines()
    start = next(idx for idx, line in enumerate(lines) if line.split()[:1] == ["layer"])
    rows = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        name, *numbers = line.replace(",", "").split()
        rows[name] = [float(number) for number in numbers]
    return rows


# ---------------------------------------------------------------------- table


@absent
def test_the_table_says_what_the_tensors_say(absent):
    calibration = make(layers=4, heads=3, **dict.fromkeys(absent))
    rows = table(calibration.summary(budget=100))
    assert list(rows) == ["1", "3", "5", "7", "all"]
    for idx, row in enumerate(rows.values()):
        of = slice(idx, idx + 1) if idx < 4 else slice(None)
        temperatures = calibration.temperatures[of].double()
        expected = [temperatures.min(), temperatures.quantile(0.5), temperatures.max(), calibration.residuals[of].max()]
        tolerances = [0.01 * value for value in expected[:3]] + [0.001]
        if "kept" not in absent:
            expected += [kept[of].double().quantile(0.5) for kept in calibration.kept]
        if "risk" not in absent:
            counts = Risk(100).allocation(calibration.curves, 2000, 36)[of].double()
            expected += [counts.min(), counts.mean(), counts.max()]
        assert len(row) == len(expected)
        tolerances += [0.5] * (len(row) - 4)
        for number, value, tolerance in zip(row, expected, tolerances, strict=True):
            assert abs(number - value) <= tolerance


@absent
def test_columns_and_notes_are_those_of_what_there_is(absent):
    summary = make(**dict.fromkeys(absent)).summary(budget=100)
    assert ("raw  before  after" in summary) == ("kept" not in absent)
    assert ("no counts of top-p" in summary) == ("kept" in absent)
    assert ("Risk(100)" in summary) == ("risk" not in absent)
    assert ("no risk curves" in summary) == ("risk" in absent)


def test_the_head_says_where_it_comes_from(tmp_path):
    calibration = make()
    path = calibration.save(tmp_path / "c.safetensors")
    head = calibration.summary().split("\n\n")[0]
    assert [line.split("  ")[0] for line in head.splitlines()] == [
        "model",
        "layers",
        "scorer",
        "settings",
        "texts",
        "versions",
        "file",
    ]
    for text in (
        "org/small-model",
        "3 of 6, KV heads in each: 2",
        "snapkv(kernel_size=7)",
        "window 32, sinks 4, interval 128, p 0.9",
        "12,000 tokens, the longest 2,000",
        "torch 2.99",
        str(path),
    ):
        assert text in head


@pytest.mark.parametrize("known", [[], ["name"], ["window", "p"], ["scorer", "length"], ["geometry", "versions"]])
def test_what_the_provenance_lacks_is_left_out(known):
    calibration = make()
    expected = table(calibration.summary())
    calibration.provenance = {name: calibration.provenance[name] for name in known}
    summary = calibration.summary()
    assert "None" not in summary
    assert ("org/small-model" in summary) == ("name" in known)
    assert ("window 32, p 0.9" in summary) == ("window" in known)
    # layers are counted, and window, sinks and length are read from the curves
    assert list(table(summary)) == ["0", "1", "2", "all"]
    assert list(table(summary).values()) == list(expected.values())
    panels(calibration.plot())


@pytest.mark.parametrize(("budget", "mean"), [(5000, 2000), (2000, 2000), (100, 100), (1, 36)])
def test_any_budget_works(budget, mean):
    calibration = make()
    assert table(calibration.summary(budget))["all"][-2] == mean
    assert panels(calibration.plot(budget=budget))[1].images[0].get_array().mean() == mean


# ---------------------------------------------------------------------- picture


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (30, 2), (64, 8), (4, 20)], ids=str)
def test_every_head_is_drawn_where_it_belongs(shape, tmp_path):
    calibration = make(*shape)
    figure = calibration.plot(tmp_path / "c.png", budget=200)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    temperatures, budgets, kept, risk = panels(figure)
    counts = Risk(200).allocation(calibration.curves, 2000, 36)
    for axis, values in ((temperatures, calibration.temperatures), (budgets, counts)):
        assert torch.equal(torch.as_tensor(axis.images[0].get_array().data), values.T)
        assert len(axis.texts) == (shape[0] * shape[1] if shape[0] <= 30 and shape[1] <= 16 else 0)
        for text in axis.texts:
            layer, head = map(int, text.get_position())
            assert float(text.get_text()) == pytest.approx(values[layer, head].item(), rel=0.05, abs=0.005)
        for tick, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True):
            assert int(label.get_text()) == 2 * tick + 1  # the model's index
    assert f"mean {counts.double().mean():,.0f}" in "".join(axis.get_ylabel() for axis in figure.axes)

    raw, before, after = calibration.kept.flatten(1)
    drawn = [torch.as_tensor(points.get_offsets().data).long() for points in kept.collections]
    assert [points.tolist() for points in drawn] == [
        torch.stack([raw, counts], 1).tolist() for counts in (before, after)
    ]

    curves = [line for line in risk.lines if len(line.get_xdata()) == len(COUNTS)]
    thin = [line for line in curves if line.get_linewidth() < 1]
    assert len(thin) == shape[0] * shape[1]
    for line, values in zip(thin, calibration.risk.flatten(0, 1), strict=True):
        assert line.get_ydata()[:-1].tolist() == pytest.approx(values[:-1].tolist())
    bold = {line.get_label() for line in curves} - {line.get_label() for line in thin}
    extremes = {int(counts.max()), int(counts.min())}
    assert {int(label.split(": ")[1].split()[0].replace(",", "")) for label in bold} == extremes


def test_colours_of_temperatures_are_centred_at_1():
    for temperatures in (torch.ones(3, 2), torch.full((3, 2), 0.01), make().temperatures):
        image = panels(make(temperatures=temperatures).plot())[0].images[0]
        assert image.norm(1.0) == pytest.approx(0.5)
        assert image.norm(0.5) + image.norm(2.0) == pytest.approx(1)  # equal factors, equal depth of colour
        assert image.norm(0.5) < 0.45


@absent
def test_panels_without_data_say_so(absent):
    drawn = panels(make(**dict.fromkeys(absent)).plot())
    missing = [False, "risk" in absent, "kept" in absent, "risk" in absent]
    for axis, is_missing in zip(drawn, missing, strict=True):
        said = [text.get_text() for text in axis.texts if text.get_text().startswith("no ")]
        assert len(said) == is_missing
        assert bool(axis.images or axis.collections or axis.lines) != is_missing


@pytest.mark.parametrize("name", ["risk", "kept"])
def test_zeros_can_be_drawn(name, tmp_path):
    calibration = make()
    getattr(calibration, name).zero_()
    calibration.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_is_closed_and_titled():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = plot_calibration(make())
    assert plt.get_fignums() == before
    assert figure.get_suptitle() == "small-model,\nsnapkv(kernel_size=7), 12,000 tokens of text"


def test_missing_matplotlib_is_said_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib.*pip install 'hardkv\[viz\]'"):
        make().plot()
    assert "Risk(512)" in make().summary()
