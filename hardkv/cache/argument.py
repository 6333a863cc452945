"""The name that transformers uses for a cache, as an argument of its functions and a field of their outputs."""

import inspect
from typing import Any

from transformers.generation.utils import GenerationMixin

# Newest first. The old name still works, with a FutureWarning, until transformers 6.0.
NAMES = ("cache", "past_key_values")
# The name in the installed version: "cache" from 5.24 on.
_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next(name for name in NAMES if name in _PARAMETERS)


def argument_of(model: Any) -> str:
    """Return the name that a model's `forward` uses. Code from the Hub may still use the old one."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, *NAMES) if name in parameters), CACHE)


def take(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from a call's arguments, under either name, and return it; None if there is none.

    Raises:
        TypeError: both names hold a cache.
    """
    given = [name for name in NAMES if kwargs.get(name) is not None]
    if len(given) > 1:
        raise TypeError(f"{' and '.join(given)} are two names of one argument: pass the cache as one of them")
    return next((cache for cache in [kwargs.pop(name, None) for name in NAMES] if cache is not None), None)
