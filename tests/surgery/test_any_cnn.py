"""Awkward models: other ranks, memory orders, wrappers, dtypes, leaves, and cuts found for the user."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import detachnet
from detachnet.surgery.cuts import spread
from detachnet.surgery.stepdown import plan_stepdown
from tests import models
from tests.helpers import assert_joint_equals_separate

pytestmark = pytest.mark.slow

SHAPES = {
    (models.Mlp, "one", (3, 4, 4)): (48,),
    (models.Tokens, "norm", (3, 8, 8)): (17, 8),
    (models.Tokens, "patch", (3, 8, 8)): (8, 4, 4),
    (models.ChannelsLast, "norm", (3, 8, 8)): (4, 4, 6),
    (models.ChannelsLast, "norm", (3, 12, 20)): (6, 10, 6),
    (models.Plain, "pool", (3, 11, 7)): (4, 5, 3),
    (models.Video, "bn", (3, 5, 8, 8)): (4, 5, 4, 4),
    (models.Reused, "act", (3, 8, 8)): (4, 8, 8),
    (models.ShapeDecisions, "inner", (3, 8, 8)): (4, 8, 8),
    (models.BatchAware, "conv1", (3, 8, 8)): (4, 8, 8),
}


@pytest.mark.parametrize(("toy", "cut", "size"), SHAPES)
@pytest.mark.parametrize("norm", ["private", "shared"])
def test_features_of_every_shape(toy: type[nn.Module], cut: str, size: tuple[int, ...], norm: str) -> None:
    net = detachnet.make_detachable(toy().double(), [cut], size, norm=norm, check="none")
    assert net.plan["sub0"].stepdown.feature == SHAPES[toy, cut, size]  # type: ignore[union-attr]
    assert_joint_equals_separate(net, torch.randn(4, *size, dtype=torch.double))
    images = torch.randn(3, *size, dtype=torch.double)
    net.eval()
    assert torch.equal(net.detach("sub0")(images), net(images, which="sub0"))
    assert net.plan["sub0"].num_params == sum(p.numel() for p in net.detach("sub0").parameters())


@pytest.mark.parametrize(
    ("image", "feature", "layout", "prefix"),
    [
        ((3, 224, 224), (96, 56, 56), "channels_first", 0),
        ((3, 224, 224), (56, 56, 96), "channels_last", 0),
        ((3, 224, 160), (7, 5, 768), "channels_last", 0),
        ((3, 224, 224), (197, 768), "tokens", 1),
        ((3, 224, 224), (196, 768), "tokens", 0),
        ((3, 224, 224), (201, 384), "tokens", 5),
        ((3, 224, 160), (35, 64), "tokens", 0),
        ((3, 224, 224), (512, 49), "tokens_last", 0),
        ((3, 16, 224, 224), (8, 56, 56, 96), "channels_last", 0),
    ],
)
def test_layouts(image: tuple[int, ...], feature: tuple[int, ...], layout: str, prefix: int) -> None:
    plan = plan_stepdown(image, feature)
    assert (plan.layout, plan.prefix) == (layout, prefix)


def test_tokens_that_form_no_grid() -> None:
    with pytest.raises(detachnet.StepDownError, match="neither axis of the feature 4000×311 is a grid of tokens"):
        plan_stepdown((3, 8, 8), (4000, 311))


def test_identity_is_nsn() -> None:
    net = detachnet.make_detachable(models.Mlp(), ["relu", "relu_1"], (3, 4, 4), stepdown="identity").eval()
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(net(images, which="sub1"), net.base.head(images.flatten(1)))  # type: ignore[operator]
    assert [m.num_params for m in net.plan.models] == [2 * (48 * 48 + 48) + 245, 48 * 48 + 48 + 245, 245]
    with pytest.raises(detachnet.StepDownError, match="the flattened image 3×8×8 has 192 values"):
        detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), stepdown="identity")


def test_nsn_of_the_paper() -> None:
    net = detachnet.make_detachable(
        detachnet.create_model("detachnet:nsn"), ["hidden.0", "hidden.1"], stepdown="identity"
    )
    assert [model.num_params for model in net.plan.models] == [1_238_730, 623_290, 7_850]


class InPassing(nn.Module):
    """Its forward makes modules of its layers, and some without tensors."""

    def __init__(self) -> None:
        super().__init__()
        layers = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.Conv2d(8, 8, 1),
        )
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.Sequential(self.features[:3], nn.Tanh())(x)
        h = nn.ReLU()(self.features[3:](h))
        return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "asked", ["features.2", detachnet.SubModel(drop=["features.2:features.4"]), detachnet.SubModel(width=0.5)]
)
def test_modules_that_a_forward_pass_makes_of_the_layers(asked: Any) -> None:
    model, images = InPassing(), torch.randn(2, 3, 16, 16)
    net = detachnet.make_detachable(model, {"sub": asked}, (3, 16, 16)).eval()
    assert torch.equal(net(images), model.eval()(images))
    assert torch.equal(net.detach("sub")(images), net(images, which="sub"))


def test_which_call_of_a_module_is_meant() -> None:
    first = detachnet.make_detachable(models.Reused(), ["act"], (3, 8, 8)).plan
    second = detachnet.make_detachable(models.Reused(), ["act_1"], (3, 8, 8)).plan
    assert first.hints == ("'act' is called 2 times; the first call is meant, 'act_1' is the next",)
    assert [plan["sub0"].stepdown.feature for plan in (first, second)] == [(4, 8, 8), (5, 4, 4)]  # type: ignore[union-attr]


def test_a_stem_that_costs_more_than_it_saves() -> None:
    with torch.device("meta"):
        model = detachnet.create_model("torchvision:resnet50")
    wide = detachnet.make_detachable(model, ["layer1", "layer2"], stepdown="stem").plan
    assert wide.hints[0] == "sub0 costs no less than base: its stem wants less width"
    assert "sub1: its step-down has" in wide.hints[1]
    narrow = detachnet.make_detachable(model, ["layer1", "layer2"], stepdown=detachnet.Stem(width=0.25)).plan
    assert narrow.hints == ()
    assert narrow["sub1"].macs < narrow["sub0"].macs < narrow["base"].macs


def test_a_decision_by_the_batch_size_is_refused() -> None:
    with pytest.raises(detachnet.TraceError, match="cannot trace BatchDecision"):
        detachnet.find_cuts(models.BatchDecision(), (3, 8, 8))


IMAGES = torch.randn(3, 3, 8, 8)


def test_the_fix_the_error_proposes_works() -> None:
    with pytest.raises(detachnet.TraceError, match=r"leaf_modules=\[Chooser\]"):
        detachnet.make_detachable(models.ControlFlow(), ["block.0"], (3, 8, 8))
    net = detachnet.make_detachable(models.ControlFlow(), ["block.0"], (3, 8, 8), leaf_modules=[models.Chooser])
    assert_joint_equals_separate(net.double(), IMAGES.double())


def test_leaf_functions() -> None:
    with pytest.raises(detachnet.TraceError, match=r"if x.sum\(\) > 0|x if x.sum"):
        detachnet.find_cuts(models.UsesFunction(), (3, 8, 8))
    points = detachnet.find_cuts(models.UsesFunction(), (3, 8, 8), leaf_functions=[models.threshold])
    assert "threshold" in [point.name for point in points]
    net = detachnet.make_detachable(models.UsesFunction(), ["conv1"], (3, 8, 8), leaf_functions=[models.threshold])
    assert_joint_equals_separate(net.double(), IMAGES.double())


def old_weight_norm(model: models.Plain) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.conv2)
    return model


def weight_norm(model: models.Plain) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.conv2)
    return model


def spectral_norm(model: models.Plain) -> nn.Module:
    nn.utils.parametrizations.spectral_norm(model.conv2)
    return model


def frozen(model: models.Plain) -> nn.Module:
    for parameter in [*model.conv2.parameters(), *model.bn2.parameters()]:
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("change", [old_weight_norm, weight_norm, spectral_norm, frozen])
def test_parametrized_and_frozen_layers(change: object) -> None:
    model = change(models.Plain().double())  # type: ignore[operator]
    expected = model.eval()(IMAGES.double())
    net = detachnet.make_detachable(model, ["conv1", "pool"], (3, 8, 8))
    assert torch.equal(net.eval()(IMAGES.double()), expected)
    net.train()(IMAGES.double(), which="all")["base"].sum().backward()
    net.eval()
    for name in net.names:
        assert torch.equal(net.detach(name)(IMAGES.double()), net(IMAGES.double(), which=name))
    net.zero_grad()
    if change is not old_weight_norm:  # its computed weight cannot be copied with copy.deepcopy(net)
        assert_joint_equals_separate(net, IMAGES.double())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models(wrap: object) -> None:
    model = models.Plain().eval()
    net = detachnet.make_detachable(wrap(model), ["pool"], (3, 8, 8))  # type: ignore[operator]
    assert type(net.base) is models.Plain
    assert torch.equal(net(IMAGES), model(IMAGES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = detachnet.make_detachable(models.Plain().to(dtype), ["pool"], (3, 8, 8)).eval()
    assert {out.dtype for out in net(IMAGES.to(dtype), which="all").values()} == {dtype}


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = models.Plain()
    net = detachnet.make_detachable(model, ["pool"], (3, 8, 8))
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert net(IMAGES.to("meta"), which="sub0").shape == (3, 5)


def test_auto_cuts_are_spread_over_the_macs_behind_activations() -> None:
    model = detachnet.create_model("timm:resnet50")
    points = {point.name: point for point in detachnet.find_cuts(model)}
    plans = {}
    for count in (1, 2, 3):
        plan = detachnet.make_detachable(model, count, check="none").plan
        plans[count] = plan
        assert len(plan.models) == count + 1
        for chosen, share in zip(plan.models[1:], spread(count), strict=True):
            assert abs(chosen.macs / plan.models[0].macs - share) < 0.15
            assert points[str(chosen.cut)].place == "activation"
    assert detachnet.make_detachable(model, "auto", check="none").plan == plans[2]


def test_shares_of_macs() -> None:
    plan = detachnet.make_detachable(detachnet.create_model("torchvision:vgg16_bn"), [0.7, 0.3], check="none").plan
    assert [round(model.macs / plan.models[0].macs, 1) for model in plan.models] == [1.0, 0.7, 0.3]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (0, "a family has at least one sub-model"),
        (99, "Plain has no 99 cuts spread over its MACs"),
        ([0.3, 0.7], "lie between 0 and 1 and fall"),
        ([1.5], "lie between 0 and 1 and fall"),
    ],
)
def test_impossible_shares(cuts: object, message: str) -> None:
    with pytest.raises(detachnet.CutError, match=message):
        detachnet.make_detachable(models.Plain(), cuts, (3, 8, 8))  # type: ignore[arg-type]
