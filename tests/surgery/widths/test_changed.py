"""Layers of the base-model that are changed after narrower sub-models were made, which read parts of them."""

import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


class Threefold(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def patched(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight, self.bias) * 3, layer)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [patched, lambda layer: setattr(layer, "__class__", Threefold)])
def test_a_forward_that_is_another_one_now(change: Callable[[nn.Module], object]) -> None:
    net, x = family(), torch.randn(4, 3, 16, 16)
    change(net.base.get_submodule("mid"))
    for _ in range(2):
        with pytest.raises(
            detachnet.WidthError, match="'mid' was changed: sub-models with fewer filters no longer"
        ):
            net(x, which="narrow")


def test_layers_with_a_forward_of_their_own_have_all_filters() -> None:
    model = models.Around(nn.Conv2d(8, 8, 1))
    patched(model.mid)
    groups = {group.name: group.reason for group in detachnet.find_widths(model, (3, 16, 16))}
    assert groups["a.0"] == "'mid': its forward is another one than that of its class"


def test_script_modules_have_all_filters() -> None:
    model = models.Around(torch.jit.script(nn.Conv2d(8, 8, 1)))
    groups = {group.name: group.reason for group in detachnet.find_widths(model, (3, 16, 16))}
    assert groups["a.0"].startswith("'mid': ")
    assert not groups["b"]
    net, x = detachnet.make_detachable(model, MODELS, (3, 16, 16)).eval(), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net.detach("narrow")(x), net(x, which="narrow"))
    assert all(p.is_leaf for module in (net, net.detach("narrow")) for p in module.parameters())
    model.fc = torch.jit.script(model.fc)
    own = detachnet.make_detachable(model, ["a"], (3, 16, 16), head="private", check="none")
    assert all(p.is_leaf for p in own.heads.parameters())


def padded(layer: nn.Module) -> None:
    layer.padding_mode = "circular"  # type: ignore[assignment]


def made_dense(layer: nn.Module) -> None:
    layer.groups, layer.weight = 1, nn.Parameter(torch.randn(8, 8, 3, 3))  # type: ignore[assignment]


@pytest.mark.parametrize("change", [padded, made_dense])
def test_numbers_of_layers_that_are_changed(change: Callable[[nn.Module], None]) -> None:
    model = models.Around(nn.Conv2d(8, 8, 3, 1, 1, groups=1 if change is padded else 8))
    net, x = detachnet.make_detachable(model, MODELS, (3, 16, 16)).eval(), torch.randn(4, 3, 16, 16)
    before = {name: net(x, which=name) for name in net.names}
    change(net.base.get_submodule("mid"))
    for name, output in before.items():
        now = net(x, which=name)
        assert not torch.allclose(now, output)
        torch.testing.assert_close(net.detach(name)(x), now)


def test_what_a_hook_leaves_on_its_layer_is_left_there() -> None:
    net, x = family().eval(), torch.randn(4, 3, 16, 16)
    layer: Any = net.base.get_submodule("b")
    layer.calls = 0

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        module.calls += 1
        module.seen = output

    layer.register_forward_hook(count)
    weight = layer.weight
    for name in net.names:
        net(x, which=name)
    assert layer.calls == len(net.names)
    assert layer.seen.shape[1] == 8
    assert layer.weight is weight
    assert "weight" not in vars(layer)


def test_a_layer_that_the_first_pass_makes() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = None

        def forward(self, x: Tensor) -> Any:
            if self.layer is None:
                self.layer = nn.Conv2d(x.shape[1], 8, 1)
            return self.layer(x)

    with pytest.raises(
        detachnet.TraceError, match=r"'mid.layer' is made by the first forward pass[\s\S]*run the model"
    ):
        detachnet.make_detachable(models.Around(Late()), MODELS, (3, 16, 16))


def test_a_norm_of_the_training_mode_only() -> None:
    class Regularized(models.Around):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.extra = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.mid(self.a(x)))
            logits: Tensor = self.fc((self.extra(x) if self.training else x).relu().mean((2, 3)))
            return logits

    net = detachnet.make_detachable(Regularized(), MODELS, (3, 16, 16))
    assert net.norms.get_submodule("narrow.extra").num_features == 8
    net(torch.randn(4, 3, 16, 16), which="narrow").sum().backward()


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
