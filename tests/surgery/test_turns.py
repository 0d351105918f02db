"""Models in passes of their own: what they have in one network begins where a joint pass begins."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import detachnet
from detachnet.training.step import TrainingStep
from tests.helpers import assert_joint_equals_separate


class Centered(nn.Module):
    """Takes off a running mean, that of this batch in it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.data.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.mean.view(1, -1, 1, 1)


class Plain(nn.Module):
    """The same with a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(8, dtype=torch.double)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.mean.view(1, -1, 1, 1)


class Tied(nn.Module):
    """The same with a buffer that is moved by one name and read by another, as one layer for the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.read = nn.Module(), nn.Module()
        for part, mean in zip((self.moved, self.read), [torch.zeros(8, dtype=torch.double)] * 2, strict=True):
            part.register_buffer("mean", mean)

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        self.moved.mean.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.move(x)
        return x - self.read.mean.view(1, -1, 1, 1)


class Begun(nn.Module):
    """The same with what the first pass in training begins, from noughts."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3))
        if self.training:
            self.mean = 0.1 * mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return x - (mean if self.mean is None else self.mean).view(1, -1, 1, 1)


class Later(nn.Module):
    """The same with a tensor that is not there before the first pass."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * mean if hasattr(self, "mean") else 0.1 * mean
        return x - (self.mean if hasattr(self, "mean") else mean).view(1, -1, 1, 1)


class Scaled(nn.Module):
    """Divides by a running scale, which the gradient needs again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        self.scale.mul_(0.9).add_(x.abs().mean((0, 2, 3)), alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.move(x)
        return x / self.scale.view(1, -1, 1, 1)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))


KINDS: list[Callable[[], nn.Module]] = [
    spectral,
    Centered,
    Plain,
    Tied,
    Begun,
    Later,
    Scaled,
    lambda: nn.BatchNorm2d(8),
]


def make(kind: Callable[[], nn.Module]) -> detachnet.DetachableNet:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()),
        kind(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).double()
    subs = {"late": detachnet.SubModel(drop=["1:2"]), "later": detachnet.SubModel(drop=["1:3"])}
    return detachnet.make_detachable(model, subs, (3, 8, 8), leaf_modules=[Tied])


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_moves_in_front_of_a_span(kind: Callable[[], nn.Module]) -> None:
    assert_joint_equals_separate(make(kind), torch.randn(4, 3, 8, 8, dtype=torch.double))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_passes_of_their_own_are_joint_steps(kind: Callable[[], nn.Module]) -> None:
    together, apart = (copy.deepcopy(net) for net in [make(kind).train()] * 2)
    loss, labels = detachnet.MultiModelLoss(distillation=1.0), torch.arange(4)
    for net, strategy in ((together, "joint"), (apart, "separate")):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        step = TrainingStep(net, net.names, loss, optimizer, strategy=strategy)  # type: ignore[arg-type]
        torch.manual_seed(1)
        for _ in range(3):
            step(torch.randn(4, 3, 8, 8, dtype=torch.double), labels)
    for (name, one), other in zip(together.state_dict().items(), apart.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=name)


class Whole(nn.Module):
    """A network that moves a running mean itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            self.mean.copy_(0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3)))
        x = self.b(x - self.mean.view(1, -1, 1, 1)).relu()
        return self.head(self.c(x).mean((2, 3)))


def test_what_a_network_moves_itself_moves_once() -> None:
    model, images = Whole().double().train(), torch.randn(4, 3, 8, 8, dtype=torch.double)
    net = detachnet.make_detachable(model, {"late": detachnet.SubModel(drop=["b:c"])}, (3, 8, 8)).train()
    net(images, which="all")
    model(images)
    torch.testing.assert_close(net.base.get_buffer("mean"), model.mean)
