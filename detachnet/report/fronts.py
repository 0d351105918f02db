"""front -> a figure: what was found over what it costs."""

from __future__ import annotations

from pathlib import Path

from detachnet.errors import CheckpointError
from detachnet.report.chart import Axis, Chart, Point, Series, percent, write
from detachnet.selection.front import Front
from detachnet.surgery.plan import BASE

_MILLION = 1e6
_LABEL = {
    "macs": "million MACs for one image",
    "bytes": "million bytes of parameters",
}


def figure(front: Front, path: str | Path) -> None:
    """Draw the accuracy of what was found against its cost, to a `.png`, `.svg` or `.pdf`.

    Raises:
        CheckpointError: The file cannot be written.
    """
    line = [Point(point.cost / _MILLION, point.accuracy) for point in front.points]
    chosen = [
        Point(point.cost / _MILLION, point.accuracy, name, f"{name} {100 * point.accuracy:.2f} %")
        for name, point in [*((found.name, found) for found in front.found), (BASE, front.base)]
    ]
    words = f"{front.title}: {', '.join(point.title for point in chosen)}."
    x = Axis(_LABEL[front.by], "{:g}".format, from_zero=True)
    y = Axis(f"held-out accuracy, n = {front.images}", percent)
    series = (Series("the best that were tried", tuple(line), 0), Series("chosen", tuple(chosen), 1))
    try:
        write(Chart("The front", words, x, y, series), path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write the figure {path}", what=str(error)) from error
