"""Does the DeadlineRunner hold a p99 that the base-model alone cannot, and at what accuracy?

    python benchmarks/deadline.py [CHECKPOINT] [--quick] [--json FILE]

One server, one thread, random images. Rounds of 400 requests with Poisson arrivals (seed: the round), the same for
the base-model alone, the fastest model alone and the runner, one after another; 5 rounds (--quick: 1), so that
what else the machine does meets all three alike. Each round measures the models first; requests arrive faster
than the base-model's throughput by a quarter of what lies between it and the fastest model's. The target is twenty
times the base-model's first median. Latencies are of all rounds together, from arrival to answer. Weighted
accuracy: each model's test accuracy, weighted by its share of the answers. Without a CHECKPOINT a half-width
VGG-16 is trained on the embedded data for one epoch first.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import detachnet
from common import arguments, begin, write
from detachnet.backends import TorchBackend
from detachnet.deadline import DeadlineRunner, Served
from detachnet.recipe import load_recipe
from detachnet.runtime import Family

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
OVERRIDES = (
    "model.kwargs.width=0.5",
    'family.cuts=["features.6", "features.33"]',
    "train.epochs=4",
    "schedule.warmup_epochs=1",
)


NUM_REQUESTS = 400


def main() -> None:
    parser = arguments(__doc__, fixed=True)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT")
    options = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or train(Path(folder) / "run")
        net = detachnet.load(path)
    rounds = [measure(net, path)]
    print(rounds[0].profile, end="\n\n")
    target_ms = 20e3 * rounds[0].profile["base"].p50_s
    fastest = min(net.accuracy, key=lambda name: rounds[0].profile[name].p50_s)
    choices = {"base alone": ["base"], f"{fastest} alone": [fastest], "runner": None}
    served: dict[str, list[Served]] = {name: [] for name in choices}
    switches = Counter(dict.fromkeys(choices, 0))
    for seed in range(1 if options.quick else 5):
        rounds += [measure(net, path)] if seed else []
        arrivals = poisson(rounds[-1].rate, seed)
        for name, models in choices.items():
            answers, changes = serve(rounds[-1], target_ms, models, arrivals)
            served[name] += answers
            switches[name] += changes
    rows = [row(name, net, answers, switches[name]) for name, answers in served.items()]
    rates = [round(each.rate, 1) for each in rounds]
    print(f"{len(served['runner'])} requests each, {rates} per second in the rounds, target {target_ms:.1f} ms")
    print_table(rows, net.names)
    load = {"rates_per_s": rates, "target_ms": target_ms, "requests_per_round": NUM_REQUESTS}
    write(options, rows, **load, profile=rounds[0].profile.model_dump(mode="json"))


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


def train(folder: Path) -> Path:
    detachnet.train(load_recipe(RECIPE, OVERRIDES), folder)
    return folder / "last.safetensors"


def poisson(rate: float, seed: int) -> list[float]:
    """Seconds at which requests arrive."""
    generator = random.Random(seed)
    return list(accumulate(generator.expovariate(rate) for _ in range(NUM_REQUESTS)))


def serve(
    now: Round, target_ms: float, models: list[str] | None, arrivals: list[float]
) -> tuple[list[Served], int]:
    """The answers to all requests, and how often the model changed."""
    image = torch.randn(now.family.input_size, generator=torch.Generator().manual_seed(0))
    with DeadlineRunner(now.family, target_ms, models, max_waiting=len(arrivals)) as runner:
        began, futures = time.perf_counter(), []
        for arrival in arrivals:
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
            futures.append(runner.submit(image))
    return [future.result() for future in futures], runner.policy.switches


def row(name: str, net: detachnet.DetachableNet, served: list[Served], switches: int) -> dict[str, object]:
    count = Counter(answer.model for answer in served)
    p50, p99 = 1e3 * np.percentile([answer.latency_s for answer in served], [50, 99])
    shares = {model: count[model] / len(served) for model in net.names}
    accuracy = sum(share * net.accuracy.get(model, 0.0) for model, share in shares.items())
    result = {"run": name, "p50_ms": float(p50), "p99_ms": float(p99), "shares": shares}
    return result | {"switches": switches, "weighted_accuracy": accuracy, "n": len(served)}


def print_table(rows: list[dict[str, object]], names: tuple[str, ...]) -> None:
    columns = "".join(f"{name:>8}" for name in names)
    print(f"{'':<12} {'p50 ms':>9} {'p99 ms':>9} {columns} {'switches':>9} {'weighted accuracy':>18}")
    for r in rows:
        shares = "".join(f"{100 * share:>6.1f} %" for share in r["shares"].values())
        figures = f"{r['p50_ms']:>9.1f} {r['p99_ms']:>9.1f} {shares} {r['switches']:>9}"
        print(f"{r['run']:<12} {figures} {100 * r['weighted_accuracy']:>16.2f} %")


if __name__ == "__main__":
    main()
