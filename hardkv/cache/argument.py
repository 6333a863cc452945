"""What transformers calls a cache: an argument of its functions, and a field of what they return."""

import inspect
from typing import Any

from transformers.generation.utils import GenerationMixin

# Newest first. The old name goes on working, with a FutureWarning, until transformers 6.0.
NAMES = ("cache", "past_key_values")
# The name in this version: "cache" from 5.24 on.
_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next(name for name in NAMES if name in _PARAMETERS)


def argument_of(model: Any) -> str:
    """The name in a model's `forward`; code from the Hub may have the old one."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, *NAMES) if name in parameters), CACHE)


def take(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from a call's arguments, whichever name it came under, None when there is none.

    Raises:
        TypeError: it came under both names.
    """
    given = [name for name in NAMES if kwargs.get(name) is not None]
    if len(given) > 1:
        raise TypeError(f"{' and '.join(given)} are two names of one argument: pass the cache as one of them")
    return next((cache for cache in [kwargs.pop(name, None) for name in NAMES] if cache is not None), None)
