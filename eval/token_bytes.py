"""Count the bytes of caches in a model of 16 bits whose heads have 64 coordinates, as SmolLM2's.

The study runs in float32, so the bytes that its caches hold do not tell which part a model of 16 bits would keep.
"""

from collections.abc import Mapping
from typing import Any

from hardkv import HardKVConfig
from hardkv.cache.storage.codec import token_nbytes

HEAD_DIM = 64
# Bytes of a token's key and value in one head.
DENSE = 2 * 2 * HEAD_DIM
# Tokens per head that keep 16 bits.
PROTECTED = HardKVConfig.sinks + HardKVConfig.window


def ours(bits: Any, dim: int = HEAD_DIM, value_dim: int = HEAD_DIM) -> int:
    """Return the bytes of a token in a head of HardKVCache; `bits` is a number, or a list for keys and values."""
    pair = (bits[0], bits[1]) if isinstance(bits, list) else (bits, bits)
    return token_nbytes(pair, dim, value_dim, itemsize=2)


def quantized(bits: int) -> float:
    """Return the bytes of a token in a head of transformers' QuantizedCache, in groups of 64.

    Each group has a scale and a zero point. Ten codes of 3 bits take four bytes, and 64 take seven times four.
    """
    return 2 * HEAD_DIM * (3.5 if bits == 3 else bits) / 8 + 2 * HEAD_DIM / 64 * 4


def share(record: Mapping[str, Any]) -> float:
    """Return the bytes of the tokens that the last event of a text keeps, as a fraction of the dense cache's.

    The tokens since the last event, at most the interval's 128, and the queries of the window come on top.

    Args:
        record: of the study of budgets, of a cache that keeps n tokens per head on average.
    """
    options, length = record["options"], record["length"]
    if "backend" in options:
        return quantized(options["bits"]) / DENSE
    bits = 16 if record["label"] == "Risk at equal bytes" else options.get("bits", 16)
    held = PROTECTED * ours(16) + (min(record["n"], length) - PROTECTED) * ours(bits)
    return held / (length * DENSE)
