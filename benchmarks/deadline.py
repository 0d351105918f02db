"""Does the DeadlineRunner hold a p99 that the base-model alone cannot, and at what accuracy?

    python benchmarks/deadline.py [CHECKPOINT] [--quick] [--json FILE]

One server, one thread, random images. Rounds of 400 requests with Poisson arrivals (seed: the round), the same for
the base-model alone, the fastest model alone and the runner, one after another; 20 rounds (--quick: 3). Each round
measures the models first; requests arrive faster than the base-model's throughput by a quarter of what lies
between it and the fastest model's. The target is twenty times the base-model's first median. A round holds it if
99 of 100 requests do, from arrival to answer: one stall of the machine that is longer than the target spoils its
round for every model, so each round counts for itself and its longest single run is kept. Accuracy: each model's
test accuracy, weighted by its share of the answers. Without a CHECKPOINT a half-width VGG-16 is trained on the
embedded data for four epochs first.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import detachnet
from common import Target, arguments, begin, trained, write
from detachnet.deploy.backends import TorchBackend
from detachnet.deploy.deadline import DeadlineRunner, Served
from detachnet.deploy.family import Family
from detachnet.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
OVERRIDES = (
    "model.kwargs.width=0.5",
    'family.cuts=["features.13", "features.33"]',
    "family.stepdown=stem",
    "loss.weights={sub0=0.2, sub1=0.2}",
    "loss.distillation=1.0",
    "train.epochs=4",
    "schedule.warmup_epochs=1",
)


NUM_REQUESTS = 400


def main() -> None:
    options, net, path = begin_with_family(__doc__)
    first = measure(net, path)
    print(first.profile, end="\n\n")
    target_ms = 20e3 * first.profile["base"].p50_s
    fastest = min(net.facts.accuracy, key=lambda name: first.profile[name].p50_s)
    choices = {"base alone": ["base"], f"{fastest} alone": [fastest], "runner": None}
    served: dict[str, list[list[Served]]] = {name: [] for name in choices}
    switches = Counter(dict.fromkeys(choices, 0))
    rates = []
    for seed in range(3 if options.quick else 20):
        now = measure(net, path) if seed else first
        rates.append(round(now.rate, 1))
        for name, models in choices.items():
            answers, changes = serve(now, target_ms, models, poisson(now.rate, seed))
            served[name].append(answers)
            switches[name] += changes
    rows = [row(name, net, rounds, target_ms, switches[name]) for name, rounds in served.items()]
    print(f"{len(rates)} rounds of {NUM_REQUESTS} requests, {min(rates)} to {max(rates)} per second, ", end="")
    print(f"target {target_ms:.1f} ms")
    print_table(rows, net.names, target_ms)
    held = Target("median p99 of the runner, ms", float(np.median(rows[-1]["p99_ms"])), target_ms)
    print(held)
    load = {"rates_per_s": rates, "target_ms": target_ms, "requests_per_round": NUM_REQUESTS}
    write(options, rows, [held], **load, profile=first.profile.model_dump(mode="json"))


class Round(NamedTuple):
    """A family as fast as it is now, and the load for it in requests per second."""

    family: Family
    profile: detachnet.Profile
    rate: float


def measure(net: detachnet.DetachableNet, path: Path) -> Round:
    measured = detachnet.profile(net, threads=1, n=50, peak_memory=False)
    base, fastest = (
        measured["base"].images_per_s,
        max(r.images_per_s for r in measured.rows if r.accuracy is not None),
    )
    return Round(Family(TorchBackend(net, threads=1), path, measured), measured, base + (fastest - base) / 4)


def begin_with_family(doc: str | None) -> tuple[argparse.Namespace, detachnet.DetachableNet, Path]:
    """The options, and the family whose file they name, or a small one that is trained first, with its path."""
    parser = arguments(doc, fixed=True)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT")
    options = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or train(Path(folder) / "run")
        return options, detachnet.load(path), path


def train(folder: Path, changes: Sequence[str] = ()) -> Path:
    return trained(load_recipe(RECIPE, [*OVERRIDES, *changes]), folder).last


def poisson(rate: float, seed: int) -> list[float]:
    """Seconds at which requests arrive."""
    generator = random.Random(seed)
    return list(accumulate(generator.expovariate(rate) for _ in range(NUM_REQUESTS)))


def serve(
    now: Round, target_ms: float, models: list[str] | None, arrivals: list[float]
) -> tuple[list[Served], int]:
    """The answers to the requests that were not refused as hopeless, and how often the model changed."""
    image = torch.randn(now.family.input_size, generator=torch.Generator().manual_seed(0))
    with DeadlineRunner(now.family, target_ms, models, max_waiting=len(arrivals)) as runner:
        began, futures = time.perf_counter(), []
        for arrival in arrivals:
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
            with suppress(detachnet.LateError):
                futures.append(runner.submit(image))
    return [future.result() for future in futures if not future.exception()], runner.policy.switches


def row(
    name: str, net: detachnet.DetachableNet, rounds: list[list[Served]], target_ms: float, switches: int
) -> dict[str, object]:
    latency_ms = [[1e3 * answer.latency_s for answer in served] for served in rounds]
    p99_ms = [float(np.percentile(each, 99)) for each in latency_ms]
    count = Counter(answer.model for served in rounds for answer in served)
    shares = {model: count[model] / count.total() for model in net.names}
    return {
        "run": name,
        "p50_ms": float(np.median(latency_ms)),
        "p99_ms": p99_ms,
        "held": sum(each <= target_ms for each in p99_ms),
        "longest_run_ms": [1e3 * max(answer.service_s for answer in served) for served in rounds],
        "shares": shares,
        "switches": switches,
        "weighted_accuracy": sum(share * net.facts.accuracy.get(model, 0.0) for model, share in shares.items()),
        "n": count.total(),
    }


def print_table(rows: list[dict[str, object]], names: tuple[str, ...], target_ms: float) -> None:
    columns = "".join(f"{name:>8}" for name in names)
    header = f"{'':<12} {'p50 ms':>7} {'p99 ms median':>14} {'worst':>7} {'held':>8}"
    print(f"{header} {columns} {'switches':>9} {'accuracy':>9}")
    for r in rows:
        shares = "".join(f"{100 * share:>6.1f} %" for share in r["shares"].values())
        held = f"{r['held']} of {len(r['p99_ms'])}"
        p99 = f"{np.median(r['p99_ms']):>14.1f} {max(r['p99_ms']):>7.1f}"
        end = f"{r['switches']:>9} {100 * r['weighted_accuracy']:>7.2f} %"
        print(f"{r['run']:<12} {r['p50_ms']:>7.1f} {p99} {held:>8} {shares} {end}")
    for p99, longest in zip(rows[-1]["p99_ms"], rows[-1]["longest_run_ms"], strict=True):
        if p99 > target_ms:
            print(
                f"the runner missed with {p99:.0f} ms; the longest single run of that round took {longest:.1f} ms"
            )


if __name__ == "__main__":
    main()
