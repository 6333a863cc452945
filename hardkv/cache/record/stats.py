"""Statistics of what a cache holds."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from hardkv.cache.layer import HardKVLayer
from hardkv.cache.record.contents import batch_size_of
from hardkv.cache.storage.hidden import UNREAD
from hardkv.cache.storage.tiers import Tiers
from hardkv.config import HardKVConfig
from hardkv.kernels.attention import backend_for
from hardkv.kernels.backends import kernels_for
from hardkv.selectors.temperatures import MAX_TEMPERATURE, MIN_TEMPERATURE


class Steps(Protocol):
    """What statistics need from the captured steps of `hardkv.graphed`."""

    captures: int
    replays: int

    @property
    def how(self) -> str:
        """See `Stats.decode`."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return all tensors held for the cache."""
        ...


class CountedCache(Protocol):
    """What statistics need from a cache; see `HardKVCache`."""

    settings: HardKVConfig
    layers: list[Any]
    warnings: list[str]
    steps: Any  # Steps, or None

    @property
    def _compressed(self) -> list[HardKVLayer]: ...

    def nbytes(self) -> int: ...

    def host_nbytes(self) -> int: ...

    def dense_nbytes(self) -> int: ...

    def get_seq_length(self) -> int: ...

    def lengths(self, tier: str | None = None) -> Tensor: ...


