"""Space + budget -> the candidate whose groups of filters are all narrowed alike."""

from __future__ import annotations

from bisect import bisect_left

from detachnet.selection.candidate import PARTS, Candidate
from detachnet.selection.space import Cost, Space


def evenly(space: Space, cost: Cost, budget: float) -> Candidate | None:
    """As many eighths of all groups as a budget allows, of some at the end one less; None if nothing meets it.

    Args:
        space: What can be left out.
        cost: Of a candidate.
        budget: In units of the cost.
    """
    groups = space.groups
    narrower = [
        Candidate().with_widths({name: kept + (i < first) for i, name in enumerate(groups)})
        for kept in range(PARTS - 1, 0, -1)
        for first in range(len(groups) - 1, -1, -1)
    ]

    def fits(candidate: Candidate) -> bool:
        costs = cost(candidate)
        return costs is not None and costs <= budget

    at = bisect_left(narrower, True, key=fits)
    return narrower[at] if at < len(narrower) else None
