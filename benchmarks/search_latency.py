"""What a search promises of latencies on this machine, and what the sub-models that it chose take.

    python benchmarks/search_latency.py [CHECKPOINT] [--runtime onnx] [--rounds 10] [--quick] [--json FILE]

Budgets are 80 and 60 % (--quick: 80 %) of what the base-model takes for one image, on one thread. Promised is the
sum of a sub-model's segments. Afterwards base-model and sub-models are measured in turn, so many rounds of 50 runs
each: their median, and how far the sum is off it. Nothing else should run meanwhile. Without a CHECKPOINT a
ResNet-14 is trained on the embedded data for two epochs first; candidates are tried on 300 of its test images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

import detachnet
from common import Row, Target, arguments, begin, report, trained
from detachnet.data.datasets import Split, load_data
from detachnet.deploy.stopwatch import Stopwatch
from detachnet.selection.searching import search
from detachnet.training.recipe import load_recipe

CHANGES = (
    "model.kwargs.depth=14",
    "family.cuts=[]",
    "family.models={}",
    "loss.weights={}",
    "data.name=cifar10-mini",
    "schedule.warmup_epochs=0.5",
    "train.epochs=2",
)
BUDGETS = (0.8, 0.6)
"""Shares of what the base-model takes."""


def main() -> None:
    parser = arguments(__doc__, fixed=True)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--runtime", choices=("onnx", "torch"), default="onnx")
    parser.add_argument("--rounds", type=int, default=10)
    options = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        net = detachnet.load(options.checkpoint or small_run(Path(folder) / "run"))
    training, test = load_data("cifar10-mini")
    shares = BUDGETS[:1] if options.quick else BUDGETS
    rows = compare(net, (test.part(0, 300), training.part(0, 300)), shares, options)
    off = max(abs(row["promised_off"]) for row in rows)
    over = max(row["measured_ms"] / row["budget_ms"] for row in rows if row["budget_ms"])
    targets = [Target("share that a sum is off", off, 0.15), Target("measured ÷ budget", over, 1.05)]
    report(options, rows, targets, runtime=options.runtime, rounds=options.rounds)


def small_run(folder: Path) -> Path:
    """The run of a small network."""
    return trained(load_recipe("resnet20_cifar10", CHANGES), folder).last


def compare(
    net: detachnet.DetachableNet,
    images: tuple[Split, Split],
    shares: Sequence[float],
    options: argparse.Namespace,
) -> list[Row]:
    """A line for the base-model and for each sub-model that was chosen."""
    watch = Stopwatch(options.runtime, options.threads)
    one = torch.randn(1, *net.plan.input_size, generator=torch.Generator().manual_seed(0))
    budgets = [1e3 * share * watch(net.detach("base"), one) for share in shares]
    held_out, calibration = images
    how = {"by": "latency_ms", "runtime": options.runtime, "threads": options.threads}
    front = search(net, held_out, budgets, calibration=calibration, **how)
    promised = {"base": front.base.cost} | {found.name: found.cost for found in front.found}
    budget = {found.name: min(found.budgets) for found in front.found}
    accuracy = {"base": front.base.accuracy} | {found.name: found.accuracy for found in front.found}
    ms: dict[str, list[float]] = {name: [] for name in promised}
    for turn in range(options.rounds):
        for name in promised if turn % 2 else reversed(promised):
            ms[name].append(1e3 * watch(front.net.detach(name), one))
    return [
        {
            "model": name,
            "budget_ms": budget.get(name),
            "promised_ms": cost,
            "measured_ms": median(ms[name]),
            "promised_off": cost / median(ms[name]) - 1,
            "macs_of_base": front.net.plan[name].macs / front.net.plan["base"].macs,
            "held_out_accuracy": accuracy[name],
        }
        for name, cost in promised.items()
    ]


if __name__ == "__main__":
    main()
