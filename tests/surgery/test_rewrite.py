"""The joint graph is separate passes: outputs, gradients and batch-norm state, in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detachnet
from detachnet.surgery.plan import Norm
from tests import models
from tests.helpers import assert_joint_equals_separate, without_dropout

FAMILIES: dict[str, tuple[list[str], int]] = {
    "detachnet:vgg16_cifar": (["features.6", "features.23"], 32),
    "detachnet:resnet_cifar": (["layer1", "layer2"], 32),
    "detachnet:airbench": (["block1", "block2.act1"], 32),
    "torchvision:resnet18": (["layer1", "layer3.0"], 64),
    "torchvision:densenet121": (["features.transition1", "features.denseblock3"], 64),
    "torchvision:mobilenet_v3_small": (["features.2", "features.8"], 64),
    "torchvision:efficientnet_b0": (["features.2", "features.5"], 64),
    "torchvision:shufflenet_v2_x0_5": (["stage2", "stage3.3"], 64),
    "torchvision:regnet_y_400mf": (["trunk_output.block1", "trunk_output.block3"], 64),
    "torchvision:convnext_tiny": (["features.1", "features.4"], 64),
    "timm:vgg11_bn": (["features.7", "features.14"], 64),
    "timm:resnet18": (["layer1", "layer3"], 64),
    "timm:densenet121": (["features.transition1", "features.transition2"], 64),
    "timm:mobilenetv3_small_050": (["blocks.1", "blocks.3"], 64),
    "timm:efficientnet_b0": (["blocks.1", "blocks.3"], 64),
    "timm:regnety_002": (["s1", "s3"], 64),
    "timm:convnext_atto": (["stages.0", "stages.2"], 64),
}

SMALL: dict[str, tuple[list[str], dict[str, Any]]] = {
    "detachnet:vgg16_cifar": (["features.6", "features.23"], {"width": 0.125}),
    "detachnet:resnet_cifar": (["layer1", "layer2"], {"depth": 8}),
    "torchvision:shufflenet_v2_x0_5": (["stage2", "stage3.3"], {}),
    "timm:densenet121": (
        ["features.transition1", "features.transition2"],
        {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    ),
    "timm:test_efficientnet": (["blocks.1", "blocks.3"], {}),
    "timm:test_byobnet": (["stages.0", "stages.2"], {}),
    "timm:test_convnext": (["stages.0", "stages.2"], {}),
}
"""Of each kind a small one, for every run."""


def assert_same(name: str, cuts: list[str], size: int, kwargs: dict[str, Any], norm: str, check: str) -> None:
    model = without_dropout(detachnet.create_model(name, num_classes=5, **kwargs)).double()
    net = detachnet.make_detachable(model, cuts, (3, size, size), norm=norm, check=check)
    images = torch.randn(2, 3, size, size, dtype=torch.double)
    assert_joint_equals_separate(net, images)
    net.eval()
    for k in net.names:
        torch.testing.assert_close(net(images, which=k), net.detach(k)(images), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["shared", "private"])
@pytest.mark.parametrize("name", SMALL)
def test_small_families(name: str, norm: str) -> None:
    cuts, kwargs = SMALL[name]
    assert_same(name, cuts, 32, kwargs, norm, "none")


@pytest.mark.nightly
@pytest.mark.parametrize("norm", ["shared", "private"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, norm: str) -> None:
    cuts, size = FAMILIES[name]
    assert_same(name, cuts, size, {"mlp_ratio": 1 / 64} if name == "timm:vgg11_bn" else {}, norm, "full")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["shared", "private"])
def test_outputs_are_bitwise_equal(norm: str) -> None:
    net = detachnet.make_detachable(
        detachnet.create_model("detachnet:vgg16_cifar", width=0.25).double(),
        ["features.6", "features.23"],
        norm=norm,
        check="none",
    )
    images = torch.randn(4, 3, 32, 32, dtype=torch.double)
    for mode in (True, False):
        net.train(mode)
        outputs = net(images, which="all")
        assert all(torch.equal(outputs[name], net(images, which=name)) for name in net.names)


TOYS = {
    models.Plain: ["pool", "bn2"],
    models.Skip: ["stem", "add"],
    models.InPlace: ["conv1", "relu"],
    models.Auxiliary: ["conv1", "conv2"],
    models.BatchAware: ["conv1", "conv2"],
    models.Frozen: ["conv1", "conv2"],
    models.Constants: ["conv1", "conv2"],
    models.Gated: ["conv1", "gate"],
    models.UnknownNorm: ["conv1", "conv2"],
}


@pytest.mark.parametrize("norm", ["shared", "private"])
@pytest.mark.parametrize("toy", TOYS)
def test_toys(toy: type[torch.nn.Module], norm: str) -> None:
    net = detachnet.make_detachable(toy().double(), TOYS[toy], (3, 8, 8), norm=norm, check="none")
    assert_joint_equals_separate(net, torch.randn(4, 3, 8, 8, dtype=torch.double))


def test_any_set_of_models() -> None:
    net = detachnet.make_detachable(models.Plain().double(), ["conv1", "pool", "bn2"], (3, 8, 8))
    images = torch.randn(4, 3, 8, 8, dtype=torch.double)
    every = net(images, which="all")
    for which in (["sub0", "sub2"], ["base", "sub1"], ["sub1"], ["sub0", "sub1", "sub2"]):
        some = net(images, which=which)
        assert list(some) == which
        for name in which:
            torch.testing.assert_close(some[name], every[name], rtol=1e-12, atol=1e-12)


def test_an_auxiliary_head_in_front_of_the_cut_is_none() -> None:
    net = detachnet.make_detachable(models.Auxiliary(), ["conv1", "conv2"], (3, 8, 8)).train()
    outputs = net(torch.randn(4, 3, 8, 8), which="all")
    assert [out[1] is None for out in outputs.values()] == [False, False, True]
    assert net(torch.randn(4, 3, 8, 8), which="sub1")[1] is None
    assert isinstance(net.eval()(torch.randn(4, 3, 8, 8), which="sub1"), torch.Tensor)


def test_functional_dropout_follows_the_mode() -> None:
    net = detachnet.make_detachable(models.FunctionalDropout(), ["conv"], (3, 8, 8))
    images = torch.randn(4, 3, 8, 8)
    assert not torch.equal(net.train()(images), net(images))
    assert torch.equal(net.eval()(images), net(images))


def test_constants_belong_to_their_mode() -> None:
    model = models.Constants().double()
    net = detachnet.make_detachable(model, ["conv1"], (3, 8, 8))
    images = torch.randn(2, 3, 8, 8, dtype=torch.double)
    for mode in (True, False):
        assert torch.equal(net.train(mode)(images), model.train(mode)(images))
    assert torch.equal(net.detach("sub0")(images), net(images, which="sub0"))
    assert not any("constant" in name for name in net.state_dict())


def test_dict_outputs() -> None:
    net = detachnet.make_detachable(models.DictOutput(), ["conv1"], (3, 8, 8))
    outputs = net(torch.randn(2, 3, 8, 8), which="all")
    assert {name: out["out"].shape for name, out in outputs.items()} == {
        "base": (2, 5, 8, 8),
        "sub0": (2, 5, 8, 8),
    }


class Several(models.Around):
    """Gives out what a function of several values makes of the logits."""

    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        super().__init__(nn.Identity())
        self.of = of

    def forward(self, x: Tensor) -> Any:
        return self.of(super().forward(x))


@pytest.mark.parametrize(
    "of",
    [
        lambda y: y.topk(2),
        lambda y: {"all": y, "best": torch.max(y, dim=1)},
        lambda y: (y, y.sort(1), [torch.split(y, [2, 3], 1)]),
        lambda y: y.unbind(1),
        lambda y: y.unsqueeze(1).chunk(2, 2),
    ],
    ids=["topk", "max", "nested", "unbind", "chunk"],
)
def test_outputs_that_one_function_gives_several_of(of: Callable[[Tensor], Any]) -> None:
    model, images = Several(of).double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.double)
    net = detachnet.make_detachable(model, {"sub0": "a", "half": detachnet.SubModel(width=0.5)}, (3, 8, 8)).eval()
    joint = net(images, which="all")
    pairs = {name: (joint[name], net.detach(name)(images)) for name in net.names}
    for found, expected in [*pairs.values(), (net(images), model(images))]:
        assert type(found) is type(expected)  # one of torch's with names, too
        torch.testing.assert_close(found, expected)


def test_separate_passes_where_the_joint_graph_cannot_be_made(caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(models.OddBatch(), ["conv1"], (3, 8, 8))
    images = torch.randn(3, 3, 8, 8)
    outputs = net(images, which="all")
    assert "models run one after another, not in one pass" in caplog.text
    assert all(torch.equal(outputs[name], net(images, which=name)) for name in net.names)


def test_frozen_norms_stay_frozen() -> None:
    net = detachnet.make_detachable(models.Frozen(), ["conv1"], (3, 8, 8), norm="private").train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net(torch.randn(4, 3, 8, 8), which="all")
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_features_are_the_base_models_at_the_cut_and_the_step_downs(training: bool) -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.1).double()
    net = detachnet.make_detachable(model, ["features.6", "features.23"], (3, 32, 32), check="none").train(
        training
    )
    images = torch.randn(4, 3, 32, 32, dtype=torch.double)
    expected = copy.deepcopy(net)(images, which="all")
    seen: dict[str, torch.Tensor] = {}
    alone = copy.deepcopy(net)
    for name, cut in (("sub0", "6"), ("sub1", "23")):
        layer = alone.base.get_submodule(f"features.{cut}")
        layer.register_forward_hook(lambda _m, _args, out, name=name: seen.setdefault(name, out))
    alone(images, which="base")
    outputs, features = net(images, which="all", features=True)
    for name, (feature, made) in features.items():
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=0)
        torch.testing.assert_close(feature, seen[name], rtol=0, atol=0)
        torch.testing.assert_close(made, net.stepdowns.get_submodule(name)(images), rtol=0, atol=0)
    assert list(features) == ["sub0", "sub1"]


def test_no_features_without_one_pass() -> None:
    net = detachnet.make_detachable(models.OddBatch(), ["conv1"], (3, 8, 8))
    with pytest.raises(detachnet.DetachNetError, match="in no simple way"):
        net(torch.zeros(2, 3, 8, 8), which="all", features=True)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["private", "shared"])
@pytest.mark.parametrize("training", [True, False])
def test_private_heads(norm: Norm, training: bool) -> None:
    """Joint equals separate, each model reads its own last layer; detached it has the base-model's name."""
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.1).double()
    net = detachnet.make_detachable(
        model, ["features.6", "features.23"], (3, 32, 32), norm=norm, head="private", check="none"
    )
    for i, parameter in enumerate(net.heads.parameters()):
        parameter.data += i + 1
    net.train(training)
    images = torch.randn(4, 3, 32, 32, dtype=torch.double)
    separate = {name: copy.deepcopy(net)(images, which=name) for name in net.names}
    joint = copy.deepcopy(net)(images, which="all")
    plain = detachnet.make_detachable(
        model, ["features.6", "features.23"], (3, 32, 32), norm=norm, check="none"
    ).train(training)
    for name in net.names:
        torch.testing.assert_close(joint[name], separate[name], rtol=1e-12, atol=1e-12)
    assert net.parameters_of(["sub0"]).keys() >= {"heads.sub0.classifier.weight", "heads.sub0.classifier.bias"}
    assert "base.classifier.weight" not in net.parameters_of(["sub0", "sub1"])
    assert net.plan.title.endswith(f"{norm} batch norms, private heads")
    assert not list(plain.heads.parameters())
    detached = net.eval().detach("sub1")
    assert torch.equal(detached(images), net(images, which="sub1"))
    assert torch.equal(detached.classifier.weight, net.heads.sub1.classifier.weight)


