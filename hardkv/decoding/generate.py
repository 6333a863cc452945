"""Decoding by replays of a CUDA graph: `model.generate(..., custom_generate=graphed)`.

A decode step of transformers costs the host tens of milliseconds, far more than moving its bytes takes. Between two
events, nothing that a step reads changes its address, so the step is captured once and replayed
(`hardkv.decoding.step`). The device draws the next token. The host reads one flag per step, one step late.
"""

from collections import deque
from typing import Any

import torch
import transformers.cache_utils
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hardkv.cache.argument import CACHE, take
from hardkv.cache.cache import HardKVCache
from hardkv.cache.handover import refuse_dropped
from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.integrity import HALF_DONE
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.model import Traits
from hardkv.cache.routing.under_way import innermost
from hardkv.cache.storage.offload import ToHost
from hardkv.decoding.fixed import linear_of, states_of
from hardkv.decoding.step import DecodeSteps
from hardkv.kernels.attention import backend_for

# Layers of a cache that can be stepped. transformers 5.17 has no layer that holds nothing.
DUMMY = getattr(transformers.cache_utils, "DummyLayer", None)
STEPPED = (HardKVLayer, HybridLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DUMMY)
# Supported ways to choose tokens, and the arguments that choose another way unless they have this value.
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
OTHER_MODES = {
    **{"num_beams": 1, "num_beam_groups": 1, "constraints": None, "force_words_ids": None, "penalty_alpha": None},
    **{"dola_layers": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "use_mtp": False},
}


