"""numbers -> inline SVG: curves, points and the bars of a family; colours are left to the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from detachnet.plan import DetachPlan, ModelPlan

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 14, 46
STYLES = 6
"""Number of looks (colour, marker, dashes) the style sheet knows; a seventh series looks like the first."""

_CHAR, _LINE = 7.0, 14.0
"""Size of a letter of a label, in units of the view box; a little more than it is."""

Format = Callable[[float], str]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """One point of a series: its place, what is written beside it, and what it says when pointed at."""

    x: float
    y: float
    label: str = ""
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points that look alike.

    Attributes:
        name: What the legend calls them.
        points: In the order in which a line connects them.
        style: Which look, from 0.
    """

    name: str
    points: tuple[Point, ...]
    style: int


@dataclass(frozen=True)
class Axis:
    """One axis: its label, how its ticks are written, and whether it starts at zero."""

    label: str
    text: Format
    from_zero: bool = False


def percent(share: float) -> str:
    """A share of 1 as a whole number of percent, or with the decimals it needs."""
    return f"{100 * share:.4g} %"


def chart(title: str, description: str, x: Axis, y: Axis, series: Sequence[Series], markers: bool) -> Markup:
    """Points over two axes, connected within each series.

    Args:
        title: Read by screen readers first.
        description: What there is to see, in a sentence.
        x: The horizontal axis.
        y: The vertical axis.
        series: At least one point in all; points that are not finite are left out.
        markers: Draw each point's marker and label; else the line only, with a marker at its end.
    """
    shown = [Series(s.name, tuple(p for p in s.points if math.isfinite(p.x + p.y)), s.style) for s in series]
    points = [point for s in shown for point in s.points]
    across = _Scale([p.x for p in points], x.from_zero, LEFT, WIDTH - RIGHT)
    up = _Scale([p.y for p in points], y.from_zero, HEIGHT - BOTTOM, TOP)
    parts = _grid(x, y, across, up)
    parts += [_line(s, across, up) for s in shown if len(s.points) > 1]
    for s in shown:
        parts += [
            _marker(across(p.x), up(p.y), s.style, p.title) for p in (s.points if markers else s.points[-1:])
        ]
    if markers:
        parts += _labels([(across(p.x), up(p.y), p.label) for p in points])
    return _svg(title, description, f"0 0 {WIDTH} {HEIGHT}", parts, "chart")


def key(style: int) -> Markup:
    """The look of a series, for a legend."""
    line = Markup('<path class="line s{}" d="M1 8H31"/>').format(style % STYLES)
    return Markup('<svg class="key" viewBox="0 0 32 16" aria-hidden="true">{}{}</svg>').format(
        line, _marker(16, 8, style, "")
    )


def bar(plan: DetachPlan, model: ModelPlan) -> Markup:
    """One model of a family: its layers from the image to the output, as wide as their share of the MACs.

    The tails of all models end at the same place, and each sub-model's step-down stands right before its cut.
    """
    base = plan.models[0].macs
    cuts = {m.name: base - _tail(m) for m in plan.models[1:]}
    left = min([0, *(cuts[m.name] - m.stepdown.macs for m in plan.models[1:] if m.stepdown)])
    unit = 1000 / max(1, base - left)

    def at(macs: float) -> float:
        return (macs - left) * unit

    parts = [
        _rectangle(at(start), at(end), f"shared t{i % STYLES}")
        for i, (start, end) in enumerate(pairwise(sorted({0, *cuts.values(), base})))
        if start >= cuts.get(model.name, 0)
    ]
    if model.stepdown is not None:
        cut = cuts[model.name]
        parts.append(_rectangle(at(cut - model.stepdown.macs), at(cut), "stepdown"))
    parts += [Markup('<path class="cut" d="M{0:.2f} 0V40"/>').format(at(cut)) for cut in cuts.values()]
    return _svg(_bar_title(model), _bar_description(model, base), "0 0 1000 40", parts, "bar", stretch=True)


