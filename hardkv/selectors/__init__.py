"""Scorers give tokens scores, budgets turn scores into kept sets. All are functions of tensors: no cache, no model."""

from hardkv.selectors.budgets import (
    BUDGETS,
    AdaKV,
    Adaptive,
    Budget,
    Pyramid,
    Risk,
    RiskCurves,
    TopK,
    TopP,
    get_budget,
    register_budget,
)
from hardkv.selectors.observation import Observation
from hardkv.selectors.scorers import (
    RKV,
    SCORERS,
    Attention,
    Scorer,
    SnapKV,
    get_scorer,
    log_affine,
    log_score,
    pool_rows,
    register_scorer,
)
from hardkv.selectors.temperatures import fit_temperatures

__all__ = [
    "BUDGETS",
    "RKV",
    "SCORERS",
    "AdaKV",
    "Adaptive",
    "Attention",
    "Budget",
    "Observation",
    "Pyramid",
    "Risk",
    "RiskCurves",
    "Scorer",
    "SnapKV",
    "TopK",
    "TopP",
    "fit_temperatures",
    "get_budget",
    "get_scorer",
    "log_affine",
    "log_score",
    "pool_rows",
    "register_budget",
    "register_scorer",
]
