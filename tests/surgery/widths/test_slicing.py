"""A narrower network equals the model whose dropped columns are zero, in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from tests.helpers import nightly_but
from tests.widths import narrowed

NETWORKS = {
    "detachnet:vgg16_cifar": (32, 0.27),
    "torchvision:resnet18": (64, 0.27),
    "torchvision:densenet121": (64, 0.27),
    "torchvision:mobilenet_v3_small": (64, 0.36),
    "torchvision:efficientnet_b0": (64, 0.31),
    "torchvision:shufflenet_v2_x0_5": (64, 0.45),
    "torchvision:regnet_y_400mf": (64, 0.31),
    "torchvision:convnext_tiny": (64, 0.28),
    "timm:convnextv2_atto": (64, 0.30),
    "timm:resnet50_gn": (64, 0.28),
    "timm:poolformer_s12": (64, 0.28),
    "timm:nf_resnet26": (64, 0.28),
    "timm:nf_regnet_b0": (64, 0.33),
    "timm:res2net50_26w_4s": (64, 0.28),
}
USUAL = (
    *("detachnet:vgg16_cifar", "torchvision:resnet18", "torchvision:mobilenet_v3_small"),
    *("torchvision:shufflenet_v2_x0_5", "timm:convnextv2_atto", "timm:nf_resnet26"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(USUAL, NETWORKS))
def test_half_the_width(name: str) -> None:
    size, most = NETWORKS[name]
    result = narrowed(detachnet.create_model(name, num_classes=10), (3, size, size))
    assert result.error < 1e-12
    assert result.changed > 1e-3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result.narrow(result.images[:1])
    assert result.kept.macs == counter.get_total_flops() // 2
    assert result.kept.num_params == sum(p.numel() for p in result.narrow.parameters())
    assert result.kept.macs_of_base < most


@pytest.mark.parametrize("path", ["layer1.0.conv1", "layer3.0.downsample.0", "layer4.1.bn2", "fc"])
def test_the_comparison_sees_a_wrong_column(path: str) -> None:
    result = narrowed(detachnet.create_model("torchvision:resnet18", num_classes=10), (3, 64, 64))
    weight = result.narrow.get_submodule(path).weight
    with torch.no_grad():
        weight.copy_(weight.flip(1 if weight.ndim > 1 else 0))
    assert result.error > 1e-6


@pytest.mark.slow
def test_other_channels_than_the_first() -> None:
    """A random order for each group."""
    model = detachnet.create_model("torchvision:densenet121", num_classes=10)
    order = {
        g.name: torch.randperm(g.units).tolist() for g in detachnet.find_widths(model, (3, 64, 64)) if not g.reason
    }
    result = narrowed(model, (3, 64, 64), order=order)
    assert 0 < result.error < 1e-12