def _tail(model: ModelPlan) -> int:
    """MACs behind a sub-model's cut."""
    return model.macs - (model.stepdown.macs if model.stepdown else 0)


def _bar_title(model: ModelPlan) -> str:
    return f"{model.name}: {model.macs / 1e6:,.2f} million MACs"


def _bar_description(model: ModelPlan, base: int) -> str:
    if model.stepdown is None:
        return "The whole network, from the image to the output."
    share = f"{100 * model.macs / max(1, base):.0f} % of the base-model"
    return f"Everything up to {model.cut} is replaced by a step-down ({model.stepdown}); {share}."


def _rectangle(left: float, right: float, style: str) -> Markup:
    return Markup('<rect class="{}" x="{:.2f}" y="4" width="{:.2f}" height="32"/>').format(
        style, left, right - left
    )


class _Scale:
    """Values of an axis to places on the page, with round ticks; the axis reaches from tick to tick."""

    def __init__(self, values: Sequence[float], from_zero: bool, start: float, end: float) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        low = min(low, 0.0) if from_zero else low
        self.ticks = ticks(low, high)
        self.low, self.high = self.ticks[0], self.ticks[-1]
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`: about `wanted` of them."""
    if high <= low:
        gap = abs(low) / 10 or 1.0
        low, high = low - gap, high + gap
    raw = (high - low) / (wanted - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _grid(x: Axis, y: Axis, across: _Scale, up: _Scale) -> list[Markup]:
    """Grid lines, ticks and the axes' labels."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in up.ticks:
        at = up(tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, at, WIDTH - RIGHT))
        parts.append(_text(LEFT - 6, at + 4, y.text(tick), "end"))
    for tick in across.ticks:
        at = across(tick)
        parts.append(Markup('<path class="grid" d="M{:.1f} {}v5"/>').format(at, bottom))
        parts.append(_text(at, bottom + 18, x.text(tick), "middle"))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, bottom, WIDTH - RIGHT))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label, "middle"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        style, x, y, anchor, text
    )


def _line(series: Series, across: _Scale, up: _Scale) -> Markup:
    places = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in series.points)
    return Markup('<polyline class="line s{}" points="{}"/>').format(series.style % STYLES, places)


def _marker(x: float, y: float, style: int, title: str) -> Markup:
    """Circle, square, triangle, diamond, cross or plus: looks differ by more than colour."""
    r = 5.0
    shape = style % STYLES
    paths = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        f"M{x:.1f} {y - 6:.1f}l6 10.5h-12z",
        f"M{x:.1f} {y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z",
        f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8",
        f"M{x:.1f} {y - 5.5:.1f}v11m-5.5 -5.5h11",
    )
    name = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<path class="marker s{}" d="{}">{}</path>').format(shape, paths[shape], name)


def _labels(places: Sequence[tuple[float, float, str]]) -> list[Markup]:
    """Each point's name beside it, where it covers no other point or name; left out where there is no room."""
    taken: list[Box] = [(x - 10, y - 8, x + 10, y + 8) for x, y, _ in places]
    parts = []
    for x, y, label in places:
        size = _CHAR * len(label)
        tries = (
            (x + 11, y + 4, "start", x + 11),
            (x - 11, y + 4, "end", x - 11 - size),
            (x, y - 12, "middle", x - size / 2),
            (x, y + 20, "middle", x - size / 2),
        )
        for at, baseline, anchor, left in tries:
            box = (left, baseline - _LINE + 3, left + size, baseline + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if label and inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(_text(at, baseline, label, anchor, "label"))
                break
    return parts


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(
    title: str, description: str, box: str, parts: Sequence[Markup], style: str, stretch: bool = False
) -> Markup:
    """A drawing with a title and a description for screen readers."""
    aspect = Markup(' preserveAspectRatio="none"') if stretch else Markup("")
    return Markup(
        '<svg class="{}" viewBox="{}" role="img" aria-label="{}: {}"{}><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(style, box, title, description, aspect, title, description, Markup("").join(map(escape, parts)))
