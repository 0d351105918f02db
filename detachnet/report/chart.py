"""points -> a chart, drawn by matplotlib: SVG for a page or alone, and whatever else matplotlib writes.

Equal charts give equal bytes. Alone, a chart has no background, and colours that can be read on white and black.
On a page it takes the page's colours.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from detachnet.surgery.figures import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Size = tuple[float, float]
Box = tuple[float, float, float, float]
ON_PAGE: Size = (400, 280)
ALONE: Size = (520, 320)
"""Width and height in points, of which texts have 12.5; alone, the legend makes it higher."""
INK, DARK_INK = "#777c84", "#1b2430"
"""Texts and axes: readable on any background, and on white."""
LOOKS: tuple[tuple[str, str, Any], ...] = (
    ("#3d82c4", "o", "-"),
    ("#c8661b", "s", (0, (7, 4))),
    ("#9166c9", "^", (0, (2, 3))),
    ("#139481", "D", (0, (10, 3, 2, 3))),
    ("#cc4f94", "x", (0, (4, 2))),
    ("#8a8420", "+", (0, (1, 4))),
)
"""Colour, marker and dashes of a series: looks differ by more than colour. A seventh looks like the first."""
_LETTER, _LINE, _LEGEND_LINE = 7.2, 14.0, 20.0
"""Width of a letter, heights of a label and of a line of the legend; a little more than they are."""
_RC: Any = {
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0.0,
    "axes.ymargin": 0.0,
    "font.size": 12.5,
    "lines.scale_dashes": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "detachnet",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Point:
    """One point: its place, what is written beside it, what it says when pointed at, and ± how much of y."""

    x: float
    y: float
    label: str = ""
    title: str = ""
    error: float = 0.0


@dataclass(frozen=True)
class Series:
    """Points that look alike.

    Attributes:
        name: What the legend calls them.
        points: In the order in which a line connects them; those that are not finite are left out.
        style: Which look, from 0.
    """

    name: str
    points: tuple[Point, ...]
    style: int


@dataclass(frozen=True)
class Axis:
    """One axis: its label, how its ticks are written, and whether it starts at zero."""

    label: str
    text: Callable[[float], str]
    from_zero: bool = False


@dataclass(frozen=True)
class Chart:
    """Points over two axes, connected within each series.

    Attributes:
        title: Read by screen readers first.
        description: What there is to see, in a sentence.
        x: The horizontal axis.
        y: The vertical axis.
        series: What is drawn.
        markers: Draw each point's marker and label; else the line only, with a marker at its end.
    """

    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    markers: bool = True


def percent(share: float) -> str:
    """A share of 1 as a whole number of percent, or with the decimals it needs."""
    return f"{100 * share:.4g} %"


def on_page(chart: Chart) -> Markup:
    """The chart as an element of a page that says `--s0` to `--s5`, and has a legend of its own."""
    with _our_settings():
        inside = _inside(_draw(chart, ON_PAGE, INK), chart)
    return svg(chart.title, chart.description, "chart", ON_PAGE, _page_colours(inside))


def write(chart: Chart, path: str | Path) -> None:
    """Write the chart with a legend to a file: `.svg`, or what matplotlib knows, such as `.png` and `.pdf`.

    Raises:
        OSError: It cannot be written.
        ValueError: matplotlib does not know its suffix.
    """
    suffix = Path(path).suffix.lower()
    columns = _legend_columns(chart, ALONE[0])
    size = (ALONE[0], ALONE[1] + _LEGEND_LINE * math.ceil(len(chart.series) / columns))
    with _our_settings():
        figure = _draw(chart, size, INK if suffix == ".svg" else DARK_INK, columns)
        if suffix != ".svg":
            figure.savefig(path, dpi=150, metadata={"CreationDate": None} if suffix == ".pdf" else None)
            return
        inside = _inside(figure, chart)
    more = f' width="{size[0]:g}" height="{size[1]:g}" xmlns="http://www.w3.org/2000/svg"'
    Path(path).write_text(
        svg(chart.title, chart.description, "chart", size, inside, more) + "\n", encoding="utf-8"
    )


def key(style: int) -> Markup:
    """The look of a series, for a page's legend."""
    from matplotlib.figure import Figure

    with _our_settings():
        figure = Figure(figsize=(32 / 72, 16 / 72), dpi=72)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 32), ylim=(0, 16))
        axes.set_axis_off()
        _plot(axes, [1, 31], [8, 8], style, "line")
        _plot(axes, [16], [8], style, "marker")
        inside = _page_colours(_inside(figure))
    return Markup('<svg class="key" viewBox="0 0 32 16" aria-hidden="true">{}</svg>').format(inside)


