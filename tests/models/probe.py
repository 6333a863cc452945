"""What HardKVCache makes of a model: supported, nothing to compress, or refused; anything else is an error of hardkv.

A run is `generate()` with the tokens given beforehand, so that a model's own preparation of inputs is used and runs
can be compared column by column. The oracle is transformers' DynamicCache with plain softmax attention in which every
KV head sees only the tokens that HardKVCache said it held when the query came; nothing of hardkv's attention is in it.
"""

import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from hardkv import HardKVCache, graphed
from hardkv.cache.argument import CACHE
from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.record.contents import tensors_of
from hardkv.cache.routing.handles import KVHandle
from tests.cache.replays import replaying
from tests.models.tiny import PAD, random_ids, tiny_model

PROMPT, NEW = 12, 12
HOLD_ALL: dict[str, Any] = {"budget": 1000, "window": 4, "sinks": 1, "interval": 3}
EVICT: dict[str, Any] = {"budget": 8, "window": 4, "sinks": 1, "interval": 3}
# Float32 runs in another order of sums; relative to the largest logit, which is a few units
TOLERANCE = 5e-5

SUPPORTED, NOTHING, REFUSED = "supported", "nothing to compress", "refused"
NO_CACHE, NOT_BUILT = "no DynamicCache", "not built"
YES = "yes"


@dataclass(frozen=True)
class Verdict:
    """What became of a model type.

    Args:
        status: one of the five above. reason: hardkv's words, or transformers'; "" when supported.
        compressed, layers: cache layers that are compressed, of how many.
        graphed: what `probe_graphed` says; "" where there is no cache of ours to step.
    """

    status: str
    reason: str = ""
    compressed: int = 0
    layers: int = 0
    graphed: str = ""


class Defect(AssertionError):
    """HardKVCache gave a wrong result, or died of something that is not one of its own errors."""


@dataclass
class Forced(LogitsProcessor):
    """Makes generate() choose the given tokens, `[B, NEW]`."""

    tokens: Tensor
    step: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self.tokens[:, self.step, None], 0.0)
        self.step += 1
        return forced


def run(model: PreTrainedModel, cache: Any, **inputs: Any) -> Tensor:
    """Logits `[NEW, 2, V]` of generate() over given random tokens, the first row left-padded."""
    tokens = random_ids(2, PROMPT + NEW)
    attention_mask = torch.ones(2, PROMPT, dtype=torch.long)
    tokens[0, : PROMPT // 3] = PAD
    attention_mask[0, : PROMPT // 3] = 0
    arguments = {"input_ids": tokens[:, :PROMPT], "attention_mask": attention_mask} | inputs
    with torch.no_grad():
        out = model.generate(
            **arguments,
            **{CACHE: cache},
            use_cache=True,  # MPT's config says False
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=[Forced(tokens[:, PROMPT:])],
        )
    if isinstance(cache, HardKVCache):
        check_used(cache, arguments["input_ids"].shape[1] + NEW - 1)
    return torch.stack(out.logits)


def check_used(cache: HardKVCache, columns: int) -> None:
    """Raise Defect unless every forward of so many columns came to the cache: it may have been dropped for another."""
    seen = [layer.get_seq_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    if max(seen, default=0) < columns:
        raise Defect(f"the model gave the cache {max(seen, default=0)} of {columns} columns and went on without it")


@dataclass
class Held:
    """What a layer held: `kept()`, and with `bits` also what was read of it, decoded.

    Args:
        kept: positions, `[B][KV heads]`. place: sequence, KV head and position of every token of `keys` and `values`,
            which are `[N, D]`.
    """

    kept: list[list[Tensor]]
    place: tuple[Tensor, ...] = ()
    keys: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def by(cls, cache: HardKVCache, layer_idx: int) -> "Held":
        """What a cache's layer holds now."""
        held = cls(cache.kept(layer_idx))
        if cache.settings.bits != 16 and held.kept:
            seen = cache.observe(layer_idx)
            sequence, head = seen.row // len(held.kept[0]), seen.row % len(held.kept[0])
            held.place, held.keys, held.values = (sequence, head, seen.positions.long()), seen.keys, seen.values
        return held


class Recording(HardKVCache):
    """Remembers what every layer held when a forward pass came to it: `held[layer][columns so far]`."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.held: dict[int, dict[int, Held]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(result[0], KVHandle):
            self.held.setdefault(layer_idx, {})[result[0].new.start] = Held.by(self, layer_idx)
        return result


class OracleCache(DynamicCache):
    """A DynamicCache that knows which layer's keys it handed out last, and where each layer's lie."""

    def __init__(self, held: dict[int, dict[int, Held]], **arguments: Any):
        super().__init__(**arguments)
        self.held = held
        self.last = 0
        self.places: dict[int, int] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.last, self.places[layer_idx] = layer_idx, keys.data_ptr()
        return keys, values

    def found(self, key: Tensor, queries: int) -> Held | None:
        """What the queries may see of the keys; None where nothing was evicted."""
        # a layer that reads another one's keys gets the very tensor
        owner = next((idx for idx, place in self.places.items() if place == key.data_ptr()), self.last)
        held = self.held.get(owner, {}).get(key.shape[2] - queries)
        return None if key.shape[2] == queries else held


def visible(held: Held, columns: int) -> Tensor:
    """Bool `[B, KV heads, columns]`: the tokens that are held, and the newest."""
    visible = torch.zeros(len(held.kept), len(held.kept[0]), columns, dtype=torch.bool)
    visible[..., -1] = True
    for row, heads in enumerate(held.kept):
        for head, positions in enumerate(heads):
            visible[row, head, positions] = True
    return visible


def as_read(held: Held, states: Tensor, read: Tensor | None) -> Tensor:
    """Keys or values `[B, KV heads, columns, D]` with what was read of them, `[N, D]`, in the places of those held."""
    return states if read is None else states.index_put(held.place, read)


@dataclass
class Oracle:
    """The attention function of an oracle's run."""

    original: Callable[..., Any]
    ignores_softcap: bool  # as sdpa does
    cache: OracleCache = field(default=None)  # type: ignore[assignment]

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **kwargs: Any) -> Any:
        held = self.cache.found(key, query.shape[2])
        if held is None:
            return self.original(module, query, key, value, *mask, **kwargs)
        assert query.shape[2] == 1
        shown = visible(held, key.shape[2])
        key, value = as_read(held, key, held.keys), as_read(held, value, held.values)
        wide = torch.promote_types(query.dtype, torch.float32)
        group = query.shape[1] // key.shape[1]
        key, value = (x.to(wide).repeat_interleave(group, 1) for x in (key, value))
        shown = shown.repeat_interleave(key.shape[1] // shown.shape[1], 1)
        scaling = kwargs.get("scaling")
        logits = query.to(wide) @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        softcap = None if self.ignores_softcap else kwargs.get("softcap")
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~shown[:, :, None], -torch.inf)
        if kwargs.get("s_aux") is not None:
            sinks = kwargs["s_aux"].to(wide).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], -1)
        weights = logits.softmax(-1)[..., : key.shape[2]]
        return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None


