"""`calibration="auto"`: a model's calibration, made once for its weights and kept in a file."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hardkv.cache.model import Traits
from hardkv.calibration.calibrate import calibrate, load_tokenizer
from hardkv.calibration.file import FORMAT, Calibration, describe_scorer
from hardkv.calibration.fingerprint import fingerprint
from hardkv.config import HardKVConfig
from hardkv.selectors.scorers.scorer import get_scorer

# Calibrations that could not be written to a file, by the file's name.
_unsaved: dict[str, Calibration] = {}


def cache_folder() -> Path:
    """Return the folder of `calibration="auto"`: $HARDKV_CACHE, or hardkv in the user's cache folder.

    Raises:
        FileNotFoundError: the user has no home folder.
    """
    if folder := os.environ.get("HARDKV_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "hardkv"
    try:
        return Path.home() / ".cache" / "hardkv"
    except RuntimeError as error:
        raise FileNotFoundError("no home folder is known: set HOME, or HARDKV_CACHE to a folder for them") from error


def auto(model: Any, settings: HardKVConfig, warn: Callable[[str], Any] = warnings.warn) -> Calibration:
    """The calibration of a model for these settings: from the user's cache folder, or made now and kept there.

    A file belongs to weights, adapters included, under any name of the model (`hardkv.calibration.fingerprint`), and to
    a scorer with its window, sinks and interval. It holds the result of the default texts. Delete it to calibrate
    again. A file that cannot be read is replaced, and with bits "auto" one without losses by bits. If no file can be
    written, this process keeps the calibration in memory.

    Args:
        model: the transformers model, loaded. settings: scorer, window, sinks and interval. warn: is told what is
            wrong with a file or its folder.

    Raises:
        ValueError: the model is None, has no tokenizer, or its weights cannot be read.
    """
    if model is None:
        raise ValueError(
            "calibration='auto' reads the model's weights, and a config holds none: pass config=model instead of "
            "config=model.config"
        )
    advice = "pass calibration=hardkv.calibrate(model, tokenizer=...) instead of 'auto'"
    config, weights = model.config, fingerprint(model)
    if weights is None:
        raise ValueError(
            f"calibration='auto' keeps a file for the weights, and those of {type(model).__name__} cannot be read "
            f"here: {advice}"
        )
    scorer = get_scorer(settings.scorer)
    described = describe_scorer(scorer)
    # beside weights, what attention depends on; the model's name and folder are not among it
    traits = Traits.of(config)
    identity = [FORMAT, traits.geometry, traits.rope, weights, described]
    identity += [settings.window, settings.sinks, settings.interval]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    name = f"{traits.model_type}-{described.get('name', 'scorer')}-{digest}.safetensors"
    if name in _unsaved:
        return _unsaved[name]
    try:
        found = Calibration.load(cache_folder() / name)
        found.check_settings(scorer, settings.window)
        if settings.bits == "auto" and found.distortion is None:
            warn(f"calibration='auto' calibrates again, since {str(found.path)!r} holds no losses by bits")
        elif found.provenance.get("weights") == weights:
            return found
        else:
            warn(f"calibration='auto' calibrates again, since {str(found.path)!r} was made for other weights")
    except FileNotFoundError:  # nothing is kept yet
        pass
    except (OSError, ValueError) as error:
        warn(f"calibration='auto' calibrates again, since what it kept is no use: {error}")
    try:
        tokenizer = load_tokenizer(model)
    except ValueError as error:
        raise ValueError(f"calibration='auto': {error}; {advice}") from error
    calibration = calibrate(
        model,
        tokenizer=tokenizer,
        scorer=scorer,
        window=settings.window,
        sinks=settings.sinks,
        interval=settings.interval,
    )
    try:
        calibration.save(cache_folder() / name)
    except OSError as error:
        _unsaved[name] = calibration
        warn(f"calibration='auto' cannot keep what it measured, so other processes will measure again: {error}")
    return calibration
