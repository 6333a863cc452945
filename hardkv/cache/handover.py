"""Notice when `generate()` was given a cache but the model runs without it, or feeds it past tokens again.

`GenerationMixin._prepare_cache_for_generation` is wrapped, because `generate()` takes a given cache there. From then on
the cache waits, in this thread, until the model's forward uses it. If attention runs while the cache waits, the model
runs without the cache.
"""

from collections.abc import Callable
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.utils import GenerationMixin

from hardkv.cache.argument import CACHE
from hardkv.cache.continuation import HeldIds
from hardkv.cache.integrity import WholeCache
from hardkv.cache.model import Traits
from hardkv.cache.routing.under_way import WAITING, innermost, wrap_method


class GivenCache(WholeCache):
    """A WholeCache that notes when `generate()` gets it, and knows the length at which some models drop their cache.

    Phi-3 and similar models rotate keys differently once a text exceeds `original_max_position_embeddings` tokens
    (LongRoPE). Their `prepare_inputs_for_generation` then drops the cache, so that everything is computed again.
    """

    _warn: Callable[[str], None]

    def __init__(self, config: Any = None):
        traits = None if config is None else Traits.of(config)
        self._limit = None if traits is None else traits.original_max_positions
        self._rotates_anew = traits is not None and traits.rotates_anew  # if False, keys stay right beyond the limit
        self._insists = False  # True while a model that would drop the cache prepares its inputs again
        self._ids: HeldIds | None = None  # of the columns held, where a generate() left them
        super().__init__(config=config)

    def given(self, model: Any, generation_config: Any) -> None:
        """Note that the `generate()` of `model` was given this cache.

        Raises:
            ValueError: `use_cache=False`, or ids that do not continue what the cache holds.
        """
        if generation_config.use_cache is False:
            raise ValueError(
                "generate(use_cache=False) feeds all tokens again at every step, and this HardKVCache would hold each "
                "of them many times: pass use_cache=True (where nobody passed False, generation_config.use_cache of "
                "the model says so), or no past_key_values"
            )
        if self._limit is not None:
            wrap_method(type(model), "prepare_inputs_for_generation", _keeping_cache)
        call = innermost()
        if call is None or call.model is not model:  # the model has a generate() of its own
            return
        if self._ids is not None:
            self._ids.check(call.ids, call.arguments.get("attention_mask"))
        if self._rotates_anew and call.arguments.get("custom_generate") is None:
            self._warn_of_limit(call.ids, generation_config.max_length)
        call.cache = self
        WAITING[get_ident()] = call

    def generated(self, result: Any) -> None:
        """Take note of what the `generate()` returned that was given this cache."""
        self._ids = HeldIds.of(result, self.get_seq_length())

    def forget_ids(self) -> None:
        """Forget which tokens are held, as columns or sequences change."""
        self._ids = None

    def reset(self) -> None:
        """Forget every token."""
        self.forget_ids()
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick sequences of the batch, in order (beam search)."""
        self.forget_ids()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self.forget_ids()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given sequences of the batch, in that order."""
        self.forget_ids()
        super().batch_select_indices(indices)

    def _warn_of_limit(self, ids: Any, longest: int) -> None:
        """Warn if a generation from these ids starts within the limit and may exceed it."""
        length = 0 if ids is None else ids.shape[1]
        if length <= self._limit < longest:  # type: ignore[operator]  # it has a limit
            self._warn(
                f"this generation may grow from {length} to {longest} tokens, and beyond {self._limit} "
                "(original_max_position_embeddings) the model rotates all keys otherwise: it ends there with an "
                "error, where hardkv.generate (custom_generate=graphed) computes the text again and goes on"
            )

    @torch.compiler.disable
    def _check_whole(self, layer: CacheLayerMixin | None = None) -> None:
        if WAITING:
            call = WAITING.get(get_ident())
            if call is not None and call.cache is self:
                del WAITING[get_ident()]
        super()._check_whole(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the logical length; padding and evicted tokens count."""
        length = super().get_seq_length(layer_idx)
        if self._insists:
            assert self._limit is not None
            return max(length, self._limit + 1)
        return length

    def insist(self, prepare: Callable[[], Any]) -> Any:
        """Call `prepare` so that a model keeps this cache beyond the limit, and return the result.

        Keeping it is correct if the tokens that it holds stay right there. A model drops a cache that holds no more
        tokens than the limit, so the cache reports a larger length meanwhile.

        Raises:
            NotImplementedError: the tokens that the cache holds are of no use beyond the limit.
        """
        length = self.get_seq_length()
        if self.outgrown(length):
            self.refuse_outgrown(length)
        self._insists = True
        try:
            return prepare()
        finally:
            self._insists = False

    def at_limit(self, length: int) -> bool:
        """Return whether the token after `length` columns is the first beyond the limit, where the rotation changes."""
        return self._rotates_anew and length == self._limit

    def outgrown(self, length: int) -> bool:
        """Return whether `length` held columns are of no use once the text exceeds the limit."""
        return self._limit is not None and self._rotates_anew and 0 < length <= self._limit

    def refuse_outgrown(self, length: int) -> NoReturn:
        """Raise NotImplementedError for a text that exceeds the limit while the cache holds `length` columns."""
        raise NotImplementedError(
            f"beyond {self._limit} tokens (original_max_position_embeddings) this model rotates all keys otherwise, so "
            f"the {length} tokens that this HardKVCache holds are of no use there, and the model would drop it. Call "
            "reset() and pass the whole text, or take hardkv.generate (custom_generate=graphed), which computes the "
            "text again where a generation gets that far; or use DynamicCache"
        )


def install() -> None:
    """Wrap `_prepare_cache_for_generation` of transformers' GenerationMixin in place. Idempotent."""
    wrap_method(GenerationMixin, "_prepare_cache_for_generation", _noting_cache)


def _noting_cache(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def noting(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        cache = model_kwargs.get(CACHE)
        result = prepare(self, generation_config, model_kwargs, *args, **kwargs)
        if isinstance(cache, GivenCache):
            cache.given(self, generation_config)
        return result

    return noting


def _keeping_cache(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `prepare_inputs_for_generation`: call it again if it dropped a HardKVCache because of the limit."""

    def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, *args, **kwargs)
        cache = kwargs.get(CACHE)
        if isinstance(cache, GivenCache) and all(value is not cache for value in inputs.values()):
            return cache.insist(lambda: prepare(self, *args, **kwargs))
        return inputs

    return keeping


@torch.compiler.disable
def check_given(module: torch.nn.Module) -> None:
    """Raise NotImplementedError if `module` attends without the cache that its model's `generate()` was given.

    Call it for attention over keys of no HardKVCache, while a cache waits.
    """
    call = WAITING.get(get_ident())
    if call is None or call is not innermost():  # another generation runs inside the one that waits
        return
    if getattr(module, "config", None) is Traits.of(call.model.config).text:
        refuse_dropped(type(call.model).__name__)


def refuse_dropped(model: str) -> NoReturn:
    """Raise NotImplementedError for a model that runs without the cache that its `generate()` was given."""
    raise NotImplementedError(
        f"generate() was given a HardKVCache, and {model} runs without it: its prepare_inputs_for_generation dropped "
        "the cache or put another in its place (as prefix tuning of PEFT does), so nothing would be compressed. If the "
        "cache was built without config=model.config, pass that; else leave past_key_values out, or use DynamicCache"
    )
