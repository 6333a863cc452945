"""Attention: the score is the attention received. Other scores are calibrated against it."""

from dataclasses import dataclass

from torch import Tensor

from hardkv.selectors.observation import Observation
from hardkv.selectors.scorers.scorer import log_score, register_scorer


@register_scorer("attention")
@dataclass(frozen=True)
class Attention:
    """z = log A: the mean attention that the newest queries pay to a token, over the whole row.

    This is the accumulated attention of H2O (https://arxiv.org/abs/2306.14048), over the last `window` queries
    instead of all past ones.
    """

    across_layers = True

    def score(self, observation: Observation) -> Tensor:
        """Return log-scores `[N]`."""
        return log_score(observation.attention)
