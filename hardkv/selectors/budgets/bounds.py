"""Floor and cap: the fewest and the most tokens per head."""

from torch import Tensor

from hardkv.selectors.checks import check_count
from hardkv.selectors.ranking import Ranking


def candidate_bounds(floor: int, cap: int | None, ranking: Ranking) -> tuple[Tensor, Tensor]:
    """Turn the public counts `floor` and `cap` into candidate counts per row, int64 `[R]` each."""
    low = (floor - ranking.num_protected).clamp_min(0).minimum(ranking.num_candidates)
    if cap is None:
        return low, ranking.num_candidates
    return low, (cap - ranking.num_protected).clamp_min(0).minimum(ranking.num_candidates)


def check_bounds(floor: int, cap: int | None) -> dict[str, int | None]:
    """Return `floor` and `cap` as plain ints, by name; raise unless 0 <= floor <= cap."""
    floor = check_count("floor", floor, 0)
    if cap is not None:
        cap = check_count("cap", cap, 1)
        if cap < floor:
            raise ValueError(f"cap={cap} must be >= floor={floor}")
    return {"floor": floor, "cap": cap}
