"""Budgets turn scores into kept sets. Each file holds one budget."""

from hardkv.selectors.budgets.adakv import AdaKV
from hardkv.selectors.budgets.adaptive import Adaptive
from hardkv.selectors.budgets.budget import BUDGETS, Budget, FixedTotal, register_budget
from hardkv.selectors.budgets.curves import RiskCurves
from hardkv.selectors.budgets.pyramid import Pyramid
from hardkv.selectors.budgets.risk import Risk
from hardkv.selectors.budgets.spec import budget_to_dict, get_budget
from hardkv.selectors.budgets.topk import TopK
from hardkv.selectors.budgets.topp import TopP

__all__ = [
    "BUDGETS",
    "AdaKV",
    "Adaptive",
    "Budget",
    "FixedTotal",
    "Pyramid",
    "Risk",
    "RiskCurves",
    "TopK",
    "TopP",
    "budget_to_dict",
    "get_budget",
    "register_budget",
]
