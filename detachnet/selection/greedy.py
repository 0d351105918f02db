"""Space + budget -> the candidates on a way to it, each without what costs least accuracy for what it saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from detachnet.selection.candidate import Candidate
from detachnet.selection.journal import Trials
from detachnet.selection.space import Cost, Space
from detachnet.selection.worth import Worth

AT_ONCE = 4
"""Things to leave out that are tried in each step: those that looked best when they were last tried."""


def greedy(space: Space, cost: Cost, trials: Trials, budget: float) -> Iterator[Candidate]:
    """The base-model and each smaller candidate, until one costs no more than the budget or nothing is left.

    In the first step everything is tried that can be left out: a step of each group of filters, each span. What
    costs least accuracy for what it saves is left out; then the `AT_ONCE` that looked best are tried anew, and so
    on. Of those that lose alike, the one whose cross entropy rises least is taken.

    Args:
        space: What can be left out.
        cost: Of a candidate.
        trials: Says what one is worth.
        budget: In units of the cost.
    """
    here = Candidate()
    looked: dict[str, tuple[float, float]] = dict.fromkeys(space.names, (-math.inf, -math.inf))
    yield here
    while (costs := cost(here)) is not None and costs > budget:
        count = len(looked) if here.is_base else AT_ONCE
        steps = _next(space, cost, here, looked, count)
        if not steps:
            return
        now, *worths = trials([here, *(to for _, to in steps)])
        for (name, to), worth in zip(steps, worths, strict=True):
            looked[name] = _lost(now, worth, costs - (cost(to) or 0.0))
        here = min(steps, key=lambda step: looked[step[0]])[1]
        yield here


def put_back(space: Space, cost: Cost, trials: Trials, budget: float) -> Iterator[Candidate]:
    """The best of what was tried within a budget, and each larger candidate that is better and keeps it, too.

    A step may save more than is asked for: what fits again is tried, the dearest first, and what helps most stays.
    """
    here = best_within(list(trials.seen.items()), cost, budget)
    while here is not None:
        yield here
        larger = [back for name in space.names if (back := space.before(here, name, cost))]
        fits = [back for back in dict.fromkeys(larger) if (cost(back) or math.inf) <= budget]
        fits.sort(key=lambda back: -(cost(back) or 0.0))
        trials(fits[:AT_ONCE])
        better = best_within(list(trials.seen.items()), cost, budget)
        here = better if better != here else None


def _next(
    space: Space, cost: Cost, here: Candidate, looked: dict[str, tuple[float, float]], count: int
) -> list[tuple[str, Candidate]]:
    """The most promising things that can be left out here, and the candidates they lead to."""
    found: list[tuple[str, Candidate]] = []
    for name in sorted(looked, key=lambda name: (looked[name], space.names.index(name))):
        if len(found) < count and (to := space.after(here, name, cost)):
            found.append((name, to))
    return found


def _lost(before: Worth, after: Worth, saved: float) -> tuple[float, float]:
    """Accuracy, and cross entropy, that is lost for each unit that is saved."""
    return (before.accuracy - after.accuracy) / saved, (after.loss - before.loss) / saved


def best_within(seen: Sequence[tuple[Candidate, Worth]], cost: Cost, budget: float) -> Candidate | None:
    """The most accurate of some candidates within a budget; of equal ones that with the lowest cross entropy."""
    fits = [(c, worth) for c, worth in seen if (costs := cost(c)) is not None and costs <= budget]
    if not fits:
        return None
    return min(fits, key=lambda tried: (-tried[1].accuracy, tried[1].loss, cost(tried[0]), tried[0].key))[0]
