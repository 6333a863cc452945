"""The arguments of HardKVCache: one dataclass that validates them and goes to and from JSON."""

import json
from dataclasses import dataclass
from typing import Any

from hardkv.kernels.attention import resolve_backend
from hardkv.selectors.budgets import Budget, budget_to_dict, get_budget
from hardkv.selectors.checks import check_count
from hardkv.selectors.scorer import Scorer, get_scorer, scorer_to_dict

# The miss counters of Cautious Update are bytes.
MAX_PATIENCE = 254


@dataclass
class HardKVConfig:
    """How a cache compresses. Names and integers become objects; every value is checked.

    Args:
        scorer: name ("attention", "snapkv", "rkv", or registered by you) or an object with `score(observation)`.
        budget: int n, the mean tokens kept per KV head (TopK), or a budget object from `hardkv.selectors`.
        window: newest tokens always kept; their queries score all others.
        sinks: first tokens always kept.
        interval: new tokens between two selection events (128 in the paper).
        patience: consecutive events a token must lose before its bytes are given back (0: at once; 1 or more: the
            prompt's own event frees nothing yet).
        pin_prompt: keep the whole prompt, that is every token up to the first forward of a single one.
        calibration: None, or "online": Logits Calibration, one temperature per KV head fitted at each sequence's first
            event (`hardkv.selectors.fit_temperatures`), for budgets that read scores as probabilities; an integer
            budget is then Adaptive(n).
        attention: "auto" or the name of a backend.

    Raises:
        ValueError, TypeError: a value that is not allowed, with what is.
    """

    scorer: "str | dict[str, Any] | Scorer" = "attention"
    budget: "int | dict[str, Any] | Budget" = 1024
    window: int = 32
    sinks: int = 4
    interval: int = 128
    patience: int = 0
    pin_prompt: bool = False
    calibration: str | None = None
    attention: str = "auto"

    def __post_init__(self) -> None:
        self.scorer = get_scorer(self.scorer)
        if self.calibration not in (None, "online"):
            raise ValueError(f"calibration={self.calibration!r} must be None or 'online'")
        self.budget = get_budget(self.budget, calibrated=self.calibration is not None)
        check_count("window", self.window, 1)
        check_count("sinks", self.sinks, 0)
        check_count("interval", self.interval, 1)
        check_count("patience", self.patience, 0, MAX_PATIENCE)
        if not isinstance(self.pin_prompt, bool):
            raise TypeError(f"pin_prompt={self.pin_prompt!r} must be True or False")
        if self.budget.smallest is not None:
            name, count = self.budget.smallest
            if count <= self.window + self.sinks:
                raise ValueError(
                    f"budget {name}={count} must be larger than window + sinks = {self.window} + {self.sinks} = "
                    f"{self.window + self.sinks}, which are always kept: raise the budget or lower window and sinks"
                )
        if self.calibration is not None and not self.budget.uses_temperature:
            raise ValueError(
                f"calibration={self.calibration!r}: the budget {self.budget} ranks by scores alone and cannot use a "
                "calibration; pass calibration=None, or a budget that reads scores as probabilities: Adaptive(n), "
                "TopP(p), Pyramid(Adaptive(n))"
            )
        resolve_backend(self.attention)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that `HardKVConfig(**d)` and `HardKVCache(config=model.config, **d)` rebuild it."""
        assert not isinstance(self.scorer, str | dict)
        assert isinstance(self.budget, Budget)  # __post_init__ saw to both
        return {
            "scorer": scorer_to_dict(self.scorer),
            "budget": budget_to_dict(self.budget),
            "window": self.window,
            "sinks": self.sinks,
            "interval": self.interval,
            "patience": self.patience,
            "pin_prompt": self.pin_prompt,
            "calibration": self.calibration,
            "attention": self.attention,
        }

    def to_json(self) -> str:
        """JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "HardKVConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: not such a JSON object, or a value that is not allowed.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object of HardKVConfig's arguments, got {type(values).__name__}")
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown arguments {sorted(unknown)}; allowed: {sorted(cls.__dataclass_fields__)}")
        return cls(**values)
