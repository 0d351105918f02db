"""Write the tables of README and docs anew, from what is committed in benchmarks/results.

python scripts/tables.py [--root DIR]

A table stands below a line `<!-- table: NAME -->` and an empty one.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/study.md", "docs/results.md")
BASE = "base"
PRUNED, EXITS = ("pruned-40%", "pruned-26%"), "exits-"
SMALL = {
    "resnet20-half": "half a ResNet-20",
    "shufflenet": "ShuffleNetV2 ×0.5",
    "mobilenet": "MobileNetV2 ×0.5",
    "resnet20": "ResNet-20",
}


@dataclass(frozen=True)
class Scores:
    """What the seeds of one network reach.

    Attributes:
        test: Accuracies on the test images, in [0, 1].
        held_out: Accuracies on training images that no run is trained on.
        macs: Its multiply-accumulates for one image.
        share: The same over the base-model's.
        effort: All that was trained for it over the base-model's training.
        on_cpu: Whether it was trained on one.
        leaves: Share of the test images that each of its exits answers, on average over seeds.
    """

    test: tuple[float, ...]
    held_out: tuple[float, ...]
    macs: float
    share: float
    effort: float
    on_cpu: bool
    leaves: tuple[float, ...] = ()

    def __str__(self) -> str:
        spread = f" ± {100 * stdev(self.test):.2f}" if len(self.test) > 2 else ""
        return f"{100 * mean(self.test):.2f}{spread} %"

    def minus(self, other: Scores) -> str:
        """The difference of means in points."""
        return f"{100 * (mean(self.test) - mean(other.test)):+.2f}".replace("-", "−")

    @property
    def each(self) -> str:
        """Every seed, where there are too few for a deviation."""
        seeds = ", ".join(f"{100 * score:.2f}" for score in self.test)
        return f"{self} ({seeds})" if len(self.test) == 2 else str(self)


@cache
def families(file: str) -> dict[tuple[str, str], Scores]:
    """The study's rows, by run and model."""
    return {
        (row["run"], row["model"]): Scores(
            tuple(row["last"]),
            tuple(row.get("held_out", ())),
            row["macs"],
            row["macs_of_base"],
            row.get("effort", 1.0),
            all(on.startswith("cpu") for on in row.get("on", ["cpu"])),
        )
        for row in read(file)["rows"]
    }


@cache
def alternatives(file: str) -> dict[str, Scores]:
    """The alternatives' rows, by run; multiply-accumulates over those of the study's base-model."""
    base = next(row["macs"] for row in read("study-routes.json")["rows"] if row["model"] == BASE)
    seeds: dict[str, list[dict[str, Any]]] = {}
    for row in read(file)["rows"]:
        seeds.setdefault(row["run"], []).append(row)
    return {
        run: Scores(
            tuple(row["test"] for row in rows),
            tuple(row["held_out"] for row in rows),
            (macs := mean(row["macs"] for row in rows)),
            macs / base,
            mean(row["effort"] for row in rows),
            all(row["on"].startswith("cpu") for row in rows),
            tuple(map(mean, zip(*(row.get("leaves", ()) for row in rows), strict=True))),
        )
        for run, rows in seeds.items()
    }


def read(name: str) -> dict[str, Any]:
    """A result, as its command wrote it."""
    return dict(json.loads((RESULTS / name).read_text(encoding="utf-8")))


def whole(share: float) -> str:
    """A share as a whole number of percent."""
    return f"{100 * share:.0f} %"


Table = tuple[str, Iterable[Sequence[str]]]
"""Which columns stand left (l) and right (r), and header and rows."""


