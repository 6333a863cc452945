"""calibrate() runs a model once over some text and measures temperatures and risk curves per KV head."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from hardkv.cache.argument import argument_of
from hardkv.cache.model import Traits
from hardkv.calibration.distortion import distortion
from hardkv.calibration.file import Calibration, describe_scorer
from hardkv.calibration.fingerprint import fingerprint
from hardkv.calibration.survey import Record, Step, SurveyCache, curve_edges, fit, squared_attention
from hardkv.config import HardKVConfig
from hardkv.selectors.checks import check_count, check_fraction, check_name
from hardkv.selectors.scorers.scorer import Scorer, get_scorer
from hardkv.selectors.temperatures import SOLVERS

__all__ = ["Calibration", "calibrate", "default_texts"]

# Number of tokens used per text.
LENGTH = 2048
# Temperatures are fitted to at most this number of events, over all texts.
SAMPLES = 16


@torch.no_grad()
def calibrate(
    model: Any,
    texts: "Sequence[str] | Sequence[Tensor] | None" = None,
    *,
    tokenizer: Any = None,
    scorer: "str | dict[str, Any] | Scorer" = HardKVConfig.scorer,
    p: float = 0.9,
    interval: int = HardKVConfig.interval,
    window: int = HardKVConfig.window,
    sinks: int = HardKVConfig.sinks,
    length: int | None = None,
    solver: str = "adam",
    measure: "Callable[[Step], Tensor] | None" = None,
    progress: bool = True,
) -> Calibration:
    """Measure temperatures and risk curves of a model, for budgets, in one dense pass over a few thousand tokens.

    The texts run through the model in steps of `interval` tokens, as in decoding, and nothing is evicted. At each
    event the scorer ranks the tokens of each head. For all counts n at once, the ranking tells which tokens a head that
    keeps n would still hold, since kept sets are nested (as in the stack simulation of paging, Mattson et al. 1970).
    The loss at n is the squared attention that the next `interval` queries pay to the tokens that the head would have
    lost. The curves average it over queries, the group's query heads, and contexts from a quarter of each text's length
    on. `hardkv.selectors.fit_temperatures` fits the temperatures to at most 16 of the events. At as many, the loss by
    fewer bits is measured in the same unit (`hardkv.calibration.distortion`), for `bits="auto"`.

    Args:
        model: a causal language model, on any device. It is not changed.
        texts: texts, or token ids, int64 `[n]` or `[B, n]` without padding.
            By default the six texts of hardkv: prose, code and mathematics.
        tokenizer: for texts; by default the tokenizer of the model's checkpoint.
        scorer, window, sinks, interval: as in `HardKVConfig`; a calibration serves caches with the same scorer and
            window.
        p: the attention mass for which temperatures are fitted.
        length: number of tokens used per text, by default 2,048, or fewer if the model has fewer positions.
            It does not apply to token ids.
        solver: the solver of `fit_temperatures`.
        measure: another measure of loss: a function of a `Step`; `squared_attention` by default. With another one, the
            loss by fewer bits is not measured, and `bits="auto"` cannot use the calibration.
        progress: show a bar.

    Raises:
        TypeError: a text is neither a string nor a tensor.
        ValueError: a text is too short for two events, or longer than the model allows; no layer has full attention;
            there are texts and no tokenizer; a setting is out of range; the model is under tensor parallelism.

    Example:

    ```python
    >>> calibration = calibrate(model, tokenizer=tokenizer, scorer="snapkv")
    >>> calibration.save("smollm2-snapkv.safetensors")
    >>> cache = HardKVCache(config=model.config, scorer="snapkv", budget=512, calibration=calibration)
    ```
    """
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"the model is split over {model.tp_size} processes, none of which sees all heads: calibrate it whole (on "
            "a CPU, or over several devices by device_map='auto'), save that, and give each process the path"
        )
    checked = HardKVConfig(scorer, 1 << 30, window, sinks, interval)
    window, sinks, interval = checked.window, checked.sinks, checked.interval
    p = check_fraction("p", p, low_open=True)
    check_name("solver", solver, SOLVERS)
    traits = Traits.of(model.config)
    room = traits.max_positions
    if length is None:
        length = LENGTH if room is None else min(LENGTH, room)
    length = check_count("length", length, 1)
    batches = _token_batches(model, texts, tokenizer, length)
    least = interval * (1 + max(2 * interval, interval + window + sinks) // interval)  # whole intervals are used
    for place, ids in enumerate(batches):
        tokens = ids.shape[1]
        if tokens < least:
            raise ValueError(
                f"text {place} gives {tokens} tokens (length={length}), which is too short to calibrate on: it takes "
                f"{least} at least (window {window}, sinks {sinks}, interval {interval}); join short texts, raise "
                "length, or lower the interval"
            )
        if room is not None and tokens - tokens % interval > room:
            raise ValueError(
                f"text {place} gives {tokens} tokens and the model takes at most {room}: pass length={room} or less, "
                "or fewer ids"
            )
    batches = [ids[:, : ids.shape[1] - ids.shape[1] % interval].to(model.device) for ids in batches]
    longest = max(ids.shape[1] for ids in batches)

    edges = curve_edges(longest - interval - window - sinks)  # what the last queries have before them
    total_events = sum(ids.shape[0] * (ids.shape[1] // interval) for ids in batches)
    records: list[Record] = []
    distort = distortion if measure is None and not traits.latent else None  # its unit is the default measure's
    cache = SurveyCache(
        model.config, records, edges, -(-total_events // SAMPLES), measure or squared_attention, distort, checked
    )
    if not records:
        raise ValueError(f"no layer of {type(model).__name__} uses full attention: there is nothing to calibrate")
    weights = fingerprint(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    arguments: dict[str, Any] = {argument_of(model): cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    try:
        with tqdm(total=sum(ids.numel() for ids in batches), unit="token", disable=not progress) as bar:
            bar.set_description("calibrating")
            for ids in batches:
                cache.begin(ids.shape[1])
                for chunk in ids.split(interval, 1):
                    model(input_ids=chunk, **arguments)
                    cache.restack()
                    bar.update(chunk.numel())
                cache.add_states()
            cache.reset()
            bar.set_description("fitting temperatures")
            temperatures, residuals, kept = fit(records, p, solver)
    finally:
        for module, training in modes.items():
            module.training = training
    counts = torch.tensor(edges, device="cpu") + window + sinks
    key_means, value_means = (torch.stack(each) for each in zip(*(record.means() for record in records), strict=True))
    distorted = [found for record in records if (found := record.distortion()) is not None]
    digest = hashlib.sha256()
    for ids in batches:
        digest.update(ids.cpu().numpy().tobytes())
    return Calibration(
        temperatures=temperatures,
        residuals=residuals,
        kept=kept,
        counts=counts,
        risk=torch.stack([record.curve() for record in records]),
        key_means=key_means,
        value_means=value_means,
        distortion=torch.stack(distorted) if len(distorted) == len(records) else None,
        provenance={
            "name": traits.name,
            "geometry": traits.geometry,
            "weights": weights,
            "layers": cache.compressed_layers,
            "scorer": describe_scorer(get_scorer(scorer)),
            "window": window,
            "sinks": sinks,
            "interval": interval,
            "p": p,
            "texts_hash": digest.hexdigest()[:16],
            "tokens": sum(ids.numel() for ids in batches),
            "length": longest,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    )


# ---------------------------------------------------------------------- texts


def default_texts() -> dict[str, str]:
    """Return the texts that come with hardkv, by name."""
    folder = resources.files("hardkv") / "data" / "calibration"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name)
    return {
        file.name.removesuffix(".txt"): file.read_text(encoding="utf-8") for file in files if "LICENSE" not in file.name
    }


def _token_batches(model: Any, texts: Any, tokenizer: Any, length: int) -> list[Tensor]:
    """Return the token ids of each text, `[B, n]`."""
    if isinstance(texts, str | bytes | Tensor | Mapping):
        raise TypeError(f"texts must be a list, not a {type(texts).__name__}: wrap a single text, [text]")
    texts = list(default_texts().values()) if texts is None else list(texts)
    if not texts:
        raise ValueError("texts is empty: pass at least one, or None for those that come with hardkv")
    batches = []
    for place, text in enumerate(texts):
        if isinstance(text, Tensor):
            integers = not (text.is_floating_point() or text.is_complex() or text.dtype == torch.bool)
            if text.dim() not in (1, 2) or not integers:
                raise ValueError(f"token ids {text.dtype} {tuple(text.shape)} must be integers, [n] or [B, n]")
            batches.append((text if text.dim() == 2 else text[None]).long())
            continue
        if not isinstance(text, str):
            raise TypeError(f"text {place} is a {type(text).__name__}: pass a string, or token ids as a tensor")
        if tokenizer is None:
            tokenizer = load_tokenizer(model)
        ids = tokenizer(text, truncation=True, max_length=length).input_ids
        batches.append(torch.tensor([ids], device="cpu"))
    return batches


def load_tokenizer(model: Any) -> Any:
    """Load the tokenizer of a model's checkpoint.

    Raises:
        ValueError: the checkpoint has none, or the model has no checkpoint.
    """
    name = Traits.of(model.config).name
    try:
        if not name:
            raise OSError("it was not loaded from a checkpoint")
        ggufs = [file.name for file in Path(name).glob("*.gguf")]
        return transformers.AutoTokenizer.from_pretrained(name, **({"gguf_file": ggufs[0]} if len(ggufs) == 1 else {}))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model has no tokenizer to be found ({error}): pass tokenizer=, or token ids instead of texts"
        ) from error
