"""One call of a registered attention function with keys of a HardKVCache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class AttentionCall(NamedTuple):
    """The arguments that a model passed to an attention function.

    Args:
        name: the name that the function is registered under; "eager" for a model's own. function: the function.
        module: the attention module. query: `[B, Hq, q, D]`. key, value: handles.
        mask, args, kwargs: as the model passed them.
    """

    name: str
    function: Callable[..., Any]
    module: torch.nn.Module
    query: Tensor
    key: Any
    value: Any
    mask: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def scale(self) -> float:
        """The factor that attention multiplies q . k by."""
        scale = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if scale is None else float(scale)

    @property
    def softcap(self) -> float | None:
        """The softcap of the logits; None without one."""
        # sdpa has no softcap: transformers ignores it there, or refuses before this call
        return None if self.name == "sdpa" else self.kwargs.get("softcap")

    @property
    def sinks(self) -> Tensor | None:
        """Learned attention sinks, `[Hq]`; None without."""
        return self.kwargs.get("s_aux")
