"""What several tests compare."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detachnet
from detachnet.losses import logits
from detachnet.surgery.turns import Turns

DROPPING = ("Dropout", "StochasticDepth", "DropPath")


def nightly_but(usual: Sequence[object], values: Iterable[object]) -> list[Any]:
    """Values for `parametrize`, a tuple for several names: those of every run, the others for `make nightly`."""
    night = [value for value in values if value not in usual]
    marked = [value if isinstance(value, tuple) else (value,) for value in night]
    return [*usual, *(pytest.param(*value, marks=pytest.mark.nightly) for value in marked)]


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with all randomness switched off."""
    for module in model.modules():
        if isinstance(getattr(module, "drop_rate", None), float):
            module.drop_rate = 0.0  # type: ignore[assignment]
        if type(module).__name__ in DROPPING:
            for name in ("p", "drop_prob"):
                if hasattr(module, name):
                    setattr(module, name, 0.0)
    return model


def assert_joint_equals_separate(net: detachnet.DetachableNet, images: Tensor) -> None:
    """One training step through the joint graph against one through separate passes.

    Outputs and batch-norm statistics to 1e-12. Every gradient to 1e-12 relative to its norm, or to a hundredth
    of the largest where it is zero but for rounding (a bias in front of a batch norm).
    """
    together, apart = net.train(), copy.deepcopy(net).train()
    target = torch.arange(len(images)) % 5
    outputs = together(images, which="all")
    separate, turns = {}, Turns(apart, apart.names)
    for name in apart.names:
        with turns.of(name):
            separate[name] = apart(images, which=name)
    for results in (outputs, separate):
        torch.stack([F.cross_entropy(logits(out), target) for out in results.values()]).sum().backward()
    for name in net.names:
        torch.testing.assert_close(logits(outputs[name]), logits(separate[name]), rtol=1e-12, atol=1e-12)
    largest = max(p.grad.norm() for p in apart.parameters() if p.grad is not None)
    for name, one, other in pairs(together, apart):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            error = (one.grad - other.grad).norm() / other.grad.norm().clamp_min(0.01 * largest)
            assert error < 1e-12, (name, float(error))
    for (name, one), (_, other) in zip(together.named_buffers(), apart.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


def pairs(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        yield name, p, q


def shift(image: tuple[int, ...], feature: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(feature[1:]), nn.Conv2d(image[0], feature[0], 1))
