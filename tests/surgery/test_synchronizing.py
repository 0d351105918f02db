"""Batch norms that several processes on CUDA share: the same network, which is traced and written as before."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import detachnet
from detachnet import SubModel
from detachnet.checkpoint.saving import check_storable
from detachnet.surgery.synchronizing import synchronize_norms
from tests import models

SIZE = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("torchvision:resnet18", {"late": SubModel(drop=["layer2.0:layer2.1"]), "thin": SubModel(width=0.5)}),
        ("timm:efficientnet_lite0", 1),  # norms with an activation
        ("detachnet:vgg16_cifar", ["features.6"]),
    ],
)
def test_it_is_the_same_network(name: str, asked: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = detachnet.create_model(name, num_classes=10)
    net = detachnet.make_detachable(model, asked, SIZE, check="none").train()
    own, images = copy.deepcopy(net), torch.randn(4, *SIZE)
    synchronize_norms(net)
    norms = [norm for norm in net.modules() if isinstance(norm, nn.SyncBatchNorm)]
    assert len(norms) == sum(isinstance(norm, nn.BatchNorm2d) for norm in own.modules()) > 0
    for which in net.names:
        torch.testing.assert_close(net(images, which=which), own(images, which=which))
    torch.testing.assert_close(net.state_dict(), own.state_dict())
    check_storable(net)
    detachnet.save(net, tmp_path / "net.safetensors")
    loaded = detachnet.load(tmp_path / "net.safetensors")
    torch.testing.assert_close(loaded.eval()(images, which="all"), net.eval()(images, which="all"))
    assert not caplog.records


def test_images_of_a_cuda_device_go_the_way_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = detachnet.make_detachable(models.Around(nn.BatchNorm2d(8)), ["a"], (3, 16, 16))
    synchronize_norms(net)
    norm, x = net.base.mid, torch.randn(2, 8, 4, 4)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda _, x: x)
    assert not torch.equal(norm(x), x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert torch.equal(norm(x), x)


class Scaled(nn.BatchNorm2d):
    """A norm with a pass of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_norm_with_a_pass_of_its_own_is_left(caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(models.Around(Scaled(8)), ["a"], (3, 16, 16))
    synchronize_norms(net)
    assert type(net.base.mid) is Scaled
    assert "its own images in base.mid, norms.sub0.mid" in caplog.text
