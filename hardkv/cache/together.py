"""Events of several layers at once: the host waits for a device once, and where it can while there is work for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hardkv.cache.event import Event, check, groups, select
from hardkv.cache.merged import Selection
from hardkv.cache.offload import ToHost
from hardkv.cache.tiers import Tiers
from hardkv.kernels.autocast import suspended

if TYPE_CHECKING:
    from hardkv.cache.layer import HardKVLayer

# Bytes of keys and values of a prompt that layers may hold uncompressed, so that their events run together.
WAITING_BYTES = 128 << 20


class Together:
    """The layers of a cache, which run their events together. Copies and pickles of it start with nothing under way.

    After later tokens that is after the last layer's attention. After a prompt, as many layers as hold `WAITING_BYTES`
    of keys and values go through an event, which ends when the next layer begins: until then the device has work, and
    the host need not wait for it.

    Args:
        layers: in the order in which they attend.
    """

    def __init__(self, layers: "list[HardKVLayer]"):
        self.layers = layers
        self.held = 0  # bytes of layers that wait, in the prompt that layers are told of
        self.under_way: Compression | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"under_way": None}

    def may_wait(self, layer: "HardKVLayer", nbytes: int) -> bool:
        """Whether a layer with a prompt of `nbytes` waits for others: not where its scorer takes one at a time."""
        return getattr(layer.settings.scorer, "across_layers", False) and 2 * nbytes <= WAITING_BYTES

    def prefilled(self, layer: "HardKVLayer", nbytes: int) -> None:
        """A layer has a prompt of `nbytes`, and waits for its event or has had it."""
        if layer is self.layers[-1]:
            return self.decoded(layer)
        if layer is self.layers[0]:
            self.held = 0
        if layer.ready:
            assert layer.tiers is not None
            self.held += layer.tiers.dense.nbytes
            if self.held + nbytes > WAITING_BYTES:
                self.under_way, self.held = Compression([each for each in self.layers if each.ready]), 0

    def decoded(self, layer: "HardKVLayer") -> None:
        """A layer has attended."""
        if layer is self.layers[-1]:
            compress_together([each for each in self.layers if each.ready])

    def finish(self) -> None:
        """Finish what is under way.

        Raises:
            ValueError, NotImplementedError: see `Compression.finish`.
        """
        if self.under_way is not None:
            under_way, self.under_way = self.under_way, None
            under_way.finish()


class Compression:
    """An event of each of some layers: what stays is decided on the device, and `finish` moves it.

    A failure leaves every layer as it was before its own event or after it, unless it has a `pool`.
    """

    def __init__(self, layers: "Sequence[HardKVLayer]"):
        count_fills(layers)
        self.layers = layers
        tiers, rings, self.events = [], [], list[Event]()
        for layer in layers:
            assert layer.tiers is not None
            assert layer.ring is not None
            self.events.append(layer.event(layer.tiers, layer.scale, layer.softcap))
            tiers.append(layer.tiers)
            rings.append(layer.ring)
        self.tiers: list[Tiers | None] = [*tiers]

        def of(parts: Sequence[Any], group: Sequence[int]) -> list[Any]:
            return [parts[i] for i in group]

        selections: dict[torch.device, list[tuple[list[int], Selection]]] = {}
        for group in groups(self.events, tiers, rings):
            device = layers[group[0]].device
            with suspended(device):
                selection = select(of(self.events, group), of(tiers, group), of(rings, group))
            selections.setdefault(device, []).append((group, selection))
        self.selected = [
            (selected, ToHost(torch.cat([selection.sizes for _, selection in selected])))
            for selected in selections.values()
        ]

    def finish(self) -> None:
        """Wait for the sizes of what stays, and give every layer its new tiers; one that has changed keeps what it has.

        Raises:
            ValueError: a scorer did not keep to its contract; nothing has changed then.
            NotImplementedError: see `event.check`; nothing has changed then.
        """
        for selected, on_the_way in self.selected:
            read = on_the_way.wait().tolist()
            sizes = [[read.pop(0) for _ in group] for group, _ in selected]
            for (group, _), each in zip(selected, sizes, strict=True):
                for i, size in zip(group, each, strict=True):
                    check(self.events[i], size)
            for (group, selection), each in zip(selected, sizes, strict=True):
                for place, (i, index) in enumerate(zip(group, selection.index(each), strict=True)):
                    layer, begun = self.layers[i], self.tiers[i]
                    self.tiers[i] = None  # so that each layer's old bytes go as soon as it has new ones
                    if begun is None or layer.tiers is not begun:
                        continue
                    del begun
                    layer.tiers = layer.selected(selection, place, index, each[place])
                    layer.committed = layer.seen
                    if layer.recorder is not None:
                        layer.recorder.event(layer)


def compress_together(layers: "Sequence[HardKVLayer]") -> None:
    """An event of each layer; see `Compression`."""
    Compression(layers).finish()


def count_fills(layers: "Sequence[HardKVLayer]") -> None:
    """Let the host know the fill of every dense tier where padding hid it, which it waits for once a device."""
    unknown: dict[torch.device, list[HardKVLayer]] = {}
    for layer in layers:
        if layer.tiers is not None and not layer.tiers.dense.even:
            unknown.setdefault(layer.device, []).append(layer)
    for same in unknown.values():
        fills: list[Tensor] = [layer.tiers.dense.fill for layer in same if layer.tiers is not None]
        for layer, fill in zip(same, torch.stack(fills).tolist(), strict=True):  # [layers, B]
            assert layer.tiers is not None
            layer.tiers = replace(layer.tiers, dense=layer.tiers.dense.counted(fill))