@contextmanager
def _our_settings() -> Iterator[None]:
    """Draw by matplotlib's defaults and ours, not by the user's, which come back."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A browser has letters that matplotlib's font has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def _draw(chart: Chart, size: Size, ink: str, columns: int = 0) -> Figure:
    """The one drawing of points over axes, with a legend of that many columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    axes: Axes = figure.subplots()
    for series in chart.series:
        points = _finite(series)
        if len(points) > 1:
            _plot(axes, [p.x for p in points], [p.y for p in points], series.style, "line")
    for i, (p, style) in enumerate(_marked(chart)):
        if p.error:
            _plot(axes, [p.x, p.x], [p.y - p.error, p.y + p.error], style, "bar")
        _plot(axes, [p.x], [p.y], style, "marker").set_gid(f"point{i}")
    _dress(axes, chart, ink)
    if columns:
        _add_legend(figure, chart, columns, ink)
    figure.draw_without_rendering()  # now points have places
    if chart.markers:
        _write_labels(axes, [_finite(series) for series in chart.series], size[0], ink)
    return figure


def _finite(series: Series) -> list[Point]:
    return [point for point in series.points if math.isfinite(point.x + point.y)]


def _marked(chart: Chart) -> list[tuple[Point, int]]:
    """The points that have a marker, each with its look."""
    last = 0 if chart.markers else -1
    return [(point, series.style) for series in chart.series for point in _finite(series)[last:]]


def _plot(axes: Axes, x: Sequence[float], y: Sequence[float], style: int, *parts: str) -> Line2D:
    """Draw points with these parts of a look: "line", "marker", or the "bar" of an error."""
    return axes.plot(x, y, **_look(style, *parts), clip_on=False)[0]


def _look(style: int, *parts: str) -> dict[str, Any]:
    colour, shape, dashes = LOOKS[style % len(LOOKS)]
    if "bar" in parts:
        return {"color": colour, "linewidth": 1.4, "marker": "_", "markersize": 9}
    look: dict[str, Any] = {"color": colour, "linewidth": 2.2, "linestyle": dashes if "line" in parts else ""}
    return look | ({"marker": shape, "markersize": 9, "markeredgewidth": 2} if "marker" in parts else {})


def _dress(axes: Axes, chart: Chart, ink: str) -> None:
    """Axes from round number to round number, with a line below and faint ones across."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set(color=ink, clip_on=False)
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=ink, alpha=0.3, clip_on=False)
    axes.tick_params(color=ink, labelcolor=ink)
    axes.tick_params(axis="y", left=False)
    for side, axis in ((axes.xaxis, chart.x), (axes.yaxis, chart.y)):
        side.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        side.set_major_formatter(_formatter(axis))
        side.set_label_text(axis.label, color=ink)
    if any(map(_finite, chart.series)):
        axes.update_datalim([(0, 0)], updatex=chart.x.from_zero, updatey=chart.y.from_zero)
        axes.autoscale_view()
    else:
        axes.set(xlim=(0, 1), ylim=(0, 1))


def _formatter(axis: Axis) -> Callable[[float, float], str]:
    return lambda value, _: axis.text(value)


def _legend_columns(chart: Chart, width: float) -> int:
    """How many names there is room for in a line."""
    longest = max((len(series.name) for series in chart.series), default=0)
    return max(1, min(len(chart.series), int(width / (_LETTER * longest + 60))))


def _add_legend(figure: Figure, chart: Chart, columns: int, ink: str) -> None:
    """Names below the axes."""
    from matplotlib.lines import Line2D

    names = [series.name for series in chart.series]
    handles = [Line2D([], [], **_look(series.style, "line", "marker")) for series in chart.series]
    looks: dict[str, Any] = {"frameon": False, "labelcolor": ink, "handlelength": 3}
    figure.legend(handles, names, loc="outside lower center", ncols=columns, **looks)


def _write_labels(axes: Axes, lines: Sequence[Sequence[Point]], width: float, ink: str) -> None:
    """Each point's name beside it, with a line to it from further away; one name for points of one name and x."""
    points = sorted((p for line in lines for p in line), key=lambda p: p.y)
    highest = {(p.label, p.x): p for p in points if p.label}
    left, bottom, _, top = axes.bbox.extents
    covered = list(_covered(axes, lines))
    for p in sorted(highest.values(), key=lambda p: p.y):
        x, y = axes.transData.transform((p.x, p.y))
        dx, dy = _free_place(x, y, _LETTER * len(p.label), (left, bottom, width, top + 8), covered)
        looks: dict[str, Any] = {"color": ink, "weight": "bold", "ha": "right" if dx < 0 else "left"}
        if abs(dy) > _LINE:
            looks["arrowprops"] = {"arrowstyle": "-", "color": ink, "linewidth": 0.8}
        looks |= {"xytext": (dx, dy), "textcoords": "offset points", "va": "center_baseline"}
        axes.annotate(p.label, (p.x, p.y), **looks).set_in_layout(False)


