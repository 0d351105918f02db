"""Greedy and evolution against all there is, where worth is known without running a network."""

from itertools import pairwise

import pytest

from detachnet.selection.candidate import PARTS, Candidate
from detachnet.selection.costs import counted
from detachnet.selection.evolution import evolve
from detachnet.selection.front import FrontPoint, unbeaten
from detachnet.selection.greedy import best_within, greedy, put_back
from detachnet.selection.journal import Journal, Trials
from detachnet.selection.worth import Worth
from tests.searched import everything, space_of_tiny

SHARES = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)


def additive(candidate: Candidate) -> Worth:
    """Each thing that is left out loses its own."""
    lost = {"stem.0": 0.16, "one.inner": 0.02, "two.inner": 0.06}
    gone = sum(lost[name] for name, kept in candidate.eighths if kept < PARTS)
    spans = {"stem:one": 0.03, "one:two": 0.14, "stem:two": 0.17}
    return Worth(0.9 - gone - sum(spans[span] for span in candidate.drop), gone)


def jealous(candidate: Candidate) -> Worth:
    """Two things lose little alone and much together: steps that look best lead astray."""
    worth = additive(candidate)
    both = {"one.inner", "two.inner"} <= candidate.widths.keys()
    return worth._replace(accuracy=worth.accuracy - 0.4 * both)


@pytest.mark.slow
def test_greedy_finds_what_listing_everything_finds_where_losses_add_up() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    base = cost(Candidate()) or 0.0
    listed = [(candidate, additive(candidate)) for candidate in everything(space, cost)]
    trials = Trials(additive, Journal(None, {}))
    way = list(greedy(space, cost, trials, 0.2 * base))
    costs = [cost(candidate) or 0.0 for candidate in way]
    assert all(a > b for a, b in pairwise(costs))
    assert costs[-1] <= 0.2 * base < costs[-2]
    for share in SHARES:
        best = best_within(listed, cost, share * base)
        found = best_within(list(trials.seen.items()), cost, share * base)
        assert best is not None
        assert found is not None
        # A step may be larger than what is left of a budget, so that another set of steps fits it better.
        assert additive(best).accuracy - additive(found).accuracy < 0.13, share
    assert len(trials.seen) < len(listed)


@pytest.mark.slow
@pytest.mark.parametrize("worth", [additive, jealous])
def test_evolution_finds_what_listing_everything_finds(worth: object) -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    base = cost(Candidate()) or 0.0
    listed = [(candidate, worth(candidate)) for candidate in everything(space, cost)]  # type: ignore[operator]
    trials = Trials(worth, Journal(None, {}))  # type: ignore[arg-type]
    for _ in greedy(space, cost, trials, 0.2 * base):
        pass
    before = dict(trials.seen)
    limits = [share * base for share in SHARES]
    for generation in evolve(space, cost, trials, limits, 60, seed=0):
        assert all((cost(child) or 0.0) <= limits[0] for child in generation)
    assert len(trials.seen) > len(before)
    for limit in limits:
        best = best_within(listed, cost, limit)
        found = best_within(list(trials.seen.items()), cost, limit)
        assert best is not None
        assert found is not None
        assert trials.seen[found].accuracy == pytest.approx(worth(best).accuracy)  # type: ignore[operator]


@pytest.mark.slow
def test_evolution_is_its_seed() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")

    def children(seed: int) -> list[list[Candidate]]:
        trials = Trials(jealous, Journal(None, {}))
        trials([Candidate()])
        return list(evolve(space, cost, trials, [0.6 * (cost(Candidate()) or 0.0)], 6, seed))

    assert children(1) == children(1)
    assert children(1) != children(2)


def test_nothing_on_the_front_is_beaten() -> None:
    costs = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.6), (2.0, 0.4), (4.0, 0.6)]
    points = [FrontPoint(None, cost, 0, 0, accuracy) for cost, accuracy in costs]
    assert [(p.cost, p.accuracy) for p in unbeaten(points)] == [(1.0, 0.2), (2.0, 0.6)]


@pytest.mark.slow
def test_what_fits_again_is_put_back() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    smallest = Candidate(("stem:two",)).with_widths({"stem.0": 4})
    trials = Trials(additive, Journal(None, {}))
    trials([smallest])
    budget = 0.7 * (cost(Candidate()) or 0.0)
    way = list(put_back(space, cost, trials, budget))
    assert way[0] == smallest
    costs = [cost(candidate) or 0.0 for candidate in way]
    assert all(a < b for a, b in pairwise(costs))
    assert costs[-1] <= budget
    accuracies = [additive(candidate).accuracy for candidate in way]
    assert all(a < b for a, b in pairwise(accuracies))
    larger = [back for name in space.names if (back := space.before(way[-1], name, cost))]
    assert all((cost(back) or 0.0) > budget or additive(back).accuracy <= accuracies[-1] for back in larger)


@pytest.mark.slow
def test_a_step_back_undoes_a_step() -> None:
    space = space_of_tiny()
    cost = counted(space, "macs")
    for candidate in everything(space, cost):
        for name in space.names:
            after = space.after(candidate, name, cost)
            if after is not None and name in space.groups:
                assert space.before(after, name, cost) == candidate
            elif after is not None and not candidate.widths:
                assert (space.before(after, name, cost) or candidate) == candidate
