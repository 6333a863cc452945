"""The scorer contract, the registry, and what scorers share."""

from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hardkv.kernels import scoring as kernels
from hardkv.selectors.checks import check_count, check_name
from hardkv.selectors.observation import Observation
from hardkv.selectors.registry import add_to_registry

# Added before every logarithm, so that a score of 0 stays finite.
TINY = torch.finfo(torch.float32).tiny


@runtime_checkable
class Scorer(Protocol):
    """One method: a log-score for every held token, higher = keep. Scorers hold hyperparameters, no state.

    A scorer that looks at each sequence by itself may set `across_layers = True`: then it is asked once for several
    layers, which it sees as further sequences, and that saves time when there are few tokens.
    """

    def score(self, observation: Observation) -> Tensor:
        """Log-scores z `[N]`, float; only the order of z matters to TopK, its spread to Top-p budgets too."""
        ...


SCORERS: dict[str, type] = {}


def register_scorer(name: str):
    """Class decorator: make a scorer available as `scorer="name"`. Its constructor must work without arguments.

    Raises:
        ValueError: the name is a built-in's.
    """
    return partial(add_to_registry, SCORERS, name)


def scorer_name(scorer: Scorer) -> str | None:
    """The registered name of a scorer's class, None when it has none."""
    return next((name for name, cls in SCORERS.items() if type(scorer) is cls), None)


def get_scorer(spec: "str | dict[str, Any] | Scorer") -> Scorer:
    """A scorer from its name, from its JSON form, or as given.

    Args:
        spec: a name, what `scorer_to_dict` made, or an object with `score(observation)`.

    Raises:
        ValueError: unknown name or hyperparameter.
        TypeError: an object without a `score` method.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if isinstance(spec, dict):
        parameters = dict(spec)
        name = parameters.pop("name", None)
        check_name("scorer", name, sorted(SCORERS))
        try:
            return SCORERS[name](**parameters)
        except TypeError as error:
            raise ValueError(f"scorer {name!r}: {error}") from error
    if isinstance(spec, type) or not isinstance(spec, Scorer):
        raise TypeError(
            f"scorer={spec!r} must be a name ({', '.join(sorted(SCORERS))}) or an object with a method "
            "score(observation) -> z; pass an instance, not a class"
        )
    return spec


def scorer_to_dict(scorer: Scorer) -> dict[str, Any]:
    """`{"name": ..., hyperparameters...}` of a registered dataclass scorer, for JSON.

    Raises:
        ValueError: the scorer is not registered.
    """
    name = scorer_name(scorer)
    if name is None or not is_dataclass(scorer):
        raise ValueError(
            f"scorer {scorer!r} has no JSON form: make it a dataclass and register it with "
            '@register_scorer("name") from hardkv.selectors'
        )
    return {"name": name, **asdict(scorer)}


def log_score(score: Tensor) -> Tensor:
    """z = log(s + tiny) for scores s >= 0.

    Args:
        score: any shape, >= 0.

    Example:

    ```python
    >>> log_score(torch.tensor([1.0, 0.5, 0.0]))
    tensor([  0.0000,  -0.6931, -87.3365])

    ```
    """
    return torch.log(score + TINY)


def log_affine(score: Tensor, observation: Observation) -> Tensor:
    """z of real-valued scores: mapped affinely to [0, 1] over the candidates of each sequence, then the logarithm.

    One map for all heads of a sequence, so that the order between heads survives. Protected tokens may lie outside the
    candidates' range and are clamped to it.

    Args:
        score: `[N]`, any real numbers, higher = keep.
        observation: the tokens they belong to.

    Returns:
        `[N]`.
    """
    if not score.numel():
        return score
    sequence = observation.row // observation.num_kv_heads
    low = observation.to_padded(score.masked_fill(observation.protected, torch.inf), torch.inf).amin((1, 2))
    high = observation.to_padded(score.masked_fill(observation.protected, -torch.inf), -torch.inf).amax((1, 2))
    span = (high - low).nan_to_num(0.0, 0.0, 0.0)
    unit = (score - low.nan_to_num(0.0, 0.0, 0.0)[sequence]) / span.clamp_min(TINY)[sequence]
    # all candidates equal: every one gets the top of the range
    return log_score(torch.where(span[sequence] > 0, unit.clamp(0.0, 1.0), 1.0))


def pool_rows(score: Tensor, observation: Observation, pooling: str, kernel_size: int, exclude: Tensor) -> Tensor:
    """Smooth scores along each row, over the tokens that `exclude` (bool `[N]`) leaves, in order of position.

    Args:
        score: `[N]`, >= 0.
        observation: the tokens they belong to.
        pooling: "max", "avg" (zeros beyond the row's ends count) or "none".
        kernel_size: odd.
        exclude: bool `[N]`, tokens that count for nothing.

    Returns:
        `[N]`; 0 at excluded tokens.
    """
    if pooling == "none":
        return score.masked_fill(exclude, 0.0)
    return kernels.pool_rows(score, exclude, observation.rows, kernel_size=kernel_size, pooling=pooling)


def check_pooling(pooling: str, kernel_size: int) -> int:
    """`kernel_size` as a plain int; raise unless the hyperparameters of `pool_rows` are sound."""
    if pooling not in ("max", "avg", "none"):
        raise ValueError(f"pooling={pooling!r} must be 'max', 'avg' or 'none'")
    kernel_size = check_count("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size!r} must be an odd integer >= 1")
    return kernel_size
