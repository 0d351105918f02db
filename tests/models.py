"""Toy networks, one per awkward case; each says what the answer is."""

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
    """Needs the square of the batch size behind the cut: the joint graph cannot express it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        square = x.shape[0] * x.shape[0]
        return self.conv2(self.conv1(x)).mean((2, 3)) * square


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
