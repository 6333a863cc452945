"""RKV: importance minus redundancy, for long chains of thought that repeat themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hardkv.kernels.similarity import mean_cosine
from hardkv.selectors.checks import check_fraction, settle
from hardkv.selectors.observation import Observation
from hardkv.selectors.scorers.scorer import check_pooling, log_affine, pool_rows, register_scorer


@register_scorer("rkv")
@dataclass(frozen=True)
class RKV:
    """R-KV (https://arxiv.org/abs/2505.24133): s = lam * importance - (1 - lam) * redundancy.

    Importance is the group's largest logit, then softmax over the keys before the window, mean over the window's
    queries, and max-pooling. Redundancy is each key's mean cosine to the other keys of its row, which spares the newest
    of near-duplicates (`kernels.similarity.mean_cosine`), then softmax over the row.

    Args:
        lam: weight of importance, in [0, 1].
        threshold: two keys are near-duplicates if their cosine exceeds this, in [0, 1].
        kernel_size, pooling: width and kind of the pooling of importance, as in SnapKV.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    lam: float = 0.1
    threshold: float = 0.5
    kernel_size: int = 7
    pooling: str = "max"
    across_layers = True

    def __post_init__(self) -> None:
        settle(
            self,
            kernel_size=check_pooling(self.pooling, self.kernel_size),
            lam=check_fraction("lam", self.lam, low_open=False),
            threshold=check_fraction("threshold", self.threshold, low_open=False),
        )

    def score(self, observation: Observation) -> Tensor:
        """Return log-scores `[N]`."""
        window = observation.window_mask
        importance = pool_rows(
            observation.received("max_logits", exclude=window), observation, self.pooling, self.kernel_size, window
        )
        cosine = mean_cosine(observation.keys, observation.rows, threshold=self.threshold)
        redundancy = observation.to_flat(torch.softmax(observation.to_padded(cosine), -1))
        return log_affine(self.lam * importance - (1 - self.lam) * redundancy, observation)
