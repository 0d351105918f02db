"""Routes -> legs: what lies between the places where a family's models part.

A leg has one set of layers, whichever of its models runs it: what one model computed at its end, another one goes
on from. Models that part at the image have one leg each, the whole of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.ownership import ViewSource
from detachnet.surgery.plan import DetachPlan
from detachnet.surgery.routes import parting


@dataclass(frozen=True)
class Leg:
    """A part of the network between two places where models part, as some of them run it.

    Attributes:
        models: Those that run it, in the family's order.
        start: The cut whose feature it takes in; empty for the image.
        end: The cut whose feature it makes; empty for the output.
        macs: Multiply-accumulates for one image.
    """

    models: tuple[str, ...]
    start: str
    end: str
    macs: int

    def __str__(self) -> str:
        return f"{self.start or 'image'} → {self.end or 'output'} of {', '.join(self.models)}"


def find_legs(source: ViewSource, plan: DetachPlan) -> dict[str, tuple[Leg, ...]]:
    """Model -> its legs, front to back; models that share one have the same.

    Args:
        source: The family's graph in evaluation mode.
        plan: What its bridges cost.
    """
    analysis, live = CutAnalysis(source.traced), source.traced.live
    image = next(i for i, node in enumerate(live) if node.op == "placeholder")
    apart = {(a, b): parting(source.routes[a], source.routes[b]) for a in source.routes for b in source.routes}
    found = {}
    for name in source.routes:
        stops = {at for other in source.routes if (at := apart[name, other]) is not None and at > image}
        legs = []
        for begin, end in pairwise([image, *sorted(stops), len(live) - 1]):
            same = [b for b in source.routes if (at := apart[name, b]) is None or at >= end]
            models = tuple(same) if end in stops else (name,)
            macs = _macs_upto(analysis, source, plan, name, end) - _macs_upto(analysis, source, plan, name, begin)
            start = source.traced.name_of[live[begin]] if begin > image else ""
            legs.append(Leg(models, start, source.traced.name_of[live[end]] if end in stops else "", macs))
        found[name] = tuple(legs)
    return found


def _macs_upto(analysis: CutAnalysis, source: ViewSource, plan: DetachPlan, name: str, end: int) -> int:
    """What a model costs from the image up to a position."""
    route = source.routes[name]
    macs = analysis.costs(lambda at: at <= end and not any(at in span for span in route))[0]
    spans = zip(route, plan[name].spans, strict=True)
    return macs + sum(planned.bridge.macs for span, planned in spans if planned.bridge and span.end <= end)


def shared_macs(legs: Mapping[str, tuple[Leg, ...]]) -> dict[tuple[str, str], int]:
    """Two models -> multiply-accumulates that the second one need not spend where the first one ran."""
    return {(a, b): sum(leg.macs for leg in legs[b] if leg in legs[a]) for a in legs for b in legs if a != b}
