"""candidate -> what it costs: MACs and bytes by counting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from detachnet.errors import BudgetError
from detachnet.selection.candidate import Candidate
from detachnet.selection.front import By, Counted
from detachnet.selection.space import Cost, Space
from detachnet.surgery.plan import BASE


def counted(space: Space, by: Counted) -> Cost:
    """What a candidate costs in MACs for one image, or in bytes of its parameters when it is detached."""
    like = next(parameter for parameter in space.net.parameters() if parameter.is_floating_point())

    def macs(candidate: Candidate) -> float | None:
        return None if (plan := space.plan(candidate)) is None else float(plan.macs)

    def num_bytes(candidate: Candidate) -> float | None:
        return None if (plan := space.plan(candidate)) is None else float(plan.num_params * like.element_size())

    return macs if by == "macs" else num_bytes


def checked(budgets: Sequence[float], by: By, base: float) -> list[float]:
    """Budgets in units of the cost, falling; of what is counted, one below 1 is a share of the base-model's.

    Raises:
        BudgetError: There is none, or one makes no sense or is kept by the base-model.
    """
    if not budgets:
        raise BudgetError("search needs a budget", hint="[0.4, 0.2] are shares of the base-model's")
    found = []
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
            raise BudgetError(f"{by}={budget!r}: a budget is a positive number")
        value = budget * base if budget < 1 and by != "latency_ms" else float(budget)
        if value >= base:
            raise BudgetError(
                f"{by}={budget:g}: the base-model keeps it already, with {base:.4g}", nearest=(BASE,)
            )
        found.append(value)
    return sorted(set(found), reverse=True)