def readme() -> Table:
    """One line for each approach, short budget."""
    found, others = families("study-routes.json"), alternatives("alternatives.json")
    base, (wide, narrow), exits = found["base-alone", BASE], PRUNED, others["exits-40%"]

    def family(title: str, run: str, *models: str, shares: bool = False) -> tuple[str, ...]:
        rows = [found[run, name] for name in models]
        about = [f"{row} ({whole(row.share)})" if shares else str(row) for row in rows]
        cells = [", ".join(about), ""] if shares else [*about, ""][:2]
        return (f"one family: {title}", f"{rows[0].effort:.2f}", f"{found[run, BASE]}", *cells)

    first = family("routes and widths", "thin+slim-labels", "thin", "slim")
    small = [others[name] for name in list(SMALL)[:2]]
    pruning = others[wide].effort + others[narrow].effort - base.effort
    return "lrrrr", [
        ("", "training", "base-model", "about 40 % of its MACs", "26 %"),
        (f"**{first[0]}**", first[1], first[2], f"**{first[3]}**", f"**{first[4]}**"),
        family("two routes", "late+middle-labels", "late", "middle", shares=True),
        family("an exit", "exit-labels", "exit"),
        family("widths", "wide+narrow", "wide", "narrow"),
        family("without the front, as in the paper", "front", "front"),
        (
            "three networks: pruned and trained on (Torch-Pruning)",
            f"{pruning:.2f}",
            *map(str, (base, others[wide], others[narrow])),
        ),
        ("early exits, on average (earlyon)", f"{exits.effort:.2f}", "", f"{exits}", ""),
        (
            f"a small network: {', '.join(list(SMALL.values())[:2])}",
            f"{small[0].effort:.1f}",
            "",
            ", ".join(f"{row} ({whole(row.share)})" for row in small),
            "",
        ),
    ]


def beside_alone(file: str, *, paper: bool) -> Table:
    """The paper's two cuts, with all that helps, beside the same networks alone and the paper's way."""
    found = families(file)
    papers = ["the paper's way"] if paper else []
    lines: list[Sequence[str]] = [
        ("model", "MACs", *papers, "family", "alone, same entry", "difference", "each seed")
    ]
    for model in (BASE, "sub0", "sub1"):
        row, alone = found["all", model], found[f"{model}-alone", model]
        each = [f"{100 * (a - b):+.2f}" for a, b in zip(row.test, alone.test, strict=True)]
        seeds = ", ".join(each).replace("-", "−")
        ways = [str(found["paper", model])] if paper else []
        lines.append((model, f"{row.macs / 1e6:.1f} M", *ways, f"{row}", f"{alone}", row.minus(alone), seeds))
    return "l" + "r" * (5 + paper), lines


FAMILIES = (
    ("an exit behind convolution 5", "exit-labels"),
    ("two routes", "late+middle-labels"),
    ("routes and widths", "thin+slim-labels"),
    ("one route", "middle-labels"),
    ("widths, with distillation", "wide+narrow"),
    ("an inner route, with distillation", "inner"),
    ("without the front, with distillation", "front"),
)


def in_families() -> Table:
    """Each model in its family beside itself alone, short budget; daggers where a CPU trained it."""
    found = families("study-routes.json")
    base_on_cpu = families("study-short.json")["base-alone", BASE]
    lines: list[Sequence[str]] = [
        ("family", "MACs in training", "model", "MACs", "in the family", "alone", "difference")
    ]
    for title, run in FAMILIES:
        models = [model for of, model in found if of == run]
        on_cpu = found[run, BASE].on_cpu
        for model in models:
            row = found[run, model]
            alone = base_on_cpu if on_cpu and model == BASE else found[f"{model}-alone", model]
            dagger = " †" if alone is base_on_cpu else ""
            family = (title + " †" * on_cpu, f"{row.effort:.2f}") if model == BASE else ("", "")
            lines.append((*family, model, whole(row.share), f"{row}", f"{alone}{dagger}", row.minus(alone)))
    return "lrlrrrr", lines


