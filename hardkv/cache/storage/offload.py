"""Keeping the ragged tiers in host memory while they do not attend.

Keys and values of the condensed and the sparse tier live on the host between forwards; positions, miss counters and the
dense tier stay on the device. As these tiers change only at events, a host copy is made once an event: leaving the
device again before the next one is forgetting what arrived. Copies and loaded caches are in pageable memory until their
next event, from which a transfer blocks.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hardkv.cache.storage.ragged import RaggedTier
from hardkv.cache.storage.tiers import Tiers


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory; pinned if it comes from a CUDA device, whose current stream may still be copying."""
    if tensor.device.type == "cuda":
        home = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return home.copy_(tensor, non_blocking=True)
    return tensor.cpu()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the current stream may still be copying."""
    return tensor.to(device, non_blocking=True)


class ToHost:
    """A tensor on its way to the host, which goes on with other work until it waits for it."""

    def __init__(self, tensor: Tensor):
        on_cuda = tensor.device.type == "cuda"
        self._home = to_host(tensor) if on_cuda else tensor.cpu()
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if on_cuda else None

    def wait(self) -> Tensor:
        """The tensor in host memory; what was launched after it need not have run."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._home


@dataclass(frozen=True)
class Arrival:
    """Ragged tiers on the device, and the ones at home that they are copies of."""

    home: tuple[RaggedTier, RaggedTier]
    here: tuple[RaggedTier, RaggedTier]
    copied: "torch.cuda.Event | None"


class Offload:
    """Moves the tiers of a cache's layers; one for all layers. Copies and pickles of it start with nothing under way.

    `fetch` starts a copy beside the computation, `arrive` waits for it, `leave` ends the stay. On devices other than
    CUDA ones a copy is done when its function returns.
    """

    def __init__(self) -> None:
        self._arrivals: dict[int, Arrival] = {}  # by layer
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> "tuple[type[Offload], tuple[()]]":
        return Offload, ()

    def fetch(self, layer_idx: int, tiers: Tiers, device: torch.device) -> None:
        """Start bringing a layer's tiers to its device, unless they are on the way."""
        if self._arrival(layer_idx, tiers) is not None:
            return
        home = (tiers.condensed, tiers.sparse)
        if device.type != "cuda":
            self._arrivals[layer_idx] = Arrival(home, _moved(home, device), None)
            return
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        # Memory that earlier layers' tiers have left is taken again, so what was launched with them must have run.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            here = _moved(home, device)
        self._arrivals[layer_idx] = Arrival(home, here, stream.record_event())

    def arrive(self, layer_idx: int, tiers: Tiers, device: torch.device) -> Tiers:
        """The layer's tiers, all on the device."""
        self.fetch(layer_idx, tiers, device)
        arrival = self._arrivals[layer_idx]
        if arrival.copied is not None:
            torch.cuda.current_stream(device).wait_event(arrival.copied)
        condensed, sparse = arrival.here
        return replace(tiers, condensed=condensed, sparse=sparse)

    def leave(self, layer_idx: int, tiers: Tiers) -> Tiers:
        """The layer's tiers with the ragged ones at home; copied only if they changed since they arrived."""
        arrival = self._arrivals.pop(layer_idx, None)
        condensed, sparse = (_left(tier, arrival) for tier in (tiers.condensed, tiers.sparse))
        return replace(tiers, condensed=condensed, sparse=sparse)

    def forget(self) -> None:
        """Give up what is on the way."""
        self._arrivals.clear()

    def _arrival(self, layer_idx: int, tiers: Tiers) -> Arrival | None:
        """What was fetched for a layer, unless its tiers at home are others by now."""
        arrival = self._arrivals.get(layer_idx)
        if arrival is not None and arrival.home[0] is tiers.condensed and arrival.home[1] is tiers.sparse:
            return arrival
        return None


def _moved(home: tuple[RaggedTier, RaggedTier], device: torch.device) -> tuple[RaggedTier, RaggedTier]:
    condensed, sparse = (
        replace(tier, columns=tier.columns.map_states(partial(to_device, device=device))) for tier in home
    )
    return condensed, sparse


def _left(tier: RaggedTier, arrival: Arrival | None) -> RaggedTier:
    if arrival is not None:
        for home, here in zip(arrival.home, arrival.here, strict=True):
            if here is tier:
                return home
    return replace(tier, columns=tier.columns.map_states(to_host))
