"""family -> how much of each model is left to run behind a smaller one, measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from detachnet.deploy.family import Family

RUNS = 5
"""Timed runs of each kind, behind one that is not."""


def measure_rests(
    family: Family, ladder: Sequence[str], clock: Callable[[], float]
) -> dict[tuple[str, str], float]:
    """Seconds of going on, relative to those of a run from the image.

    Args:
        family: The models.
        ladder: Those to measure, the slowest first.
        clock: Seconds that only grow.

    Returns:
        A model and a slower one → what the slower one takes behind the other, as a share of what it takes alone; 1
        or more where they share nothing.
    """
    image = torch.zeros(family.input_size)
    found = {}
    for i, small in enumerate(ladder):
        for large in ladder[:i]:
            rests, wholes = list[float](), list[float]()
            for _ in range(1 + RUNS):
                work = family.resumable(image)
                work.run(small)
                began = clock()
                work.run(large)
                done = clock()
                family.run(image, large)
                rests.append(done - began)
                wholes.append(clock() - done)
            found[small, large] = median(rests[1:]) / max(median(wholes[1:]), 1e-9)
    return found
