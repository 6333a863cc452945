"""Run the events of several layers together, so that the host waits only once per device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from hardkv.cache.events.inputs import EventInputs
from hardkv.cache.events.select import groups, select
from hardkv.cache.events.selection import Selection, Sizes
from hardkv.cache.storage.hidden import UNREAD
from hardkv.cache.storage.offload import ToHost
from hardkv.cache.storage.tiers import Tiers
from hardkv.kernels.autocast import suspended


class Events:
    """The events of some layers. The constructor selects tokens on the device; `finish` builds the new tiers.

    Args:
        inputs: one per layer. Old tiers stay alive until `finish`, or for as long as other code holds them.
    """

    def __init__(self, inputs: Sequence[EventInputs]):
        counted = with_fills(inputs)
        self._inputs: list[EventInputs | None] = [*counted]
        selections: dict[torch.device, list[tuple[list[int], Selection]]] = {}
        for group in groups(counted):
            device = counted[group[0]].tiers.dense.keys.device
            with suspended(device):
                selection = select([counted[i] for i in group])
            selections.setdefault(device, []).append((group, selection))
        self._selected = [
            (selected, ToHost(torch.cat([selection.sizes for _, selection in selected])))
            for selected in selections.values()
        ]

    def finish(self, wanted: Callable[[int], bool] = lambda layer: True) -> Iterator[tuple[int, Tiers]]:
        """Wait for the sizes of the new tiers and build them, layer by layer.

        Args:
            wanted: returns whether a layer, by its index in the inputs, still needs its new tiers.

        Yields:
            The layer's index and its tiers. Install them before asking for the next, so that the old ones are freed.

        Raises:
            ValueError: a scorer returned scores that are not finite. Nothing has changed then.
            NotImplementedError: see `_check`. Nothing has changed then.
        """
        found = [(selected, [Sizes(*each) for each in read.wait().tolist()]) for selected, read in self._selected]
        for selected, sizes in found:
            for i, each in zip([i for group, _ in selected for i in group], sizes, strict=True):
                _check(self._inputs[i], each)
        for selected, sizes in found:
            for group, selection in selected:
                own, sizes = sizes[: len(group)], sizes[len(group) :]
                for place, (i, index) in enumerate(zip(group, selection.index(own), strict=True)):
                    inputs, self._inputs[i] = self._inputs[i], None
                    if inputs is not None and wanted(i):
                        yield i, selection.tiers(place, inputs, index, own[place])


def _check(inputs: EventInputs | None, sizes: Sizes) -> None:
    """Raise the errors that the device found.

    Raises:
        ValueError: scores are not finite.
        NotImplementedError: a step of one token had a mask that hid or showed past columns as no mask had before.
    """
    assert inputs is not None
    if sizes.hidden:
        raise NotImplementedError(UNREAD.format(sizes.hidden))
    if not sizes.sound:
        raise ValueError(
            f"scorer {inputs.settings.scorer!r} returned NaN or infinite scores; return log-scores, such as "
            "torch.log(s + 1e-38) for s >= 0"
        )


def with_fills(inputs: Sequence[EventInputs]) -> list[EventInputs]:
    """Return the inputs with all dense fills known to the host, also with padding. The host waits once per device."""
    counted = list(inputs)
    unknown: dict[torch.device, list[int]] = {}
    for i, each in enumerate(inputs):
        if not each.tiers.dense.even:
            unknown.setdefault(each.tiers.dense.keys.device, []).append(i)
    for same in unknown.values():
        fills = torch.stack([inputs[i].tiers.dense.fill for i in same]).tolist()  # [layers, B]
        for i, fill in zip(same, fills, strict=True):
            tiers = inputs[i].tiers
            counted[i] = replace(inputs[i], tiers=replace(tiers, dense=tiers.dense.counted(fill)))
    return counted
