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


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of README and docs.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs", help="their folder")
    folder = parser.parse_args().out
    write(results(read("routes-cifar10.json"), read("front-cifar10.json")), folder / "results.svg")
    write(study(read("study-short.json")["rows"]), folder / "study.svg")
    routes, others = read("study-routes.json")["rows"], read("accuracy.json")["rows"]
    write(approaches(routes, others), folder / "approaches.svg")


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


def approaches(rows: Sequence[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> Chart:
    """Sub-models of families beside the same networks alone and the alternatives, trained with the same effort."""
    by_run = {(row["run"], row["model"]): row for row in rows}

    def models(*runs: str) -> tuple[Point, ...]:
        """Models of families that have a base-model in common: each where it is first named."""
        found = {row["model"]: row for run in reversed(runs) for row in rows if row["run"] == run}
        return in_order(over_seeds(row) for row in found.values())

    alone = [over_seeds(row) for (run, model), row in by_run.items() if run == f"{model}-alone"]
    peers: dict[str, list[Mapping[str, Any]]] = {}
    for row in others:
        peers.setdefault(row["run"], []).append(row)
    means = {run: mean_of(run, of) for run, of in peers.items()}
    series = {
        "routes, in a family": models("late+middle"),
        "fewer filters": models("wide+narrow"),
        "routes and fewer filters": models("thin+slim"),
        "dropping the front": models("front"),
        "each network alone": in_order(alone),
        "pruned and trained on": in_order(point for run, point in means.items() if run.startswith("pruned")),
        "early exits": in_order(point for run, point in means.items() if run.startswith("exits")),
    }
    return Chart(
        "Accuracy against multiply-accumulates, short budget",
        "Families of routes and of fewer filters beside the same networks alone, pruned networks and early exits.",
        MACS,
        ACCURACY,
        tuple(Series(name, points, i) for i, (name, points) in enumerate(series.items()) if points),
    )


def mean_of(run: str, rows: Sequence[Mapping[str, Any]]) -> Point:
    """The mean over seeds of an alternative."""
    tests = [row["test"] for row in rows]
    return Point(mean(row["macs"] for row in rows), mean(tests), run, error=stdev(tests) if tests[1:] else 0.0)


def over_seeds(row: Mapping[str, Any]) -> Point:
    """The mean over seeds, with its standard deviation."""
    last = row["last"]
    return Point(row["macs"], mean(last), row["model"], error=stdev(last) if last[1:] else 0.0)


def in_order(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points by their costs, as a line connects them."""
    return tuple(sorted(points, key=lambda point: point.x))


if __name__ == "__main__":
    main()
