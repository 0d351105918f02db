"""What a search found: sub-models within budgets, and what beats what; prints as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.plan import BASE
from detachnet.surgery.routes import SubModel
from detachnet.text import Table, si

By = Literal["macs", "bytes"]
UNITS: dict[By, str] = {"macs": "MACs", "bytes": "bytes"}


@dataclass(frozen=True)
class Point:
    """A sub-model that was tried.

    Attributes:
        model: What leaves out what it does.
        cost: In the unit of the budgets.
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
class Found(Point):
    """A sub-model that was chosen.

    Attributes:
        name: What it is called in the family.
        budgets: Those it is the best for, in the unit of the cost.
    """

    name: str = ""
    budgets: tuple[float, ...] = ()


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
    """

    net: DetachableNet
    by: By
    base: Point
    found: tuple[Found, ...]
    points: tuple[Point, ...]
    tries: int
    images: int
    seconds: float

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
        header = ("model", "left out", "budget", "MACs", "of base", "parameters", "held-out accuracy")
        rows = [(BASE, "", "", *self._row(self.base))]
        for found in self.found:
            budgets = " and ".join(f"{si(round(budget))} {UNITS[self.by]}" for budget in found.budgets)
            rows.append((found.name, found.left_out, budgets, *self._row(found)))
        return Table(header, tuple(rows), self.title, left=2)

    def _row(self, point: Point) -> tuple[str, ...]:
        share = f"{100 * point.macs / max(1, self.base.macs):.0f} %"
        return si(point.macs), share, si(point.num_params), f"{100 * point.accuracy:.2f} %"

    def to_json(self) -> dict[str, Any]:
        """All of it but the family, for a file."""
        return {
            "by": self.by,
            "unit": UNITS[self.by],
            "tries": self.tries,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "base": _told(self.base),
            "found": [{"name": f.name, "budgets": list(f.budgets)} | _told(f) for f in self.found],
            "front": [_told(point) for point in self.points],
        }

    def __str__(self) -> str:
        return str(self.table)


def _told(point: Point) -> dict[str, Any]:
    model = {} if point.model is None else point.model.model_dump(mode="json")
    return {
        "model": model,
        "cost": point.cost,
        "macs": point.macs,
        "num_params": point.num_params,
        "accuracy": point.accuracy,
    }


def unbeaten(points: Iterable[Point]) -> tuple[Point, ...]:
    """Those that nothing cheaper, or as cheap, is as accurate as; the cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return tuple(kept)


def name_of(by: By, budget: float, base: float) -> str:
    """What a sub-model for a budget is called: `macs40` for 40 % of the MACs, `bytes12_5`."""
    return by + f"{100 * budget / base:.4g}".replace(".", "_").replace("-", "_")
