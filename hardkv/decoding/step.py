"""A model's decode step over the pools of a cache; with CUDA it is captured in a CUDA graph."""

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hardkv.cache.argument import NAMES, argument_of
from hardkv.cache.cache import HardKVCache
from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.model import Traits
from hardkv.cache.routing.handles import KVHandle, LatentHandle, UnmaskedLength
from hardkv.decoding import joined_linears
from hardkv.decoding.compiled import compiled_forward
from hardkv.decoding.fixed import StaticDecoding
from hardkv.decoding.fixed_tokens import StaticTokens

# Inputs of a step: those that change in a known way, those that stay the same, and those that the pools replace.
MOVING = ("input_ids", "position_ids")
CONSTANT = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
REPLACED = (*NAMES, "attention_mask")


class UnknownLength(UnmaskedLength):
    """A length that grows while the code that reads it runs only once. It can be compared but not computed with."""

    def _refuse(self, *args: Any) -> Any:
        raise NotImplementedError(
            "this model computes with the length of its cache at every step, which a captured step cannot follow: "
            "leave out custom_generate=graphed"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = __neg__ = _refuse

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        """Refuse arithmetic between a tensor and this length."""
        cls()._refuse()


class StepLayer(CacheLayerMixin):
    """A layer as the model sees it during a static step."""

    is_sliding = False

    def __init__(self, layer_idx: int, length: int, window: int | None, latent: bool):
        super().__init__()
        self.is_initialized = True  # some models take an uninitialized cache for the first forward
        self.layer_idx = layer_idx
        self.length = length
        self.window = window
        self.latent = latent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the pools hold what is stored."""

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        """Return handles of keys `[B, H, 1, D]` and values `[B, H, 1, Dv]` for attention."""
        new = StaticTokens(self.layer_idx, key_states, value_states, self.window, self.latent)
        handle = LatentHandle if self.latent else KVHandle
        return handle(new, key_states), handle(new, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes for the new token alone, because attention reads no mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return a length above 0; its value means nothing."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1


class HybridStepLayer(StepLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """A `StepLayer` for keys and values, with the original state tensors of a `HybridLayer`."""

    def __init__(self, layer_idx: int, length: int, layer: HybridLayer):
        StepLayer.__init__(self, layer_idx, length, None, layer.latent)
        for name in vars(LinearAttentionLayer()):
            setattr(self, name, getattr(layer, name))


class DecodeSteps:
    """A model's decode step over the pools of one cache, captured if there is CUDA.

    It runs once uncompiled, then once compiled if `compiled`, and is then captured. It is captured again if a pool
    outgrows its room, weights move, or inputs change shape. Copies and pickles of a cache start without it.

    Args:
        model: its forward runs. compiled: whether to use `torch.compile`.
    """

    def __init__(self, model: Any, compiled: bool):
        self._model = weakref.ref(model)
        self._argument = argument_of(model)
        self.compiled = compiled
        self.decoding: StaticDecoding | None = None
        self.captures = self.replays = 0
        self._inputs: dict[str, Any] = {}
        self._weights: tuple[int, ...] = ()  # addresses; they must not change while steps run
        self._autocast: Any = None  # the caller's autocast setting; it must not change either
        self._forget()

    def __reduce__(self) -> Any:
        return type(None), ()

    def _forget(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._place: Any = None  # the addresses that the graph was captured with
        self._runs = 0  # uncaptured runs with inputs of these shapes

    def of(self, model: Any, compiled: bool) -> bool:
        """Return whether these are steps of that model, compiled or not as asked."""
        return self._model() is model and self.compiled == compiled

    @property
    def how(self) -> str:
        """ "captured"; "uncaptured" without CUDA; "" before the first step."""
        if self.decoding is None:
            return ""
        return "captured" if self.decoding.column.device.type == "cuda" else "uncaptured"

    @property
    def running(self) -> StaticDecoding:
        """The StaticDecoding in use, after `start`."""
        assert self.decoding is not None
        return self.decoding

    def prefilling(self, cache: HardKVCache) -> AbstractContextManager[None]:
        """Return a context for a prefill: an empty cache that has pools puts its tiers into them at once."""
        return nullcontext() if self.decoding is None or cache.get_seq_length() else self.decoding.placing()

    def start(self, cache: HardKVCache, inputs: dict[str, Any], length: int) -> None:
        """Prepare for steps.

        Args:
            cache: after its prefill. inputs: what `prepare_inputs_for_generation` gives the model at the next step.
            length: the most columns that the cache will see.

        Raises:
            NotImplementedError: an input whose next values are not known.
        """
        model = self._model()
        assert model is not None
        self._settle_weights(model)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        if autocast != self._autocast:
            self._forget()
            self._autocast = autocast
        self._take({name: value for name, value in inputs.items() if name not in REPLACED})
        for layer in cache._compressed:
            if layer.event_due:  # held back until all layers had read the keys
                layer.compress()
        if self.decoding is None or not self.decoding.fits(cache.layers, length):
            self._forget()
            self.decoding = None  # free the old pools before new ones are made
            self.decoding = StaticDecoding(cache.layers, length, cache.settings.attention)
        seen, padding, padded = cache.get_seq_length(), None, self.decoding.padded
        if self.decoding.windows and inputs.get("attention_mask") is not None:
            padding = _padding(inputs["attention_mask"], seen)
        self.decoding.hold(seen, padding)
        if self.decoding.padded != padded:
            self._forget()

    def _settle_weights(self, model: Any) -> None:
        """Note the addresses of the weights. A compiled forward first needs weights that it joins to be adjacent."""
        if self.compiled:
            joined_linears.join(model)
        self._weights = tuple(parameter.data_ptr() for parameter in model.parameters())

    def _take(self, inputs: dict[str, Any]) -> None:
        """Copy the inputs to fixed addresses."""
        for name, value in inputs.items():
            if isinstance(value, Tensor) and name not in (*MOVING, *CONSTANT):
                raise NotImplementedError(
                    f"custom_generate=graphed does not know how {name!r} goes on from step to step: leave it out"
                )
        old = self._inputs
        if old.keys() == inputs.keys() and all(_alike(old[name], value) for name, value in inputs.items()):
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    old[name].copy_(value)
            return
        self._forget()
        with torch.inference_mode(False):
            self._inputs = {
                name: torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value)
                if isinstance(value, Tensor)
                else value
                for name, value in inputs.items()
            }

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run one step: tokens `[B]` in, float32 logits `[B, vocabulary]` out. The next step may overwrite the logits.

        Raises:
            NotImplementedError: the forward cannot be captured, or compiled as a whole.
        """
        self._inputs["input_ids"].copy_(tokens[:, None])
        if tokens.device.type != "cuda":
            logits = self._run()
        elif self._runs <= self.compiled:  # run before a capture, so that kernels are built and workspaces exist
            side, here = torch.cuda.Stream(tokens.device), torch.cuda.current_stream(tokens.device)
            side.wait_stream(here)
            try:
                with torch.cuda.stream(side):
                    logits = self._run()
            finally:  # a failure may free memory that the other stream still uses
                here.wait_stream(side)
            logits.record_stream(here)
        else:
            self._capture()
            assert self._graph is not None
            assert self._logits is not None
            self._graph.replay()
            self.replays += 1
            logits = self._logits
        if self.compiled and self._runs == 1:
            self._settle_weights(self._model())
        self.running.steps += 1
        return logits

    def _run(self) -> Tensor:
        """Run the step itself."""
        model, decoding = self._model(), self.running
        assert model is not None
        compiled = self.compiled and self._runs > 0  # the first run tests what the model reads from the cache
        forward = compiled_forward(model) if compiled else model
        length = 1 if compiled else UnknownLength(1)
        layers: list[Any] = [_seen_of(decoding, idx, length) for idx in range(Traits.of(model.config).num_layers)]
        before = [] if self._runs else _held_by_modules(model)
        watching = joined_linears.watch(model) if self.compiled and not self._runs else nullcontext()
        with decoding.step(), watching:
            try:
                out = forward(**self._inputs, **{self._argument: Cache(layers=layers)}, return_dict=True)
            except torch._dynamo.exc.Unsupported as error:
                raise NotImplementedError(
                    f"the forward of {type(model).__name__} cannot be compiled as a whole: leave out compile=True"
                ) from error
            if not self._runs and list(map(id, before)) != list(map(id, _held_by_modules(model))):
                raise NotImplementedError(
                    f"{type(model).__name__} keeps states in its modules, which change from step to step: leave out "
                    "custom_generate=graphed"
                )
            logits = out.logits[:, -1].float()
            if "position_ids" in self._inputs:
                self._inputs["position_ids"].add_(1)
        self._runs += 1
        return logits

    def _capture(self) -> None:
        """Capture a graph, unless the present one has the current addresses."""
        model, decoding = self._model(), self.running
        assert model is not None
        place = decoding.addresses, self._weights
        if self._graph is not None and place == self._place:
            return
        self._graph = self._logits = None
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.clear_autocast_cache()  # its casts of weights last as long as its block: a graph must not use them
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self._run()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # if ending the capture fails, PyTorch stays on the capture's stream
            if isinstance(error, torch.OutOfMemoryError | NotImplementedError):
                raise
            raise NotImplementedError(
                f"the forward of {type(model).__name__} cannot be captured in a CUDA graph ({error}): leave out "
                "custom_generate=graphed" + ("" if self.compiled else ", or try graphed with compile=True")
            ) from error
        finally:
            torch.clear_autocast_cache()
        self._graph, self._logits, self._place = graph, logits, place
        self.captures += 1

    def tensors(self) -> list[Tensor]:
        """Return all tensors held for the cache, for counting bytes."""
        return [] if self.decoding is None else self.decoding.tensors()


def _padding(mask: Any, seen: int) -> Tensor:
    """Return which of the columns so far hold tokens, bool `[B, seen]`."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise NotImplementedError(
            "custom_generate=graphed needs an attention_mask of two dimensions, 1 for tokens and 0 for padding: leave "
            "one of them out"
        )
    return mask[:, :seen].bool()


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new


def _seen_of(decoding: StaticDecoding, idx: int, length: int) -> CacheLayerMixin | LinearAttentionCacheLayerMixin:
    """Return the layer that the model sees; for linear attention the layer itself, which changes in place."""
    linear = decoding.linear.get(idx)
    if linear is None:
        window = decoding.windows[idx].size if idx in decoding.windows else None
        return StepLayer(idx, length, window, idx in decoding.layers and decoding.layers[idx].latent)
    return HybridStepLayer(idx, length, linear) if isinstance(linear, HybridLayer) else linear


def _held_by_modules(model: Any) -> list[Tensor]:
    """Return the tensors that modules hold as plain attributes."""
    return [value for each in model.modules() for value in vars(each).values() if isinstance(value, Tensor)]
