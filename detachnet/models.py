"""The networks detachnet brings along."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import cfgs as vgg_cfgs, make_layers

MOST = {"num_classes": 1_000_000, "depth": 2000, "width": 64}
"""The largest arguments of the networks here that are built at all."""


def _check(**given: float) -> None:
    """Refuse sizes that no training could use.

    Raises:
        ValueError: One is too large, or not above 0.
    """
    for name, value in given.items():
        if not 0 < value <= MOST[name]:
            raise ValueError(f"{name} is above 0 and at most {MOST[name]}, not {value}")


@runtime_checkable
class FromImages(Protocol):
    """A network some of whose first weights are made from images: a training does so before its first step."""

    def initialize_from(self, images: Tensor) -> None:
        """Set these weights, given a batch of training images `(B, C, H, W)` as the network takes them in."""


class VGG16Cifar(nn.Module):
    """VGG-16 for 32×32 images, as the paper trains it.

    Batch norm after every weight layer but the last; the first two fully connected layers are removed and
    the last one is 512 → `num_classes`. The layers are torchvision's, so `features.6` and `features.23` are
    the first and the third pooling layer, the paper's two cuts.

    Args:
        num_classes: Size of the output, `(B, num_classes)`.
        width: Multiplies every number of channels.

    Source: Fuengfusin & Tamukoh, JRNAL 8(1), 2021, section 3; initialized as torchvision's VGG.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        _check(num_classes=num_classes, width=width)
        cfg = [v if isinstance(v, str) else max(1, round(v * width)) for v in vgg_cfgs["D"]]
        num_chs = [v for v in cfg if isinstance(v, int)]
        self.features = make_layers(cfg, batch_norm=True)
        self.classifier = nn.Linear(num_chs[-1], num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.constant_(module.bias, 0)  # type: ignore[arg-type]
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, 32, 32)`."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class ResNetCifar(nn.Module):
    """A residual network for 32×32 images: three stages of basic blocks with 16, 32 and 64 channels.

    `layer1` and `layer2` are the places to cut. The blocks are torchvision's; where a stage changes the size, the
    shortcut is a 1×1 convolution.

    Args:
        num_classes: Size of the output, `(B, num_classes)`.
        depth: Number of weight layers, 6n + 2: 20, 32, 44, 56, ….
        width: Multiplies every number of channels.

    Raises:
        ValueError: `depth` is not 6n + 2, or an argument is out of bounds.

    Source: He et al., arXiv 1512.03385, section 4.2, with its shortcuts of option B.
    """

    def __init__(self, num_classes: int = 10, depth: int = 20, width: float = 1.0) -> None:
        super().__init__()
        _check(num_classes=num_classes, depth=depth, width=width)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is 6n + 2, such as 20 or 56, not {depth}")
        small, middle, large = (max(1, round(n * width)) for n in (16, 32, 64))
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, small, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(small)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(small, small, count, stride=1)
        self.layer2 = _stage(small, middle, count, stride=2)
        self.layer3 = _stage(middle, large, count, stride=2)
        self.fc = nn.Linear(large, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, 32, 32)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(in_chs: int, out_chs: int, count: int, stride: int) -> nn.Sequential:
    """`count` basic blocks, the first of which changes the size and the number of channels."""
    shortcut = None
    if stride != 1 or in_chs != out_chs:
        shortcut = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))
    blocks = [BasicBlock(in_chs, out_chs, stride, shortcut)]
    return nn.Sequential(*blocks, *(BasicBlock(out_chs, out_chs) for _ in range(count - 1)))


class AirbenchCifar(nn.Module):
    """A plain convolutional network for short trainings on 32×32 images.

    2×2 filters that whiten the image, then three blocks of two 3×3 convolutions, the first of which is pooled. The
    first filters of a convolution, as many as it has inputs, start as the identity: a block without its second
    convolution (the span `block1.act1:block1`) is nearly the same then. Neither the whitening filters nor the
    factors of the batch norms are trained.

    Args:
        num_classes: Size of the output, `(B, num_classes)`.
        width: Multiplies the 64, 256 and 256 channels of the blocks; the 24 whitening filters stay.

    Source: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, section 3; norms with
    PyTorch's epsilon, and a whitening bias that is trained to the end.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        _check(num_classes=num_classes, width=width)
        small, middle, large = (max(1, round(n * width)) for n in (64, 256, 256))
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.act = nn.GELU()
        self.block1 = _airbench_block(24, small)
        self.block2 = _airbench_block(small, middle)
        self.block3 = _airbench_block(middle, large)
        self.pool = nn.MaxPool2d(3)
        self.fc = nn.Linear(large, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 3, 32, 32)`."""
        x = self.block3(self.block2(self.block1(self.act(self.whiten(x)))))
        logits: Tensor = self.fc(self.pool(x).flatten(1) / 9)
        return logits

    @torch.no_grad()
    def initialize_from(self, images: Tensor) -> None:
        """Make the first layer whiten the 2×2 patches of images `(B, 3, H, W)`.

        Its filters are the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue,
        and their negatives.
        """
        patches = F.unfold(images.detach().cpu().double(), 2).transpose(0, 1).flatten(1)
        values, vectors = torch.linalg.eigh(torch.cov(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]


def _airbench_block(in_chs: int, out_chs: int) -> nn.Sequential:
    """Two convolutions with batch norms and GELUs, the first of which is pooled."""
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False)}
    layers |= {"pool": nn.MaxPool2d(2), "norm1": nn.BatchNorm2d(out_chs, momentum=0.4), "act1": nn.GELU()}
    layers |= {"conv2": nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)}
    layers |= {"norm2": nn.BatchNorm2d(out_chs, momentum=0.4), "act2": nn.GELU()}
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight[: layer.in_channels])
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.requires_grad_(False)
    return nn.Sequential(OrderedDict(layers))


class NSN(nn.Module):
    """An MLP whose hidden layers are as wide as the image has pixels, so that each can take in the image itself.

    784-784-784-10 by default: `hidden.0` and `hidden.1` are the places to cut, with `stepdown="identity"`.

    Args:
        num_classes: Size of the output, `(B, num_classes)`.
        depth: Number of hidden layers.
        dropout: Probability behind each hidden layer.

    Source: Fuengfusin & Tamukoh, "Network with Sub-Networks", arXiv 1908.00763.
    """

    def __init__(self, num_classes: int = 10, depth: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        _check(num_classes=num_classes, depth=depth)
        layers = [nn.Sequential(nn.Linear(784, 784), nn.ReLU(), nn.Dropout(dropout)) for _ in range(depth)]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(784, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of images `(B, 1, 28, 28)`."""
        logits: Tensor = self.head(self.hidden(x.flatten(1)))
        return logits
