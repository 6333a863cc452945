"""Track which `generate()` runs in this thread. transformers does not pass this to caches or attention functions.

`GenerationMixin.generate` and `GenerationMixin._prefill` are wrapped once, in place. The wrappers note what runs.
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
        model: the model whose `generate()` runs.
        arguments: the caller's arguments, by name.
        cache: the HardKVCache that the caller passed, if any.
    """

    model: Any
    arguments: dict[str, Any]
    cache: Any = None

    @property
    def ids(self) -> Any:
        """The token ids that its caller passed; None without any."""
        return next(
            (self.arguments[name] for name in ("inputs", "input_ids") if self.arguments.get(name) is not None), None
        )


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []  # the innermost call is last
        self.prefills = 0


_thread = _Thread()

# Maps a thread to a call whose model has not used the given cache yet. Attention reads it, also when compiled, so it is
# a plain dict. It is empty except just before a prefill.
WAITING: dict[int, Call] = {}


def innermost() -> Call | None:
    """Return the innermost `generate()` call of this thread, or None."""
    return _thread.calls[-1] if _thread.calls else None


def prefilling() -> bool:
    """Return whether `generate()` is processing its prompt.

    The last chunk of a prompt may be a single token (`prefill_chunk_size`), which looks like a drawn token.
    """
    return _thread.prefills > 0


def install() -> None:
    """Wrap `generate` and `_prefill` of transformers' GenerationMixin in place. Idempotent."""
    wrap_method(GenerationMixin, "generate", _noting_call)
    wrap_method(GenerationMixin, "_prefill", _noting_prefill)


def wrap_method(owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a class's method by `wrap(method)`, unless hardkv has wrapped it already."""
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
            result = generate(self, *args, **kwargs)
            if call.cache is not None:
                call.cache.generated(result)
            return result
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
