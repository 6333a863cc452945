"""Provide tiny random models and prompts for all cache tests, a stepper, and an oracle for evicting caches.

All are plain functions. The fixtures return the functions, not their results: every call gives a fresh model and
nothing is shared between tests. Nothing here imports hardkv: the oracle cannot share its mistakes, and a child process
can compute references without it.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 98
PAD = 0
# The name of the cache argument in the installed transformers.
NEW, OLD = "cache", "past_key_values"
CACHE = NEW if NEW in inspect.signature(LlamaForCausalLM.prepare_inputs_for_generation).parameters else OLD

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # the models are too small for several threads
# The default device of all tests; HARDKV_TEST_DEVICE=cuda tests the kernels.
DEVICE = os.environ.get("HARDKV_TEST_DEVICE", "cpu")
if DEVICE != "cpu":  # a default device is a mode that every operation passes through: it would halve the tests' speed
    torch.set_default_device(DEVICE)

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# name -> (model class, config class, config arguments)
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, COMMON),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, COMMON),
    "mistral": (MistralForCausalLM, MistralConfig, COMMON | {"sliding_window": None}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gemma3": (  # sliding-window hybrid
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        COMMON
        | {
            "num_hidden_layers": 4,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


def make_model(
    name: str, attn: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Make a tiny random model in eval mode, with weights scaled for O(1) activations and logits and uneven attention.

    Args:
        name: a key of `MODELS`. attn: "sdpa" or "eager". overrides: config arguments, e.g. `num_hidden_layers=1`.
    """
    model_class, config_class, arguments = MODELS[name]
    config = config_class(**(arguments | overrides))
    config._attn_implementation = attn
    with torch.device("cpu"):  # the same weights everywhere
        model = model_class(config).eval()
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad(), torch.device("cpu"):
        for path, parameter in model.named_parameters():
            if parameter.ndim < 2:  # norms and biases keep their initial 1 (0 in gemma) and 0
                continue
            fan_in = config.hidden_size
            if "down_proj" in path or path.endswith("mlp.c_proj.weight"):
                fan_in = parameter.numel() // config.hidden_size
            scale = fan_in**-0.5
            if "q_proj" in path or "k_proj" in path or "c_attn" in path:
                scale *= 1.5  # make attention sharp enough that tokens differ in weight
            embedding = "embed" in path or "wte" in path
            if embedding and not config.tie_word_embeddings:
                scale = 1.0
            parameter.normal_(0, scale, generator=generator)
    return model.to(DEVICE, dtype)


def make_prompts(batch: int, length: int = 13, seed: int = 1, new: int = 0) -> dict[str, Tensor]:
    """Make `input_ids` and `attention_mask` `[batch, length + new]`; with batch > 1, every second row is left-padded.

    Row 0 loses a third and row 2 two thirds of its first `length` columns to padding, row 1 none.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    input_ids = torch.randint(2, VOCABULARY, (batch, length + new), generator=generator, device="cpu").to(DEVICE)
    attention_mask = torch.ones(batch, length + new, dtype=torch.long)
    for row in range(0, batch if batch > 1 else 0, 2):
        attention_mask[row, : length // 3 * (1 + row // 2 % 2)] = 0
    input_ids[attention_mask == 0] = PAD
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def generate_logits(model: PreTrainedModel, cache: Any, inputs: dict[str, Tensor], new: int, **kwargs: Any) -> Any:
    """Return tokens `[B, columns]` and logits `[new, B, V]` of `model.generate` with a cache, greedy by default."""
    out = model.generate(
        **inputs,
        **{CACHE: cache},
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **({"do_sample": False} | kwargs),
    )
    return out.sequences, torch.stack(out.logits)


# ---------------------------------------------------------------------- stepping and the oracle


def feed(
    model: PreTrainedModel, cache: Any, input_ids: Tensor, attention_mask: Tensor, chunks: list[int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Run given tokens through a model in chunks of the given sizes.

    Yields `(start, stop, logits [B, stop - start, V])` after each forward, with the cache as that forward left it.
    """
    position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
    start = 0
    for size in chunks:
        new = slice(start, start + size)
        with torch.no_grad():
            out = model(
                input_ids=input_ids[:, new],
                attention_mask=attention_mask[:, : new.stop],
                position_ids=position_ids[:, new],
                **{CACHE: cache},
            )
        yield new.start, new.stop, out.logits
        start = new.stop


