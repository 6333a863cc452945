"""How many tokens each head keeps: scores in, kept sets out, all rows of a layer at once.

Every public count (n, floor, cap) includes the protected tokens F of a row and holds right after an event.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hardkv.kernels.selection import share_of_best
from hardkv.selectors.checks import check_count, check_fraction, check_name, settle
from hardkv.selectors.observation import Observation
from hardkv.selectors.ranking import Ranking
from hardkv.selectors.scorer import add_to_registry

BUDGETS: "dict[str, type[Budget]]" = {}


def register_budget(name: str):
    """Class decorator: give a budget, a frozen dataclass, a name for JSON.

    Raises:
        ValueError: the name is a built-in's.
    """
    return partial(add_to_registry, BUDGETS, name)


class Budget(ABC):
    """Turns log-scores into kept sets. Subclasses are frozen dataclasses of hyperparameters that implement `counts`."""

    #: Whether calibrated temperatures change what the budget keeps.
    uses_temperature = False
    #: Whether it needs measured risk curves.
    uses_risk = False
    #: The mass at which temperatures are fitted for this budget.
    calibration_p = 0.9
    #: How many KV heads of a layer it knows one by one; None: it treats whatever heads come.
    known_heads: int | None = None

    @abstractmethod
    def counts(self, ranking: Ranking) -> Tensor:
        """How many of its best candidates every row keeps, int64 `[R]`; more than it has means all."""

    def for_layer(self, layer_idx: int, num_layers: int, num_protected: int) -> "Budget":
        """The budget of one layer; `num_protected` is the usual |F| (window + sinks)."""
        return self

    def together(self, budgets: "Sequence[Budget]") -> "Budget | None":
        """One budget for several layers, whose sequences follow one another as if they were one batch.

        Args:
            budgets: those of the layers, this one first.

        Returns:
            A budget, or None, the default: every layer selects for itself.
        """
        return None

    def for_heads(self, first: int, last: int) -> "Budget":
        """The budget of a process that computes only heads `first` to `last - 1` (tensor parallelism)."""
        return self

    @property
    def limit(self) -> int | None:
        """The tokens a row of mean length may keep, F included; None without a bound."""
        return None

    @property
    def smallest(self) -> tuple[str, int] | None:
        """The count, with its name, that must exceed the protected tokens; None without one."""
        return None

    def fixed_total(self, heads: int, length: int, protected: int) -> int | None:
        """The most tokens that all heads of a layer together keep of a sequence, F included; None: it depends.

        Args:
            heads: KV heads of the layer.
            length: tokens that the sequence may have had by then.
            protected: the most tokens that are protected in a head.
        """
        return None

    def tensors(self, device: torch.device) -> list[Tensor]:
        """What the budget itself holds on a cache's device, for counting bytes; layers may share it."""
        return []

    def select(self, z: Tensor, observation: Observation, temperature: Tensor | None = None) -> Tensor:
        """The kept set.

        Args:
            z: log-scores `[N]` from a scorer, higher = keep.
            observation: the tokens they belong to.
            temperature: `[R]`, what Top-p budgets divide z by; 1 when None.

        Returns:
            bool `[N]`: protected tokens always, and of every row a prefix of its candidates ordered by z (ties: the
            newer token first).
        """
        ranking = Ranking.of(z, observation, temperature)
        return ranking.keep(self.counts(ranking))


@dataclass(frozen=True)
class FixedTotal(Budget):
    """What budgets with a mean of n tokens a head share."""

    n: int

    def __post_init__(self) -> None:
        settle(self, n=check_count("n", self.n, 1))

    def together(self, budgets: Sequence[Budget]) -> Budget | None:
        return self if all(each == self for each in budgets) else None

    @property
    def limit(self) -> int:
        return self.n

    @property
    def smallest(self) -> tuple[str, int]:
        return "n", self.n

    def fixed_total(self, heads: int, length: int, protected: int) -> int:
        return heads * min(max(self.n, protected), length)

    def with_n(self, n: int) -> "FixedTotal":
        """The same budget for another mean."""
        return replace(self, n=n)

    def room(self, ranking: Ranking) -> Tensor:
        """n - |F|, at least 0, int64 `[R]`."""
        return (self.n - ranking.num_protected).clamp_min(0)


