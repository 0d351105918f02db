"""What sub-models leave out -> routes: which parts of a network a model runs, and where models part.

The valid cuts of a network are a chain from the image to the output. A route leaves out spans of it; two models
are one network, with one set of norms and statistics, until their routes first part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from detachnet.errors import CutError, WidthError
from detachnet.fields import Fields
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.graph import TracedGraph

STEPDOWNS = "stepdowns"
BRIDGES = "bridges"
Filters = Literal["first", "important"]
Number = Annotated[float, Field(strict=True)]
"""No text and no truth value that could be read as one."""
HALF = "half_"
MOST_CHOSEN = 16
"""Sub-models that are chosen for a network, at most."""
MOST_MODELS = 1000
"""Sub-models of a family."""
HINT = "a span is 'a:b': everything after a up to and including b; ':b' begins at the image"


class SubModel(Fields):
    """What a sub-model leaves out of the base-model: spans of it, filters, or both.

    Attributes:
        drop: Spans `"a:b"`: everything after the cut `a` up to and including the cut `b`. An empty `a` is the
            image, so `":features.6"` drops the front up to `features.6`.
        width: The share of the filters it keeps, in (0, 1]: one for all groups, or by a group's name, as
            `find_widths` lists them, or by the path of a layer or module, for all groups that it makes filters
            of; groups without one stay whole.
        filters: Which of them: the `first`, for a network that is to be trained; or the most `important` of a
            trained one.

    Raises:
        CutError: `drop` is no list of strings, or nothing is left out.
        WidthError: A width is out of range, or `filters` is unknown.

    Examples:
        >>> detachnet.SubModel(drop=[":layer1", "layer3.0:layer3.4"])
        >>> detachnet.SubModel(width=0.5)
    """

    refused_as = {"": CutError, "width": WidthError, "filters": WidthError}

    drop: tuple[str, ...] = ()
    width: Number | dict[str, Number] = 1.0
    filters: Filters = "first"
    _kept: dict[str, int | str] = PrivateAttr(default_factory=dict)

    @property
    def is_narrow(self) -> bool:
        """Whether it leaves out filters."""
        return any(share < 1 for share in self._shares)

    @property
    def _shares(self) -> tuple[float, ...]:
        return tuple(self.width.values()) if isinstance(self.width, dict) else (self.width,)

    @property
    def kept(self) -> dict[str, int | str]:
        """What it keeps of each group, where that has been chosen."""
        return self._kept

    def keeping(self, kept: Mapping[str, int | str]) -> SubModel:
        """The same with a choice that has been made."""
        made = self.model_copy()
        made._kept = dict(kept)
        return made

    @property
    def parts(self) -> tuple[str, ...]:
        """What it leaves out, in words."""
        return (*self.drop, *([f"width={self.width}"] if self.is_narrow else []))

    @field_validator("drop", mode="before")
    @classmethod
    def _are_spans(cls, drop: Any) -> Any:
        if isinstance(drop, str):
            raise ValueError(f"drop is a list of spans, not a string: write drop=[{drop!r}]")
        return drop

    @field_validator("width")
    @classmethod
    def _are_shares(cls, width: float | dict[str, float]) -> float | dict[str, float]:
        if not all(0 < share <= 1 for share in (width.values() if isinstance(width, dict) else [width])):
            raise ValueError(f"width={width!r}: a width is a share of the filters, in (0, 1]")
        return width

    @model_validator(mode="after")
    def _leaves_something_out(self) -> SubModel:
        if not self.drop and not self.is_narrow:
            raise ValueError(
                "this is the base-model: a sub-model is SubModel(drop=['a:b', …]) or SubModel(width=0.5)"
            )
        if self.filters != "first" and not self.is_narrow:
            raise ValueError(
                f"filters={self.filters!r} says which filters stay, but all do: it is for a width, "
                f"SubModel(width=0.5, filters={self.filters!r})"
            )
        return self


def narrow_models(widths: Sequence[float]) -> dict[str, SubModel]:
    """The sub-models `sub0`, `sub1`, … that `make_detachable(model, widths=…)` asks for.

    Raises:
        WidthError: It is no list of shares in (0, 1), or one is there twice.
    """
    if not isinstance(widths, list | tuple) or not widths:
        raise WidthError(f"widths={widths!r}: give a list of shares of the filters", hint="widths=[0.75, 0.5]")
    for share in widths:
        if not isinstance(share, float) or not 0 < share < 1:
            raise WidthError(
                f"widths={list(widths)}: {share!r} is no share of the filters between 0 and 1",
                hint="widths=[0.75, 0.5]; the base-model has all of them",
            )
    if len(set(widths)) < len(widths):
        twice = next(share for share in widths if list(widths).count(share) > 1)
        raise WidthError(f"widths={list(widths)}: {twice:g} is there twice", hint="leave one of them out")
    return {f"sub{i}": SubModel(width=float(share)) for i, share in enumerate(widths)}


@dataclass(frozen=True)
class Span:
    """A part of a graph that a model leaves out.

    Attributes:
        start: Position in `TracedGraph.live` of the value it begins behind; that of the image for the front.
        end: Position of the last value it leaves out.
    """

    start: int
    end: int

    def __contains__(self, position: int) -> bool:
        return self.start < position <= self.end


Route = tuple[Span, ...]
"""The spans that a model leaves out, front to back; none for the base-model."""


def split_span(text: str) -> tuple[str, str]:
    """The names of a span's ends; an empty first one is the image.

    Raises:
        CutError: It is no span.
    """
    start, colon, end = text.partition(":")
    if not colon or not end or ":" in end:
        raise CutError(f"{text!r} is no span", hint=HINT)
    return start, end


def find_route(analysis: CutAnalysis, model: SubModel) -> tuple[list[tuple[str, str]], Route]:
    """The ends of a sub-model's spans, front to back, and its route.

    Raises:
        CutError: A span is none, its ends are no cuts, reversed or equal, or two spans overlap or touch.
    """
    found = []
    for text in model.drop:
        start, end = split_span(text)
        span = Span(_position(analysis, start), analysis.position[analysis.find(end)])
        if span.start >= span.end:
            wrong = "both ends are the same place" if span.start == span.end else "its ends are reversed"
            back = f"drop=[{f'{end}:{start}'!r}]" if span.start > span.end else ""
            raise CutError(f"the span {text!r} leaves nothing out: {wrong}", hint=back or HINT, node=end)
        found.append((span, (start, end)))
    found.sort(key=lambda item: item[0].start)
    for (one, (a, b)), (other, (c, d)) in pairwise(found):
        if other.start <= one.end:
            last = d if other.end > one.end else b
            raise CutError(
                f"the spans '{a}:{b}' and '{c}:{d}' {'touch' if other.start == one.end else 'overlap'}",
                hint=f"drop=['{a}:{last}']",
                node=c,
            )
    return [ends for _, ends in found], tuple(span for span, _ in found)


def _position(analysis: CutAnalysis, start: str) -> int:
    """Where a span begins."""
    if start:
        return analysis.position[analysis.find(start)]
    return next(analysis.position[node] for node in analysis.traced.live if node.op == "placeholder")


def check_distinct(routes: Mapping[str, Route], names: Mapping[str, Sequence[str]]) -> None:
    """Refuse two models with the same route.

    Raises:
        CutError: There are such.
    """
    seen: dict[Route, str] = {}
    for name, route in routes.items():
        if route in seen:
            raise CutError(
                f"{seen[route]} and {name} leave out the same: {', '.join(names[name])}", hint="drop one of them"
            )
        seen[route] = name


def parting(one: Route, other: Route) -> int | None:
    """The position up to which two models are the same network; None where they are the same to the end."""
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return min(mine.start, theirs.start)
    longer = max(one, other, key=len)
    rest = longer[min(len(one), len(other)) :]
    return rest[0].start if rest else None


def owner(routes: Mapping[str, Route], name: str, position: int) -> str:
    """The first of the models that are one network with `name` up to a position: layers there are its own."""
    for other, route in routes.items():
        apart = parting(routes[name], route)
        if apart is None or position <= apart:
            return other
    return name


def bridge_place(graph: TracedGraph, routes: Mapping[str, Route], name: str, number: int) -> str:
    """Where the module is that stands for a model's span; models that are the same so far share it."""
    span = routes[name][number]
    whose = owner(routes, name, span.end)
    from_image = graph.live[span.start].op == "placeholder"
    place = folder(whose)
    return f"{STEPDOWNS}.{place}" if from_image else f"{BRIDGES}.{place}.{number}"


def folder(name: str) -> str:
    """What a model's own parts are below, in `norms` and the others: torch's modules have a method `half`."""
    return HALF if name == "half" else name
