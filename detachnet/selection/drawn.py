"""Space + budget -> candidates drawn at random: ways that greedy, one step at a time, does not go."""

from __future__ import annotations

import random
from collections.abc import Iterator

from detachnet.selection.candidate import Candidate
from detachnet.selection.space import Cost, Space

ATTEMPTS = 20
"""Draws for each candidate that is asked for, to find so many different ones."""


def drawn(space: Space, cost: Cost, budget: float, count: int, seed: int) -> Iterator[Candidate]:
    """Different candidates within a budget; fewer where hardly any new ones are found.

    Args:
        space: What can be left out.
        cost: Of a candidate.
        budget: In units of the cost.
        count: How many.
        seed: Decides all draws.
    """
    draw, found = random.Random(seed), set[Candidate]()
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            return
        candidate = _draw(space, cost, budget, draw)
        if candidate is not None and candidate not in found:
            found.add(candidate)
            yield candidate


def _draw(space: Space, cost: Cost, budget: float, draw: random.Random) -> Candidate | None:
    """A candidate that things are left out of at random until it fits; None if it never does."""
    candidate, names = Candidate(), list(space.names)
    while names and (cost(candidate) or 0.0) > budget:
        name = draw.choice(names)
        smaller = space.after(candidate, name, cost)
        candidate = smaller or candidate
        names = names if smaller else [other for other in names if other != name]
    return candidate if (cost(candidate) or 0.0) <= budget else None
