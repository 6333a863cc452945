"""SnapKV: the attention of the window's queries, pooled along the row."""

from dataclasses import dataclass

from torch import Tensor

from hardkv.selectors.checks import settle
from hardkv.selectors.observation import Observation
from hardkv.selectors.scorers.scorer import check_pooling, log_score, pool_rows, register_scorer


@register_scorer("snapkv")
@dataclass(frozen=True)
class SnapKV:
    """SnapKV (https://arxiv.org/abs/2404.14469) in AdaKV's form for grouped queries (https://arxiv.org/abs/2407.11550).

    The score is the softmax over all keys of the row, without the window's columns; its mean over the window's queries,
    then over the group; then pooling over the remaining tokens in order of position.

    Args:
        kernel_size: odd width of the pooling.
        pooling: "max" (AdaKV's default), "avg" (SnapKV's paper) or "none".
        group_reduce: "mean" or "max" over the query heads of each KV head.

    Raises:
        ValueError, TypeError: a hyperparameter out of range or of the wrong type.
    """

    kernel_size: int = 7
    pooling: str = "max"
    group_reduce: str = "mean"
    across_layers = True

    def __post_init__(self) -> None:
        settle(self, kernel_size=check_pooling(self.pooling, self.kernel_size))
        if self.group_reduce not in ("mean", "max"):
            raise ValueError(f"group_reduce={self.group_reduce!r} must be 'mean' or 'max'")

    def score(self, observation: Observation) -> Tensor:
        """Return log-scores `[N]`; the window's tokens get the lowest."""
        received = observation.attention if self.group_reduce == "mean" else observation.received("max")
        return log_score(
            pool_rows(received, observation, self.pooling, self.kernel_size, exclude=observation.window_mask)
        )