def chosen() -> Table:
    """What held-out images say of the losses, short budget."""
    found = families("study-routes.json")
    both, labels = "labels and distillation", "**labels**"
    lines: list[Sequence[str]] = [("family", "losses", "base", "smaller models")]
    for family, losses, run in (
        ("middle", both, "middle"),
        ("middle", "the same, weight 0.5", "middle-half"),
        ("middle", "the same, weight 0.2", "middle-fifth"),
        ("middle", labels, "middle-labels"),
        ("exit", both, "exit"),
        ("exit", labels, "exit-labels"),
        ("late and middle", both, "late+middle"),
        ("late and middle", "the same, weight 0.5", "late+middle-half"),
        ("late and middle", labels, "late+middle-labels"),
        ("thin and slim", both, "thin+slim"),
        ("thin and slim", labels, "thin+slim-labels"),
    ):
        rows = {model: row for (of, model), row in found.items() if of == run}
        scores = {model: f"{100 * mean(row.held_out):.2f} %" for model, row in rows.items()}
        smaller = ", ".join(f"{model} {score}" for model, score in scores.items() if model != BASE)
        lines.append((family + " †" * rows[BASE].on_cpu, losses, scores[BASE], smaller))
    return "llrr", lines


def beside() -> Table:
    """The alternatives, short budget."""
    others = alternatives("alternatives.json")
    exits = sorted((run for run in others if run.startswith(EXITS)), key=lambda run: -others[run].share)
    wide, narrow = PRUNED
    titles = {wide: "pruned and trained on (Torch-Pruning 1.6.1)", narrow: "the same"}
    titles |= {exits[0]: "early exits (earlyon 0.3.0), on average"}
    titles |= dict.fromkeys(exits[1:], "the same network, other thresholds") | SMALL
    rows = [(title, others[run]) for run, title in titles.items()]
    rows.append(("base-model alone", families("study-routes.json")["base-alone", BASE]))
    return "lrrr", [
        ("", "MACs in training", "MACs of base", "accuracy"),
        *((title, f"{row.effort:.2f}", whole(row.share), f"{row}") for title, row in rows),
    ]


def paper() -> Table:
    """The paper's Table 1: its two sub-models beside the same networks alone."""
    rows = {(row["run"], row["model"]): row for row in read("paper.json")["rows"]}
    own = "with statistics of its own"
    lines: list[Sequence[str]] = [
        ("model", "MACs", "parameters", "alone", "family, best epoch", "last epoch", own, "to alone")
    ]
    for (run, model), row in rows.items():
        if run == "all":
            measured, alone = mean(row["recalibrated"]), rows.get((f"{model}-alone", model))
            macs = f"{row['macs'] / 1e6:.1f} M" + f" ({whole(row['macs_of_base'])})" * (model != BASE)
            scores = [f"{100 * accuracy:.2f} %" for accuracy in (mean(row["best"]), mean(row["last"]), measured)]
            beside = ("not trained", "")
            if alone is not None:
                minus = f"{100 * (measured - mean(alone['last'])):+.2f}".replace("-", "−")
                beside = (f"{100 * mean(alone['last']):.2f} %", minus)
            lines.append((model, macs, f"{row['num_params'] / 1e6:.2f} M", beside[0], *scores, beside[1]))
    return "lrrrrrrr", lines


ROUTES = (BASE, "late", "middle")


def converged() -> Table:
    """Two routes beside themselves alone, 40 epochs."""
    found = families("study-converged.json")
    lines: list[Sequence[str]] = [("model", "MACs", "alone", "in the family", "sub-models' losses × 0.5")]
    for model in ROUTES:
        alone, family = found[f"{model}-alone", model], found["late+middle", model]
        macs = f"{family.macs / 1e6:.1f} M" + (f" ({whole(family.share)})" if model != BASE else "")
        lines.append((model, macs, alone.each, family.each, found["late+middle-half", model].each))
    return "lrrrr", lines


