"""What a search found: sub-models within budgets, and what beats what; prints as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.plan import BASE
from detachnet.surgery.routes import SubModel
from detachnet.text import Table, si

Counted = Literal["macs", "bytes"]
By = Literal["macs", "bytes", "latency_ms"]
UNITS: dict[By, str] = {"macs": "MACs", "bytes": "bytes", "latency_ms": "ms"}


@dataclass(frozen=True)
class FrontPoint:
    """A sub-model that was tried.

    Attributes:
        model: What leaves out what it does.
        cost: In the unit of the budgets; of a latency the sum of what its segments take.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters when detached.
        accuracy: On the held-out images, in [0, 1], its norms recalibrated.
    """

    model: SubModel | None
    cost: float
    macs: int
    num_params: int
    accuracy: float

    @property
    def left_out(self) -> str:
        """In a few words."""
        if self.model is None:
            return ""
        narrow = self.model.width if isinstance(self.model.width, dict) else {}
        filters = f"filters of {len(narrow)} group" + "s" * (len(narrow) != 1) if narrow else ""
        return ", ".join([*self.model.drop, *([filters] if filters else [])])


@dataclass(frozen=True)
class Found(FrontPoint):
    """A sub-model that was chosen.

    Attributes:
        name: What it is called in the family.
        budgets: Those it is the best for, in the unit of the cost.
        measured: Milliseconds that it takes as a whole, where budgets are latencies.
    """

    name: str = ""
    budgets: tuple[float, ...] = ()
    measured: float | None = None


@dataclass(frozen=True)
class Front:
    """The answer of `search`; prints as a table.

    Attributes:
        net: The family with the sub-models that were chosen, their norms recalibrated.
        by: What budgets are of.
        base: The base-model.
        found: What was chosen, the largest budget first.
        points: All that was tried and that nothing cheaper or as cheap is as accurate as; the cheapest first.
        tries: How many candidates were tried.
        images: Held-out images that decided.
        seconds: What trying them took, added up.
        how: What latencies were measured with and on; empty where budgets are of what is counted.
    """

    net: DetachableNet
    by: By
    base: FrontPoint
    found: tuple[Found, ...]
    points: tuple[FrontPoint, ...]
    tries: int
    images: int
    seconds: float
    how: str = ""

    @property
    def deviation(self) -> float:
        """By what share the sum of what was chosen is off at most from what it takes as a whole."""
        return max((abs(f.cost / f.measured - 1) for f in self.found if f.measured), default=0.0)

    @property
    def models(self) -> dict[str, SubModel]:
        """Name of each sub-model that was chosen → what it leaves out; `make_detachable` takes them as `cuts`."""
        return {found.name: found.model for found in self.found if found.model is not None}

    @property
    def title(self) -> str:
        """The heading of the table."""
        return (
            f"{self.net.plan.model}: {self.tries} candidates tried on {self.images} held-out images "
            f"in {self.seconds / 60:.1f} minutes"
        )

    @property
    def table(self) -> Table:
        """The base-model and what was chosen."""
        ms = ("p50 ms", "of segments") if self.how else ()
        header = ("model", "left out", "budget", *ms, "MACs", "of base", "parameters", "held-out accuracy")
        rows = [(BASE, "", "", *self._row(self.base, self.base.cost))]
        for found in self.found:
            budgets = " and ".join(f"{self._text(budget)} {UNITS[self.by]}" for budget in found.budgets)
            rows.append((found.name, found.left_out, budgets, *self._row(found, found.measured)))
        said = f"{self.how}; segments added up are off by {100 * self.deviation:.1f} % at most"
        return Table(header, tuple(rows), self.title, (said,) if self.how else (), left=2)

    def _row(self, point: FrontPoint, measured: float | None) -> tuple[str, ...]:
        ms = (f"{measured or 0:.3f}", f"{point.cost:.3f}") if self.how else ()
        share = f"{100 * point.macs / max(1, self.base.macs):.0f} %"
        return *ms, si(point.macs), share, si(point.num_params), f"{100 * point.accuracy:.2f} %"

    def _text(self, budget: float) -> str:
        return f"{budget:g}" if self.how else si(round(budget))

    def to_json(self) -> dict[str, Any]:
        """All of it but the family, for a file."""
        return {
            "by": self.by,
            "unit": UNITS[self.by],
            "tries": self.tries,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "measured_with": self.how,
            "deviation": self.deviation,
            "base": _told(self.base),
            "found": [
                {"name": f.name, "budgets": list(f.budgets), "measured": f.measured} | _told(f) for f in self.found
            ],
            "front": [_told(point) for point in self.points],
        }

    def __str__(self) -> str:
        return str(self.table)


def _told(point: FrontPoint) -> dict[str, Any]:
    model = {} if point.model is None else point.model.model_dump(mode="json")
    return {
        "model": model,
        "cost": point.cost,
        "macs": point.macs,
        "num_params": point.num_params,
        "accuracy": point.accuracy,
    }


def unbeaten(points: Iterable[FrontPoint]) -> tuple[FrontPoint, ...]:
    """Those that nothing cheaper, or as cheap, is as accurate as; the cheapest first."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return tuple(kept)


def name_of(by: By, budget: float, base: float) -> str:
    """What a sub-model for a budget is called: `macs40` for 40 % of the MACs, `bytes12_5`; `ms5` for 5 ms."""
    number = f"ms{budget:.4g}" if by == "latency_ms" else f"{by}{100 * budget / base:.4g}"
    return re.sub(r"\W", "_", number)
