"""What a sub-model that may be chosen leaves out: spans, and eighths of groups of filters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from detachnet.errors import CheckpointError
from detachnet.surgery.routes import SubModel
from detachnet.text import parse_json

PARTS = 8
"""A group of filters is left out in steps of one part of so many."""


@dataclass(frozen=True)
class Candidate:
    """A sub-model by what it leaves out.

    Attributes:
        drop: Spans `"a:b"`, front to back.
        eighths: Group of filters → how many eighths of it are kept, by name; groups that are not named stay whole.
    """

    drop: tuple[str, ...] = ()
    eighths: tuple[tuple[str, int], ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        """`eighths` as a dict."""
        return dict(self.eighths)

    def with_widths(self, changed: Mapping[str, int]) -> Candidate:
        """The same with other eighths of some groups."""
        eighths = {name: kept for name, kept in (self.widths | dict(changed)).items() if kept < PARTS}
        return Candidate(self.drop, tuple(sorted(eighths.items())))

    def with_drop(self, drop: tuple[str, ...]) -> Candidate:
        """The same with other spans."""
        return Candidate(drop, self.eighths)

    @property
    def is_base(self) -> bool:
        """Whether it leaves nothing out."""
        return not self.drop and not self.eighths

    @property
    def asked(self) -> SubModel:
        """What a family is made with to have it."""
        width = {name: kept / PARTS for name, kept in self.eighths} or 1.0
        return SubModel(drop=self.drop, width=width, filters="important" if self.eighths else "first")

    @property
    def key(self) -> str:
        """The same as text, for a file; equal candidates have equal texts."""
        return json.dumps({"drop": self.drop, "eighths": dict(self.eighths)}, sort_keys=True)

    @classmethod
    def of_key(cls, key: str) -> Candidate:
        """The candidate of a text.

        Raises:
            CheckpointError: It is none.
        """
        try:
            raw = parse_json(key)
            return cls(
                tuple(map(str, raw["drop"])), tuple(sorted((str(n), int(k)) for n, k in raw["eighths"].items()))
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{key!r} is no candidate", what=str(error)) from error
