"""A model's forward, compiled as a whole. The steps of all its caches share it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hardkv.decoding import joined_linears

# The most batch sizes that a model may be compiled for.
MAX_SHAPES = 64


class _Compiled:
    """A model's compiled forward, stored on the model. Copies and pickles of the model start without it."""

    def __init__(self, model: Any):
        options = {"pre_grad_custom_pass": joined_linears.JoinProducts()}
        compiled = partial(torch.compile, model.forward, fullgraph=True, dynamic=False, options=options)
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            self.forward = compiled(recompile_limit=MAX_SHAPES)
        else:
            self.forward = _with_more_shapes(compiled())

    def __reduce__(self) -> Any:
        return type(None), ()


def _with_more_shapes(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `recompile_limit` does, for a PyTorch whose `torch.compile` does not have it."""

    def limited(**inputs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return forward(**inputs)

    return limited


def compiled_forward(model: Any) -> Callable[..., Any]:
    """Return the model's compiled forward, which is stored on the model."""
    if getattr(model, "_hardkv_compiled", None) is None:
        model._hardkv_compiled = _Compiled(model)
    return model._hardkv_compiled.forward
