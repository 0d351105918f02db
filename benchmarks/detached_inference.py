"""Is a detached sub-model as fast as the same layers written by hand, and as much faster as its MACs promise?

    python benchmarks/detached_inference.py [--quick] [--json FILE] [--device cuda] [--threads N]

The layers behind each cut are written by hand below, as an ordinary module of the same architecture, and get the
detached model's weights; its outputs must be equal before anything is timed. The base-model, and each sub-model
detached and by hand, run in turn in evaluation mode. `to_base` is the detached model's latency over the
base-model's, `mac_ratio` the same of multiply-accumulates.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import detachnet
from common import Row, Target, arguments, begin, report, time_in_turn
from detachnet.models import VGG16Cifar

LIMIT = 1.02


class VGGTail(nn.Module):
    """`VGG16Cifar` behind one of its pooling layers.

    Args:
        pool: Index of that layer.
        patch: Its stride from the image: kernel and stride of the convolution in its place.
        width: Multiplies every number of channels.
    """

    def __init__(self, pool: int, patch: int, width: float = 1.0) -> None:
        super().__init__()
        whole = VGG16Cifar(width=width)
        self.stepdown = nn.Conv2d(3, whole.features[pool + 1].in_channels, patch, patch)
        self.features = nn.Sequential(OrderedDict(list(whole.features.named_children())[pool + 1 :]))
        self.classifier = whole.classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(self.stepdown(x)).flatten(1))
        return logits


class ResNetTail(nn.Module):
    """torchvision's ResNet-18 from its stage `first` on, behind a convolution of kernel and stride `patch`."""

    def __init__(self, first: int, patch: int) -> None:
        super().__init__()
        whole = resnet18(num_classes=10)
        self.stages = [f"layer{i}" for i in range(first, 5)]
        stages = [getattr(whole, name) for name in self.stages]
        self.stepdown = nn.Conv2d(3, stages[0][0].conv1.in_channels, patch, patch)
        for name, stage in zip(self.stages, stages, strict=True):
            self.add_module(name, stage)
        self.avgpool, self.fc = whole.avgpool, whole.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.stepdown(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


@dataclass(frozen=True)
class Case:
    """A base-model for 32×32 images, its cuts, and its sub-models by hand."""

    label: str
    base: Callable[[], nn.Module]
    cuts: tuple[str, ...]
    by_hand: Mapping[str, Callable[[], nn.Module]]


def vgg(width: float = 1.0) -> Case:
    tails = {"sub0": partial(VGGTail, 6, 2, width), "sub1": partial(VGGTail, 23, 8, width)}
    return Case("VGG-16-BN/32", partial(VGG16Cifar, width=width), ("features.6", "features.23"), tails)


def resnet() -> Case:
    tails = {"sub0": partial(ResNetTail, 2, 4), "sub1": partial(ResNetTail, 3, 8)}
    return Case("ResNet-18/32", partial(resnet18, num_classes=10), ("layer1", "layer2"), tails)


def main() -> None:
    options = begin(arguments(__doc__))
    rows, targets = [], []
    for case in (vgg(), resnet()):
        for batch in (1, 32):
            new = measure(case, batch, options, seconds=4 if options.quick else 15)
            rows += new
            targets += [
                Target(f"{r['model']} {r['sub_model']}, batch {batch}: detached ÷ by hand", r["to_by_hand"], LIMIT)
                for r in new
            ]
    report(options, rows, targets)


def measure(case: Case, batch: int, options: argparse.Namespace, seconds: float) -> list[Row]:
    """A row per sub-model."""
    net = make(case)
    images = torch.randn(batch, 3, 32, 32, device=options.device)
    models = {"base": net.detach("base")}
    for name in net.names[1:]:
        models |= {name: net.detach(name), f"{name} by hand": by_hand(net, case, name)}
    models = {name: model.to(options.device) for name, model in models.items()}
    with torch.inference_mode():
        for name in net.names[1:]:
            torch.testing.assert_close(models[name](images), models[f"{name} by hand"](images), rtol=0, atol=0)
        timing = time_in_turn({name: partial(m, images) for name, m in models.items()}, options.device, seconds)
    return [
        {
            "model": case.label,
            "sub_model": name,
            "batch": batch,
            "detached_ms": timing.median_ms(name),
            "by_hand_ms": timing.median_ms(f"{name} by hand"),
            "to_by_hand": timing.ratio(name, f"{name} by hand"),
            "base_ms": timing.median_ms("base"),
            "to_base": timing.ratio(name, "base"),
            "mac_ratio": net.plan[name].macs / net.plan["base"].macs,
            "n": timing.n,
        }
        for name in net.names[1:]
    ]


def make(case: Case) -> detachnet.DetachableNet:
    """The family, with statistics in its batch norms that differ from model to model."""
    torch.manual_seed(0)
    net = detachnet.make_detachable(case.base(), case.cuts, (3, 32, 32)).train()
    with torch.no_grad():
        net(torch.randn(16, 3, 32, 32), which="all")
    return net.eval()


def by_hand(net: detachnet.DetachableNet, case: Case, name: str) -> nn.Module:
    """A sub-model by hand, with the family's weights."""
    model = case.by_hand[name]().eval()
    model.load_state_dict(net.detach(name).state_dict())
    return model


if __name__ == "__main__":
    main()