class Visibility:
    """Record which tokens each query may see, from the tokens that a cache reports before each forward.

    Args:
        attention_mask: `[B, T]`, which tokens of the whole run exist.

    `layers` is `{layer_idx: bool [B, KV heads, queries T, tokens T]}`, without the layers that a cache leaves alone.
    `decoded` holds what queries read instead of some keys and values: `{layer_idx: (bool [B, KV heads, queries T,
    tokens T], keys [B, KV heads, T, D], values [B, KV heads, T, D])}`.
    """

    def __init__(self, attention_mask: Tensor):
        self.exists = attention_mask.bool()
        self.layers: dict[int, Tensor] = {}
        self.decoded: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, start: int, stop: int, kept: dict[int, list[list[Tensor]]]) -> None:
        """Let queries `start` to `stop` see `kept[layer][batch][kv_head]`, and of each other the tokens not newer."""
        batch, total = self.exists.shape
        among_new = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        for layer, sequences in kept.items():
            if layer not in self.layers:
                self.layers[layer] = torch.zeros(batch, len(sequences[0]), total, total, dtype=torch.bool)
            for b, rows in enumerate(sequences):
                for h, positions in enumerate(rows):
                    queries = self.layers[layer][b, h, start:stop]
                    queries[:, positions] = True
                    queries[:, start:stop] = among_new & self.exists[b, start:stop]

    def of(self, module: torch.nn.Module, sliding_window: int | None) -> Tensor:
        """bool `[B, KV heads or 1, T, T]` of an attention layer."""
        if module.layer_idx in self.layers:
            return self.layers[module.layer_idx]
        total = self.exists.shape[1]
        recent = torch.ones(total, total, dtype=torch.bool).tril()
        if sliding_window is not None:
            recent = recent.triu(1 - sliding_window)
        return recent & self.exists[:, None, None]


def kept_by(cache: Any, heads: int, batch: int) -> dict[int, list[list[Tensor]]]:
    """Return `cache.kept` of every layer that the cache compresses, `{layer: [batch][kv_head]}`."""
    layers = [idx for idx, layer in enumerate(cache.layers) if hasattr(layer, "tiers")]
    assert layers
    if cache.get_seq_length() == 0:
        return {idx: [[torch.zeros(0, dtype=torch.long)] * heads] * batch for idx in layers}
    return {idx: cache.kept(idx) for idx in layers}


def record(
    model: PreTrainedModel, cache: Any, input_ids: Tensor, attention_mask: Tensor, chunks: list[int]
) -> tuple[Tensor, Visibility]:
    """Return logits `[B, T, V]` of `feed`, and the tokens that its queries may see."""
    visibility = Visibility(attention_mask)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    kept, logits = kept_by(cache, heads, len(input_ids)), []
    for start, stop, chunk_logits in feed(model, cache, input_ids, attention_mask, chunks):
        visibility.add(start, stop, kept)
        kept = kept_by(cache, heads, len(input_ids))
        logits.append(chunk_logits)
    return torch.cat(logits, 1), visibility


ORACLE = "masked-oracle"


def oracle_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    oracle: Visibility,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute plain softmax attention over all tokens, with -inf on tokens that the KV head does not hold."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key, value = (x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query.to(dtype) @ key.transpose(2, 3) * scaling
    seen = oracle.of(module, sliding_window)
    seen = seen.repeat_interleave(group if seen.shape[1] > 1 else 1, 1)
    coded = oracle.decoded.get(module.layer_idx)
    if coded is not None:
        where, keys, values = (x.repeat_interleave(group, 1) for x in coded)
        logits = torch.where(where, query.to(dtype) @ keys.to(dtype).transpose(2, 3) * scaling, logits)
    weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)  # NaN: queries of pads
    out = weights @ value
    if coded is not None:
        out = weights.masked_fill(where, 0.0) @ value + weights.masked_fill(~where, 0.0) @ values.to(dtype)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(ORACLE, oracle_attention)


def oracle_logits(name: str, visibility: Visibility, input_ids: Tensor, **model_arguments: Any) -> Tensor:
    """Return logits `[B, T, V]` of one dense forward of `make_model(name, ...)`, masked by `visibility`."""
    model = make_model(name, ORACLE, **model_arguments)
    position_ids = (visibility.exists.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, oracle=visibility).logits


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that every run notices reading it."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register implementations, and remove them afterwards."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))


# ---------------------------------------------------------------------- the functions, as fixtures


def hand_out(name: str, function: Callable[..., Any]) -> Any:
    """Make a fixture whose value is `function`."""

    @pytest.fixture(name=name, scope="session")
    def fixture() -> Callable[..., Any]:
        return function

    return fixture


tiny_model = hand_out("tiny_model", make_model)  # tiny_model(name, attn, seed=0) -> model
tiny_prompts = hand_out("tiny_prompts", make_prompts)  # tiny_prompts(batch) -> dict(input_ids, attention_mask)
run_generate = hand_out("run_generate", generate_logits)
run_feed = hand_out("run_feed", feed)
run_record = hand_out("run_record", record)
run_oracle = hand_out("run_oracle", oracle_logits)
make_visibility = hand_out("make_visibility", Visibility)