@register_budget("topk")
@dataclass(frozen=True)
class TopK(FixedTotal):
    """Every head keeps its n - |F| best tokens.

    Args:
        n: tokens kept per head, protected ones included.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    def counts(self, ranking: Ranking) -> Tensor:
        return self.room(ranking)


@register_budget("adakv")
@dataclass(frozen=True)
class AdaKV(FixedTotal):
    """AdaKV (https://arxiv.org/abs/2407.11550): heads share a layer's budget by their part in its best tokens.

    With base = n - |F| and c_h the tokens of head h among the best H * base of the layer, head h gets
    c_h * (1 - alpha) + alpha * base, rounded by largest remainder so that totals are exact; what a head has no
    candidates for goes to the heads that do. Sequences of a batch are separate.

    Args:
        n: mean tokens kept per head, protected ones included.
        alpha: the share that is split evenly, in [0, 1].

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, alpha=check_fraction("alpha", self.alpha, low_open=False))

    def counts(self, ranking: Ranking) -> Tensor:
        base = ranking.per_head(self.room(ranking))  # [B, H]
        total = base.sum(1)
        positions = ranking.observation.positions[ranking.token]
        best = share_of_best(ranking.per_head(ranking.z), ranking.per_head(positions), total)
        # float32 where there is no float64 (MPS); rounded so that equal remainders are equal on every backend
        dtype = torch.float32 if base.device.type == "mps" else torch.float64
        target = best.to(dtype) * (1 - self.alpha) + self.alpha * base.to(dtype)
        room = ranking.per_head(ranking.num_candidates)
        return round_to_total(target, room, total, ranking.z.shape[1]).flatten()


def round_to_total(target: Tensor, room: Tensor, total: Tensor, most: int | None = None) -> Tensor:
    """Integers near `target [B, H]`, at most `room [B, H]`, that sum to `min(total [B], room)`: largest remainder.

    One unit at a time goes to the head that lacks most of its target and has room; equals: the lower head. `most`: a
    bound on `room`, read from the device when None.
    """
    units = (int(room.max()) if room.numel() else 0) if most is None else most
    unit = torch.arange(units, device=target.device)
    lack = (target[..., None] - unit).mul_(1 << 16).round_()
    lack = lack.masked_fill(unit >= room[..., None], -torch.inf)
    return share_of_best(lack, torch.zeros_like(lack, dtype=torch.int32), total)


@register_budget("pyramid")
@dataclass(frozen=True)
class Pyramid(Budget):
    """PyramidKV (https://arxiv.org/abs/2406.02069): lower layers keep more, linearly, at the same mean.

    With base = n - |F|: the last layer gets base // beta, the first 2 * base - base // beta.

    Args:
        n: mean tokens kept per head over all layers, protected ones included; or a budget (TopK, AdaKV, Adaptive)
            whose n is spread over the layers.
        beta: steepness, >= 1; 1 is flat.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    n: "int | FixedTotal"
    beta: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.n, FixedTotal):
            settle(self, n=check_count("n", self.n, 1))
        elif self.n.uses_risk:
            raise ValueError(f"{self.n} already gives every layer its own share; it cannot be wrapped in Pyramid")
        settle(self, beta=check_count("beta", self.beta, 1))

    @property
    def inner(self) -> FixedTotal:
        """The budget applied within a layer."""
        return self.n if isinstance(self.n, FixedTotal) else TopK(self.n)

    @property
    def uses_temperature(self) -> bool:  # type: ignore[override]
        """As the budget within a layer does."""
        return self.inner.uses_temperature

    @property
    def limit(self) -> int:
        return self.inner.n

    @property
    def smallest(self) -> tuple[str, int]:
        return "n", self.inner.n

    def for_layer(self, layer_idx: int, num_layers: int, num_protected: int) -> Budget:
        base = self.inner.n - num_protected
        low = base // self.beta
        high = 2 * base - low
        mirror = num_layers - 1 - layer_idx
        if layer_idx == mirror:
            room = base
        elif layer_idx < mirror:
            room = high - round(layer_idx * (high - low) / (num_layers - 1))
        else:  # mirrored, so that every pair of layers, and so the whole, sums exactly
            room = low + round(mirror * (high - low) / (num_layers - 1))
        return self.inner.with_n(num_protected + room)

    def counts(self, ranking: Ranking) -> Tensor:
        raise TypeError("Pyramid gives every layer its own budget: call for_layer(layer_idx, num_layers, |F|) first")


def candidate_bounds(floor: int, cap: int | None, ranking: Ranking) -> tuple[Tensor, Tensor]:
    """Public counts `floor` and `cap` as candidate counts of every row, int64 `[R]` each."""
    low = (floor - ranking.num_protected).clamp_min(0).minimum(ranking.num_candidates)
    if cap is None:
        return low, ranking.num_candidates
    return low, (cap - ranking.num_protected).clamp_min(0).minimum(ranking.num_candidates)


def check_bounds(floor: int, cap: int | None) -> dict[str, int | None]:
    """`floor` and `cap` as plain ints, by name; raise unless 0 <= floor <= cap."""
    floor = check_count("floor", floor, 0)
    if cap is not None:
        cap = check_count("cap", cap, 1)
        if cap < floor:
            raise ValueError(f"cap={cap} must be >= floor={floor}")
    return {"floor": floor, "cap": cap}


@register_budget("topp")
@dataclass(frozen=True)
class TopP(Budget):
    """HARD-KV's Top-p (https://arxiv.org/abs/2606.28831): each head keeps the fewest best tokens that hold mass p.

    Scores are read as probabilities, P = softmax(z / T) over candidates; protected tokens count toward p with the
    attention they truly receive, A(F), so candidates must hold (p - A(F)) / (1 - A(F)) of theirs.

    Args:
        p: mass to keep, in (0, 1]; p = 1 keeps everything, whatever floor and cap say.
        floor: fewest tokens of a head, protected ones included (a head short of it keeps what it has).
        cap: most tokens of a head, protected ones included: bounds the memory. None: no bound.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    p: float
    floor: int = 0
    cap: int | None = 4096
    uses_temperature = True

    def __post_init__(self) -> None:
        settle(self, p=check_fraction("p", self.p, low_open=True), **check_bounds(self.floor, self.cap))

    @property
    def calibration_p(self) -> float:  # type: ignore[override]
        """The mass that temperatures are fitted for: its own."""
        return self.p

    def together(self, budgets: Sequence[Budget]) -> Budget | None:
        return self if all(each == self for each in budgets) else None

    @property
    def limit(self) -> int | None:
        return None if self.p == 1 else self.cap

    @property
    def smallest(self) -> tuple[str, int] | None:
        return None if self.p == 1 or self.cap is None else ("cap", self.cap)

    def counts(self, ranking: Ranking) -> Tensor:
        if self.p == 1:
            return ranking.num_candidates
        low, high = candidate_bounds(self.floor, self.cap, ranking)
        return (ranking.mass_lost > 1 - self.p).sum(1).clamp(low, high)


