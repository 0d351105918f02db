"""front -> a figure: what was found over what it costs."""

from __future__ import annotations

from pathlib import Path

from detachnet.errors import CheckpointError
from detachnet.report.chart import Axis, Chart, Point, Series, percent, write
from detachnet.selection.front import By, Front
from detachnet.surgery.plan import BASE

_AXIS: dict[By, tuple[float, str]] = {
    "macs": (1e6, "million MACs for one image"),
    "bytes": (1e6, "million bytes of parameters"),
    "latency_ms": (1.0, "milliseconds for one image"),
}


def figure(front: Front, path: str | Path) -> None:
    """Draw the accuracy of what was found against its cost, to a `.png`, `.svg` or `.pdf`.

    Raises:
        CheckpointError: The file cannot be written.
    """
    unit, label = _AXIS[front.by]
    line = [Point(point.cost / unit, point.accuracy) for point in front.points]
    chosen = [
        Point(point.cost / unit, point.accuracy, name, f"{name} {100 * point.accuracy:.2f} %")
        for name, point in [*((found.name, found) for found in front.found), (BASE, front.base)]
    ]
    words = f"{front.title}: {', '.join(point.title for point in chosen)}."
    x = Axis(label, "{:g}".format, from_zero=True)
    y = Axis(f"held-out accuracy, n = {front.images}", percent)
    series = (Series("the best that were tried", tuple(line), 0), Series("chosen", tuple(chosen), 1))
    try:
        write(Chart("The front", words, x, y, series), path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write the figure {path}", what=str(error)) from error
