"""Keep the ragged tiers in host memory while their layer does not attend.

The keys and values of the condensed and sparse tiers live on the host between forwards; positions, miss counters and
the dense tier stay on the device. These tiers change only at events, so the host copy is made once per event. When
unchanged tiers leave the device again, the device copy is dropped and nothing is transferred. Copied and loaded caches
are in pageable memory until their next event; until then a transfer blocks.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hardkv.cache.storage.ragged import RaggedTier
from hardkv.cache.storage.tiers import Tiers


def to_host(tensor: Tensor) -> Tensor:
    """Return the tensor in host memory. For a CUDA tensor: pinned, and the current stream may still be copying."""
    if tensor.device.type == "cuda":
        home = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return home.copy_(tensor, non_blocking=True)
    return tensor.cpu()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; the current stream may still be copying."""
    return tensor.to(device, non_blocking=True)


class ToHost:
    """Copy a tensor to the host, while the host does other work until it waits for the copy."""

    def __init__(self, tensor: Tensor):
        on_cuda = tensor.device.type == "cuda"
        self._home = to_host(tensor) if on_cuda else tensor.cpu()
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if on_cuda else None

    def wait(self) -> Tensor:
        """Wait for the copy and return it. Work launched after the copy need not have run."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._home


@dataclass(frozen=True)
class Arrival:
    """Ragged tiers on the device, and the tiers in host memory that they are copies of."""

    home: tuple[RaggedTier, RaggedTier]
    here: tuple[RaggedTier, RaggedTier]
    copied: "torch.cuda.Event | None"


class Offload:
    """Move the tiers of a cache's layers between host and device. One object serves all layers.

    `fetch` starts a copy that runs during computation, `arrive` waits for it, `leave` moves the tiers back. On devices
    other than CUDA a copy is complete when its function returns. A copied or unpickled Offload has no transfers in
    progress.
    """

    def __init__(self) -> None:
        self._arrivals: dict[int, Arrival] = {}  # by layer
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> "tuple[type[Offload], tuple[()]]":
        return Offload, ()

    def fetch(self, layer_idx: int, tiers: Tiers, device: torch.device) -> None:
        """Start to copy a layer's tiers to the device, unless that copy has already started."""
        if self._arrival(layer_idx, tiers) is not None:
            return
        home = (tiers.condensed, tiers.sparse)
        if device.type != "cuda":
            self._arrivals[layer_idx] = Arrival(home, _moved(home, device), None)
            return
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        # The copies may reuse memory that earlier layers' tiers freed, so work that read those tiers must finish first.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            here = _moved(home, device)
        self._arrivals[layer_idx] = Arrival(home, here, stream.record_event())

    def arrive(self, layer_idx: int, tiers: Tiers, device: torch.device) -> Tiers:
        """Return the layer's tiers, all on the device."""
        self.fetch(layer_idx, tiers, device)
        arrival = self._arrivals[layer_idx]
        if arrival.copied is not None:
            torch.cuda.current_stream(device).wait_event(arrival.copied)
        condensed, sparse = arrival.here
        return replace(tiers, condensed=condensed, sparse=sparse)

    def leave(self, layer_idx: int, tiers: Tiers) -> Tiers:
        """Return the layer's tiers with the ragged ones in host memory. Copy only what changed since it arrived."""
        arrival = self._arrivals.pop(layer_idx, None)
        condensed, sparse = (_left(tier, arrival) for tier in (tiers.condensed, tiers.sparse))
        return replace(tiers, condensed=condensed, sparse=sparse)

    def forget(self) -> None:
        """Drop all fetched tiers."""
        self._arrivals.clear()

    def _arrival(self, layer_idx: int, tiers: Tiers) -> Arrival | None:
        """Return what was fetched for a layer, or None if its tiers in host memory have been replaced since."""
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
