"""Legs: run one behind the other they are the model, and what models share is one of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detachnet
from detachnet import SubModel
from detachnet.surgery.legs import shared_macs
from tests.helpers import nightly_but

FAMILIES: dict[str, tuple[str, dict[str, Any], int, dict[str, list[str]]]] = {
    "vgg": (
        "detachnet:vgg16_cifar",
        {"width": 0.125},
        32,
        {
            "late": ["features.16:features.22", "features.26:features.32"],
            "inner": ["features.9:features.12", "features.16:features.22"],
            "front": [":features.6"],
            "exit": ["features.23:features.43"],
        },
    ),
    "resnet": (
        "torchvision:resnet18",
        {"num_classes": 5},
        32,
        {
            "both": ["layer1.0:layer1.1", "layer3.0:layer3.1"],
            "one": ["layer3.0:layer3.1"],
            "bridge": ["layer1.1:layer3.0"],
        },
    ),
    "mobilenet": (
        "torchvision:mobilenet_v3_small",
        {"num_classes": 5},
        64,
        {"two": ["features.2:features.3", "features.5:features.6"], "one": ["features.5:features.6"]},
    ),
    "swin": (
        "torchvision:swin_t",
        {"num_classes": 5},
        64,
        {"late": ["features.5.2:features.5"], "early": ["features.3.0:features.3"]},
    ),
    "convnext": (
        "timm:convnext_atto",
        {"num_classes": 5},
        64,
        {"late": ["stages.2.blocks.2:stages.2.blocks.5"], "early": ["stages.1.blocks.0:stages.1.blocks.1"]},
    ),
}


def family(name: str, **options: Any) -> detachnet.DetachableNet:
    torch.manual_seed(0)
    network, kwargs, size, drops = FAMILIES[name]
    models = {sub: SubModel(drop=drop) for sub, drop in drops.items()}
    model = detachnet.create_model(network, **kwargs)
    net = detachnet.make_detachable(model, models, (3, size, size), check="none", **options)
    for module in net.modules():  # statistics of their own, or wrong norms would go unseen
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return net.double().eval()


def run(net: detachnet.DetachableNet, name: str, images: Tensor, share: bool = True) -> Tensor:
    value = images
    for leg in net.legs[name]:
        before = value.clone()
        made = net.detach_leg(leg, share=share)(value)
        assert torch.equal(value, before), f"{leg} changes what other models go on from"
        value = made
    return value


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(["vgg", "resnet"], FAMILIES))
@pytest.mark.parametrize("options", [{}, {"head": "private"}, {"norm": "shared"}], ids=str)
def test_legs_one_behind_the_other_are_the_model(name: str, options: dict[str, Any]) -> None:
    net = family(name, **options)
    images = torch.randn(3, *net.plan.input_size, dtype=torch.double)
    with torch.no_grad():
        for model in net.names:
            assert torch.equal(run(net, model, images), net(images, which=model))
            assert sum(leg.macs for leg in net.legs[model]) == net.plan[model].macs


def test_what_models_share_is_one_leg() -> None:
    net = family("vgg")
    ends = {model: [leg.end for leg in legs] for model, legs in net.legs.items()}
    assert ends == {
        "base": ["features.9", "features.16", "features.23", ""],
        "late": ["features.9", "features.16", ""],
        "inner": ["features.9", ""],
        "front": [""],
        "exit": ["features.9", "features.16", "features.23", ""],
    }
    assert net.legs["base"][0].models == ("base", "late", "inner", "exit")
    assert net.legs["base"][0] == net.legs["inner"][0]
    shared = shared_macs(net.legs)
    assert shared["late", "base"] == net.plan["late"].shared_macs == shared["base", "late"]
    assert shared["front", "base"] == 0


def test_a_detached_leg_has_weights_of_its_own() -> None:
    net = family("resnet")
    leg = net.legs["base"][0]
    alone, shared = net.detach_leg(leg), net.detach_leg(leg, share=True)
    assert not {id(p) for p in alone.parameters()} & {id(p) for p in net.parameters()}
    assert {id(p) for p in shared.parameters()} <= {id(p) for p in net.parameters()}
    assert str(leg) == "image → layer1.0 of base, both, one, bridge"
