"""The caches that the harness compares: a name on the command line -> a new cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import DynamicCache

from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.selectors import AdaKV, Adaptive, Budget, Pyramid, Risk, TopK, TopP

# By the mean number of tokens kept a head.
BY_COUNT: dict[str, type[Budget]] = {
    "topk": TopK,
    "adakv": AdaKV,
    "pyramid": Pyramid,
    "adaptive": Adaptive,
    "adaptive-calibrated": Adaptive,
    "risk": Risk,
}
# By the attention mass kept: bytes follow the text.
BY_MASS = ("topp", "topp-calibrated")
METHODS = ("full", *BY_COUNT, *BY_MASS)


@dataclass(frozen=True)
class Configuration:
    """One cache of the comparison.

    Args:
        method: one of `METHODS`. scorer: what ranks tokens, None for the full cache.
        budget: as it was asked for: tokens a head ("1024"), a fraction of the full cache's mean length ("1/8"), or a
            mass ("p0.95"); None for the full cache.
    """

    method: str
    scorer: str | None = None
    budget: str | None = None

    @property
    def label(self) -> str:
        """What its file and its rows in tables are called."""
        parts = (self.method, self.scorer, self.budget and self.budget.replace("/", "_"))
        return "-".join(part for part in parts if part)

    @property
    def needs_calibration(self) -> bool:
        return self.method == "risk" or self.method.endswith("-calibrated")

    @property
    def is_fraction(self) -> bool:
        return self.budget is not None and "/" in self.budget

    def tokens(self, full_length: float | None) -> int | None:
        """Mean tokens a head of a budget by count; None of the others.

        Args:
            full_length: mean tokens, prompt and answer, of a sequence with the full cache; for fractions.
        """
        if self.budget is None or self.method in BY_MASS:
            return None
        if not self.is_fraction:
            return int(self.budget)
        assert full_length is not None
        return round(Fraction(self.budget) * Fraction(full_length))

    def settings(self, n: int | None, options: Mapping[str, Any], calibration: Calibration | None) -> HardKVConfig:
        """Arguments of its HardKVCache.

        Args:
            n: what `tokens` said. options: window, sinks and interval. calibration: needed by some methods only.

        Raises:
            ValueError: a budget that the options leave no room for, or a calibration that does not fit.
        """
        assert self.scorer is not None
        assert self.budget is not None
        if self.method in BY_MASS:
            budget: Budget = TopP(float(self.budget[1:]))
        else:
            budget = BY_COUNT[self.method](n)  # type: ignore[call-arg]
        return HardKVConfig(self.scorer, budget, calibration=calibration if self.needs_calibration else None, **options)


def new_cache(model: Any, settings: HardKVConfig | None) -> DynamicCache:
    """An empty cache: HardKVCache, or with None the full one."""
    if settings is None:
        return DynamicCache(config=model.config)
    return HardKVCache(config=model.config, **vars(settings))


def grid(
    methods: list[str], scorers: list[str], budgets: list[str], masses: list[float], options: Mapping[str, Any]
) -> list[Configuration]:
    """All configurations, the full cache first.

    Raises:
        ValueError: unknown methods, or a budget that says nothing or leaves no room beside window and sinks.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"--method {','.join(unknown)}: allowed are {', '.join(METHODS)}")
    found = [Configuration("full")] if "full" in methods else []
    for method in (name for name in METHODS if name in methods and name != "full"):
        for scorer in scorers:
            for budget in [f"p{mass:g}" for mass in masses] if method in BY_MASS else budgets:
                found.append(Configuration(method, scorer, budget))
    for configuration in found:
        if configuration.method in BY_MASS:
            TopP(float((configuration.budget or "p")[1:]))
        elif configuration.budget is not None:
            _check_budget(configuration, options)
    return found


def _check_budget(configuration: Configuration, options: Mapping[str, Any]) -> None:
    budget = str(configuration.budget)
    try:
        value = Fraction(budget)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0 or ("/" in budget and value > 1) or ("/" not in budget and value.denominator != 1):
        raise ValueError(f"--budget {budget}: tokens a head (1024), or a fraction of the full cache's length (1/8)")
    if "/" not in budget:
        HardKVConfig(budget=TopK(int(value)), **options)
