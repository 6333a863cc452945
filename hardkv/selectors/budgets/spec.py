"""Makes a budget from a number of tokens or from its JSON form, and a JSON form from a budget."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hardkv.selectors.budgets.budget import BUDGETS, Budget
from hardkv.selectors.budgets.topk import TopK
from hardkv.selectors.checks import check_name


def get_budget(spec: "int | dict[str, Any] | Budget", of_int: Callable[[int], Budget] = TopK) -> Budget:
    """Return a budget, made from a mean number of tokens or from its JSON form, or as given.

    Args:
        spec: an integer n, a dict from `budget_to_dict`, or a budget.
        of_int: makes a budget from an integer.

    Raises:
        ValueError: the name is not registered, or a value is not allowed.
        TypeError: `spec` is none of these.
    """
    if isinstance(spec, Budget):
        return spec
    if isinstance(spec, dict):
        parameters = dict(spec)
        name = parameters.pop("name", None)
        check_name("budget", name, sorted(BUDGETS))
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
    """Return `{"name": ..., hyperparameters...}`, for JSON.

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
