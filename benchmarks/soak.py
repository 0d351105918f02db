"""What a DeadlineRunner does under 0.5, 1, 2 and 4 times the load that the base-model can answer.

    python benchmarks/soak.py [CHECKPOINT] [--quick] [--json FILE]

One server, one thread, 500 requests a load (--quick: 100) with Poisson arrivals, the same for the base-model
alone, the fastest model alone and the runner with all of them. The target is twenty times the base-model's median.
Requests are the test images of `cifar10-mini` in turn, so that the accuracy is that of the answers themselves.
Each is answered in time, answered late, refused (by `submit`, or when its turn comes) or lost: without any of
these when the runner is closed. Nothing may be lost. Without a CHECKPOINT a half-width VGG-16 is trained on the
embedded data for four epochs first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate

import numpy as np
from torch import Tensor

import detachnet
from common import Row, Target, report
from deadline import begin_with_family, measure
from detachnet.data.batches import Batches
from detachnet.data.datasets import load_data
from detachnet.deploy.deadline import DeadlineRunner, Served
from detachnet.deploy.family import Family
from detachnet.facts import DataInfo

LOADS = (0.5, 1.0, 2.0, 4.0)


def main() -> None:
    options, net, path = begin_with_family(__doc__)
    requests = test_images(net.facts.known_data, 100 if options.quick else 500)
    now = measure(net, path)
    target_ms = 20e3 * now.profile["base"].p50_s
    rows = soak(now.family, now.profile["base"].images_per_s, target_ms, requests)
    lost = Target("requests without an answer or a refusal", sum(row["lost"] for row in rows), 0)
    late = [row["late"] / max(1, row["in_time"] + row["late"]) for row in rows if row["models"] == "all"]
    targets = [lost, Target("largest share of late answers of the runner", max(late), 0.01)]
    report(options, rows, targets, target_ms=target_ms, profile=now.profile.model_dump(mode="json"))


def test_images(data: DataInfo, count: int) -> list[tuple[Tensor, int]]:
    """So many normalized test images with their labels, from the first on again where there are fewer."""
    images, labels = next(Batches(load_data("cifar10-mini")[1], data, 1000).epoch())
    return [(images[i % len(images)], int(labels[i % len(labels)])) for i in range(count)]


def soak(family: Family, capacity: float, target_ms: float, requests: Sequence[tuple[Tensor, int]]) -> list[Row]:
    """What became of the requests, at each load, of the base-model alone, the fastest alone and all models.

    Args:
        family: With its profile.
        capacity: Images per second of the base-model.
        target_ms: From arrival to answer.
        requests: Images and their labels.
    """
    fastest = min(family.accuracy, key=lambda name: family.latency_s(name)[0])
    rows = []
    for load in LOADS:
        generator = random.Random(load)
        arrivals = list(accumulate(generator.expovariate(load * capacity) for _ in requests))
        for models in (["base"], [fastest], None):
            rows.append({"load": load, "models": models[0] if models else "all"})
            rows[-1] |= serve(DeadlineRunner(family, target_ms, models), arrivals, requests)
    return rows


def serve(runner: DeadlineRunner, arrivals: Sequence[float], requests: Sequence[tuple[Tensor, int]]) -> Row:
    """Hand in requests when they arrive, and count what becomes of them."""
    accepted: list[tuple[Future[Served], int]] = []
    refused = 0
    with runner:
        began = time.perf_counter()
        for arrival, (image, label) in zip(arrivals, requests, strict=True):
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
            try:
                accepted.append((runner.submit(image), label))
            except detachnet.BudgetError:
                refused += 1
    answers = [(future.result(), label) for future, label in accepted if future.done() and not future.exception()]
    refused += sum(isinstance(future.exception(), detachnet.LateError) for future, _ in accepted if future.done())
    latencies = [answer.latency_s for answer, _ in answers]
    late = sum(latency > runner.policy.target_s for latency in latencies)
    right = sum(int(answer.output.argmax()) == label for answer, label in answers)
    return {
        "sent": len(requests),
        "refused": refused,
        "in_time": len(answers) - late,
        "late": late,
        "lost": len(requests) - refused - len(answers),
        "p99_ms": 1e3 * float(np.percentile(latencies, 99)) if latencies else None,
        "right_of_answered": right / len(answers) if answers else None,
        "right_of_sent": right / len(requests),
    }


if __name__ == "__main__":
    main()
