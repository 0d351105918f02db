"""How training images lie in memory: channels-last where a CPU can train so."""

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detachnet
from detachnet.surgery.layout import image_layout
from tests.helpers import nightly_but

CPU = torch.device("cpu")

TRAIN_A_THIN_RESNET = """
import sys
import detachnet
from detachnet.training.recipe import load_recipe
recipe = load_recipe(sys.argv[1], [
    "model.name=detachnet:resnet_cifar", "model.kwargs.width=0.25", "model.kwargs.depth=8",
    "family.models={}", 'family.cuts=["layer1"]', "data.num_train=1024", "train.batch_size=64", "train.epochs=2",
])
print(detachnet.train(recipe, sys.argv[2]).status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("widest_instructions", nightly_but(["AVX2"], ["AVX2", "DEFAULT"]))
def test_a_thin_resnet_is_trained(tmp_path, widest_instructions: str) -> None:
    """In a process of its own: where the layout is wrong the heap is corrupted, with AVX2 within a few steps."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": widest_instructions, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN_A_THIN_RESNET, "recipes/quickstart.toml", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "finished\n"
    assert done.stderr.count("channels-first") == 1
    assert "'layer2.0.downsample.0' is a strided 1×1 convolution" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "cut"),
    [
        ("detachnet:vgg16_cifar", {"width": 0.25}, "features.6"),
        ("detachnet:resnet_cifar", {"width": 0.5}, "layer1"),  # 8 channels
        ("torchvision:resnet50", {}, "layer1"),
        ("torchvision:mobilenet_v3_large", {}, "features.3"),
    ],
)
def test_other_networks_are_trained_channels_last(
    name: str, kwargs: dict[str, float], cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = detachnet.make_detachable(detachnet.create_model(name, **kwargs), [cut], check="none")
    assert image_layout(net, CPU) is torch.channels_last
    assert not caplog.records


class Convolution(nn.Module):
    """A convolution called as a function, in the middle of a network."""

    def __init__(self, in_chs: int, kernel: int, groups: int = 1, **options: object) -> None:
        super().__init__()
        self.entry, self.options = nn.Conv2d(3, in_chs, 3), options | {"groups": groups}
        self.weight = nn.Parameter(torch.randn(8, in_chs // groups, kernel, kernel))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.entry(x), self.weight, **self.options).mean((2, 3)))


@pytest.mark.parametrize(
    ("in_chs", "kernel", "options", "layout"),
    [
        (2, 1, {"stride": 2}, torch.contiguous_format),
        (7, 1, {"stride": (1, 3)}, torch.contiguous_format),
        (1, 1, {"stride": 2}, torch.channels_last),
        (8, 1, {"stride": 2}, torch.channels_last),
        (4, 1, {}, torch.channels_last),
        (4, 3, {"stride": 2}, torch.channels_last),
        (4, 1, {"stride": 2, "groups": 2}, torch.channels_last),
    ],
)
def test_convolutions_called_as_functions_count(
    in_chs: int, kernel: int, options: dict[str, object], layout: torch.memory_format, caplog
) -> None:
    net = detachnet.make_detachable(Convolution(in_chs, kernel, **options), ["entry"], (3, 16, 16))
    with caplog.at_level(logging.WARNING):
        assert image_layout(net, CPU) is layout
    assert ("'conv2d' is a strided 1×1 convolution" in caplog.text) == (layout is torch.contiguous_format)
