"""Noticing that `generate()` was given a cache and the model runs without it, or is fed what the cache holds.

`generate()` sets `_is_user_defined` on a cache that its caller gave. From then on the cache waits, in this thread,
until the model's forward asks it for anything; attention that runs meanwhile runs without it.
"""

import sys
import weakref
from collections.abc import Callable
from threading import get_ident
from types import FrameType
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from hardkv.cache.callers import callers
from hardkv.cache.model import Traits
from hardkv.cache.whole import WholeCache

# By thread, the cache that generate() was given and no forward has asked yet. Attention looks here, so it is a plain
# dict, empty but for the moment before a prefill.
WAITING: dict[int, "weakref.ref[GivenCache]"] = {}


class GivenCache(WholeCache):
    """A WholeCache that knows whether `generate()` was given it, and the length at which some models drop their cache.

    Phi-3 and its kin rotate keys otherwise once a text exceeds `original_max_position_embeddings` tokens (LongRoPE).
    Their `prepare_inputs_for_generation` then drops the cache, for everything to be computed again.
    """

    _warn: Callable[[str], None]

    def __init__(self, config: Any = None):
        self._given = False
        traits = None if config is None else Traits.of(config)
        self._limit = None if traits is None else traits.original_max_positions
        self._rotates_anew = traits is not None and traits.rotates_anew  # else keys stay right beyond the limit
        super().__init__(config=config)

    @property
    def _is_user_defined(self) -> bool:
        return self._given

    @_is_user_defined.setter
    def _is_user_defined(self, given: bool) -> None:
        self._given = given
        call = _generate_under_way()
        if call is None:
            return
        if call["generation_config"].use_cache is False:
            raise ValueError(
                "generate(use_cache=False) feeds all tokens again at every step, and this HardKVCache would hold each "
                "of them many times: pass use_cache=True (where nobody passed False, generation_config.use_cache of "
                "the model says so), or no past_key_values"
            )
        if self._rotates_anew and call["custom_generate"] is None:
            length, longest = call["input_ids"].shape[1], call["generation_config"].max_length
            if length <= self._limit < longest:
                self._warn(
                    f"this generation may grow from {length} to {longest} tokens, and beyond {self._limit} "
                    "(original_max_position_embeddings) the model rotates all keys otherwise: it ends there with an "
                    "error, where hardkv.generate (custom_generate=graphed) computes the text again and goes on"
                )
        WAITING[get_ident()] = weakref.ref(self)

    @torch.compiler.disable
    def _check_whole(self, layer: CacheLayerMixin | None = None) -> None:
        if WAITING:
            waiting = WAITING.get(get_ident())
            if waiting is not None and waiting() is self:
                del WAITING[get_ident()]
        super()._check_whole(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: padding and evicted tokens included.

        Raises:
            NotImplementedError: a model is about to drop this cache and the tokens it holds.
        """
        length = super().get_seq_length(layer_idx)
        if self._limit is not None and _asks_whether_to_drop(sys._getframe(1)):
            if self.outgrown(length):
                self.refuse_outgrown(length)
            return max(length, self._limit + 1)  # nothing held is wrong beyond the limit: the model keeps the cache
        return length

    def at_limit(self, length: int) -> bool:
        """Whether the token after `length` columns is the first beyond the limit, where the model rotates otherwise."""
        return self._rotates_anew and length == self._limit

    def outgrown(self, length: int) -> bool:
        """Whether `length` columns held are of no use once the text exceeds the limit."""
        return self._limit is not None and self._rotates_anew and 0 < length <= self._limit

    def refuse_outgrown(self, length: int) -> NoReturn:
        """Raise NotImplementedError for a text that exceeds the limit while the cache holds `length` columns."""
        raise NotImplementedError(
            f"beyond {self._limit} tokens (original_max_position_embeddings) this model rotates all keys otherwise, so "
            f"the {length} tokens that this HardKVCache holds are of no use there, and the model would drop it. Call "
            "reset() and pass the whole text, or take hardkv.generate (custom_generate=graphed), which computes the "
            "text again where a generation gets that far; or use DynamicCache"
        )


def _generate_under_way() -> dict[str, Any] | None:
    """The local variables of transformers' innermost `generate()` that this thread is in."""
    for frame in callers():
        if frame.f_code.co_name == "generate" and "model_kwargs" in frame.f_code.co_varnames:
            return frame.f_locals
    return None


def use_cache_of_forward() -> bool | None:
    """What `use_cache` is in the model's forward that this thread is in, the config's where nobody gave it."""
    for frame in callers():
        if frame.f_code.co_name == "forward" and "use_cache" in frame.f_code.co_varnames:
            given = frame.f_locals
            if isinstance(given["self"], PreTrainedModel):  # a layer's may be a default that nobody cared for
                return given["use_cache"]
    return None


def _asks_whether_to_drop(frame: FrameType) -> bool:
    """Whether this is a `prepare_inputs_for_generation` that compares the length with the limit."""
    code = frame.f_code
    return code.co_name == "prepare_inputs_for_generation" and "original_max_position_embeddings" in code.co_names


@torch.compiler.disable
def check_given(module: torch.nn.Module) -> None:
    """Raise NotImplementedError when `module`, which attends, is of a model whose `generate()` was given a cache.

    For calls with keys of no HardKVCache, while a cache waits.
    """
    waiting = WAITING.get(get_ident())
    cache, call = None if waiting is None else waiting(), _generate_under_way()
    if cache is None or call is None:
        WAITING.pop(get_ident(), None)  # that call has failed
        return
    model = call["self"]
    ours = any(value is cache for value in call["model_kwargs"].values())
    if ours and getattr(module, "config", None) is Traits.of(model.config).text:
        refuse_dropped(type(model).__name__)


def refuse_dropped(model: str) -> NoReturn:
    """Raise NotImplementedError for a model that runs without the cache that its `generate()` was given."""
    raise NotImplementedError(
        f"generate() was given a HardKVCache, and {model} runs without it: its prepare_inputs_for_generation dropped "
        "the cache or put another in its place (as prefix tuning of PEFT does), so nothing would be compressed. If the "
        "cache was built without config=model.config, pass that; else leave past_key_values out, or use DynamicCache"
    )
