"""The scorer contract, the registry, and functions that scorers share."""

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
    """The contract of a scorer: one method that returns a log-score per held token.

    A scorer holds hyperparameters and no state. A scorer that treats each sequence separately may set
    `across_layers = True`. Then it is called once for several layers, which it sees as further sequences; that saves
    time when there are few tokens.
    """

    def score(self, observation: Observation) -> Tensor:
        """Return log-scores z `[N]`, float; higher ones are kept. TopK uses their order, Top-p budgets their spread."""
        ...


SCORERS: dict[str, type] = {}


def register_scorer(name: str):
    """Class decorator that registers a scorer as `scorer="name"`. Its constructor must work without arguments.

    Raises:
        ValueError: a built-in has this name.
    """
    return partial(add_to_registry, SCORERS, name)


def scorer_name(scorer: Scorer) -> str | None:
    """Return the registered name of a scorer's class; None without one."""
    return next((name for name, cls in SCORERS.items() if type(scorer) is cls), None)


def get_scorer(spec: "str | dict[str, Any] | Scorer") -> Scorer:
    """Return a scorer, made from its name or from its JSON form, or as given.

    Args:
        spec: a name, a dict from `scorer_to_dict`, or an object with `score(observation)`.

    Raises:
        ValueError: the name or a hyperparameter is unknown.
        TypeError: the object has no `score` method.
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
    """Return `{"name": ..., hyperparameters...}` of a registered dataclass scorer, for JSON.

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
    """Return z = log(s + tiny) for scores s >= 0.

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
    """Map the scores of each sequence's candidates affinely to [0, 1], and return the logarithm.

    All heads of a sequence have the same map, so the order between heads is preserved. Scores of protected tokens are
    clamped to the candidates' range.

    Args:
        score: `[N]`, any real numbers; higher scores are kept.
        observation: the tokens that the scores belong to.

    Returns:
        `[N]`, with a NaN if the score of a candidate is NaN or infinite.
    """
    if not score.numel():
        return score
    sequence = observation.row // observation.num_kv_heads
    low = observation.to_padded(score.masked_fill(observation.protected, torch.inf), torch.inf).amin((1, 2))
    high = observation.to_padded(score.masked_fill(observation.protected, -torch.inf), -torch.inf).amax((1, 2))
    span = (high - low)[sequence]
    unit = ((score - low[sequence]) / span).clamp(0.0, 1.0)
    # no candidates, or all of them equal: every token gets the top of the range
    return log_score(unit.masked_fill(span <= 0, 1.0))


def pool_rows(score: Tensor, observation: Observation, pooling: str, kernel_size: int, exclude: Tensor) -> Tensor:
    """Pool scores along each row, in order of position, without the tokens in `exclude`.

    Args:
        score: `[N]`, >= 0.
        observation: the tokens that the scores belong to.
        pooling: "max", "avg" (with zeros beyond the row's ends) or "none".
        kernel_size: width of the pooling, odd.
        exclude: bool `[N]`, True for tokens that are left out.

    Returns:
        `[N]`; 0 at excluded tokens.
    """
    if pooling == "none":
        return score.masked_fill(exclude, 0.0)
    return kernels.pool_rows(score, exclude, observation.rows, kernel_size=kernel_size, pooling=pooling)


def check_pooling(pooling: str, kernel_size: int) -> int:
    """Return `kernel_size` as a plain int; raise unless `pool_rows` can take these hyperparameters."""
    if pooling not in ("max", "avg", "none"):
        raise ValueError(f"pooling={pooling!r} must be 'max', 'avg' or 'none'")
    kernel_size = check_count("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size!r} must be an odd integer >= 1")
    return kernel_size
