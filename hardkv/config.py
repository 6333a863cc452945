"""HardKVConfig: the arguments of HardKVCache, which it validates and converts to and from JSON."""

import json
from dataclasses import dataclass
from os import PathLike
from typing import Any

from hardkv.calibration.file import Calibration
from hardkv.kernels.attention import check_backend
from hardkv.kernels.codes import BITS
from hardkv.selectors.budgets import Adaptive, Budget, Risk, TopK, budget_to_dict, get_budget
from hardkv.selectors.checks import check_count
from hardkv.selectors.scorers.scorer import Scorer, get_scorer, scorer_to_dict

# The miss counters of Cautious Update are bytes.
MAX_PATIENCE = 254


def check_bits(bits: Any) -> int | tuple[int, int] | str:
    """Return the bits of keys and values, as one number if they are equal; or "auto".

    Raises:
        ValueError: they are not allowed.
    """
    if isinstance(bits, str) and bits == "auto":
        return bits
    pair = tuple(bits) if isinstance(bits, list | tuple) else (bits, bits)
    if len(pair) != 2 or any(type(each) is not int or each not in BITS for each in pair):
        raise ValueError(f"bits={bits!r} must be one of {BITS}, or a pair of them for keys and values, or 'auto'")
    return pair[0] if pair[0] == pair[1] else pair


def read_bits(text: str) -> int | tuple[int, int] | str:
    """Return the bits of "4", of "4:2" for keys and values, or of "auto".

    Raises:
        ValueError: they are not allowed.
    """
    try:
        parts = [int(part) for part in text.split(":")] if text != "auto" else [text]
        return check_bits(parts if len(parts) > 1 else parts[0])
    except ValueError:
        allowed = ", ".join(map(str, BITS))
        raise ValueError(f"bits {text!r} must be one of {allowed}, two of them as keys:values (4:2), or auto") from None


