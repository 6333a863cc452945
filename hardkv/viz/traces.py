"""What pictures of a trace share: where it comes from, and its axis."""

from typing import TYPE_CHECKING

from hardkv.cache import HardKVCache, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def trace_of(source: "Trace | HardKVCache", what: str = "source") -> Trace:
    """Return a recorded trace as it is, or a trace of a cache's present state.

    Raises:
        TypeError: `source` is neither.
        ValueError: it holds nothing.
    """
    if isinstance(source, HardKVCache):
        source = Trace.of(source)
    if not isinstance(source, Trace):
        raise TypeError(f"{what}={type(source).__name__} must be a HardKVCache, or the Trace of cache.record()")
    if not len(source):
        raise ValueError(f"{what} is empty: run the model with this cache first, within cache.record() for a trace")
    return source


def label_snapshots(axis: "Axes", trace: Trace, most: int = 8, name: bool = True) -> None:
    """Label the x axis, which has one cell per snapshot, with the number of columns seen, and name the axis."""
    every = -(-len(trace) // most)
    places = range(len(trace) - 1, -1, -every)
    axis.set_xticks(list(places), labels=[f"{int(trace.seen[place]):,}" for place in places], fontsize=8)
    if name:
        axis.set_xlabel("tokens seen: after every event, and at the end", fontsize=9)
