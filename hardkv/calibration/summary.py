"""What a calibration found, as a table; and what its table and its picture both tell."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hardkv.selectors.budgets import Risk, RiskCurves

NO_KEPT = "no counts of top-p in this calibration"
NO_RISK = "no risk curves in this calibration: temperatures only"


class Found(Protocol):
    """What a `Calibration` holds; see there."""

    temperatures: Tensor
    residuals: Tensor
    counts: Tensor | None
    risk: Tensor | None
    kept: Tensor | None
    provenance: dict[str, Any]
    path: Path | None

    @property
    def curves(self) -> RiskCurves:
        """The risk curves."""
        ...


def summarize(calibration: Found, budget: int = 512) -> str:
    """The table of `Calibration.summary`: where it comes from, then one row a layer and one for all.

    Args:
        calibration: what it lacks is left out. budget: n of the `Risk(n)` whose counts are shown.
    """
    layers = layers_of(calibration)
    blocks = [_block("", ["layer"], [[str(layer)] for layer in layers] + [["all"]])]
    temperatures = [[row.min(), row.quantile(0.5), row.max()] for row in _by_layer(calibration.temperatures)]
    shown = [[f"{value:#.3g}".rstrip(".") for value in row] for row in temperatures]
    blocks.append(_block("temperature", ["min", "median", "max"], shown))
    residuals = [[f"{row.max():.3f}"] for row in _by_layer(calibration.residuals)]
    blocks.append(_block("residual", ["max"], residuals))
    notes = []
    if calibration.kept is None:
        notes.append(NO_KEPT)
    else:
        columns = [[row.quantile(0.5) for row in _by_layer(kept)] for kept in calibration.kept]
        shown = [[f"{value:,.0f}" for value in row] for row in zip(*columns, strict=True)]
        blocks.append(_block("kept by top-p", ["raw", "before", "after"], shown))
        notes.append(
            "kept by top-p: median tokens of a head beyond the protected ones,\n"
            "by raw attention and by scores before and after calibration"
        )
    counts = allocation_of(calibration, budget)
    if counts is None:
        notes.append(NO_RISK)
    else:
        columns = [[row.min(), row.mean(), row.max()] for row in _by_layer(counts)]
        shown = [[f"{value:,.0f}" for value in row] for row in columns]
        blocks.append(_block(f"Risk({budget})", ["min", "mean", "max"], shown))
        notes.append(
            f"Risk({budget}): tokens of a head, protected ones included, in a context of {length_of(calibration):,}"
        )
    head = _head(calibration)
    width = max((len(label) for label, _ in head), default=0)
    lines = [f"{label:<{width}}  {text}" for label, text in head]
    return "\n".join([*lines, "", *("   ".join(row).rstrip() for row in zip(*blocks, strict=True)), "", *notes])


def layers_of(calibration: Found) -> list[int]:
    """The model's indices of the calibrated layers; by default all there are."""
    return list(calibration.provenance.get("layers", range(calibration.temperatures.shape[0])))


def length_of(calibration: Found) -> int:
    """Tokens of the longest text it was measured on."""
    return int(calibration.provenance.get("length", calibration.curves.length))


def allocation_of(calibration: Found, budget: int) -> Tensor | None:
    """Counts `[L, H]` of `Risk(budget)` at the calibrated length, None without risk curves."""
    if calibration.risk is None or calibration.counts is None:
        return None
    known = calibration.provenance
    # Curves begin where only the protected tokens are left.
    protected = known["window"] + known["sinks"] if {"window", "sinks"} <= set(known) else int(calibration.counts[0])
    return Risk(budget).allocation(calibration.curves, length_of(calibration), protected)


def _head(calibration: Found) -> list[tuple[str, str]]:
    """Labels and texts of what the provenance knows."""
    known = calibration.provenance
    geometry = known.get("geometry", {})
    layers, heads = calibration.temperatures.shape
    total = geometry.get("num_hidden_layers", layers)
    of_all = f" of {total}" if total != layers else ""
    settings = [f"{key} {known[key]}" for key in ("window", "sinks", "interval", "p") if key in known]
    text = [f"{known['tokens']:,} tokens"] if "tokens" in known else []
    text += [f"the longest {known['length']:,}"] if "length" in known else []
    lines = [
        ("model", known.get("name", "")),
        ("layers", f"{layers}{of_all}, KV heads in each: {heads}"),
        ("scorer", scorer_name(known["scorer"]) if "scorer" in known else ""),
        ("settings", ", ".join(settings)),
        ("texts", ", ".join(text)),
        ("versions", ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())),
        ("file", str(calibration.path or "")),
    ]
    return [(label, text) for label, text in lines if text]


def scorer_name(described: dict[str, Any]) -> str:
    """A scorer's description as a call: `{"name": "snapkv", "kernel_size": 7}` as snapkv(kernel_size=7)."""
    parameters = [f"{key}={value!r}" for key, value in described.items() if key not in ("name", "class")]
    name = str(described.get("name") or described.get("class"))
    return f"{name}({', '.join(parameters)})" if parameters else name


def _by_layer(values: Tensor) -> list[Tensor]:
    """`[H]` of each layer, then `[L * H]` of all, float64."""
    values = values.double().cpu()
    return [*values, values.flatten()]


def _block(title: str, names: list[str], rows: list[list[str]]) -> list[str]:
    """Right-aligned columns under one title, all lines equally wide."""
    columns = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, columns, strict=True)) for row in [names, *rows]]
    width = max(len(title), len(lines[0]))
    return [title.rjust(width), *(line.rjust(width) for line in lines)]
