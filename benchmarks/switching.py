"""What does it cost to switch between the models of a family, and to run one through the family?

    python benchmarks/switching.py [--quick] [--json FILE] [--device cuda] [--threads N]

Switching is `net.active = name`, in microseconds. Running through the family is `net(images)` with an active
model, and `Family.run` with images that are normalized already; each in turn with the detached model, which shares
the family's weights here, so that all find them in the same caches. Batch 1, where what Python adds weighs most.
The quarter-width VGG-16 is the fastest family the recipes train, and so the hardest case.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median
from timeit import repeat
from typing import Any

import torch

import detachnet
from common import Row, Target, arguments, begin, report, time_in_turn
from detachnet.deploy.backends import TorchBackend

VGG_CUTS, RESNET_CUTS = ("features.6", "features.23"), ("layer1", "layer2")
CASES: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("VGG-16-BN/32", "detachnet:vgg16_cifar", VGG_CUTS, {}),
    ("VGG-16-BN/32, quarter width", "detachnet:vgg16_cifar", VGG_CUTS, {"width": 0.25}),
    ("ResNet-18/32", "torchvision:resnet18", RESNET_CUTS, {"num_classes": 10}),
)
SWITCH_LIMIT_US = 20.0
LIMIT = 1.02


def main() -> None:
    options = begin(arguments(__doc__))
    rows, targets, switch = [], [], {}
    for label, model, cuts, kwargs in CASES:
        net = make(model, cuts, options.device, **kwargs)
        switch[label] = switch_us(net)
        targets.append(Target(f"{label}: net.active = name, µs", switch[label]["us"], SWITCH_LIMIT_US))
        for row in measure(label, net, options, seconds=2 if options.quick else 10):
            rows.append(row)
            what = f"{label} {row['sub_model']}: Family ÷ detached"
            targets.append(Target(what, row["family_to_detached"], LIMIT))
    report(options, rows, targets, switch=switch)


def make(model: str, cuts: tuple[str, ...], device: torch.device, **kwargs: object) -> detachnet.DetachableNet:
    base = detachnet.create_model(model, **kwargs)
    return detachnet.make_detachable(base, cuts, (3, 32, 32)).to(device).eval()


def switch_us(net: detachnet.DetachableNet, repeats: int = 50) -> dict[str, float]:
    """Microseconds of `net.active = name`: the median of `repeats` times a thousand there and back."""

    def there_and_back() -> None:
        net.active = "sub1"
        net.active = "base"

    times = repeat(there_and_back, number=1000, repeat=repeats)
    return {"us": 1e6 * median(times) / 2000, "n": repeats}


def measure(label: str, net: detachnet.DetachableNet, options: argparse.Namespace, seconds: float) -> list[Row]:
    """A row per sub-model."""
    family = detachnet.Family(TorchBackend(net, options.threads), label, None)
    images = torch.randn(1, *net.plan.input_size, device=options.device)
    rows = []
    for name in net.names[1:]:
        net.active = name
        runs = {
            "detached": partial(net.detach(name, share=True), images),
            "net": partial(net, images),
            "family": partial(family.run, images, name),
        }
        with torch.no_grad():
            timing = time_in_turn(runs, options.device, seconds)
        rows.append(
            {
                "model": label,
                "sub_model": name,
                **{f"{way}_ms": timing.median_ms(way) for way in runs},
                "net_to_detached": timing.ratio("net", "detached"),
                "family_to_detached": timing.ratio("family", "detached"),
                "n": timing.n,
            }
        )
    return rows


if __name__ == "__main__":
    main()
