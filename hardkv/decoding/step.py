"""A model's decode step over the pools of a cache, as a CUDA graph where there is CUDA."""

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

# Inputs of a step: those that change as we know, those that stay as they are, and those that the pools stand for.
MOVING = ("input_ids", "position_ids")
CONSTANT = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
REPLACED = (*NAMES, "attention_mask")


class UnknownLength(UnmaskedLength):
    """A length that grows while the code that asks for it runs only once: it can be compared, not computed with."""

    def _refuse(self, *args: Any) -> Any:
        raise NotImplementedError(
            "this model computes with the length of its cache at every step, which a captured step cannot follow: "
            "leave out custom_generate=graphed"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = __neg__ = _refuse

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        """What comes before a tensor's own arithmetic with an int."""
        cls()._refuse()


class StepLayer(CacheLayerMixin):
    """What the model sees of a layer during a static step."""

    is_sliding = False

    def __init__(self, layer_idx: int, length: int, window: int | None, latent: bool):
        super().__init__()
        self.is_initialized = True  # some models take a cache that is not for the first forward
        self.layer_idx = layer_idx
        self.length = length
        self.window = window
        self.latent = latent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pools hold what is stored."""

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        """Handles of keys `[B, H, 1, D]` and values `[B, H, 1, Dv]`, which attention takes."""
        new = StaticTokens(self.layer_idx, key_states, value_states, self.window, self.latent)
        handle = LatentHandle if self.latent else KVHandle
        return handle(new, key_states), handle(new, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the new token alone, as attention reads no mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Some length above 0."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class HybridStepLayer(StepLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """`StepLayer` for the keys and values, and the very states of a `HybridLayer`."""

    def __init__(self, layer_idx: int, length: int, layer: HybridLayer):
        StepLayer.__init__(self, layer_idx, length, None, layer.latent)
        for name in vars(LinearAttentionLayer()):
            setattr(self, name, getattr(layer, name))


class DecodeSteps:
    """A model's decode step over the pools of one cache, captured where there is CUDA.

    It runs once as it is, once compiled if it shall be, and is then captured. Outgrown pools, weights at other
    addresses and inputs of other shapes lead to a new capture. Copies and pickles of a cache begin without.

    Args:
        model: whose forward runs. compiled: whether by `torch.compile`.
    """

    def __init__(self, model: Any, compiled: bool):
        self._model = weakref.ref(model)
        self._argument = argument_of(model)
        self.compiled = compiled
        self.decoding: StaticDecoding | None = None
        self.captures = self.replays = 0
        self._inputs: dict[str, Any] = {}
        self._weights: tuple[int, ...] = ()  # addresses, which nobody changes while steps are made
        self._autocast: Any = None  # the caller's, which nobody changes either
        self._forget()

    def __reduce__(self) -> Any:
        return type(None), ()

    def _forget(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._place: Any = None  # addresses that the graph was captured with
        self._runs = 0  # uncaptured, with the inputs' shapes

    def of(self, model: Any, compiled: bool) -> bool:
        """Whether these are steps of that model."""
        return self._model() is model and self.compiled == compiled

    @property
    def how(self) -> str:
        """ "captured", "uncaptured" where there is no CUDA, or "" before the first step."""
        if self.decoding is None:
            return ""
        return "captured" if self.decoding.column.device.type == "cuda" else "uncaptured"

    @property
    def running(self) -> StaticDecoding:
        """What steps, after `start`."""
        assert self.decoding is not None
        return self.decoding

    def prefilling(self, cache: HardKVCache) -> AbstractContextManager[None]:
        """Around a prefill: an empty cache that has pools fills them at once."""
        return nullcontext() if self.decoding is None or cache.get_seq_length() else self.decoding.placing()

    def start(self, cache: HardKVCache, inputs: dict[str, Any], length: int) -> None:
        """Get ready to step.

        Args:
            cache: after its prefill. inputs: what `prepare_inputs_for_generation` gives the model at the next step.
            length: columns that the cache will have seen at most.

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
            if layer.event_due:  # held until all layers had read the keys
                layer.compress()
        if self.decoding is None or not self.decoding.fits(cache.layers, length):
            self._forget()
            self.decoding = None  # before new pools are made
            self.decoding = StaticDecoding(cache.layers, length, cache.settings.attention)
        seen, padding, padded = cache.get_seq_length(), None, self.decoding.padded
        if self.decoding.windows and inputs.get("attention_mask") is not None:
            padding = _padding(inputs["attention_mask"], seen)
        self.decoding.hold(seen, padding)
        if self.decoding.padded != padded:
            self._forget()

    def _settle_weights(self, model: Any) -> None:
        """Take note of where the weights lie, those that the compiled forward reads as one next to each other."""
        if self.compiled:
            joined_linears.join(model)
        self._weights = tuple(parameter.data_ptr() for parameter in model.parameters())

    def _take(self, inputs: dict[str, Any]) -> None:
        """Give the inputs addresses that stay."""
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
        """One step: tokens `[B]` in, float32 logits `[B, vocabulary]` out, which the next step may overwrite.

        Raises:
            NotImplementedError: the forward cannot be captured, or compiled as a whole.
        """
        self._inputs["input_ids"].copy_(tokens[:, None])
        if tokens.device.type != "cuda":
            logits = self._run()
        elif self._runs <= self.compiled:  # kernels are built and workspaces made before anything is captured
            side, here = torch.cuda.Stream(tokens.device), torch.cuda.current_stream(tokens.device)
            side.wait_stream(here)
            try:
                with torch.cuda.stream(side):
                    logits = self._run()
            finally:  # what fails may free memory that the other stream still works on
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
        """The step itself."""
        model, decoding = self._model(), self.running
        assert model is not None
        compiled = self.compiled and self._runs > 0  # the first run finds what the model asks the cache
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
        """Have a graph that is captured with everything where it lies now."""
        model, decoding = self._model(), self.running
        assert model is not None
        place = decoding.addresses, self._weights
        if self._graph is not None and place == self._place:
            return
        self._graph = self._logits = None
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.clear_autocast_cache()  # it keeps casts of weights while its block lasts: no graph may read or make them
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self._run()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # PyTorch stays on the capture's where ending it fails
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
        """Everything held for the cache, for counting bytes."""
        return [] if self.decoding is None else self.decoding.tensors()


def _padding(mask: Any, seen: int) -> Tensor:
    """Which of the columns so far hold tokens, bool `[B, seen]`."""
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
    """What the model sees of a layer: of linear attention the layer itself, which changes in place."""
    linear = decoding.linear.get(idx)
    if linear is None:
        window = decoding.windows[idx].size if idx in decoding.windows else None
        return StepLayer(idx, length, window, idx in decoding.layers and decoding.layers[idx].latent)
    return HybridStepLayer(idx, length, linear) if isinstance(linear, HybridLayer) else linear


def _held_by_modules(model: Any) -> list[Tensor]:
    """Tensors that modules hold as plain attributes."""
    return [value for each in model.modules() for value in vars(each).values() if isinstance(value, Tensor)]