@dataclass
class HardKVConfig:
    """How a cache compresses. The constructor turns names and integers into objects and checks every value.

    Args:
        scorer: name ("rkv", "attention", "snapkv", or one you registered) or an object with `score(observation)`. "rkv"
            is for long reasoning; its events take longest, as they compare each token with up to 1,536 others.
        budget: int n, the mean tokens kept per KV head, or a budget object from `hardkv.selectors`. An integer means
            TopK(n) without a calibration, Risk(n) with risk curves, and Adaptive(n) with temperatures only.
        window: number of newest tokens, which are always kept; their queries score the others.
        sinks: number of first tokens, which are always kept.
        interval: new tokens between two selection events (128 in the paper).
        patience: number of consecutive events at which a token must lose before its bytes are freed (0: freed at once;
            with 1 or more, the prompt's own event frees nothing).
        pin_prompt: keep the whole prompt of `generate()`, in chunks or not. In a loop of your own, the prompt is every
            token before the first forward of a single token; so give its last chunk two tokens or more.
        calibration: None; a `hardkv.Calibration` or the path of a saved one; "auto", with `HardKVCache(config=model)`:
            calibrate once for the model's weights and the scorer, and keep the file (`hardkv.calibration.auto.auto`);
            or "online": Logits Calibration, one temperature per KV head, fitted at each sequence's first event with
            tokens that are not protected (`hardkv.selectors.fit_temperatures`); until then the temperatures are 1.
        refit: with "online", number of events after which a sequence's temperatures are fitted again; 0: never.
        attention: "auto", or a backend for tokens after the prompt: "triton" (GPUs; pip install 'hardkv[triton]'),
            "flash_attn" (whichever flash_attn_varlen_func is installed, or PyTorch's) or "torch" (anywhere).
        offload: keep condensed keys and values in host memory, and copy those of a layer to the device while the layer
            before it computes. The dense tier, positions and sliding-window layers stay on the device.
        bits: per coordinate of the tokens that events keep: 16 (as they are), 8, 4, 3 or 2, or a pair for keys and
            values. "auto", for `Risk(n)` with a calibration: choose each layer's bits, and spend the bytes of n tokens
            of 16 bits per head where they buy most. The first `sinks` tokens and those since the last event always
            have 16.

    Raises:
        ValueError, TypeError: a value is not allowed; the message says which are.
        FileNotFoundError: there is no calibration at the path.

    Example:

    ```python
    >>> config = HardKVConfig(scorer="snapkv", budget=256)
    >>> config.budget
    TopK(n=256)
    >>> HardKVConfig.from_json(config.to_json()) == config
    True
    >>> HardKVConfig(budget=32)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: budget n=32 must be larger than window + sinks = 32 + 4 = 36, which are always kept: raise ...

    ```
    """

    scorer: "str | dict[str, Any] | Scorer" = "rkv"
    budget: "int | dict[str, Any] | Budget" = 1024
    window: int = 32
    sinks: int = 4
    interval: int = 128
    patience: int = 0
    pin_prompt: bool = False
    calibration: "str | PathLike[str] | Calibration | None" = None
    refit: int = 0
    attention: str = "auto"
    offload: bool = False
    bits: "int | tuple[int, int] | str" = 16

    def __post_init__(self) -> None:
        self.scorer = get_scorer(self.scorer)
        if isinstance(self.calibration, str | PathLike) and self.calibration not in ("online", "auto"):
            self.calibration = Calibration.load(self.calibration)
        if not (self.calibration in (None, "online", "auto") or isinstance(self.calibration, Calibration)):
            raise TypeError(
                f"calibration={self.calibration!r} must be None, 'online', 'auto', a Calibration or the path of one"
            )
        has_risk = self.calibration == "auto" or getattr(self.calibration, "risk", None) is not None
        self.budget = get_budget(
            self.budget, of_int=Risk if has_risk else Adaptive if self.calibration is not None else TopK
        )
        self.bits = check_bits(self.bits)
        if self.bits == "auto" and not (has_risk and isinstance(self.budget, Risk)):
            raise ValueError(
                "bits='auto' shares the bytes of Risk(n) between tokens and bits, by losses that a calibration "
                f"measured; got budget={self.budget}, calibration={self.calibration}: pass budget=Risk(n), and "
                "calibration='auto', or what hardkv.calibrate(model) returned, or the path it was saved to"
            )
        self.window = check_count("window", self.window, 1)
        self.sinks = check_count("sinks", self.sinks, 0)
        self.interval = check_count("interval", self.interval, 1)
        self.patience = check_count("patience", self.patience, 0, MAX_PATIENCE)
        self.refit = check_count("refit", self.refit, 0)
        for name in ("pin_prompt", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.budget.smallest is not None:
            name, count = self.budget.smallest
            if count <= self.window + self.sinks:
                raise ValueError(
                    f"budget {name}={count} must be larger than window + sinks = {self.window} + {self.sinks} = "
                    f"{self.window + self.sinks}, which are always kept: raise the budget or lower window and sinks"
                )
        if isinstance(self.calibration, Calibration):
            self.calibration.check_settings(self.scorer, self.window)
            if self.bits == "auto":
                self.calibration.check_distortion()
        if self.budget.uses_risk and not has_risk:
            raise ValueError(
                f"the budget {self.budget} needs measured risk curves: pass calibration='auto', or what "
                "hardkv.calibrate(model) returned, or the path it was saved to"
            )
        means = self.bits != 16 and getattr(self.calibration, "key_means", None) is not None  # which codes use
        if self.calibration is not None and not (self.budget.uses_temperature or self.budget.uses_risk or means):
            raise ValueError(
                f"calibration={self.calibration!r}: the budget {self.budget} ranks by scores alone and cannot use a "
                "calibration; pass calibration=None, or a budget that can: Risk(n), or one that reads scores as "
                "probabilities, Adaptive(n), TopP(p), Pyramid(Adaptive(n))"
            )
        if self.refit and self.calibration != "online":
            raise ValueError(
                f"refit={self.refit} is for calibration='online'; a calibration made before is not refitted"
            )
        check_backend(self.attention)

    @property
    def bits_of_both(self) -> tuple[int, int]:
        """`bits` of keys and of values; 16 if they are "auto", until the cache has chosen those of each layer."""
        if isinstance(self.bits, str):
            return 16, 16
        return self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values d; `HardKVConfig(**d)` and `HardKVCache(config=model.config, **d)` take them.

        Raises:
            ValueError: the scorer or budget is not registered, or the calibration was not saved.
        """
        assert not isinstance(self.scorer, str | dict)
        assert isinstance(self.budget, Budget)  # __post_init__ saw to both
        calibration = self.calibration
        if isinstance(calibration, Calibration):
            if calibration.path is None:
                raise ValueError("the calibration has no JSON form before it is saved: calibration.save(path)")
            calibration = str(calibration.path)
        return {
            "scorer": scorer_to_dict(self.scorer),
            "budget": budget_to_dict(self.budget),
            "window": self.window,
            "sinks": self.sinks,
            "interval": self.interval,
            "patience": self.patience,
            "pin_prompt": self.pin_prompt,
            "calibration": calibration,
            "refit": self.refit,
            "attention": self.attention,
            "offload": self.offload,
            "bits": list(self.bits) if isinstance(self.bits, tuple) else self.bits,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "HardKVConfig":
        """Make the config that `to_json` wrote.

        Raises:
            ValueError: the text is no such JSON object, or a value is not allowed.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object of HardKVConfig's arguments, got {type(values).__name__}")
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown arguments {sorted(unknown)}; allowed: {sorted(cls.__dataclass_fields__)}")
        return cls(**values)
