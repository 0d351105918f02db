"""How much sooner a search is done by several workers, and that it finds the same.

    python benchmarks/search_workers.py [CHECKPOINT] [--workers 2] [--ray] [--quick] [--json FILE]

The same search three times, each time from the beginning: in this process, by a pool of processes, and with --ray
(`pip install 'detachnet[ray]'`) by a local Ray. Every process has one thread. Workers are started, and sent the
network, before. Without a CHECKPOINT a half-width VGG-16 is trained on the embedded data for four epochs first;
candidates are tried on its 1000 test images, down to 60 % of its MACs. --quick: a quarter of the width, two
epochs, 200 images and 80 %.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import detachnet
from common import Row, Target, arguments, begin, report
from deadline import train
from detachnet.data.datasets import Split, load_data
from detachnet.selection.cluster import RayExecutor
from detachnet.selection.front import Front

QUICK = ("model.kwargs.width=0.25", "train.epochs=2")


def main() -> None:
    parser = arguments(__doc__, fixed=True)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", action="store_true", help="by a local Ray, too")
    options = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        net = detachnet.load(options.checkpoint or train(Path(folder) / "run", QUICK if options.quick else ()))
    images = load_data("cifar10-mini")
    count = 200 if options.quick else 1000
    rows, fronts = compare(net, images[1].part(0, count), images[0].part(0, count), options)
    answers = [[(f.name, f.model, f.accuracy) for f in front.found] for front in fronts]
    targets = [
        Target("fronts that differ", sum(answer != answers[0] for answer in answers), 0),
        *(
            Target(f"seconds of {row['by']} ÷ of one process", row["of_one"], 1.2 / options.workers)
            for row in rows[1:]
        ),
    ]
    report(options, rows, targets)


def compare(
    net: detachnet.DetachableNet, held_out: Split, calibration: Split, options: argparse.Namespace
) -> tuple[list[Row], list[Front]]:
    """A line, and the front, of each way to run the search."""
    rows: list[Row] = []
    fronts: list[Front] = []
    for by, start in ways(options).items():
        budgets = [0.8] if options.quick else [0.6]
        with start() as running:
            if running is not None:  # the network is sent, and traced, once
                detachnet.search(net, held_out, [0.97], calibration=calibration, executor=running)
            began = time.perf_counter()
            fronts.append(detachnet.search(net, held_out, budgets, calibration=calibration, executor=running))
            seconds = time.perf_counter() - began
        first = rows[0]["seconds"] if rows else seconds
        rows.append({"by": by, "tries": fronts[-1].tries, "seconds": seconds, "of_one": seconds / first})
    return rows, fronts


def ways(options: argparse.Namespace) -> dict[str, Callable[[], AbstractContextManager[Executor | None]]]:
    """Who tries the candidates, and how that is started."""
    workers = options.workers
    found: dict[str, Callable[[], AbstractContextManager[Executor | None]]] = {
        "one process": nullcontext,
        f"{workers} processes": partial(
            ProcessPoolExecutor, workers, get_context("spawn"), torch.set_num_threads, (1,)
        ),
    }
    if options.ray:
        found[f"Ray, {workers} workers"] = partial(RayExecutor, workers)
    return found


if __name__ == "__main__":
    main()
