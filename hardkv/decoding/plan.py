"""Plan the bytes that a HardKVCache will hold, before anything runs."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from hardkv.cache.cache import HardKVCache
from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.model import Traits
from hardkv.cache.record.stats import format_bytes
from hardkv.config import HardKVConfig
from hardkv.selectors.budgets import Budget
from hardkv.selectors.checks import check_count


@dataclass(frozen=True)
class MemoryPlan:
    """The most bytes that a cache will hold. Activations and weights are not counted.

    Args:
        condensed: tokens that events keep, including deselected tokens that are held for a while (`patience`).
        recent: the dense tiers, each with room for the window and an interval.
        queries: the queries that score tokens.
        sliding: layers that attend within a window; they stay uncompressed. transformers keeps their whole prompt until
            the first step; those of MiMo-V2-Flash have twice as many KV heads as its config says.
        dense_nbytes: what a DynamicCache holds at `max_length`.
        fixed: whether the budget's totals are fixed. Then `graphed` allocates this from the start; otherwise it is an
            upper bound.
        uncounted: kinds of layers whose states are not counted, such as linear attention, alone or besides attention.
    """

    condensed: int
    recent: int
    queries: int
    sliding: int
    dense_nbytes: int
    fixed: bool
    uncounted: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """All bytes of the cache."""
        return self.condensed + self.recent + self.queries + self.sliding

    def __str__(self) -> str:
        share = f", {self.nbytes / self.dense_nbytes:.1%} of dense {format_bytes(self.dense_nbytes)}"
        uncounted = f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else ""
        return f"{'' if self.fixed else 'at most '}{format_bytes(self.nbytes)}{share}{uncounted}"


def plan(
    config: Any,
    budget: "int | Budget | dict[str, Any]" = HardKVConfig.budget,
    batch: int = 1,
    prompt_length: int = 0,
    max_length: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> MemoryPlan:
    """Plan the bytes of `HardKVCache(config=config, budget=budget, **settings)` for a batch. Run nothing.

    Args:
        config: `model.config`, or the model.
        budget: as for `HardKVCache`.
        batch: number of sequences.
        prompt_length: columns of the prompt; they matter if it is pinned.
        max_length: columns of prompt and answer.
        dtype: of keys and values.
        settings: as for `HardKVCache`.

    Raises:
        ValueError: lengths or batch are not positive, the prompt is longer than `max_length`, the model has latent
            attention, or an argument is not one that HardKVCache takes.
        TypeError: lengths or batch are not integers.

    Example:

    ```python
    >>> from transformers import Qwen3Config
    >>> print(plan(Qwen3Config(), budget=1024, batch=2, max_length=32768))
    1.2 GiB, 3.6% of dense 32.0 GiB

    ```
    """
    batch, max_length = check_count("batch", batch, 1), check_count("max_length", max_length, 1)
    prompt_length = check_count("prompt_length", prompt_length, 0, max_length)
    cache = HardKVCache(config=config, budget=budget, **settings)
    traits = Traits.of(getattr(config, "config", config))
    if any(layer.latent for layer in cache._compressed):
        raise ValueError("plan() does not know latent attention (MLA): ask cache.nbytes() after a prompt")
    window = cache.settings.window
    pinned = prompt_length if cache.settings.pin_prompt else 0
    condensed = recent = queries = sliding = dense = 0
    fixed, uncounted = cache.settings.patience == 0, set()
    for idx, layer in enumerate(cache.layers):
        query_heads, heads, dim, value_dim = traits.heads(idx)
        token = (dim + value_dim) * dtype.itemsize  # one key and one value
        if isinstance(layer, HardKVLayer):
            if isinstance(layer, HybridLayer):
                uncounted.add(LinearAttentionLayer.__name__)  # the layer's linear part
            dense += batch * heads * max_length * token
            ragged, known = layer.most_condensed(heads, max_length, pinned)
            fixed = fixed and known
            at_rest = token  # bytes of a token that leaves the dense tier
            if layer.codec is not None:
                at_rest = layer.codec.nbytes(dim, value_dim, dtype.itemsize)
                condensed += batch * heads * token  # centres
            if cache.settings.patience:  # all tokens outside the condensed tier may still be held
                ragged = heads * (max_length - min(layer.stay_in_dense, max_length))
            columns = layer.stay_in_dense + cache.settings.interval
            condensed += batch * ragged * (at_rest + 5)  # position, misses
            condensed += 2 * (batch * heads + 1) * 4 + batch * heads * 24  # cu_seqlens; schedules
            if cache.settings.calibration is not None and layer.budget.uses_temperature:
                condensed += batch * heads * 4
            recent += batch * (heads * columns * token + columns * 4 + 16)  # positions, fill, tokens so far
            recent += batch * layer.first * (max_length + 1)  # the last mask, and a flag for unread masks
            queries += batch * (window + 1) * (query_heads * dim * dtype.itemsize + 1)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            sliding += batch * heads * min(layer.sliding_window, max_length) * token
        else:
            uncounted.add(type(layer).__name__)
    return MemoryPlan(condensed, recent, queries, sliding, dense + sliding, fixed, tuple(sorted(uncounted)))


def max_batch_size(
    config: Any,
    budget: "int | Budget | dict[str, Any]" = HardKVConfig.budget,
    prompt_length: int = 0,
    max_length: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    *,
    memory: int | None = None,
    **settings: Any,
) -> int:
    """Return the most sequences whose `plan` fits into memory; 0 if none fits.

    Args:
        config, budget, prompt_length, max_length, dtype, settings: as for `plan`.
        memory: bytes for the cache: the device's memory, less weights and the activations of the prompt. None: the free
            bytes of the current CUDA device. Then call this after loading the model, and leave room for activations.

    Raises:
        ValueError: as `plan`; or `memory` is None and there is no CUDA device.
    """
    if memory is None:
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device to ask for its free memory: pass memory=, in bytes")
        memory = torch.cuda.mem_get_info()[0]
    one, two = (plan(config, budget, batch, prompt_length, max_length, dtype, **settings).nbytes for batch in (1, 2))
    return 1 + int((memory - one) // (two - one)) if memory >= one else 0