def format_bytes(count: float) -> str:
    """Format bytes for people: `1536` -> `'1.5 KiB'`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _range(nested: list[list[list[float]]]) -> str:
    flat = [value for layer in nested for sequence in layer for value in sequence]
    return f"min {min(flat):.2f}, mean {sum(flat) / len(flat):.2f}, max {max(flat):.2f}"


@dataclass(frozen=True)
class Stats:
    """A snapshot of a HardKVCache. Print it, or turn it into JSON with `to_dict()`.

    Args:
        nbytes: bytes held, on devices and on the host.
        host_nbytes: the part of them that `offload=True` keeps in host memory.
        dense_nbytes: bytes that a DynamicCache would hold for the same sequences.
        seq_length: logical length; padding and evicted tokens count.
        batch_size: number of sequences; 0 before the first token.
        layers: layers of the model.
        compressed_layers: layers that this cache compresses.
        lengths: tokens that attention reads, `[compressed layers][batch][kv_heads]`.
        temperatures: fitted temperatures, of the same shape; empty without a calibration.
        sparse: deselected tokens that are held but not read, over all rows.
        events: selection events per layer so far.
        scorer: ranks tokens.
        budget: decides how many tokens are kept.
        calibration: the calibration in use: its file, the model that it was made for and a fingerprint of that model's
            weights; "online"; "" for none.
        bits: per coordinate of the tokens that events keep; "4", or "4, 3" for keys and values, or "auto".
        layer_bits: bits of keys and values, `[compressed layers][2]`.
        attention: backend that computes attention after the prompt.
        kernels: "triton" or "torch"; they score, select and compact.
        decode: how `graphed` ran its steps: "" if it did not run, "captured", or "uncaptured" without CUDA.
        captures: CUDA graphs captured.
        replays: steps that replayed a graph.
        warnings: messages for the user.
    """

    nbytes: int
    host_nbytes: int
    dense_nbytes: int
    seq_length: int
    batch_size: int
    layers: int
    compressed_layers: int
    lengths: list[list[list[int]]]
    temperatures: list[list[list[float]]]
    sparse: int
    events: int
    scorer: str
    budget: str
    calibration: str
    bits: str
    layer_bits: list[list[int]]
    attention: str
    kernels: str
    decode: str
    captures: int
    replays: int
    warnings: list[str]

    @classmethod
    def of(cls, cache: CountedCache) -> "Stats":
        """Return the statistics of a cache as it is now."""
        settings, steps, compressed = cache.settings, cache.steps, cache._compressed
        held = [layer.tiers for layer in compressed if layer.tiers is not None]

        def used(by: Callable[[HardKVLayer], str]) -> str:
            return ", ".join(sorted({by(layer) for layer in compressed if layer.seen})) or "auto"

        return cls(
            nbytes=cache.nbytes(),
            host_nbytes=cache.host_nbytes(),
            dense_nbytes=cache.dense_nbytes(),
            seq_length=cache.get_seq_length() if cache.layers else 0,
            batch_size=max((batch_size_of(layer) for layer in cache.layers), default=0),
            layers=len(cache.layers),
            compressed_layers=len(compressed),
            lengths=cache.lengths().tolist(),
            temperatures=[t.temperatures.view(t.shape).tolist() for t in held if t.temperatures is not None],
            sparse=int(cache.lengths("sparse").sum()),
            events=compressed[0].events if compressed else 0,
            scorer=str(settings.scorer),
            budget=str(settings.budget),
            calibration="" if settings.calibration is None else str(settings.calibration),
            bits=str(settings.bits).strip("()"),
            layer_bits=[list(layer.bits) for layer in compressed],
            attention=used(_attention),
            kernels=used(lambda layer: kernels_for(layer.device, layer.dtype, layer.key_dim)),
            decode="" if steps is None else steps.how,
            captures=0 if steps is None else steps.captures,
            replays=0 if steps is None else steps.replays,
            warnings=[*cache.warnings, *_clamped(held), *_unread(held)],
        )

    @property
    def ratio(self) -> float:
        """Bytes held over bytes of a DynamicCache; 1 before the first token."""
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self) | {"ratio": self.ratio}

    def __repr__(self) -> str:
        flat = [length for layer in self.lengths for sequence in layer for length in sequence]
        kept = f"min {min(flat)}, mean {sum(flat) / len(flat):.1f}, max {max(flat)}" if flat else "nothing yet"
        host = f", {format_bytes(self.host_nbytes)} of it in host memory" if self.host_nbytes else ""
        lines = [
            f"bytes held      {format_bytes(self.nbytes)}, {self.ratio:.1%} of dense {format_bytes(self.dense_nbytes)}"
            f"{host}",
            f"tokens per head {kept} of {self.seq_length} seen",
            f"layers          {self.compressed_layers} of {self.layers} compressed, {self.batch_size} sequences",
            f"events          {self.events}, {self.sparse} tokens on probation",
            f"selection       {self.scorer}, {self.budget}",
            *([f"calibration     {self.calibration}"] if self.calibration else []),
            *([f"temperatures    {_range(self.temperatures)}"] if self.temperatures else []),
            *([f"bits            {self._bits()}"] if self.bits != "16" else []),
            f"attention       {self.attention}, other kernels {self.kernels}",
            *(
                [f"decode steps    {self.decode}, {self.replays} replays of {self.captures} captures"]
                if self.decode
                else []
            ),
            *(f"warning         {warning}" for warning in self.warnings),
        ]
        return "HardKVCache stats\n  " + "\n  ".join(lines)

    def _bits(self) -> str:
        """Return the bits, and if they are "auto", in how many layers keys and values have which."""
        layers = sorted(Counter(map(tuple, self.layer_bits)).items(), reverse=True) if self.bits == "auto" else []
        which = ", ".join(f"{keys}, {values} in {count} layers" for (keys, values), count in layers)
        return f"{self.bits}: {which}" if which else self.bits


def _attention(layer: HardKVLayer) -> str:
    name = backend_for(layer.settings.attention, layer.device, layer.dtype)
    return name if layer.codec is None or name != "flash_attn" else f"{name} on decoded tokens"


def _clamped(held: list[Tiers]) -> list[str]:
    """Return a warning if fitted temperatures stopped at a limit."""
    fitted = [tiers.temperatures for tiers in held if tiers.temperatures is not None]
    count = sum(int(((t <= MIN_TEMPERATURE * 1.01) | (t >= MAX_TEMPERATURE / 1.01)).sum()) for t in fitted)
    total = sum(t.numel() for t in fitted)
    limits = f"[{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]"
    return [f"{count} of {total} temperatures stopped at the limits {limits}"] if count else []


def _unread(held: list[Tiers]) -> list[str]:
    """Return a warning if the next event will raise an error because of masks."""
    counts = [int(tiers.hidden.sum()) for tiers in held if tiers.hidden is not None]
    return [UNREAD.format(max(counts))] if any(counts) else []
