"""Define the cases to decode: shapes of models, methods, and numbers of sequences and columns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from hardkv import graphed

COMMON = {"num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 128, "max_position_embeddings": 1 << 18}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3-8b": lambda: Qwen3Config(
        **COMMON, vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36
    ),
    "qwen3-4b": lambda: Qwen3Config(
        **COMMON,
        **{"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        **COMMON, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32
    ),
}
# Name -> (kind of cache, further arguments of generate()).
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("dynamic", {}),
    "static-compile": ("static", {}),
    "topk-eager": ("topk", {}),
    "topk": ("topk", {"custom_generate": graphed}),
    "topk-compile": ("topk", {"custom_generate": graphed, "compile": True}),
    "topk-8bit": ("topk-8", {"custom_generate": graphed}),
    "topk-4bit": ("topk-4", {"custom_generate": graphed}),
    "topk-8bit-compile": ("topk-8", {"custom_generate": graphed, "compile": True}),
    "topk-4bit-compile": ("topk-4", {"custom_generate": graphed, "compile": True}),
    "risk": ("risk", {"custom_generate": graphed}),
    "risk-compile": ("risk", {"custom_generate": graphed, "compile": True}),
    "kvpress": ("kvpress", {}),
}


@dataclass(frozen=True)
class Case:
    """Describe the sequences to decode, of `context` columns; `batch` 0 means the largest that fits."""

    context: int
    batch: int
    kept: int = 2048


CASES = (
    *(Case(2048, batch) for batch in (32, 8, 1)),
    *(Case(8192, batch) for batch in (32, 1)),
    *(Case(32768, batch) for batch in (0, 8, 1)),
    Case(131072, 0),
)
