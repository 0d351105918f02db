"""Candidates that are drawn at random."""

from detachnet.selection.costs import counted
from detachnet.selection.drawn import drawn
from detachnet.selection.space import Space
from tests.searched import trained


def test_drawn_candidates_differ_and_keep_the_budget() -> None:
    space = Space(trained())
    cost = counted(space, "macs")
    budget = 0.6 * (cost(next(drawn(space, cost, 1e12, 1, 0))) or 0.0)  # all fits: the base-model
    found = list(drawn(space, cost, budget, 6, 0))
    assert len(set(found)) == len(found) == 6
    assert all((cost(candidate) or 1e12) <= budget for candidate in found)
    assert found == list(drawn(space, cost, budget, 6, 0)) != list(drawn(space, cost, budget, 6, 1))
    assert list(drawn(space, cost, 1.0, 6, 0)) == []
