"""What a search finds, beside routes and widths spread evenly and random candidates, on images it never saw.

    python benchmarks/search.py [NETWORK ...] [--data-root DIR] [--out runs/search] [--seeds 3] [--evolve 0]
                                [--set TABLE.KEY=VALUE] [--device cuda] [--quick] [--json FILE]

For each network (`vgg16_quarter`, `resnet20`) and seed a family is trained to search in, on 20 000 images of
CIFAR-10 for 6 epochs: in each step the base-model, the smallest and a random one of its sub-models. Then, within
60, 40 and 25 % of the base-model's MACs, on 2000 held-out training images:

- `search`: what `detachnet.search` chooses;
- `evolved`: what it chooses when so many more candidates evolve from those that were tried (--evolve);
- `random`: the best of as many candidates, each made by leaving out things at random until it fits;
- `even routes`: spans left out evenly along the network, the fewest that fit;
- `even widths`: as many eighths of all filters, of some groups at the end one less; the search tries it, too.

Norms are measured on training images for all alike. Test accuracy is of all test images, which nothing was chosen
by. It can be stopped at any time and goes on from there: runs that are finished are skipped, candidates that were
tried are not tried again. --quick: one seed on the embedded data, which is too little to say anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import detachnet
from common import Row, arguments, begin, report, table, trained, write
from detachnet.data.batches import mix
from detachnet.data.datasets import Split, load_data
from detachnet.selection.candidate import Candidate
from detachnet.selection.costs import counted
from detachnet.selection.drawn import drawn
from detachnet.selection.even import evenly
from detachnet.selection.front import Front
from detachnet.selection.greedy import best_within
from detachnet.selection.images import run_images
from detachnet.selection.journal import Journal, Trials
from detachnet.selection.searching import search
from detachnet.selection.space import CANDIDATE, Cost, Space
from detachnet.selection.worth import Judge, judged
from detachnet.training.recipe import load_recipe

BUDGETS = (0.6, 0.4, 0.25)
SHORT = ("data.num_train=20000", "data.holdout=2000", "train.epochs=6", "schedule.warmup_epochs=2")
FIRST = 'drop = ["layer1.0:layer1.2", "layer2.0:layer2.2", "layer3.0:layer3.2"]'
NETWORKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vgg16_quarter": ("vgg16_quarter_supernet", SHORT),
    "resnet20": (
        "resnet20_cifar10",
        (
            *SHORT,
            "family.cuts=[]",
            "family.models.narrow={width = 0.75}",
            "family.models.half={width = 0.5}",
            f"family.models.first_half={{{FIRST}, width = 0.5}}",
            "loss.weights={}",
            "train.sample=1",
        ),
    ),
}
"""Network → its recipe, and what is overridden."""
QUICK = ("data.name=cifar10-mini", "data.num_train=0", "data.holdout=500", "train.epochs=2", "train.batch_size=50")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets are")
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="where runs go, and go on from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evolve", type=int, default=0, help="candidates that evolve after greedy")
    parser.add_argument("--images", type=int, default=2000, help="held-out images that decide")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="changes the recipes"
    )
    options = begin(parser)
    rows: list[Row] = []
    for network in options.networks or NETWORKS:
        for seed in range(1 if options.quick else options.seeds):
            rows += of_network(network, seed, options)
            write(options, rows, means=means(rows))
    print("\n".join(table(rows)))
    report(options, means(rows))
    write(options, rows, means=means(rows))


def means(rows: Sequence[Row]) -> list[Row]:
    """A line for each network, budget and way to choose, of the seeds with which it has found something.

    Test accuracies have a standard deviation, with two seeds or more.
    """
    alike: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        if row["test_accuracy"] is not None:
            alike.setdefault((row["network"], row["budget"], row["how"]), []).append(row)
    return [
        {
            **dict(zip(("network", "budget", "how"), key, strict=True)),
            "seeds": len(found),
            **{name: mean(row[name] for row in found) for name in MEASURED},
            "test_deviation": stdev(row["test_accuracy"] for row in found) if len(found) > 1 else None,
        }
        for key, found in alike.items()
    ]


MEASURED = ("macs_of_base", "held_out_accuracy", "test_accuracy", "tries", "minutes")
"""What rows have that is averaged over seeds."""


def of_network(network: str, seed: int, options: argparse.Namespace) -> list[Row]:
    """One network of one seed, trained if it is not."""
    name, changes = NETWORKS[network]
    quick = QUICK if options.quick else ()
    recipe = load_recipe(name, [*changes, *quick, *options.set, f"train.seed={seed}"])
    folder = options.out / f"{network}-{seed}{'-quick' if options.quick else ''}"
    net = detachnet.load(trained(recipe, folder, options.data_root).last).to(options.device)
    held_out, calibration = run_images(folder, options.images, options.data_root)
    test = load_data(recipe.data.name, options.data_root)[1]
    budgets = BUDGETS[:1] if options.quick else BUDGETS
    rows = compare(net, (held_out, calibration, test), budgets, options.evolve, seed, folder)
    return [{"network": network, "seed": seed} | row for row in rows]


def compare(
    net: detachnet.DetachableNet,
    images: tuple[Split, Split, Split],
    budgets: Sequence[float],
    evolve: int,
    seed: int,
    folder: Path,
) -> list[Row]:
    """A line for the base-model, and for each budget and each way to choose.

    Args:
        net: The family, trained.
        images: Those that decide, those that norms are measured on, and test images.
        budgets: Shares of the base-model's MACs.
        evolve: Candidates that evolve after greedy.
        seed: Of evolution and random candidates.
        folder: Where what was tried is kept.
    """
    held_out, calibration, test = images
    fronts: dict[str, Front] = {}
    for how, more in {"search": 0, "evolved": evolve}.items() if evolve else [("search", 0)]:
        settings = {"calibration": calibration, "evolve": more, "seed": seed, "folder": folder}
        fronts[how] = search(net, held_out, budgets, **settings)
    space, each = Space(net), fronts["search"].tries // len(budgets)
    cost, judge = counted(space, "macs"), Judge(net, held_out, calibration, space)
    whole = cost(Candidate()) or 0.0

    def line(how: str, budget: float, candidate: Candidate | None, tries: int = 0, seconds: float = 0.0) -> Row:
        if candidate is None:
            return row(how, budget, None, None, None, tries, seconds)
        name, made = ("base", None) if candidate.is_base else (CANDIDATE, calibration)
        on_test = judged(space.family(candidate).eval(), name, test, made).accuracy
        share = (cost(candidate) or 0.0) / whole
        return row(how, budget, share, judge(candidate).accuracy, on_test, tries, seconds)

    about = {"family": folder.name, "budgets": list(budgets), "images": len(held_out)}
    rows = [line("base", 1.0, Candidate())]
    for number, budget in enumerate(budgets):
        limit = budget * whole
        trials = Trials(judge, Journal(folder / f"random-{number}.jsonl", about | {"budget": budget}))
        for candidate in drawn(space, cost, limit, each, mix(seed, number)):
            trials([candidate])
        for how, front in fronts.items():
            found = next(f for f in front.found if limit in f.budgets)
            on_test = judged(front.net, found.name, test, None).accuracy
            share = found.macs / front.base.macs
            rows.append(row(how, budget, share, found.accuracy, on_test, front.tries, front.seconds))
        best = best_within(list(trials.seen.items()), cost, limit)
        spent = sum(worth.seconds for worth in trials.seen.values())
        rows += [
            line("random", budget, best, len(trials.seen), spent),
            line("even routes", budget, even_routes(space, cost, limit)),
            line("even widths", budget, evenly(space, cost, limit)),
        ]
    return rows


def row(
    how: str,
    budget: float,
    share: float | None,
    held_out: float | None,
    test: float | None,
    tries: int,
    seconds: float,
) -> Row:
    """A line; nothing in it where a way to choose finds none within the budget."""
    return {
        "how": how,
        "budget": budget,
        "macs_of_base": share,
        "held_out_accuracy": held_out,
        "test_accuracy": test,
        "tries": tries,
        "minutes": seconds / 60,
    }


def even_routes(space: Space, cost: Cost, limit: float) -> Candidate | None:
    """The fewest spans within a budget, spread evenly along the network."""
    for count in range(1, len(space.spans) + 1):
        drop: tuple[str, ...] = ()
        for i in range(count):
            drop = space.with_span(drop, space.spans[(2 * i + 1) * len(space.spans) // (2 * count)])
        candidate = Candidate(drop)
        if (costs := cost(candidate)) is not None and costs <= limit:
            return candidate
    return None


if __name__ == "__main__":
    main()
