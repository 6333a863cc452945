"""What transformers' `generate()` is doing in this thread, which it tells no cache and no function of the user's own.

`GenerationMixin.generate` and `GenerationMixin._prefill` are wrapped once and in place, and note here what runs.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from transformers.generation.utils import GenerationMixin


@dataclass(eq=False)
class Call:
    """A call of `generate()` that has not returned yet.

    Args:
        model: whose `generate()` it is.
        arguments: what its caller passed, by name.
        cache: the HardKVCache that it was given, if any.
    """

    model: Any
    arguments: dict[str, Any]
    cache: Any = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []  # the innermost last
        self.prefills = 0


_thread = _Thread()

# By thread, the call whose cache no forward has asked for anything yet. Attention looks here, compiled or not, so it is
# a plain dict, empty but for the moment before a prefill.
WAITING: dict[int, Call] = {}


def innermost() -> Call | None:
    """The innermost `generate()` that this thread is in."""
    return _thread.calls[-1] if _thread.calls else None


def prefilling() -> bool:
    """Whether `generate()` is at its prompt, whose last chunk may be a single token (`prefill_chunk_size`).

    Nothing else tells such a chunk from a drawn token.
    """
    return _thread.prefills > 0


def install() -> None:
    """Wrap `generate` and `_prefill` of transformers' GenerationMixin in place. Idempotent."""
    wrap_method(GenerationMixin, "generate", _noting_call)
    wrap_method(GenerationMixin, "_prefill", _noting_prefill)


def wrap_method(owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrap(method)` in the place of a class's method, unless hardkv has wrapped it already."""
    method = getattr(owner, name)
    if not hasattr(method, "_hardkv"):
        wrapper = functools.wraps(method)(wrap(method))
        wrapper._hardkv = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)


def _noting_call(generate: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(generate).parameters)[1:]  # without self

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = Call(self, dict(zip(names, args, strict=False)) | kwargs)
        _thread.calls.append(call)
        try:
            return generate(self, *args, **kwargs)
        finally:
            _thread.calls.pop()
            if WAITING.get(get_ident()) is call:
                del WAITING[get_ident()]

    return noting


def _noting_prefill(prefill: Callable[..., Any]) -> Callable[..., Any]:
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        _thread.prefills += 1
        try:
            return prefill(self, *args, **kwargs)
        finally:
            _thread.prefills -= 1

    return noting
