"""Draws each held token as a point in layers x heads x positions; the user can turn and zoom the view."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hardkv.cache import HardKVCache, Trace
from hardkv.cache.storage.tiers import TIERS
from hardkv.extras import require
from hardkv.viz.figures import STATES, TIER_COLOURS
from hardkv.viz.html import Html
from hardkv.viz.traces import trace_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_TICKS = 8  # on the axes of heads and layers


def explore(
    source: "Trace | HardKVCache",
    sequence: int = 0,
    snapshots: "int | Sequence[int]" = -1,
    max_points: int = 60_000,
    include_plotlyjs: "bool | str" = True,
) -> Html:
    """Make an interactive view of what each KV head holds: one point per token, coloured by its tier.

    Args:
        source: a cache, or a trace from `cache.record()`.
        sequence: index of the sequence in the batch.
        snapshots: indices of snapshots of the trace, by default the newest; several get a slider.
        max_points: the most points per snapshot; if there are more tokens, every k-th is drawn, and the title says
            so.
        include_plotlyjs: True for a page that works alone (about 5 MB), "cdn" for a small one that needs the internet,
            False for a page that already has plotly.js; as in `plotly.io.to_html`.

    Returns:
        `Html`: notebooks show it, and `save(path)` writes a page.

    Raises:
        MissingPackageError: plotly is not installed.
        TypeError, ValueError: nothing was recorded, or the call asks for no snapshot or no points.
        IndexError: there is no such sequence or snapshot.
    """
    require("viz", "plotly")
    figure = draw(trace_of(source), sequence, snapshots, max_points)
    body = figure.to_html(full_html=False, include_plotlyjs=include_plotlyjs, config={"displaylogo": False})
    return Html(body, "What every KV head holds")


def draw(trace: Trace, sequence: int, snapshots: "int | Sequence[int]", max_points: int) -> "Figure":
    """Draw the figure of `explore`: one set of points per snapshot and tier."""
    import plotly.graph_objects as go

    places = list(snapshots) if isinstance(snapshots, Iterable) else [snapshots]
    places = [range(len(trace))[place] for place in places]  # IndexError; negative ones count from the end
    if not places or max_points < 1:
        raise ValueError(f"snapshots={snapshots!r}, max_points={max_points}: ask for one at least")
    figure = go.Figure()
    titles = []
    for place in places:
        points = {tier: _points(trace, sequence, place, tier) for tier in TIERS}
        held = sum(len(each) for each in points.values())
        every = -(-held // max_points)
        thinned = "" if every == 1 else f"; every {every}th is drawn"
        titles.append(f"{held:,} tokens held after {int(trace.seen[place]):,} seen{thinned}")
        for code, (tier, colour) in enumerate(TIER_COLOURS.items(), 1):
            position, head, layer = points[tier][::every].T.numpy()
            figure.add_scatter3d(
                x=position,
                y=head,
                z=layer,
                mode="markers",
                name=STATES[code][0],
                marker={"size": 2, "color": colour},
                hovertemplate="layer %{z}, head %{y}, position %{x}",
                visible=place == places[-1],
            )
    heads = max(trace.heads(layer_idx) for layer_idx in trace.layers)
    axes: dict[str, Any] = {
        "xaxis": {"title": "position", "range": [0, trace.columns]},
        "yaxis": {"title": "KV head", "dtick": -(-heads // MAX_TICKS)},  # whole numbers only
        "zaxis": {"title": "layer", "dtick": -(-(trace.layers[-1] + 1) // MAX_TICKS)},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.8, "y": 0.7, "z": 1.0},
        "camera": {"eye": {"x": 0.5, "y": -1.9, "z": 0.8}, "center": {"x": 0.05, "y": 0, "z": -0.1}},
    }
    figure.update_layout(
        title={"text": titles[-1], "font": {"size": 14}},
        scene=axes,
        width=720,
        height=560,
        margin={"l": 30, "r": 30, "t": 40, "b": 20},
        legend={"orientation": "h", "itemsizing": "constant", "y": 1.0},
    )
    if len(places) > 1:
        steps = [
            {
                "method": "update",
                "label": f"{int(trace.seen[place]):,}",
                "args": [
                    {"visible": [other == rank for other in range(len(places)) for _ in TIERS]},
                    {"title.text": title},
                ],
            }
            for rank, (place, title) in enumerate(zip(places, titles, strict=True))
        ]
        prefix = {"prefix": "tokens seen: "}
        slider = {"steps": steps, "active": len(places) - 1, "currentvalue": prefix, "pad": {"t": 10, "b": 20}}
        figure.update_layout(sliders=[slider])
    return figure


def _points(trace: Trace, sequence: int, place: int, tier: str) -> torch.Tensor:
    """Return position, head and layer of each token of a tier, `[points, 3]`; int32, to save bytes."""
    rows = []
    for layer_idx in trace.layers:
        for head, positions in enumerate(trace.kept(layer_idx, place, tier)[sequence]):
            where = torch.tensor([head, layer_idx], device="cpu").expand(len(positions), -1)
            rows.append(torch.cat([positions[:, None], where], 1))
    return torch.cat(rows).int()
