"""Toy networks, one per awkward case; each says what the answer is."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """conv1 (4 channels), pool, conv2 (8 channels), fc: five cuts, all valid; 8×8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.bn2(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class Keeping(nn.Linear):
    """Keeps something besides its tensors."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.state: object = {"scale": 3}

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


class Skip(nn.Module):
    """`stem` also feeds the addition, so `branch` is no cut and `add` is one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x)
        return self.head(x).mean((2, 3))


class InPlace(nn.Module):
    """`conv1`'s output is changed by an `add_` whose result is not used, and overwritten by an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x.add_(1.0)
        x = self.relu(x)
        return self.conv2(x).mean((2, 3))


class FunctionalDropout(nn.Module):
    """Dropout called as a function: baked into the trace as on or off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.fc(F.dropout(x, 0.5, self.training))


class Auxiliary(nn.Module):
    """An auxiliary head in training, in front of `conv2`; a plain tensor in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.aux = nn.Linear(4, 5)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.conv1(x)
        side = self.aux(x.mean((2, 3))) if self.training else None
        x = self.fc(self.conv3(self.conv2(x)).mean((2, 3)))
        return x if side is None else (x, side)


class BatchAware(nn.Module):
    """Takes the batch size from the image at the start and uses it, the height and the device at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, _ = x.shape
        x = self.conv2(self.conv1(x))
        x = x + torch.zeros(batch, 1, 1, height, device=x.device, dtype=x.dtype)
        return x.reshape(batch * 5, -1).mean(1).view(batch, 5)


class ControlFlow(nn.Module):
    """Decides by a tensor's value; cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), Chooser())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).mean((2, 3))


class Chooser(nn.Module):
    """The part of `ControlFlow` that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.conv(x)
        return x


class Gate(nn.Module):
    """A layer without children that decides by a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x.mean() > 0 else -x


class Gated(nn.Module):
    """Decides by a tensor's value inside a leaf: works, and model by model behind a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.gate = Gate()
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.gate(self.conv1(x))).mean((2, 3))


class Constants(nn.Module):
    """Makes a tensor from nothing in forward, another one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.full((1, 4, 1, 1), 2.0 if self.training else 3.0, dtype=torch.double)
        return self.conv2(self.conv1(x) * scale).mean((2, 3))


class Frozen(nn.Module):
    """Keeps its batch norm in evaluation mode whatever `train()` says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv2(self.conv1(x))).mean((2, 3)))


class OwnNorm(nn.Module):
    """A layer of unknown kind that keeps statistics of the batch."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.mean((0, 2, 3))
            self.running.mul_(0.9).add_(0.1 * mean.detach())
        else:
            mean = self.running
        return x - mean[:, None, None]


class UnknownNorm(nn.Module):
    """Uses `OwnNorm` behind a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = OwnNorm(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv2(self.conv1(x))).mean((2, 3)))


class OddBatch(nn.Module):
    """Works with the share of one image in the batch behind the cut: the joint graph cannot express it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(x).mean((2, 3)) * (1 / x.shape[0])


class DictOutput(nn.Module):
    """Returns a dict, as segmentation networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        x = self.conv2(self.conv1(x))
        return {"out": F.interpolate(x, size=size, mode="bilinear", align_corners=False)}


class Mlp(nn.Module):
    """Hidden layers as wide as the image has values (48): `identity` step-downs fit."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(48, 48)
        self.two = nn.Linear(48, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x.flatten(1)).relu()
        return self.head(self.two(x).relu())


class Tokens(nn.Module):
    """16 patches of 2×2 pixels and a class token: `(B, 17, 8)` at `norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 17, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(x)[:, 0])


class ChannelsLast(nn.Module):
    """`(B, 4, 4, 6)` at `norm`, as ConvNeXt and Swin have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Video(nn.Module):
    """3-D convolutions on `(B, 3, T, H, W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, stride=(1, 2, 2), padding=1)
        self.bn = nn.BatchNorm3d(4)
        self.head = nn.Conv3d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x))).mean((2, 3, 4))


class Reused(nn.Module):
    """`act` is called twice: `act` is the first call, `act_1` the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1, stride=2)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.act(self.conv1(x)))).mean((2, 3))


class ShapeDecisions(nn.Module):
    """Decides, loops and unpacks by shapes only; every such thing is known while tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError("images, please")
        x = self.inner(x)
        _, channels, *size = x.shape
        total = sum(x[:, i : i + 1] * 0 for i in range(x.shape[1]))
        assert len(size) == 2
        x = x + total
        return self.head(x.mean((2, 3)) if channels > 2 else x.amax((2, 3)))


class BatchDecision(nn.Module):
    """Decides by the batch size, which a graph must not bake in: refused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x * 1.0
        return self.conv(x).mean((2, 3))


def threshold(x: Tensor) -> Tensor:
    """A function that decides by values; traceable only as a leaf."""
    return x if x.sum() > 0 else x * 2


class UsesFunction(nn.Module):
    """Calls `threshold` by its global name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(threshold(self.conv1(x))).mean((2, 3))


class NormedHead(nn.Module):
    """A norm and a linear layer, kept whole by some tests."""

    def __init__(self, in_chs: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(in_chs), nn.Linear(in_chs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(x))
        return logits


class Reverse(torch.autograd.Function):
    """The gradient with the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Around(nn.Module):
    """A small network around a module that takes 8 channels at half the image's size, and gives as many."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.mid, self.b, self.fc = middle, nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.b(self.mid(self.a(x))).relu().mean((2, 3)))
        return logits


class ChangesImages(Around):
    """Changes the images that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(3).add_(1))
