"""Draw the figures of README and docs anew, from what is committed in benchmarks/results.

python scripts/figures.py [--out docs]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from detachnet.report.chart import Axis, Chart, Point, Series, percent, write
from detachnet.text import si

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MACS = Axis("multiply-accumulates for one image", lambda count: si(round(count)), from_zero=True)
LATENCY = Axis("ms for one image in ONNX Runtime, one thread", "{:.2g}".format, from_zero=True)
ACCURACY = Axis("test accuracy", percent)
ROUTES, BOTH = "late+middle-labels", "thin+slim-labels"
"""The study's families of two routes, and of routes with fewer filters."""
ALONE = {"base": "base-alone", "sub0": "sub0-alone", "sub1": "sub1-alone"}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of README and docs.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs", help="their folder")
    folder = parser.parse_args(words).out
    folder.mkdir(parents=True, exist_ok=True)
    write(results(read("routes-cifar10.json"), read("front-cifar10.json")), folder / "results.svg")
    write(study(read("study-short.json")["rows"]), folder / "study.svg")
    write(
        approaches(read("study-routes.json")["rows"], read("alternatives.json")["rows"]), folder / "approaches.svg"
    )
    at_length = read("study-converged-labels.json")["rows"], read("alternatives-converged.json")["rows"]
    write(converged(*at_length, MACS, macs_of), folder / "converged.svg")
    takes = {row["network"]: row["onnx_ms"] for row in read("costs.json")["rows"]}
    write(converged(*at_length, LATENCY, partial(latency_of, takes)), folder / "latency.svg")


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


def approaches(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> Chart:
    """Families of routes and widths beside the same networks alone, pruning, early exits and small networks."""
    found = {(row["run"], row["model"]): row for row in rows}
    seeds: dict[str, list[Mapping[str, Any]]] = {}
    for row in others:
        seeds.setdefault(row["run"], []).append(row)

    def family(run: str, *models: str) -> tuple[Point, ...]:
        return in_order(over_seeds(found[run, model]) for model in models)

    def other(*starts: str, named: bool = True) -> tuple[Point, ...]:
        runs = {name: rows for name, rows in seeds.items() if name.startswith(starts)}
        return in_order(runs_over_seeds(name if named else "", rows) for name, rows in runs.items())

    base = over_seeds(found["base-alone", "base"])
    return Chart(
        "Accuracy against multiply-accumulates, short budget",
        "Families of routes and widths beside pruning, early exits, small networks and models without the front.",
        MACS,
        ACCURACY,
        (
            Series("routes, one family", family(ROUTES, "base", "late", "middle"), 0),
            Series("routes and widths, one family", family(BOTH, "base", "thin", "slim"), 3),
            Series("pruned and trained on, a training each", in_order((*other("pruned"), base)), 1),
            Series("early exits, on average", other("exits", named=False), 2),
            Series("without the front, one family", family("front", "base", "front"), 4),
            Series("small networks, a training each", other("resnet20-half", "shufflenet"), 5),
        ),
    )


def converged(
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    x: Axis,
    place: Callable[[Mapping[str, Any]], float],
) -> Chart:
    """Families and alternatives trained until they hardly rise, each seed's mean, over one of their costs."""

    def family(run: str) -> tuple[Point, ...]:
        models = [row for row in rows if row["run"] == run]
        return in_order(Point(place(row), mean(row["last"]), row["model"]) for row in models)

    def other(start: str) -> Iterator[Point]:
        found = [row for row in others if row["run"].startswith(start)]
        for run in dict.fromkeys(row["run"] for row in found):
            of_run = [row for row in found if row["run"] == run]
            yield Point(mean(map(place, of_run)), mean(row["test"] for row in of_run))

    base = family("base-alone")
    return Chart(
        f"Accuracy against {x.label}, 45 000 images, 40 epochs",
        "Families of routes, routes and widths, and an exit beside pruning, early exits and a small network.",
        x,
        ACCURACY,
        (
            Series("routes, one family", family(ROUTES), 0),
            Series("routes and widths, one family", family(BOTH), 3),
            Series("an exit, one family", family("exit-labels"), 4),
            Series("pruned and trained on, a training each", in_order((*other("pruned"), *base)), 1),
            Series("early exits, on average", in_order(other("exits")), 2),
            Series("half a ResNet-20", in_order(other("resnet20-half")), 5),
        ),
    )


def macs_of(row: Mapping[str, Any]) -> float:
    """Multiply-accumulates for an image."""
    return float(row["macs"])


def latency_of(takes: Mapping[str, float], row: Mapping[str, Any]) -> float:
    """Milliseconds for an image; of early exits their mean, weighted with how many images leave at each."""
    if leaves := row.get("leaves"):
        exits = [ms for name, ms in takes.items() if name.startswith("exits: ")]
        return float(sum(share * ms for share, ms in zip(leaves, exits, strict=True)))
    if "model" not in row:
        return takes[row["run"]]
    return next(ms for network, ms in takes.items() if network.endswith(f": {row['model']}"))


def runs_over_seeds(label: str, rows: Sequence[Mapping[str, Any]]) -> Point:
    """The mean over seeds of an alternative, with its standard deviation."""
    scores = [row["test"] for row in rows]
    return Point(mean(row["macs"] for row in rows), mean(scores), label, error=stdev(scores))


def over_seeds(row: Mapping[str, Any]) -> Point:
    """The mean over seeds, with its standard deviation."""
    return Point(row["macs"], mean(row["last"]), row["model"], error=stdev(row["last"]))


def in_order(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points by their costs, as a line connects them."""
    return tuple(sorted(points, key=lambda point: point.x))


if __name__ == "__main__":
    main()
