"""Events of several layers at once: the host waits for a device once, and where it can while there is work for it."""

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
    """An event of each of some layers: what stays is decided on the device, and `finish` makes the new tiers.

    Args:
        inputs: of each layer. The old tiers live on as long as somebody else holds them, or until `finish`.
    """

    def __init__(self, inputs: Sequence[EventInputs]):
        self._inputs: list[EventInputs | None] = [*with_fills(inputs)]
        selections: dict[torch.device, list[tuple[list[int], Selection]]] = {}
        counted = [each for each in self._inputs if each is not None]
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
        """Wait for the sizes of what stays, and make the new tiers, one layer after the other.

        Args:
            wanted: whether the new tiers of a layer, by its place in the inputs, are still wanted.

        Yields:
            The layer's place, and its tiers; install them before the next ones are made, so that the old ones go.

        Raises:
            ValueError: a scorer did not keep to its contract; nothing has changed then.
            NotImplementedError: see `_check`; nothing has changed then.
        """
        for selected, on_the_way in self._selected:
            read = [Sizes(*each) for each in on_the_way.wait().tolist()]
            for i, sizes in zip([i for group, _ in selected for i in group], read, strict=True):
                _check(self._inputs[i], sizes)
            for group, selection in selected:
                own, read = read[: len(group)], read[len(group) :]
                for place, (i, index) in enumerate(zip(group, selection.index(own), strict=True)):
                    inputs, self._inputs[i] = self._inputs[i], None
                    if inputs is not None and wanted(i):
                        yield i, selection.tiers(place, inputs, index, own[place])


def _check(inputs: EventInputs | None, sizes: Sizes) -> None:
    """Raise for what the device noticed.

    Raises:
        ValueError: scores that are not finite.
        NotImplementedError: steps of one token whose masks said of past columns what no mask had said before.
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
    """The inputs with the fill of every dense tier known where padding hid it; the host waits once per device."""
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
