"""candidate -> its latency on this machine: what its segments take, each measured once, added up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from detachnet.progress import tell
from detachnet.selection.candidate import Candidate
from detachnet.selection.journal import Journal
from detachnet.selection.space import CANDIDATE, Segment, Space
from detachnet.surgery.legs import Leg
from detachnet.surgery.plan import BASE

WHOLE = "whole"
"""What the journal calls a candidate that was measured as it is."""


class Latency:
    """What candidates take for one image, in milliseconds; it is their cost in a search.

    The network is taken apart where spans begin and end. Each segment is measured once for each number of filters
    that it is asked for; all are scaled alike, so that those of the base-model add up to what it takes as a whole.

    Args:
        space: Says which segments a candidate runs.
        journal: Keeps what was measured; a search that goes on does not measure it again.
        stopwatch: Median seconds of a module on an image or a feature; in words, what measures the same.

    Attributes:
        how: The stopwatch in words.
        measured: What was measured whole → milliseconds.
    """

    def __init__(self, space: Space, journal: Journal, stopwatch: Callable[[nn.Module, Tensor], float]) -> None:
        self.space, self.journal, self.stopwatch = space, journal, stopwatch
        self.how = str(stopwatch)
        self.measured: dict[Candidate, float] = {}

    def __call__(self, candidate: Candidate) -> float | None:
        """The sum of a candidate's segments; None where it cannot be."""
        if self.space.plan(candidate) is None:
            return None
        total = self._sum(candidate)
        return None if total is None else self._scale * total

    def whole(self, candidate: Candidate) -> float:
        """What a candidate takes, measured as it is when it is detached."""
        key = f"{self.how}: {WHOLE} {candidate.key}"
        if key not in self.journal.noted:
            module = self.space.family(candidate).eval().detach(_name(candidate))
            self.journal.note(key, 1e3 * self.stopwatch(module, self._image))
        self.measured[candidate] = self.journal.noted[key]
        return self.measured[candidate]

    @cached_property
    def _scale(self) -> float:
        """A pass through the base-model over the sum of its segments."""
        return self.whole(Candidate()) / max(self._sum(Candidate()) or 0.0, 1e-12)

    @property
    def _image(self) -> Tensor:
        like = next(p for p in self.space.net.parameters() if p.is_floating_point())
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, *self.space.net.plan.input_size, generator=generator).to(like.device, like.dtype)

    def _sum(self, candidate: Candidate) -> float | None:
        """Milliseconds of a candidate's segments, added up; None where its filters cannot be left out."""
        narrow = Candidate(eighths=candidate.eighths)
        plan = self.space.plan(narrow)
        if plan is None:
            return None
        keys = {segment: self._key(segment, plan.kept) for segment in self.space.segments}
        run = self.space.segments_of(candidate)
        if unknown := {segment: keys[segment] for segment in run if keys[segment] not in self.journal.noted}:
            self._measure(narrow, unknown)
        return sum(self.journal.noted[keys[segment]] for segment in run)

    def _key(self, segment: Segment, kept: Mapping[str, int | str]) -> str:
        """What the journal calls a segment with so many of its filters."""
        counts = {
            name: units if isinstance(units, int) else int(units, 16).bit_count()
            for name in segment.groups
            if (units := kept.get(name)) is not None
        }
        return f"{self.how}: {segment.start}:{segment.end} {json.dumps(counts)}"

    def _measure(self, narrow: Candidate, keys: Mapping[Segment, str]) -> None:
        """Measure segments of a candidate that leaves out filters alone, each on the feature that it gets."""
        net, value, done = self.space.family(narrow).eval(), self._image, 0
        for segment in self.space.segments:
            module = net.detach_leg(Leg((_name(narrow),), segment.start, segment.end, 0))
            if segment in keys:
                tell("segments measured", done, len(keys))
                self.journal.note(keys[segment], 1e3 * self.stopwatch(module, value))
                done += 1
            if segment.end:
                with torch.no_grad():
                    value = module(value)
        tell("segments measured", done, done)


def _name(candidate: Candidate) -> str:
    """What a candidate is called in its family."""
    return BASE if candidate.is_base else CANDIDATE
