"""Create the caches that the harness compares, from names on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import DynamicCache

from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.config import read_bits
from hardkv.selectors import AdaKV, Adaptive, Budget, Pyramid, Risk, TopK, TopP

# Budgets by the mean number of tokens kept per head.
BY_COUNT: dict[str, type[Budget]] = {
    "topk": TopK,
    "adakv": AdaKV,
    "pyramid": Pyramid,
    "adaptive": Adaptive,
    "adaptive-calibrated": Adaptive,
    "risk": Risk,
}
# Budgets by the attention mass kept; the bytes depend on the text.
BY_MASS = ("topp", "topp-calibrated")
METHODS = ("full", *BY_COUNT, *BY_MASS)


@dataclass(frozen=True)
class Configuration:
    """Describe one cache of the comparison.

    Args:
        method: one of `METHODS`. scorer: ranks the tokens; None for the full cache.
        budget: as requested: tokens per head ("1024"), a fraction of the full cache's mean length ("1/8"), or a
            mass ("p0.95"); None for the full cache.
        bits: of the tokens that events keep: "4", or "4:2" for keys and values; or "auto", with method "risk".
    """

    method: str
    scorer: str | None = None
    budget: str | None = None
    bits: str = "16"

    @property
    def label(self) -> str:
        """Return the name of the configuration's file and of its table rows."""
        bits = None if self.bits == "16" else f"{self.bits.replace(':', '_')}bit"
        parts = (self.method, self.scorer, self.budget and self.budget.replace("/", "_"), bits)
        return "-".join(part for part in parts if part)

    @property
    def needs_calibration(self) -> bool:
        """Return whether the cache uses a calibration: its curves, its temperatures, or its means to centre codes."""
        return self.method == "risk" or self.method.endswith("-calibrated") or self.bits != "16"

    @property
    def is_fraction(self) -> bool:
        return self.budget is not None and "/" in self.budget

    def tokens(self, full_length: float | None) -> int | None:
        """Return the mean tokens per head of a budget by count; None for other budgets.

        Args:
            full_length: mean tokens per sequence, prompt and answer, with the full cache; used for fractions.
        """
        if self.budget is None or self.method in BY_MASS:
            return None
        if not self.is_fraction:
            return int(self.budget)
        assert full_length is not None
        return round(Fraction(self.budget) * Fraction(full_length))

    def settings(self, n: int | None, options: Mapping[str, Any], calibration: Calibration | None) -> HardKVConfig:
        """Return the arguments of the configuration's HardKVCache.

        Args:
            n: the result of `tokens`. options: window, sinks and interval. calibration: only some methods need it.

        Raises:
            ValueError: the budget is too small for the options, or the calibration does not fit.
        """
        assert self.scorer is not None
        assert self.budget is not None
        if self.method in BY_MASS:
            budget: Budget = TopP(float(self.budget[1:]))
        else:
            budget = BY_COUNT[self.method](n)  # type: ignore[call-arg]
        calibration = calibration if self.needs_calibration else None
        return HardKVConfig(self.scorer, budget, calibration=calibration, bits=read_bits(self.bits), **options)


def new_cache(model: Any, settings: HardKVConfig | None) -> DynamicCache:
    """Create an empty cache: HardKVCache, or the full cache for None."""
    if settings is None:
        return DynamicCache(config=model.config)
    return HardKVCache(config=model.config, **vars(settings))


def grid(
    methods: list[str],
    scorers: list[str],
    budgets: list[str],
    masses: list[float],
    bits: list[str],
    options: Mapping[str, Any],
) -> list[Configuration]:
    """Return all configurations, the full cache first.

    Raises:
        ValueError: a method is unknown; or a budget is unreadable or leaves no room beside window and sinks; or bits
            are not allowed, or are "auto" without the method "risk".
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"--method {','.join(unknown)}: allowed are {', '.join(METHODS)}")
    for each in bits:
        read_bits(each)
    if "auto" in bits and "risk" not in methods:
        raise ValueError("--bits auto: method risk shares bytes over tokens and bits, so add it to --method")
    found = [Configuration("full")] if "full" in methods else []
    for method in (name for name in METHODS if name in methods and name != "full"):
        suited = [each for each in bits if each != "auto" or method == "risk"]
        for scorer in scorers:
            for budget in [f"p{mass:g}" for mass in masses] if method in BY_MASS else budgets:
                found += [Configuration(method, scorer, budget, each) for each in suited]
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
