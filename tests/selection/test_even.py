"""All groups of filters narrowed alike, as little as a budget allows."""

import pytest

from detachnet.selection.candidate import Candidate
from detachnet.selection.costs import counted
from detachnet.selection.even import evenly
from detachnet.selection.space import Cost
from tests.searched import space_of_tiny


def only(widest: dict[str, int]) -> Cost:
    """Costs 1 where a candidate is as narrow as this or narrower, 2 where it is not."""
    return lambda candidate: 1.0 + any(candidate.widths.get(name, 8) > kept for name, kept in widest.items())


@pytest.mark.parametrize("kept", [7, 4, 1])
@pytest.mark.parametrize("narrower", [0, 1, 2])
def test_the_least_narrow_that_fits(kept: int, narrower: int) -> None:
    space = space_of_tiny()
    first = len(space.groups) - narrower
    widths = {name: kept - (i >= first) for i, name in enumerate(space.groups)}
    found = evenly(space, only(widths), 1.0)
    if 0 in widths.values():
        assert found is None
    else:
        assert found == Candidate().with_widths(widths)


def test_what_it_costs_keeps_the_budget() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    whole = cost(Candidate()) or 0.0
    half = evenly(space, cost, 0.5 * whole)
    assert half is not None
    assert (cost(half) or whole) <= 0.5 * whole
    assert not half.drop
    assert evenly(space, cost, 0.01 * whole) is None
    assert evenly(space, lambda _: None, whole) is None
