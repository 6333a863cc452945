"""What a cache held over time. `HardKVCache.record` fills a `Trace`; pictures read it, and a small file stores it."""

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol
from zipfile import is_zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hardkv.cache.record.snapshot import HeldByLayer, HoldingLayer, Positions, Snapshot
from hardkv.cache.storage.tiers import TIERS
from hardkv.config import HardKVConfig
from hardkv.files import replacing

FORMAT = 1
# Numbers that a snapshot holds besides positions.
NUMBERS = ("seen", "events", "nbytes", "dense_nbytes")


class RecordedCache(Protocol):
    """What a trace needs from a cache."""

    settings: HardKVConfig

    @property
    def _compressed(self) -> Sequence[HoldingLayer]: ...


class Trace:
    """The positions that every KV head held after every selection event, by tier, and the bytes held; see `record`.

    It covers the layers that the cache compresses. Symbols: S snapshots, L compressed layers, B sequences, H KV heads,
    P columns (pads counted). Layers with fewer heads than others are padded with heads that hold nothing.

    Args:
        layers: indices of the compressed layers in the model.
        settings: plain values; scorer and budget as text.
        snapshots: in the order of time.

    Example:
        ```python
        >>> with cache.record() as trace:
        ...     out = model.generate(**inputs, past_key_values=cache, max_new_tokens=1024)
        >>> trace.save("run.npz")
        >>> trace.lengths()[-1].float().mean()  # tokens that attention reads, at the end
        ```
    """

    def __init__(self, layers: Sequence[int], settings: dict[str, Any], snapshots: Sequence[Snapshot] = ()):
        self.layers = list(layers)
        self.settings = settings
        self.snapshots = list(snapshots)

    @classmethod
    def of(cls, cache: RecordedCache) -> "Trace":
        """Take one snapshot of a cache as it is now; none if the cache is empty or its last forward failed midway."""
        given = cache.settings
        numbers = {name: getattr(given, name) for name in ("window", "sinks", "interval", "patience", "pin_prompt")}
        used = used_layers(cache._compressed)
        trace = cls(
            [layer.layer_idx for layer in used],
            {"scorer": str(given.scorer), "budget": str(given.budget)} | numbers,
        )
        if len({layer.seen for layer in used}) == 1:
            trace.snapshots.append(Snapshot.of(used, {}))
        return trace

    def __len__(self) -> int:
        return len(self.snapshots)

    def __repr__(self) -> str:
        if not self.snapshots:
            return f"Trace(no snapshots, {len(self.layers)} layers)"
        snapshots, layers, batch, heads = self.lengths().shape
        return (
            f"Trace({snapshots} snapshots up to column {self.columns:,}, {layers} layers, {batch} sequences, "
            f"{heads} KV heads)"
        )

    # ------------------------------------------------------------------ reading

    def _of_each(self, name: str) -> Tensor:
        return torch.tensor([getattr(each, name) for each in self.snapshots], dtype=torch.int64, device="cpu")

    @property
    def seen(self) -> Tensor:
        """Columns that the cache had seen, int64 `[S]`."""
        return self._of_each("seen")

    @property
    def events(self) -> Tensor:
        """Selection events so far, int64 `[S]`."""
        return self._of_each("events")

    @property
    def nbytes(self) -> Tensor:
        """Bytes that the compressed layers held, int64 `[S]`."""
        return self._of_each("nbytes")

    @property
    def dense_nbytes(self) -> Tensor:
        """Bytes that DynamicCache would have held for these layers, int64 `[S]`."""
        return self._of_each("dense_nbytes")

    @property
    def columns(self) -> int:
        """P, the most columns seen."""
        return max((each.seen for each in self.snapshots), default=0)

    def lengths(self, tier: str | None = None) -> Tensor:
        """Return the tokens per snapshot, layer, sequence and KV head, int64 `[S, L, B, H]`.

        Args:
            tier: None for what attention reads (condensed and dense), or "condensed", "sparse", "dense".

        Raises:
            ValueError: `tier` is something else.
        """
        _check_tier(tier)
        if not self.snapshots:
            return torch.zeros(0, len(self.layers), 0, 0, dtype=torch.int64, device="cpu")
        most = max(layer.heads for layer in self.snapshots[0].layers)

        def padded(layer: HeldByLayer) -> Tensor:
            return F.pad(layer.lengths(tier), (0, most - layer.heads))

        return torch.stack([torch.stack([padded(layer) for layer in each.layers]) for each in self.snapshots])

    def kept(self, layer_idx: int, snapshot: int = -1, tier: str | None = None) -> list[list[Tensor]]:
        """Return the positions (columns, pads counted) that a layer held: `[batch][kv_head]`, ascending int64.

        Args:
            layer_idx: index of the layer in the model.
            snapshot: index of the snapshot; the newest by default.
            tier: as for `lengths`.

        Raises:
            ValueError: the cache did not compress the layer.
            IndexError: there is no such snapshot.
        """
        _check_tier(tier)
        return self._snapshot(snapshot).layers[self._rank(layer_idx)].kept(tier)

    def tiers(self, layer_idx: int, sequence: int = 0) -> Tensor:
        """Return the tier in which each head of a layer held every position, at every snapshot.

        Args:
            layer_idx: index of the layer in the model.
            sequence: index in the batch.

        Returns:
            uint8 `[S, H, P]`, H of this layer: 0 not held, 1 condensed, 2 sparse, 3 dense.

        Raises:
            ValueError: the cache did not compress the layer.
            IndexError: there is no such sequence, or nothing is recorded.
        """
        rank, heads = self._rank(layer_idx), self.heads(layer_idx)
        found = torch.zeros(len(self.snapshots), heads, self.columns, dtype=torch.uint8, device="cpu")
        for states, each in zip(found, self.snapshots, strict=True):
            for code, tier in enumerate(TIERS, 1):
                for row, positions in zip(states, each.layers[rank].kept(tier)[sequence], strict=True):
                    row[positions] = code
        return found

    def holders(self, sequence: int = 0, snapshot: int = -1) -> Tensor:
        """Return how many heads, over all compressed layers, read each position at a snapshot.

        Returns:
            int64 `[columns seen then]`.

        Raises:
            IndexError: there is no such sequence or snapshot.
        """
        each = self._snapshot(snapshot)
        read = [positions for layer in each.layers for positions in layer.kept(None)[sequence]]
        return torch.bincount(torch.cat(read), minlength=each.seen)

    def heads(self, layer_idx: int) -> int:
        """Return the number of KV heads of a layer.

        Raises:
            ValueError: the cache did not compress the layer.
            IndexError: nothing is recorded.
        """
        return self._snapshot(0).layers[self._rank(layer_idx)].heads

    @property
    def num_heads(self) -> int:
        """KV heads of all compressed layers together."""
        return sum(layer.heads for layer in self.snapshots[0].layers) if self.snapshots else 0

    def _rank(self, layer_idx: int) -> int:
        if layer_idx not in self.layers:
            raise ValueError(f"layer_idx={layer_idx} is not in this trace; layers: {self.layers}")
        return self.layers.index(layer_idx)

    def _snapshot(self, index: int) -> Snapshot:
        if not -len(self.snapshots) <= index < len(self.snapshots):
            raise IndexError(f"snapshot={index}: this trace has {len(self.snapshots)}")
        return self.snapshots[index]

    # ------------------------------------------------------------------ what happens to the cache

    def _change(self, change: Callable[[HeldByLayer], HeldByLayer]) -> None:
        self.snapshots[:] = [
            Snapshot(each.seen, each.events, each.nbytes, each.dense_nbytes, [change(layer) for layer in each.layers])
            for each in self.snapshots
        ]

    # ------------------------------------------------------------------ files

    def save(self, path: "str | PathLike[str]") -> Path:
        """Write a compressed npz file to `path`, whatever its extension, and return its path.

        In memory a snapshot takes about 4 bytes for every token that a row holds; in the file less than one. The
        arrays: `steps` int32, differences of all positions, one snapshot, layer, tier and row after the other;
        `lengths` int32, of these rows; `heads` of every layer; `batch`; `seen`, `events`, `nbytes`, `dense_nbytes` of
        every snapshot; `meta`, JSON text.

        Raises:
            OSError: the file cannot be written, or `path` is something other than a file.
        """
        layers = [layer for each in self.snapshots for layer in each.layers]
        tiers = [layer.tiers[name] for layer in layers for name in TIERS]
        flat = _joined([tier.flat for tier in tiers], torch.int32)
        lengths = _joined([tier.lengths for tier in tiers], torch.int64)
        meta = {"format": FORMAT, "layers": self.layers, "settings": self.settings}
        heads = [layer.heads for layer in self.snapshots[0].layers] if self.snapshots else []
        arrays: dict[str, Any] = {
            "meta": np.array(json.dumps(meta)),
            "steps": np.diff(flat, prepend=np.int32(0)),  # small numbers compress well
            "lengths": lengths.astype(np.int32),
            "heads": np.array(heads, np.int64),
            "batch": np.array(layers[0].batch if layers else 0),
        }
        for name in NUMBERS:
            arrays[name] = self._of_each(name).numpy()
        with replacing(path) as file:  # given a name, numpy would append .npz
            np.savez_compressed(file, **arrays)
        return Path(path)

    @classmethod
    def load(cls, path: "str | PathLike[str]") -> "Trace":
        """Read a trace that `save` wrote.

        Raises:
            ValueError: the file is not a trace, or a newer hardkv wrote it.
            FileNotFoundError: there is no such file.
        """
        with open(path, "rb") as file:
            if not is_zipfile(file):
                raise ValueError(f"{path} is not a trace: pass a file that Trace.save wrote")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                if "meta" not in stored or "steps" not in stored:
                    raise ValueError(f"{path} is not a trace: pass a file that Trace.save wrote")
                arrays = {name: stored[name] for name in stored.files}
        meta = json.loads(str(arrays["meta"]))
        if meta["format"] > FORMAT:
            raise ValueError(f"{path} has format {meta['format']}, and this hardkv reads up to {FORMAT}: update it")
        batch, heads = int(arrays["batch"]), arrays["heads"].tolist()
        rows = [batch if name == "dense" else batch * count for count in heads for name in TIERS]
        count = len(arrays["seen"])
        lengths = torch.from_numpy(arrays["lengths"].astype(np.int64)).split(rows * count)
        flat = torch.from_numpy(np.cumsum(arrays["steps"], dtype=np.int32)).split([int(each.sum()) for each in lengths])
        tiers = iter(Positions(*each) for each in zip(flat, lengths, strict=True))
        snapshots = []
        for numbers in zip(*(arrays[name].tolist() for name in NUMBERS), strict=True):
            held = [HeldByLayer(each, {name: next(tiers) for name in TIERS}) for each in heads]
            snapshots.append(Snapshot(**dict(zip(NUMBERS, numbers, strict=True)), layers=held))
        return cls(meta["layers"], meta["settings"], snapshots)


def used_layers(layers: Sequence[HoldingLayer]) -> list[HoldingLayer]:
    """Return the layers that hold tokens. A model need not use all layers."""
    return [layer for layer in layers if layer.seen]


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Any:
    return (torch.cat(tensors) if tensors else torch.zeros(0, dtype=dtype, device="cpu")).numpy()


def _check_tier(tier: str | None) -> None:
    if tier is not None and tier not in TIERS:
        raise ValueError(f"tier={tier!r} must be None or one of {TIERS}")
