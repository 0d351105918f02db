"""Layers of the base-model that are changed after narrower sub-models were made, which read parts of them."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import detachnet
from detachnet import SubModel
from tests import models

MODELS = {"narrow": SubModel(width=0.5), "narrow_behind": SubModel(drop=[":a"], width=0.5)}


def family(change: Callable[[nn.Module], object] = lambda net: None) -> detachnet.DetachableNet:
    torch.manual_seed(0)
    model = models.Around(nn.Conv2d(8, 8, 3, 1, 1))
    change(model)
    return detachnet.make_detachable(model, MODELS, (3, 16, 16))


def doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


def halved(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] / 2,)


def hook(net: nn.Module) -> None:
    net.get_submodule("mid").register_forward_hook(doubled)
    net.get_submodule("fc").register_forward_pre_hook(halved)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_layers_are_called(when: str) -> None:
    net, without = family(hook if when == "before" else lambda net: None), family()
    if when == "after":
        hook(net.base)
    x = torch.randn(4, 3, 16, 16)
    for name in net.names:
        alone = net.eval().detach(name)
        torch.testing.assert_close(alone(x), net(x, which=name))
        assert not torch.allclose(without.eval()(x, which=name), net(x, which=name))
    net.train()
    joint = {name: net(x, which=name) for name in net.names}
    together = net(x, which="all")
    for name, output in joint.items():
        torch.testing.assert_close(together[name], output)


@pytest.mark.parametrize("path", ["mid", "fc", "a.1"])
def test_a_weight_that_is_pruned(path: str) -> None:
    no_longer_fits(
        path,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.remove(layer, "weight"),
    )


@pytest.mark.parametrize("path", ["b", "fc"])
def test_a_weight_that_is_parametrized(path: str) -> None:
    def undo(layer: nn.Module) -> None:
        parametrize.remove_parametrizations(layer, "weight")

    no_longer_fits(path, parametrizations.orthogonal, undo)


def no_longer_fits(path: str, change: Callable[[nn.Module], object], undo: Callable[[nn.Module], object]) -> None:
    net, x = family(), torch.randn(4, 3, 16, 16)
    layer = net.base.get_submodule(path)
    change(layer)
    said = rf"'{path}' was changed: sub-models with fewer filters no longer fit[\s\S]*computes its weight"
    for use in (lambda: net(x, which="all"), lambda: net.detach("narrow"), lambda: net(x, which="narrow")):
        with pytest.raises(detachnet.WidthError, match=said):
            use()
    undo(layer)
    net.train()
    outputs = net(x, which="all")
    sum(output.sum() for output in outputs.values()).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    net.eval()
    torch.testing.assert_close(net.detach("narrow")(x), net(x, which="narrow"))


def test_a_bias_that_is_taken_away(caplog: pytest.LogCaptureFixture) -> None:
    net, x = family().eval(), torch.randn(4, 3, 16, 16)
    net(x, which="narrow")
    bias = net.base.mid.bias
    net.base.mid.bias = None
    with caplog.at_level(logging.WARNING, "detachnet"):
        without = net(x, which="narrow")
    assert "Around is traced again: other parts of mid" in caplog.text
    torch.testing.assert_close(net.detach("narrow")(x), without)
    net.base.mid.bias = nn.Parameter(torch.zeros_like(bias))
    torch.testing.assert_close(net(x, which="narrow"), without)
