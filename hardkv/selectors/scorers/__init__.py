"""Scorers give tokens scores. Each file holds one scorer."""

from hardkv.selectors.scorers.attention import Attention
from hardkv.selectors.scorers.rkv import RKV
from hardkv.selectors.scorers.scorer import (
    SCORERS,
    Scorer,
    get_scorer,
    log_affine,
    log_score,
    pool_rows,
    register_scorer,
    scorer_to_dict,
)
from hardkv.selectors.scorers.snapkv import SnapKV

__all__ = [
    "RKV",
    "SCORERS",
    "Attention",
    "Scorer",
    "SnapKV",
    "get_scorer",
    "log_affine",
    "log_score",
    "pool_rows",
    "register_scorer",
    "scorer_to_dict",
]