def converged_labels() -> Table:
    """Two routes from labels alone, 40 epochs."""
    found, labels = families("study-converged.json"), families("study-converged-labels.json")
    on = "on held-out images: "
    lines: list[Sequence[str]] = [
        ("model", "from labels alone", "with distillation", f"{on}labels", "distillation", "alone")
    ]
    for model in ROUTES:
        family, taught = labels["late+middle-labels", model], found["late+middle", model]
        rows = (family, taught, found[f"{model}-alone", model])
        lines.append((model, family.each, f"{taught}", *(f"{100 * mean(row.held_out):.2f} %" for row in rows)))
    return "lrrrrr", lines


@cache
def costs() -> dict[str, dict[str, Any]]:
    """What each network of the study takes where it runs."""
    return {row["network"]: row for row in read("costs.json")["rows"]}


def latency(network: str, runtime: str, leaves: Sequence[float] = ()) -> str:
    """Over the base-model's; the mean over where images leave."""
    if not leaves:
        return f"{costs()[network][f'{runtime}_to_base']:.2f}"
    exits = [row[f"{runtime}_to_base"] for name, row in costs().items() if name.startswith("exits: ")]
    return f"{sum(a * b for a, b in zip(leaves, exits, strict=True)):.2f}"


def network_of(model: str) -> str:
    """The first network of that name, whose costs are those of the same one in any run."""
    return next(network for network in costs() if network.endswith(f": {model}"))


def converged_beside() -> Table:
    """Families and alternatives, 40 epochs on a CPU, with what they take where they run."""
    found, others = families("study-converged-labels.json"), alternatives("alternatives-converged.json")
    titles = {run: title for title, run in FAMILIES} | {run: "alone" for run, _ in found if run.endswith("-alone")}
    rows = [
        (f"{titles[run]}: {model}", network_of(model), row)
        for (run, model), row in sorted(found.items(), key=lambda item: list(titles).index(item[0][0]))
    ]
    for run, row in others.items():
        title = run.replace("pruned-", "pruned to ").replace("exits-", "early exits within ").replace("%", " %")
        rows.append((SMALL.get(run, title), "exits: final" if row.leaves else run, row))
    return "lrrrrrrr", [
        ("", "seeds", "training", "MACs", "accuracy", "held-out", "latency", "MB"),
        *(
            (
                title,
                f"{len(row.test)}",
                f"{row.effort:.2f}",
                whole(row.share),
                row.each,
                f"{100 * mean(row.held_out):.2f} %",
                f"{latency(network, 'torch', row.leaves)}, {latency(network, 'onnx', row.leaves)}",
                f"{costs()[network]['bytes'] / 1e6:.2f}",
            )
            for title, network, row in rows
        ),
    ]


TABLES: dict[str, Callable[[], Table]] = {
    "readme": readme,
    "short": partial(beside_alone, "study-short.json", paper=True),
    "long": partial(beside_alone, "study-long.json", paper=False),
    "in-families": in_families,
    "chosen": chosen,
    "beside": beside,
    "paper": paper,
    "converged": converged,
    "converged-labels": converged_labels,
    "converged-beside": converged_beside,
}


def markdown(columns: str, lines: Iterable[Sequence[str]]) -> str:
    """Header and rows with each column on its side."""
    header, *rows = lines
    rule = ["---" if side == "l" else "---:" for side in columns]
    written = ("| " + " | ".join(line) + " |" for line in chain([header], [rule], rows))
    return "\n".join(re.sub("  +", " ", line).replace("|  |", "| |") for line in written) + "\n"


def renewed(page: str) -> str:
    """A page with its tables written anew."""
    place = re.compile(r"(<!-- table: ([\w-]+) -->\n\n)(?:\|.*\n)*\n?")
    return place.sub(lambda found: found[1] + markdown(*TABLES[found[2]]()) + "\n", page)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the tables of README and docs.")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    root = parser.parse_args(words).root
    for name in PAGES:
        page = root / name
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
