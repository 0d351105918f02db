"""Does the DeadlineRunner hold a p99 that the base-model alone cannot, and at what accuracy?

    python benchmarks/deadline.py [CHECKPOINT] [--quick] [--json FILE]

One server, one thread, random images, Poisson arrivals (seed 0) at the geometric mean of what the base-model and
the fastest model can answer; the target is ten times the base-model's median. The same arrivals for the base-model
alone, the fastest model alone and the runner. 2000 requests each (--quick: 400), so a queue that grows without end
stops growing. Weighted accuracy: each model's test accuracy, weighted by its share of the answers. Without a
CHECKPOINT a half-width VGG-16 is trained on the embedded data for one epoch first.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import detachnet
from detachnet.backends import TorchBackend
from detachnet.deadline import DeadlineRunner, Served
from detachnet.recipe import load_recipe
from detachnet.runtime import Family

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
OVERRIDES = ("model.kwargs.width=0.5", 'family.cuts=["features.6", "features.33"]', "train.epochs=1")


def main() -> None:
    torch.set_num_threads(1)
    num_requests = 400 if "--quick" in sys.argv else 2000
    with tempfile.TemporaryDirectory() as folder:
        path = given_checkpoint() or train(Path(folder) / "run")
        net = detachnet.load(path)
    measured = detachnet.profile(net, threads=1, n=num_requests // 10, peak_memory=False)
    family = Family(TorchBackend(net, threads=1), path, measured)
    print(measured, end="\n\n")
    rate, target_ms = load_of(measured)
    print(f"{num_requests} requests, {rate:.0f} per second, target {target_ms:.1f} ms")
    fastest = min(family.accuracy, key=lambda name: measured[name].p50_s)
    choices = {"base alone": ["base"], f"{fastest} alone": [fastest], "runner": None}
    arrivals = poisson(rate, num_requests)
    rows = [row(name, family, *serve(family, target_ms, models, arrivals)) for name, models in choices.items()]
    print_table(rows, family.names)
    if "--json" in sys.argv:
        settings = {"num_requests": num_requests, "rate_per_s": rate, "target_ms": target_ms}
        result = {"rows": rows, **settings, "profile": measured.model_dump(mode="json")}
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(result, indent=1) + "\n")


def given_checkpoint() -> Path | None:
    names = [word for word in sys.argv[1:] if word.endswith(".safetensors")]
    return Path(names[0]) if names else None


def train(folder: Path) -> Path:
    detachnet.train(load_recipe(RECIPE, OVERRIDES), folder)
    return folder / "last.safetensors"


def load_of(measured: detachnet.Profile) -> tuple[float, float]:
    """Requests per second that overload the base-model but not the fastest, and the target in milliseconds."""
    capacities = [row.images_per_s for row in measured.rows if row.accuracy is not None]
    return (capacities[0] * max(capacities)) ** 0.5, 1e4 * measured.rows[0].p50_s


def poisson(rate: float, count: int) -> list[float]:
    """Seconds at which requests arrive."""
    generator = random.Random(0)
    return np.cumsum([generator.expovariate(rate) for _ in range(count)]).tolist()


def serve(
    family: Family, target_ms: float, models: list[str] | None, arrivals: list[float]
) -> tuple[list[Served], int]:
    """The answers to all requests, and how often the model changed."""
    image = torch.randn(family.input_size, generator=torch.Generator().manual_seed(0))
    for name in models or family.names:
        family.run(image, name)
    with DeadlineRunner(family, target_ms, models, max_waiting=len(arrivals)) as runner:
        began, futures = time.perf_counter(), []
        for arrival in arrivals:
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
            futures.append(runner.submit(image))
    return [future.result() for future in futures], runner.policy.switches


def row(name: str, family: Family, served: list[Served], switches: int) -> dict[str, object]:
    count = Counter(answer.model for answer in served)
    p50, p99 = 1e3 * np.percentile([answer.latency_s for answer in served], [50, 99])
    shares = {model: count[model] / len(served) for model in family.names}
    accuracy = sum(share * family.accuracy.get(model, 0.0) for model, share in shares.items())
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