@register_budget("adaptive")
@dataclass(frozen=True)
class Adaptive(FixedTotal):
    """Top-p with the one p, per layer and sequence, at which the heads' total is exact: fixed bytes, free shares.

    A candidate is kept when the mass its head would lose from there on is among the layer's largest
    (`Ranking.mass_lost`); a head's kept set stays a prefix of its order.

    Args:
        n: mean tokens kept per head, protected ones included.
        floor: fewest tokens of a head, protected ones included, at most n.
        cap: most tokens of a head, protected ones included. None: no bound.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    floor: int = 0
    cap: int | None = None
    uses_temperature = True

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, **check_bounds(self.floor, self.cap))
        if self.floor > self.n:
            raise ValueError(f"floor={self.floor} must be <= n={self.n}")
        if self.cap is not None and self.cap < self.n:
            raise ValueError(f"cap={self.cap} must be >= n={self.n}, the mean")

    def with_n(self, n: int) -> "Adaptive":
        """The same budget for another mean; floor and cap give way to it."""
        return replace(self, n=n, floor=min(self.floor, n), cap=None if self.cap is None else max(self.cap, n))

    def counts(self, ranking: Ranking) -> Tensor:
        low, high = candidate_bounds(self.floor, self.cap, ranking)
        order = torch.arange(ranking.z.shape[1], device=ranking.z.device)
        lost = ranking.mass_lost.masked_fill(order >= high[:, None], -torch.inf)
        lost = lost.masked_fill(order < low[:, None], torch.inf)
        total = ranking.per_head(self.room(ranking)).sum(1)
        positions = ranking.observation.positions[ranking.token]
        return share_of_best(ranking.per_head(lost), ranking.per_head(positions), total).flatten()


def get_budget(spec: "int | dict[str, Any] | Budget", of_int: Callable[[int], Budget] = TopK) -> Budget:
    """A budget from a mean number of tokens, from its JSON form, or as given.

    Args:
        spec: an integer n, what `budget_to_dict` made, or a budget.
        of_int: what an integer becomes.

    Raises:
        ValueError: unknown name or bad value.
        TypeError: anything else.
    """
    if isinstance(spec, Budget):
        return spec
    if isinstance(spec, dict):
        parameters = dict(spec)
        name = parameters.pop("name", None)
        check_name("budget", name, BUDGETS)
        if isinstance(parameters.get("n"), dict):
            parameters["n"] = get_budget(parameters["n"])
        try:
            return BUDGETS[name](**parameters)
        except TypeError as error:
            raise ValueError(f"budget {name!r}: {error}") from error
    if hasattr(spec, "__index__") and not isinstance(spec, bool):
        return of_int(spec)
    raise TypeError(
        f"budget={spec!r} must be an integer (mean tokens per head) or a budget object: TopK(n), TopP(p), Adaptive(n), "
        "AdaKV(n, alpha), Pyramid(n, beta), Risk(n) from hardkv.selectors"
    )


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """`{"name": ..., hyperparameters...}`, for JSON.

    Raises:
        ValueError: the budget's class is not registered.
    """
    name = next((name for name, cls in BUDGETS.items() if type(budget) is cls), None)
    if name is None:
        raise ValueError(f'budget {budget!r} has no JSON form: register its class with @register_budget("name")')
    values = {field.name: getattr(budget, field.name) for field in fields(budget)}  # type: ignore[arg-type]
    return {"name": name} | {
        key: budget_to_dict(value) if isinstance(value, Budget) else value for key, value in values.items()
    }