def test_the_head_is_the_last_layer() -> None:
    net = detachnet.make_detachable(models.Plain(), ["conv1", "pool"], (3, 8, 8), head="private")
    last = [name for name, layer in models.Plain().named_modules() if isinstance(layer, torch.nn.Linear)][-1]
    assert {name for name, _ in net.heads.named_parameters()} == {
        f"{sub}.{last}.{kind}" for sub in ("sub0", "sub1") for kind in ("weight", "bias")
    }
    with pytest.raises(detachnet.CutError, match="head is 'private' or 'shared', not 'own'"):
        detachnet.make_detachable(models.Plain(), ["conv1"], (3, 8, 8), head="own")  # type: ignore[arg-type]


class _Twice(torch.nn.Module):
    """A trunk, and a main output from a layer that was called before, with a norm and another output behind it."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.conv, self.fc, self.mid = torch.nn.Conv2d(3, 4, 8), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.norm, self.aux = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
        self.functional = functional

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.conv(x).flatten(1)
        deep = self.mid(self.fc(features))
        logits = torch.nn.functional.linear(deep, self.fc.weight) if self.functional else self.norm(self.fc(deep))
        return {"out": logits, "aux": self.aux(features)}


def test_heads_of_awkward_models() -> None:
    net = detachnet.make_detachable(_Twice(), ["conv"], (3, 8, 8), head="private")
    assert [name for name, _ in net.heads.named_parameters()] == ["sub0.fc.weight", "sub0.fc.bias"]
    assert [name for name, _ in net.norms.named_parameters()] == ["sub0.norm.weight", "sub0.norm.bias"]
    with pytest.raises(detachnet.CutError, match="sub0 has no layer behind its cut that could"):
        detachnet.make_detachable(_Twice(functional=True), ["conv"], (3, 8, 8), head="private")
