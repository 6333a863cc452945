"""What a cache holds, as numbers."""

from dataclasses import asdict, dataclass
from typing import Any


def format_bytes(count: float) -> str:
    """`1536` -> `'1.5 KiB'`."""
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
    """A snapshot of a HardKVCache; print it, or `to_dict()` it to JSON.

    Args:
        nbytes: bytes held, wherever.
        host_nbytes: those of them in host memory by `offload=True`.
        dense_nbytes: bytes a DynamicCache would hold for the same sequences.
        seq_length: logical length, padding and evicted tokens included.
        batch_size: sequences, 0 before the first.
        layers: layers of the model.
        compressed_layers: those that this cache compresses.
        lengths: tokens that attention reads, `[compressed layers][batch][kv_heads]`.
        temperatures: fitted ones, shaped alike; empty without a calibration.
        sparse: deselected tokens that are held but not read, over all rows.
        events: selection events per layer so far.
        scorer: what ranks tokens.
        budget: what says how many are kept.
        calibration: which one is used: its file, and the model and a fingerprint of the weights it was made for;
            "online"; "" for none.
        attention: backend that computes attention after the prompt.
        kernels: "triton" or "torch", which scores, selects and compacts.
        decode: how `graphed` ran its steps: "" where it did not, "captured", or "uncaptured" without CUDA.
        captures: CUDA graphs captured.
        replays: steps that replayed one.
        warnings: what the user should know.
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
    attention: str
    kernels: str
    decode: str
    captures: int
    replays: int
    warnings: list[str]

    @property
    def ratio(self) -> float:
        """Bytes held over bytes of a DynamicCache; 1 before the first token."""
        return self.nbytes / self.dense_nbytes if self.dense_nbytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
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
            f"attention       {self.attention}, other kernels {self.kernels}",
            *(
                [f"decode steps    {self.decode}, {self.replays} replays of {self.captures} captures"]
                if self.decode
                else []
            ),
            *(f"warning         {warning}" for warning in self.warnings),
        ]
        return "HardKVCache stats\n  " + "\n  ".join(lines)
