"""family -> what its sub-models can be: the neighbours of a candidate, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from detachnet.errors import CutError, StepDownError, WidthError
from detachnet.selection.candidate import PARTS, Candidate
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.enlarging import check_enlargeable, enlarged, plan_enlarged
from detachnet.surgery.plan import BASE, ModelPlan
from detachnet.surgery.routes import SubModel, split_span
from detachnet.surgery.spans import span_places, span_points
from detachnet.surgery.widths.channels import CONSTANT, compress, distinct
from detachnet.surgery.widths.functions import tensors_of
from detachnet.surgery.widths.groups import group_channels, group_names, owners
from detachnet.surgery.widths.storing import Narrowing

CANDIDATE = "candidate"
"""What a candidate is called in the family it is tried in."""


Cost = Callable[[Candidate], float | None]
"""What a candidate costs; None where it cannot be."""


class Segment(NamedTuple):
    """A part of the base-model's chain.

    Attributes:
        start: The place whose feature it takes in; empty for the image.
        end: The place whose feature it makes; empty for the output.
        groups: The groups of filters that it has some of, or reads.
    """

    start: str
    end: str
    groups: tuple[str, ...]


class Space:
    """What can be left out of a family's base-model without a new, untrained layer.

    Where a span is left out, the filters at both its ends are one thing: they are left out alike.

    Args:
        net: The family, trained.

    Attributes:
        places: Where spans begin and end, front to back.
        spans: The shortest spans.
        groups: The groups of filters.
        segments: What lies between two places that follow each other, front to back.

    Raises:
        CutError: There is nothing that could be left out.
    """

    def __init__(self, net: DetachableNet) -> None:
        check_enlargeable(net)
        self.net = net
        self.narrowing = Narrowing(net.retraced(), net.base)
        analysis = CutAnalysis(self.narrowing.traced.eval)
        self.places = [analysis.traced.name_of[node] for node in span_places(analysis)]
        self.spans = [point.name for point in span_points(self.narrowing.traced) if point.bridge is None]
        self._find_groups()
        self._plans: dict[Candidate, ModelPlan | None] = {Candidate(): net.plan[BASE]}
        self._subs: dict[Candidate, SubModel] = {}
        self._alone: dict[tuple[str, int], int | str] = {}
        if not self.spans and not self.groups:
            raise CutError(
                f"{net.plan.model} has no span and no filters that could be left out without a new layer",
                hint="detachnet.find_spans(model) and find_widths(model) list what there is",
            )

    def _find_groups(self) -> None:
        """The groups of filters that can be left out; those at each end of each span."""
        channels = self.narrowing.channels
        groups = group_channels(channels)
        names, owner = group_names(channels), owners(channels, groups)
        free = {i: name for i, name in enumerate(names) if not groups[i].reason}
        self.sizes = {name: len(groups[i].roots) for i, name in free.items()}
        # Narrower features have other statistics: nothing of them can be shared.
        self.groups = [] if self.net.plan.norm == "shared" else list(free.values())
        self._at: dict[str, frozenset[str]] = {}
        self.segments: list[Segment] = []
        ends = {channels.traced.names[place]: place for place in self.places}
        start, passed = "", frozenset[str]()
        for node in channels.traced.live:
            value = channels.values.get(node)
            atoms = [compress(t).clamp_min(CONSTANT) for t in (tensors_of(value) if value is not None else ())]
            here = frozenset(free.get(i, "") for some in atoms for i in distinct(owner[some]).tolist())
            passed |= here
            if node in ends or node.op == "output":
                end = ends.get(node, "")
                self.segments.append(Segment(start, end, tuple(sorted(passed - {""}))))
                self._at[end], start, passed = here, end, here

    def segments_of(self, candidate: Candidate) -> list[Segment]:
        """Those that a candidate runs."""
        left_out = set[str]()
        for start, end in map(split_span, candidate.drop):
            left_out.update(self.places[self.places.index(start) + 1 : self.places.index(end) + 1])
        return [segment for segment in self.segments if segment.end not in left_out]

    def plan(self, candidate: Candidate) -> ModelPlan | None:
        """What a candidate costs; None where it cannot be, or would need a new layer."""
        if candidate not in self._plans:
            try:
                models = {CANDIDATE: self.sub_model(candidate)}
                made = plan_enlarged(self.net, models, (), self.narrowing)[0]
                self._plans[candidate] = made[CANDIDATE]
            except (CutError, WidthError, StepDownError):
                self._plans[candidate] = None
        return self._plans[candidate]

    def sub_model(self, candidate: Candidate) -> SubModel:
        """What a family is made with to have a candidate, with the filters it keeps."""
        if candidate not in self._subs:
            sub = candidate.asked
            kept = self.narrowing.stored(CANDIDATE, sub) if sub.is_narrow else {}
            for tied in self._ties(candidate.drop):
                chosen = kept.get(tied[-1])  # what reads them is the last one's
                kept |= dict.fromkeys(tied, chosen) if chosen is not None else {}
            self._subs[candidate] = sub.keeping(kept) if kept else sub
        return self._subs[candidate]

    def family(self, candidate: Candidate) -> DetachableNet:
        """The base-model and a candidate, `CANDIDATE`; its norms are to be measured."""
        models = {} if candidate.is_base else {CANDIDATE: self.sub_model(candidate)}
        return enlarged(self.net, models, (), self.narrowing)

    @property
    def names(self) -> list[str]:
        """Everything that can be left out, a step of a group of filters or a span; `after` takes these names."""
        return [*self.groups, *self.spans]

    def after(self, candidate: Candidate, name: str, cost: Cost) -> Candidate | None:
        """The candidate that leaves out a span, or the next step of a group, too; None if that saves nothing.

        Of a group it is as many eighths as it takes: channels are kept in multiples of eight.
        """
        if name in self.spans:
            drop = self.with_span(candidate.drop, name)
            to = self.tied(candidate.with_drop(drop))
            return to if drop != candidate.drop and _saves(cost, candidate, to) else None
        tied = next((some for some in self._ties(candidate.drop) if name in some), (name,))
        if name != tied[0]:
            return None  # the first of them stands for all
        now = candidate.widths.get(name, PARTS)
        for kept in range(now - 1, 0, -1):
            to = candidate.with_widths(dict.fromkeys(tied, kept))
            if self._stored(name, kept) != self._stored(name, now) and _saves(cost, candidate, to):
                return to
        return None

    def before(self, candidate: Candidate, name: str, cost: Cost) -> Candidate | None:
        """The candidate that has a span, or the next step of a group, again; None if that brings nothing back."""
        if name in self.spans:
            back = self.tied(candidate.with_drop(self._without_span(candidate.drop, name)))
            return back if _saves(cost, back, candidate) else None
        tied = next((some for some in self._ties(candidate.drop) if name in some), (name,))
        now = candidate.widths.get(name, PARTS)
        if name != tied[0]:
            return None
        more = {kept: self._stored(name, kept) for kept in range(now + 1, PARTS + 1)}
        for first in [kept for kept in more if more[kept] != self._stored(name, now)]:
            kept = max(other for other in more if more[other] == more[first])  # as it is named by `after`
            back = candidate.with_widths(dict.fromkeys(tied, kept))
            if _saves(cost, back, candidate):
                return back
        return None

    def _stored(self, name: str, kept: int) -> int | str:
        """What is kept of a group alone at so many eighths; rounded, several may be the same."""
        if (name, kept) not in self._alone:
            found: Mapping[str, int | str] = {}
            if kept < PARTS:
                try:
                    found = self.narrowing.stored(CANDIDATE, Candidate().with_widths({name: kept}).asked)
                except WidthError:
                    found = {}
            self._alone[name, kept] = found.get(name, self.sizes[name])
        return self._alone[name, kept]

    def with_span(self, drop: tuple[str, ...], span: str) -> tuple[str, ...]:
        """Some spans and one more; those that touch or overlap become one."""
        merged: list[tuple[str, str]] = []
        at = self.places.index
        for start, end in sorted(map(split_span, {*drop, span}), key=lambda ends: at(ends[0])):
            if merged and at(start) <= at(merged[-1][1]):
                last = max(merged[-1][1], end, key=at)
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((start, end))
        return tuple(f"{start}:{end}" for start, end in merged)

    def _without_span(self, drop: tuple[str, ...], span: str) -> tuple[str, ...]:
        """Some spans but for one of the shortest that they are made of."""
        at = self.places.index
        rest: tuple[str, ...] = ()
        inside = [tuple(map(at, split_span(each))) for each in drop]
        for other in self.spans:
            start, end = map(at, split_span(other))
            if other != span and any(first <= start and end <= last for first, last in inside):
                rest = self.with_span(rest, other)
        return rest

    def _ties(self, drop: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Groups that go together, front to back, because what lay between them is left out."""
        tied: list[set[str]] = []
        for start, end in map(split_span, drop):
            ends = self._at[start] | self._at[end]
            if len(ends) > 1 and len({self.sizes.get(name) for name in ends}) == 1 and "" not in ends:
                joined = [some for some in tied if some & ends]
                tied = [some for some in tied if not some & ends] + [set(ends).union(*joined)]
        return [tuple(name for name in self.groups if name in some) for some in tied if self.groups]

    def tied(self, candidate: Candidate) -> Candidate:
        """The same with as few filters in groups that go together as the narrowest of them has."""
        for tied in self._ties(candidate.drop):
            fewest = min(candidate.widths.get(name, PARTS) for name in tied)
            candidate = candidate.with_widths(dict.fromkeys(tied, fewest))
        return candidate

    def smallest(self, cost: Cost) -> Candidate:
        """A candidate that costs as little as one can: an eighth of all filters, without all spans that saves."""
        found = Candidate()
        for names in (self.groups, *([name] for name in self.groups)):
            narrower = found.with_widths(dict.fromkeys(names, 1))
            if narrower != found and _saves(cost, found, narrower):
                found = narrower
        for span in self.spans:
            shorter = self.tied(found.with_drop(self.with_span(found.drop, span)))
            found = shorter if _saves(cost, found, shorter) else found
        return found


def _saves(cost: Cost, before: Candidate, after: Candidate) -> bool:
    """Whether one candidate can be, and costs less than another."""
    here, there = cost(before), cost(after)
    return here is not None and there is not None and there < here
