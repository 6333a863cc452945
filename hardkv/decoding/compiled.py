"""A model's forward, compiled as a whole, which the steps of all its caches share."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hardkv.decoding import joined_linears

# Batch sizes that a model may be compiled for.
MAX_SHAPES = 64


class _Compiled:
    """A model's compiled forward, kept with it; copies and pickles of the model begin without."""

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
    """What `recompile_limit` does, for a PyTorch whose `torch.compile` does not take it."""

    def limited(**inputs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return forward(**inputs)

    return limited


def compiled_forward(model: Any) -> Callable[..., Any]:
    """The model's compiled forward, which stays with the model."""
    if getattr(model, "_hardkv_compiled", None) is None:
        model._hardkv_compiled = _Compiled(model)
    return model._hardkv_compiled.forward
