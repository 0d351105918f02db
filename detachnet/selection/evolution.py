"""Space + budgets + what was tried -> more candidates: children of the best ones within each budget."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from detachnet.data.batches import mix
from detachnet.progress import tell
from detachnet.selection.candidate import PARTS, Candidate
from detachnet.selection.journal import Trials
from detachnet.selection.space import Cost, Space

CHILDREN = 8
"""Candidates of a generation, which are tried together."""
PARENTS = 8
"""The most accurate so many within a budget have children."""
ATTEMPTS = 100
"""To find a child within the budget that was not tried yet."""


def evolve(
    space: Space, cost: Cost, trials: Trials, budgets: Sequence[float], tries: int, seed: int
) -> Iterator[list[Candidate]]:
    """Generations of candidates within the budgets, `tries` in all; fewer where no new ones are found.

    A child has each group's filters from one of two parents and the spans of the first; then one or two of its
    things change. Too expensive ones lose more, at random, until they fit.

    Args:
        space: What can be left out.
        cost: Of a candidate.
        trials: What was tried, which the first parents are among.
        budgets: One is drawn for each child.
        tries: How many candidates.
        seed: Decides all draws.
    """
    draw = random.Random(mix(seed, "evolution"))
    done = 0
    while done < tries:
        children: dict[Candidate, None] = {}
        for _ in range(ATTEMPTS):
            if len(children) == min(CHILDREN, tries - done):
                break
            budget = draw.choice(budgets)
            child = _child(space, cost, _parents(trials, cost, budget), budget, draw)
            if child is not None and child not in trials.seen:
                children[child] = None
        if not children:
            return
        trials(list(children))
        done += len(children)
        tell("candidates of the evolution", done, tries)
        yield list(children)


def _parents(trials: Trials, cost: Cost, budget: float) -> list[Candidate]:
    """The best of those that were tried within a budget; of all where none is."""
    fits = [(c, w) for c, w in trials.seen.items() if (costs := cost(c)) is not None and costs <= budget]
    ranked = sorted(
        fits or trials.seen.items(), key=lambda tried: (-tried[1].accuracy, tried[1].loss, tried[0].key)
    )
    return [candidate for candidate, _ in ranked[:PARENTS]]


def _child(
    space: Space, cost: Cost, parents: Sequence[Candidate], budget: float, draw: random.Random
) -> Candidate | None:
    """A new candidate within a budget; None where the draws lead to none."""
    one, other = draw.choice(parents), draw.choice(parents)
    both = one.widths, other.widths
    widths = {name: draw.choice(both).get(name, PARTS) for name in space.groups}
    child = one.with_widths(widths)
    for _ in range(draw.choice((1, 2))):
        child = _changed(space, child, draw)
    child = space.tied(child)
    while (costs := cost(child)) is None or costs > budget:
        name = draw.choice(space.names)
        smaller = None if costs is None else space.after(child, name, cost)
        if costs is None or (smaller is None and draw.random() < 0.2):
            return None
        child = smaller or child
    return None if child.is_base else child


def _changed(space: Space, candidate: Candidate, draw: random.Random) -> Candidate:
    """A candidate with one thing changed: the filters of a group, or a span that comes or goes."""
    name = draw.choice(space.names)
    if name in space.groups:
        now = candidate.widths.get(name, PARTS)
        kept = min(PARTS, max(1, now + draw.choice((-2, -1, 1, 2))))
        return candidate.with_widths({name: kept})
    if candidate.drop and draw.random() < 0.5:
        back = draw.choice(candidate.drop)
        return candidate.with_drop(tuple(span for span in candidate.drop if span != back))
    return candidate.with_drop(space.with_span(candidate.drop, name))