def generate(model: Any, *args: Any, compile: bool = False, tokenizer: Any = None, **kwargs: Any) -> Any:
    """Call `model.generate(...)` with `graphed`, and with a new HardKVCache unless one is given.

    Pass a cache as `cache` or `past_key_values`: both names work with every version of transformers.

    Args:
        model: a transformers model that generates.
        args, kwargs: as for `model.generate`.
        compile: see `graphed`.
        tokenizer: as for `model.generate`, for `stop_strings`.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: `stop_strings` without a tokenizer.
        TypeError: two caches; see `graphed` for this and NotImplementedError.
    """
    cache = take(kwargs)
    kwargs[CACHE] = HardKVCache(config=model.config) if cache is None else cache
    strings = kwargs.pop("stop_strings", None)  # generate() does not pass the tokenizer on
    if strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
        criteria = [*(kwargs.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
        kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
    return model.generate(*args, custom_generate=graphed, compile=compile, **kwargs)


@torch.no_grad()
def graphed(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    compile: bool = False,
    **model_kwargs: Any,
) -> "GenerateDecoderOnlyOutput | Tensor":
    """Run greedy search and sampling as `generate()` does, with a captured decode step.

    Use it as `model.generate(..., past_key_values=HardKVCache(...), custom_generate=graphed)`, or with `cache=` from
    transformers 5.24 on. The prefill runs as usual. A cache that is used again, after `reset()` or for another turn,
    keeps its graph; a new cache needs a new capture. Without CUDA the same steps run uncaptured, and `stats()` says so.

    With `compile=True`, the `torch.compile`d forward is captured; its logits differ by rounding. It multiplies the
    weights of linear layers that share one input (query, key and value; gate and up) in one product. For that, their
    weights are moved next to each other in memory, values unchanged: no other thread may use the model the first time.
    If inductor autotunes (`max_autotune`), the products stay separate, and a warning says so.

    Some models rotate all keys differently once a text exceeds a length (Phi-3 with LongRoPE). When a text reaches it,
    the cache is reset and the text computed again, with new captures. The state of a linear attention cannot go back a
    step. With such layers the host waits for every token before the next step, and a step that fails leaves the cache
    unusable until `reset()`.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, model_kwargs: what
            `model.generate` passes; `input_ids` int64 `[B, n]`.
        compile: whether to capture the `torch.compile`d forward.

    Returns:
        What `model.generate` returns: token ids `[B, n + new]`, or its output object with `return_dict_in_generate`.

    Raises:
        TypeError: the cache is no HardKVCache.
        NotImplementedError: the mode is neither greedy search nor sampling (beams, assisted decoding, contrastive
            search and others), the steps of the model or cache cannot be captured, or the forward cannot be compiled as
            a whole (latent attention, for one).
    """
    cache = model_kwargs.get(CACHE)
    call = innermost()
    given = {} if call is None else call.arguments  # generate() does not pass all of these to custom functions
    synced_gpus = synced_gpus or _synced(model, given.get("synced_gpus"))
    _refuse(model, cache, generation_config, synced_gpus, given.get("assistant_model"))
    assert isinstance(cache, HardKVCache)
    steps = cache.steps
    if not isinstance(steps, DecodeSteps) or not steps.of(model, compile):
        cache.steps = steps = DecodeSteps(model, compile)
    seen = cache.get_seq_length()
    with steps.prefilling(cache):
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
    if cache.get_seq_length() == seen:  # attention notices this too, if it goes through transformers' functions
        refuse_dropped(type(model).__name__)
    loop = _Loop(logits_processor, stopping_criteria, generation_config, given.get("streamer"))
    with model._optimize_model_for_decode():
        return loop.run(model, cache, input_ids, outputs, model_kwargs)


def _refuse(model: Any, cache: Any, config: Any, synced_gpus: bool, assistant_model: Any) -> None:
    """Raise unless this is greedy search or sampling with a HardKVCache whose layers can all be stepped."""
    what = type(model).__name__
    if not isinstance(cache, HardKVCache):
        got = type(cache).__name__
        raise TypeError(f"custom_generate=graphed needs {CACHE}=HardKVCache(config=model.config), got {got}")
    layers = {type(layer).__name__ for layer in cache.layers if type(layer) not in STEPPED}
    traits = Traits.of(model.config)
    devices = {parameter.device for parameter in model.parameters()}
    mode = config.get_generation_mode(assistant_model)
    given = {name: getattr(config, name, None) for name in OTHER_MODES}
    chosen = [f"{name}={value}" for name, value in given.items() if value not in (None, OTHER_MODES[name])]
    chosen += ["assistant_model"] * (assistant_model is not None)
    refusals = {
        f"{mode.value.replace('_', ' ')} ({', '.join(chosen)})": mode not in MODES,
        "output_attentions and output_hidden_states": config.output_attentions or config.output_hidden_states,
        "synced_gpus": synced_gpus,
        "offload=True": cache._offload is not None,
        "a cache built without config=model.config": not cache.layers,
        f"the layers of a kind of their own in {what} ({', '.join(sorted(layers))})": bool(layers),
        f"the chunked attention of {what}": "chunked_attention" in traits.layer_types,
        "a cache that records the past (assisted decoding)": any(
            getattr(x, "record_past", False) for x in cache.layers
        ),
        f"{what} on several devices ({', '.join(sorted(map(str, devices)))})": len(devices) > 1,
        f"the encoder and decoder of {what}": traits.is_encoder_decoder,
    }
    for reason, refused in refusals.items():
        if refused:
            raise NotImplementedError(f"custom_generate=graphed does not work with {reason}: leave one of them out")
    (device,) = devices
    if device.type == "cuda" and (backend := backend_for(cache.settings.attention, device, model.dtype)) != "triton":
        raise NotImplementedError(
            f"custom_generate=graphed captures Triton's attention only, and attention={cache.settings.attention!r} is "
            f"{backend!r} here: pip install 'hardkv[triton]' and take attention='auto'"
        )


def runs_ahead(device: torch.device) -> bool:
    """Return whether the host prepares a step while the device still runs the one before."""
    return device.type == "cuda"


def _synced(model: Any, synced_gpus: bool | None) -> bool:
    """Return whether all ranks must continue until the last has ended; `generate()` decides if the argument is None."""
    return bool(model._extract_generation_mode_kwargs(None, {}, synced_gpus, None, None)["synced_gpus"])


class _Flight:
    """A flag whether all sequences have ended, and their newest tokens, on the way to the host."""

    def __init__(self, ended: Tensor, tokens: Tensor | None):
        self._ended, self._tokens = ToHost(ended), None if tokens is None else ToHost(tokens)

    def land(self, streamer: Any) -> bool:
        """Wait, stream the tokens, and return whether all sequences have ended."""
        if streamer is not None:
            assert self._tokens is not None
            streamer.put(self._tokens.wait())
        return bool(self._ended.wait())


class _Loop:
    """The part of `generate()` after the prefill."""

    def __init__(self, logits_processor: Any, stopping_criteria: Any, config: Any, streamer: Any):
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.config = config
        self.streamer = streamer
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.in_flight: deque[_Flight] = deque()

    def run(
        self, model: Any, cache: HardKVCache, ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]
    ) -> "GenerateDecoderOnlyOutput | Tensor":
        """Draw tokens and step until every sequence has ended."""
        steps = cache.steps
        assert isinstance(steps, DecodeSteps)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        del outputs  # may hold logits of the whole prompt
        length = self.stopping_criteria.max_length
        held, covered = cache.get_seq_length(), ids.shape[1] + 1  # tokens in the cache, and in model_kwargs
        columns = held + (length or self.config.max_length) - ids.shape[1]
        unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        reversible = not states_of(linear_of(cache.layers))  # whether an extra step can be removed
        behind = int(reversible and runs_ahead(ids.device))  # how many flags the host does not wait for
        started = False
        try:
            while True:
                tokens, ids, unfinished = self._draw(logits, ids, unfinished)
                full = length is not None and ids.shape[1] >= length
                again = cache.at_limit(held)
                ended = self._land(0 if full or again else behind)
                if ended and self.in_flight:  # the newest token comes from an extra step
                    self._undo(steps)
                    ids = ids[:, :-1]
                if ended:
                    break
                if again:
                    if ids.shape[1] != held + 1:  # the prompt was embeddings, or the cache held tokens of earlier calls
                        cache.refuse_outgrown(held)
                    cache.reset()
                    started, held = False, held + 1
                    cache.steps = steps = DecodeSteps(model, steps.compiled)  # tensors that modules hold may have moved
                    logits, model_kwargs = self._again(model, ids, model_kwargs, ids.shape[1] - covered)
                    continue
                if not started:
                    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
                    steps.start(cache, inputs, columns)
                    started = True
                logits, held = steps(tokens), held + 1
                if steps.running.event_due:
                    if self._land(0):
                        steps.running.take_back()
                        break
                    with cache._whole_or_broken():
                        steps.running.compress()
        except BaseException:
            if started and cache._broken is None:
                steps.running.recover()
                if steps.running.midway and not reversible:
                    cache._broken = HALF_DONE
            raise
        if started:
            steps.running.settle()
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,  # type: ignore[arg-type]  # here and below, transformers' annotations are too narrow
            scores=tuple(self.scores) if self.config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(self.logits) if self.config.output_logits else None,  # type: ignore[arg-type]
            **{CACHE: cache},  # type: ignore[arg-type]
        )

    def _draw(self, logits: Tensor, ids: Tensor, unfinished: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next token of every sequence `[B]`, all tokens so far, and which sequences continue."""
        config = self.config
        scores = self.logits_processor(ids, logits)
        if config.return_dict_in_generate and config.output_scores:
            self.scores.append(scores.clone())
        if config.return_dict_in_generate and config.output_logits:
            self.logits.append(logits.clone())
        tokens = scores.argmax(-1)
        if config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
        if any(hasattr(criterion, "eos_token_id") for criterion in self.stopping_criteria):
            pad = config._pad_token_tensor.to(ids.device)
            tokens = tokens * unfinished + pad * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], -1)
        unfinished = unfinished & ~self.stopping_criteria(ids, tuple(self.scores))
        self.in_flight.append(_Flight(unfinished.max() == 0, None if self.streamer is None else tokens))
        return tokens, ids, unfinished

    @staticmethod
    def _again(model: Any, ids: Tensor, model_kwargs: dict[str, Any], new: int) -> tuple[Tensor, dict[str, Any]]:
        """Fill a reset cache with all tokens `[B, n]`. `model_kwargs` do not cover the newest `new` of them.

        Returns:
            The next token's logits `[B, vocabulary]`, and what `prepare_inputs_for_generation` takes after it.
        """
        if new:
            model_kwargs = model._update_model_kwargs_for_generation({}, model_kwargs, num_new_tokens=new)
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
        return logits, model._update_model_kwargs_for_generation(outputs, model_kwargs)

    def _land(self, left: int) -> bool:
        """Read all flags but the newest `left`. Return True at the first that says that all sequences have ended."""
        while len(self.in_flight) > left:
            if self.in_flight.popleft().land(self.streamer):
                return True
        return False

    def _undo(self, steps: DecodeSteps) -> None:
        steps.running.take_back()
        self.scores, self.logits = self.scores[:-1], self.logits[:-1]
