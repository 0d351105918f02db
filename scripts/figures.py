"""Draw the figures of README and docs anew, from what is committed in benchmarks/results.

python scripts/figures.py [--out docs]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from detachnet.report.chart import Axis, Chart, Point, Series, percent, write
from detachnet.text import si

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MACS = Axis("multiply-accumulates for one image", si, from_zero=True)
ACCURACY = Axis("test accuracy", percent)
ALONE = {"base": "base-alone", "sub0": "sub0-alone", "sub1": "sub1-alone"}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of README and docs.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs", help="their folder")
    folder = parser.parse_args(words).out
    folder.mkdir(parents=True, exist_ok=True)
    write(results(read("routes-cifar10.json"), read("front-cifar10.json")), folder / "results.svg")
    write(study(read("study-short.json")["rows"]), folder / "study.svg")


def read(name: str) -> dict[str, Any]:
    """A result, as its command wrote it."""
    return dict(json.loads((RESULTS / name).read_text()))


def results(routes: Mapping[str, Any], front: Mapping[str, Any]) -> Chart:
    """A family of routes, a cascade of its models on half of the test images, and one that drops the front."""

    def models(run: Mapping[str, Any]) -> tuple[Point, ...]:
        return in_order(Point(row["macs"], row["last_accuracy"], row["model"]) for row in run["results"])

    cascade = in_order(Point(row["mean_macs"], row["accuracy"]) for row in routes["cascade"]["points"])
    return Chart(
        "Accuracy against multiply-accumulates",
        "A base-model with routes that leave out inner layers, their cascade, and sub-models that drop the front.",
        MACS,
        ACCURACY,
        (
            Series("routes, one family", models(routes), 0),
            Series("their cascade, on average", cascade, 1),
            Series("dropping the front, as in the paper", models(front), 2),
        ),
    )


def study(rows: Iterable[Mapping[str, Any]]) -> Chart:
    """The family of the study beside the same networks alone, and the paper's way."""
    found = {(row["run"], row["model"]): row for row in rows}
    ways = {
        "family": [found["all", model] for model in ALONE],
        "alone, same entry": [found[run, model] for model, run in ALONE.items()],
        "the paper's way": [found["paper", model] for model in ALONE],
    }
    return Chart(
        "Accuracy against multiply-accumulates, short budget",
        "A family beside the same networks trained alone and the paper's way; bars are one standard deviation.",
        MACS,
        ACCURACY,
        tuple(Series(name, in_order(map(over_seeds, ways[name])), i) for i, name in enumerate(ways)),
    )


def over_seeds(row: Mapping[str, Any]) -> Point:
    """The mean over seeds, with its standard deviation."""
    return Point(row["macs"], mean(row["last"]), row["model"], error=stdev(row["last"]))


def in_order(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points by their costs, as a line connects them."""
    return tuple(sorted(points, key=lambda point: point.x))


if __name__ == "__main__":
    main()
