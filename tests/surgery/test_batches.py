"""Numbers and lengths that follow the batch size, at whatever size: never one that a trace was made at."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detachnet
from tests.helpers import assert_joint_equals_separate

pytestmark = pytest.mark.slow

SIZE = (3, 16, 16)


class Middle(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(8, 8, 3, 1, 1), function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self.conv, h)


class Net(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.mid, self.b, self.fc = Middle(function), nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.b(self.mid(self.a(x))).relu().mean((2, 3)))
        return logits


@torch.jit.script
def centred(h: Tensor) -> Tensor:
    if h.shape[0] > 8:
        h = h - h.mean(0, keepdim=True)
    return h


class Limited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h / (h.abs().max() / 2).clamp(min=1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / gradient.norm().clamp(min=1e-3)


def spread(h: Tensor) -> Tensor:
    """Only above so many images, and above a value that noise hardly has."""
    return h - h.mean(0, keepdim=True) if h.shape[0] > 8 else h / h.abs().max().clamp(min=20)


def with_the_first_doubled(h: Tensor) -> Tensor:
    h = h.clone()
    h[:16] *= 2
    return h


def of_position(h: Tensor, images: Tensor) -> Tensor:
    return h * (1 + images).to(h).view(-1, 1, 1, 1)


CASES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "split": lambda conv, h: torch.cat([conv(part) for part in h.split(16)]),
    "chunk": lambda conv, h: torch.cat([conv(part) for part in h.chunk(4)]),
    "tensor_split": lambda conv, h: torch.cat([conv(part) for part in torch.tensor_split(h, 3)]),
    "ranges": lambda conv, h: torch.cat([conv(h[16 * i :][:16]) for i in range(math.ceil(h.shape[0] / 16))]),
    "remainder": lambda conv, h: conv(h) * (2 if h.shape[0] % 5 == 0 else 1),
    "one size": lambda conv, h: conv(h) * (2 if h.shape[0] == 10 else 1),
    "whole part": lambda conv, h: conv(h) * (1 + h.shape[0] // 16),
    "least": lambda conv, h: conv(h) * min(h.shape[0], 13),
    "scripted": lambda conv, h: centred(conv(h)),
    "applied": lambda conv, h: Limited.apply(conv(h)),  # type: ignore[no-untyped-call]
    "the first ones": lambda conv, h: with_the_first_doubled(conv(h)),
    "all but the last ones": lambda conv, h: torch.cat([conv(h[:-16]) * 2, conv(h[-16:])]),
    "moved round": lambda conv, h: conv(h.roll(24, 0)),
    "all moved round": lambda conv, h: conv(torch.roll(h, 8)),
    "by position": lambda conv, h: of_position(conv(h), torch.arange(h.shape[0]) < 16),
    "group by position": lambda conv, h: of_position(conv(h), torch.arange(h.shape[0]) // 16),
    "of channels": lambda conv, h: torch.cat(list(conv(h).split(3, dim=1)), 1),
}

WHOLE = ("split", "chunk", "ranges", "remainder", "one size", "least")
"""Whose trace would be another for another batch size."""


def assert_joint_is_separate(net: detachnet.DetachableNet, images: Tensor) -> None:
    """In the mode it is in; in training with all that a step changes."""
    if net.training:
        assert_joint_equals_separate(net, images)
        net.zero_grad()
    else:
        joint = net(images, which="all")
        for name in net.names:
            torch.testing.assert_close(joint[name], net(images, which=name))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_any_size_is_what_the_model_makes_of_it(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Net(CASES[name]).double()
    net = detachnet.make_detachable(model, ["a"], SIZE)
    model.train(training)
    net.train(training)
    for batch in (1, 5, 10, 16, 17, 40):
        images = 100 * torch.randn(batch, *SIZE, dtype=torch.double)
        net.base.load_state_dict(model.state_dict())
        torch.testing.assert_close(net(images, which="base"), model(images))
        assert_joint_is_separate(net, images)
    assert ("mid" in net.plan.whole) == (name in WHOLE)


@pytest.mark.parametrize("training", [False, True])
def test_functions_kept_whole_run_model_by_model(training: bool) -> None:
    torch.manual_seed(0)
    model = Net(lambda conv, h: spread(conv(h))).double()
    net = detachnet.make_detachable(model, ["a"], SIZE, leaf_functions=[spread]).train(training)
    for batch in (2, 6, 12):
        assert_joint_is_separate(net, 100 * torch.randn(batch, *SIZE, dtype=torch.double))


def test_a_number_of_several_tensors_is_none_of_images() -> None:
    model = Net(lambda conv, h: torch.cat(list(conv(h).chunk(8, dim=1)), 1))
    assert detachnet.make_detachable(model, ["a"], SIZE).plan.checked == ""


def test_in_the_models_own_forward_it_is_refused() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            return torch.cat(list(out.split(16)))

    with pytest.raises(detachnet.TraceError, match="a decision by the batch size") as refused:
        detachnet.make_detachable(Model(CASES["of channels"]), ["a"], SIZE)
    assert "move that" in str(refused.value)