def oracle_run(model: PreTrainedModel, held: Any, attn: str, **inputs: Any) -> Tensor:
    """Logits of `run` whose queries see what `held` says; `attn` is what the model runs with otherwise."""
    original = eager_attention if attn == "eager" else AttentionInterface._global_mapping[attn]
    oracle = Oracle(original, ignores_softcap=attn == "sdpa")
    oracle.cache = OracleCache(held, config=model.config)
    AttentionInterface.register("architecture-oracle", oracle)  # type: ignore[arg-type]
    AttentionMaskInterface.register("architecture-oracle", AttentionMaskInterface._global_mapping[attn])
    try:
        set_attention(model, "architecture-oracle")
        return run(model, oracle.cache, **inputs)
    finally:
        set_attention(model, attn)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("architecture-oracle")


def eager_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the file that defines the module's class."""
    files = (sys.modules[klass.__module__] for klass in type(module).__mro__)
    function = next(vars(file)["eager_attention_forward"] for file in files if hasattr(file, "eager_attention_forward"))
    return function(module, *args, **kwargs)


def set_attention(model: PreTrainedModel, attn: str) -> None:
    """Switch the language model's attention and nothing else."""
    model.config.get_text_config(decoder=True)._attn_implementation_internal = attn


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    error = (actual - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    if not error <= TOLERANCE * scale:
        raise Defect(f"{what}: logits differ by {error:.2g} (largest logit {scale:.2g})")


def in_one_line(error: BaseException) -> str:
    """An error's name and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_refusal(error: BaseException) -> bool:
    """Whether hardkv itself raised it, as one of the errors that its documentation names."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "hardkv/cache/" in last.filename.replace("\\", "/") and isinstance(error, RuntimeError | ValueError)


def probe(model_type: str, attn: str | None = None) -> Verdict:
    """The verdict on a tiny model of the type, with the attention that transformers chooses or another one.

    Raises:
        Defect: HardKVCache is wrong about it.
    """
    try:
        model = tiny_model(model_type)
        if attn is not None:
            model.set_attn_implementation(attn)
    except Exception as error:
        return Verdict(NOT_BUILT, in_one_line(error))
    return probe_model(model)


def probe_model(model: PreTrainedModel, **inputs: Any) -> Verdict:
    """`probe` of a model at hand, whose generate() also gets `inputs`."""
    attn = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        past = DynamicCache(config=model.config)
        dense = run(model, past, **inputs)
    except Exception as error:
        return Verdict(NO_CACHE, in_one_line(error))
    if not any(isinstance(layer, CacheLayerMixin) and layer.get_seq_length() for layer in past.layers):
        return Verdict(NO_CACHE, "leaves it empty")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = Recording(config=model.config, **HOLD_ALL)
        compressed = len(cache._compressed)
        whole = run(model, cache, **inputs)
    except Defect:
        raise
    except Exception as error:
        if is_refusal(error) and "DynamicCache" in str(error):  # the way out
            return Verdict(REFUSED, in_one_line(error))
        raise Defect(f"obscure {in_one_line(error)}") from error
    layers = len(cache.layers)
    assert_near(whole, dense, "nothing evicted")
    if not compressed:
        warning = next((str(each.message) for each in caught if "compresses nothing" in str(each.message)), None)
        if warning is None:
            raise Defect("compresses nothing and does not say so")
        return Verdict(NOTHING, warning, 0, layers)
    if not any(layer.seen for layer in cache._compressed):
        raise Defect("HardKVCache was never asked to hold anything")
    if cache.stats().events < 3:
        raise Defect(f"only {cache.stats().events} events")
    cache = Recording(config=model.config, scorer="snapkv", **EVICT)
    evicted = run(model, cache, **inputs)
    if int(cache.lengths().max()) > EVICT["budget"] + EVICT["interval"]:
        raise Defect(f"a head holds {int(cache.lengths().max())} tokens")
    if not (evicted - dense).abs().max() > 1e-3:
        raise Defect("eviction makes no difference: the model cannot show whether it is right")
    assert_near(evicted, oracle_run(model, cache.held, attn, **inputs), "evicted")
    return Verdict(SUPPORTED, "", compressed, layers)


def probe_bits(model: PreTrainedModel, bits: Any) -> str:
    """ "yes" when decoding equals the oracle's, which reads decoded tokens; or why these bits are refused.

    Raises:
        Defect: it is neither the same nor refused.
    """
    attn = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        cache = Recording(config=model.config, scorer="snapkv", bits=bits, **EVICT)
        coded = run(model, cache)
    except ValueError as error:
        if str(error).startswith("bits=") and str(error).endswith("use bits=16"):
            return in_one_line(error)
        raise Defect(f"bits: obscure {in_one_line(error)}") from error
    kinds = [layer.tiers.condensed.keys.dtype for layer in cache._compressed if layer.tiers is not None]
    if set(kinds) != {torch.uint8}:
        raise Defect(f"bits: holds {set(kinds)}")
    assert_near(coded, oracle_run(model, cache.held, attn), "bits")
    return YES


def probe_graphed(model: PreTrainedModel, **settings: Any) -> str:
    """ "yes" when decoding by static steps is generate()'s own loop with the same evicting cache; or why it is refused.

    The logits, what every KV head keeps, and all that layers hold which are not compressed. Between two events a step
    is recorded once and replayed, as a CUDA graph is.

    Raises:
        Defect: it is neither the same nor refused.
    """
    caches = [HardKVCache(config=model.config, scorer="snapkv", **EVICT, **settings) for _ in range(2)]
    try:
        expected = run(model, caches[0])
        with replaying() as replays:
            actual = run(model, caches[1], custom_generate=graphed)
    except NotImplementedError as error:
        if "custom_generate=graphed" in str(error):
            return in_one_line(error)
        raise Defect(f"graphed: {in_one_line(error)}") from error
    except Defect:
        raise
    except Exception as error:
        raise Defect(f"graphed: obscure {in_one_line(error)}") from error
    if len(replays) < NEW // 2:
        raise Defect(f"graphed: only {len(replays)} replays")
    assert_near(actual, expected, "graphed")
    for idx, (one, other) in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if isinstance(one, HardKVLayer) and as_lists(caches[0].kept(idx)) != as_lists(caches[1].kept(idx)):
            raise Defect(f"graphed: layer {idx} keeps other tokens")
        for expected_held, held in zip(*(uncompressed(layer) for layer in (one, other)), strict=True):
            assert_near(held, expected_held, f"graphed: what layer {idx} holds")
    return YES


def as_lists(kept: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[positions.tolist() for positions in heads] for heads in kept]


def uncompressed(layer: Any) -> list[Tensor]:
    """The tensors of a cache layer that are transformers' own."""
    if isinstance(layer, HardKVLayer):
        return layer.states() if isinstance(layer, HybridLayer) else []
    return tensors_of(layer)


def autocast_rounding(model_type: str) -> Tensor:
    """Differences `[NEW, 2, V]` of a cache that evicts nothing from DynamicCache, both under autocast to bfloat16."""
    model = tiny_model(model_type)
    caches = DynamicCache(config=model.config), HardKVCache(config=model.config, **HOLD_ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = (run(model, cache) for cache in caches)
    stored = {layer.tiers.dense.keys.dtype for layer in caches[1]._compressed if layer.tiers is not None}
    if stored != {torch.bfloat16}:
        raise Defect(f"stores {stored} under autocast")
    return (actual - expected).float()


def rounding(model_type: str, dtype: torch.dtype) -> Tensor:
    """Differences `[NEW, 2, V]` of an evicting cache from the oracle in half precision, both finite.

    The oracle computes attention in float32, as hardkv does: what differs is where results are rounded.
    """
    model = tiny_model(model_type).to(dtype)
    attn = model.config.get_text_config(decoder=True)._attn_implementation
    cache = Recording(config=model.config, scorer="snapkv", **EVICT)
    actual = run(model, cache)
    expected = oracle_run(model, cache.held, attn)
    if not (actual.isfinite().all() and expected.isfinite().all()):
        raise Defect(f"not finite in {dtype}")
    return (actual - expected).float()