def _covered(axes: Axes, lines: Sequence[Sequence[Point]]) -> Iterator[Box]:
    """Boxes around points with their error bars, and little ones along the lines between points."""
    place = axes.transData.transform
    for line in lines:
        for p in line:
            (x, low), (_, high) = place([(p.x, p.y - p.error), (p.x, p.y + p.error)])
            yield x - 8, low - 8, x + 8, high + 8
        for a, b in pairwise(line):
            (ax, ay), (bx, by) = place([(a.x, a.y), (b.x, b.y)])
            count = math.ceil(math.hypot(bx - ax, by - ay) / 6)
            for i in range(1, count):
                x, y = ax + (bx - ax) * i / count, ay + (by - ay) * i / count
                yield x - 2, y - 2, x + 2, y + 2


def _free_place(x: float, y: float, width: float, inside: Box, covered: list[Box]) -> Size:
    """Where a label goes from its point: right or left, as little up or down as covers nothing; it is noted."""
    for step in range(60):
        for dy in (step * _LINE / 4, -step * _LINE / 4):
            for dx, start in ((11.0, x + 11), (-11.0, x - 11 - width)):
                box = (start, y + dy - _LINE / 2, start + width, y + dy + _LINE / 2)
                fits = all(box[i] >= inside[i] and box[i + 2] <= inside[i + 2] for i in (0, 1))
                if fits and not any(_overlap(box, other) for other in covered):
                    covered.append(box)
                    return dx, dy
    return 11.0, 0.0  # more names than there is room


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(figure: Figure, chart: Chart | None = None) -> Markup:
    """What is in the SVG element matplotlib writes; shapes in place of references, so no name is there twice."""
    figure.patch.set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue().partition("</metadata>")[2].rpartition("</svg>")[0]
    shapes = dict(re.findall(r'<path id="(m\w+)" d="([^"]+)"', text))
    text = re.sub(r"<defs>.*?</defs>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<use xlink:href="#(\w+)" x="(.+?)" y="(.+?)" style="(.*?)"/>',
        lambda use: f'<path d="{shapes[use[1]]}" transform="translate({use[2]} {use[3]})" style="{use[4]}"/>',
        text,
    )
    text = re.sub(r"font: (bold |700 )?([\d.]+)px [^;\"]*", r"font: \1\2px system-ui, sans-serif", text)
    for i, (point, _) in enumerate(_marked(chart) if chart else ()):
        title = f"<title>{escape(point.title)}</title>" if point.title else ""
        text = text.replace(f'<g id="point{i}">', f"<g>{title}")
    text = re.sub(r' id="[^"]*"', "", text)
    return Markup(re.sub(r"\s*\n\s*", "\n", text).strip())


def _page_colours(text: Markup) -> Markup:
    """The page's names for our colours."""
    names = {INK: "currentColor"} | {look[0]: f"var(--s{i})" for i, look in enumerate(LOOKS)}
    return Markup(re.sub("|".join(names), lambda found: names[found[0]], text))
