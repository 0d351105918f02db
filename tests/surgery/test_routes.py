"""Sub-models that leave out spans anywhere: the joint pass is the separate ones, what is shared runs once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detachnet
from detachnet import SubModel
from detachnet.surgery.ownership import ViewSource
from detachnet.surgery.routes import Span, owner, parting
from tests.helpers import assert_joint_equals_separate, nightly_but, without_dropout

VGG = {
    "late": ["features.16:features.22", "features.26:features.32", "features.36:features.42"],
    "inner": ["features.2:features.5", "features.9:features.12", "features.16:features.22"],
    "front": [":features.13"],
    "both": [":features.6", "features.26:features.32"],
    "exit": ["features.23:features.43"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any], int, dict[str, list[str]]]] = {
    "vgg": ("detachnet:vgg16_cifar", {"width": 0.125}, 32, VGG),
    "resnet": (
        "torchvision:resnet18",
        {"num_classes": 5},
        32,
        {
            "blocks": ["layer1.0:layer1.1", "layer3.0:layer3.1"],
            "nested": ["maxpool:layer1.1", "layer3.0:layer3.1"],
            "bridge": ["layer1.1:layer3.0"],
            "exit": ["layer2:layer4"],
            "front": [":layer1.0"],
        },
    ),
    "densenet": (
        "torchvision:densenet121",
        {"num_classes": 5},
        32,
        {"inner": ["features.transition1:features.transition2"], "exit": ["features.denseblock2:features.norm5"]},
    ),
    "mobilenet": (
        "torchvision:mobilenet_v3_large",
        {"num_classes": 5},
        32,
        {"blocks": ["features.4:features.5", "features.7:features.9"], "front": [":features.3"]},
    ),
    "efficientnet": (
        "timm:efficientnet_b0",
        {"num_classes": 5},
        64,
        {"blocks": ["blocks.2.0:blocks.2.1", "blocks.3.0:blocks.3.2"], "exit": ["blocks.3:blocks.6"]},
    ),
    "shufflenet": (
        "torchvision:shufflenet_v2_x0_5",
        {"num_classes": 5},
        32,
        {"blocks": ["stage3.0:stage3.5"], "bridge": ["stage2.1:stage3.1"]},
    ),
    "regnet": (
        "timm:regnety_002",
        {"num_classes": 5},
        32,
        {"blocks": ["s3.b1:s3.b3", "s4.b1:s4.b5"], "front": [":s1"]},
    ),
    "convnext": (
        "timm:convnext_atto",
        {"num_classes": 5},
        32,
        {"blocks": ["stages.2.blocks.0:stages.2.blocks.3"], "bridge": ["stages.0:stages.1"]},
    ),
    "swin": (
        "torchvision:swin_t",
        {"num_classes": 5},
        32,
        {"blocks": ["features.5.0:features.5.3"], "bridge": ["features.1:features.2"], "front": [":features.2"]},
    ),
}


def family(name: str, **options: Any) -> detachnet.DetachableNet:
    model, kwargs, size, routes = FAMILIES[name]
    torch.manual_seed(0)
    subs = {sub: SubModel(drop=drop) for sub, drop in routes.items()}
    return detachnet.make_detachable(
        detachnet.create_model(model, **kwargs), subs, (3, size, size), check="none", **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["private", "shared"])
@pytest.mark.parametrize("name", nightly_but(["vgg", "resnet", "shufflenet"], FAMILIES))
def test_joint_equals_separate(name: str, norm: str) -> None:
    if norm == "shared" and name in ("densenet", "swin"):
        pytest.skip("the others say it")
    net = without_dropout(family(name, norm=norm)).double()
    size = FAMILIES[name][2]
    assert_joint_equals_separate(net, torch.randn(3, 3, size, size, dtype=torch.double))


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(["vgg", "resnet"], ["vgg", "resnet", "mobilenet", "convnext"]))
def test_detached_equals_attached_and_files_come_back(name: str, tmp_path) -> None:
    net = family(name, head="private").eval()
    images = torch.randn(2, 3, 32, 32)
    detachnet.save(net, tmp_path / "family.safetensors")
    again = detachnet.load(tmp_path / "family.safetensors")
    assert again.plan == net.plan
    joint = net(images, which="all")
    for sub in net.names:
        alone = net.detach(sub)
        assert torch.equal(alone(images), net(images, which=sub))
        assert torch.equal(again(images, which=sub), net(images, which=sub))
        torch.testing.assert_close(joint[sub], net(images, which=sub), rtol=1e-4, atol=1e-5)
        assert net.plan[sub].num_params == sum(p.numel() for p in alone.parameters())


def test_a_route_is_the_network_without_its_layers() -> None:
    """Against the same modules called by hand."""
    net = family("vgg").double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    layers = net.base.features
    x = images
    for i, layer in enumerate(layers):
        if not (16 < i <= 22 or 26 < i <= 32 or 36 < i <= 42):
            private = i > 16 and isinstance(layer, nn.BatchNorm2d)
            x = (net.norms.get_submodule(f"late.features.{i}") if private else layer)(x)
    expected = net.base.classifier(x.flatten(1))
    torch.testing.assert_close(net(images, which="late"), expected, rtol=1e-12, atol=1e-12)


class Pooled(nn.Module):
    """A segmentation model, its map averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = detachnet.create_model("torchvision:lraspp_mobilenet_v3_large", num_classes=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["out"].mean((2, 3))


@pytest.mark.slow
def test_a_segmentation_model() -> None:
    subs = {"small": SubModel(drop=["net.backbone.2:net.backbone.3"])}
    net = detachnet.make_detachable(Pooled(), subs, (3, 64, 64), check="none").double()
    assert_joint_equals_separate(net, torch.randn(3, 3, 64, 64, dtype=torch.double))


def test_what_is_shared_runs_once() -> None:
    net = family("vgg")
    calls: list[int] = []
    net.base.features[0].register_forward_hook(lambda *_: calls.append(0))
    net.train()(torch.randn(2, 3, 32, 32), which="all")
    assert calls == [0]
    norm = net.base.features[1]
    assert int(norm.num_batches_tracked) == 1
    assert not hasattr(net.norms.late.features, "1")
    assert hasattr(net.norms.late.features, "25")


@pytest.mark.slow
def test_models_that_part_late_share_norms_and_bridges() -> None:
    model = detachnet.create_model("detachnet:resnet_cifar", width=0.25)
    net = detachnet.make_detachable(
        model,
        {
            "one": SubModel(drop=["layer1.1:layer2.0"]),
            "two": SubModel(drop=["layer1.1:layer2.0", "layer3.0:layer3.1"]),
        },
        check="none",
    ).double()
    assert set(dict(net.bridges.named_children())) == {"one"}
    assert not hasattr(net.norms.two, "layer2")
    assert hasattr(net.norms.one, "layer2")
    assert hasattr(net.norms.two, "layer3")
    assert_joint_equals_separate(net, torch.randn(3, 3, 32, 32, dtype=torch.double))
    source: ViewSource = net._derived.of_base[True]
    assert source.target(next(n for n in source.own("one") if str(n.target) == "base.layer2.1.bn1"), "two") == (
        "norms.one.layer2.1.bn1"
    )


@pytest.mark.slow
def test_macs_are_those_of_distinct_segments() -> None:
    plan = family("vgg").plan
    base, late = plan["base"], plan["late"]
    assert late.shared_macs < late.macs < base.macs
    assert plan.joint_macs < sum(model.macs for model in plan.models)
    only = detachnet.make_detachable(
        detachnet.create_model("detachnet:vgg16_cifar", width=0.125),
        {"late": SubModel(drop=VGG["late"])},
        check="none",
    ).plan
    assert only.joint_macs == base.macs + late.macs - late.shared_macs


@pytest.mark.parametrize("head", ["private", "shared"])
@pytest.mark.parametrize("norm", ["private", "shared"])
def test_own_parameters_are_those_that_are_not_the_base_models(norm: Any, head: Any) -> None:
    routes: Any = {
        "late": VGG["late"],
        "longer": [*VGG["late"], "features.2:features.5"],
        "front": [":features.6"],
    }
    subs = {name: SubModel(drop=drop) for name, drop in routes.items()}
    subs |= (
        {} if norm == "shared" else {"half": SubModel(width=0.5), "thin": SubModel(drop=VGG["late"], width=0.5)}
    )
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.125)
    net = detachnet.make_detachable(model, subs, norm=norm, head=head, check="none")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.fill_(not name.startswith("base."))
    for name in net.names:
        alone = net.detach(name)
        assert net.plan[name].own_params == sum(int(p.sum()) for p in alone.parameters()), name


class InPlace(nn.Module):
    """Every value is overwritten by the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(4))
        self.acts = nn.ModuleList(nn.ReLU(inplace=True) for _ in range(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv, act in zip(self.convs, self.acts, strict=True):
            x = act(conv(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    "drop", [["convs.0:convs.1"], ["convs.0:convs.2"], ["acts.0:acts.2"], ["convs.0:convs.1", "acts.2:acts.3"]]
)
def test_what_is_overwritten_in_place_is_kept(drop: list[str]) -> None:
    subs = {"one": SubModel(drop=drop), "two": SubModel(drop=["convs.1:convs.3"])}
    net = detachnet.make_detachable(InPlace(), subs, (3, 8, 8)).double()
    assert_joint_equals_separate(net, torch.randn(3, 3, 8, 8, dtype=torch.double))


def test_features_of_routes() -> None:
    net = family("resnet").train()
    images = torch.randn(2, 3, 32, 32)
    _, found = net(images, which="all", features=True)
    assert set(found) == {"blocks", "nested", "bridge", "exit", "front"}
    for base, made in found.values():
        assert base.shape == made.shape


def test_shared_dropout_draws_once() -> None:
    class Dropping(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 2)
            )

    net = detachnet.make_detachable(Dropping(), {"small": SubModel(drop=["1:2"])}, (3, 8, 8)).train()
    net.base[2].weight.data.zero_()
    net.base[2].weight.data[:, :, 0, 0] = torch.eye(4)
    net.base[2].bias.data.zero_()
    out = net(torch.randn(2, 3, 8, 8), which="all")
    torch.testing.assert_close(out["base"], out["small"])


def test_positions() -> None:
    a, b = (Span(2, 5),), (Span(2, 5), Span(7, 9))
    assert parting(a, a) is None
    assert parting((), a) == 2
    assert parting(a, b) == 7
    assert parting(a, (Span(2, 6),)) == 2
    routes = {"base": (), "one": a, "two": b}
    assert [owner(routes, "two", at) for at in (0, 2, 6, 7, 8)] == ["base", "base", "one", "one", "two"]


REFUSED = [
    ({"a": ["layer2"]}, r"'layer2' is no span\n.*a span is 'a:b'"),
    ({"a": ["layer1:layer2:layer3"]}, "is no span"),
    ({"a": ["layer2:layer1"]}, r"'layer2:layer1' leaves nothing out: its ends are reversed\n.*layer1:layer2"),
    ({"a": ["layer2:layer2"]}, "both ends are the same place"),
    ({"a": ["layer1:layer2.0.conv1"]}, r"cannot cut ResNet at 'layer2.0.conv1': 'layer1' also crosses it"),
    ({"a": ["layer1:layr3"]}, r"no node has that name[\s\S]*nearest .*layer3"),
    ({"a": ["layer1:layer3", "layer2:layer4"]}, r"'layer1:layer3' and 'layer2:layer4' overlap\n.*'layer1:layer4'"),
    ({"a": ["layer1:layer2", "layer2:layer3"]}, r"'layer1:layer2' and 'layer2:layer3' touch\n.*'layer1:layer3'"),
    ({"a": ["layer1:layer2"], "b": ["layer1:layer2"]}, "a and b leave out the same: layer1:layer2"),
    ({"a": ["layer4:fc"]}, "that is the output, nothing would be left of the model"),
]


@pytest.mark.parametrize(("routes", "message"), REFUSED)
def test_refused_routes(routes: dict[str, list[str]], message: str) -> None:
    model = detachnet.create_model("torchvision:resnet18", num_classes=5)
    subs = {name: SubModel(drop=drop) for name, drop in routes.items()}
    with pytest.raises(detachnet.CutError, match=message):
        detachnet.make_detachable(model, subs, (3, 32, 32), check="none")


def test_refused_sub_models() -> None:
    with pytest.raises(detachnet.CutError, match=r"drop is a list of spans, not a string: write drop=\['a:b'\]"):
        SubModel(drop="a:b")
    with pytest.raises(detachnet.CutError, match=r"this is the base-model: a sub-model is SubModel\(drop="):
        SubModel(drop=[])


class Growing(nn.Sequential):
    """A decoder: its features grow."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1)
        )


def test_a_bridge_that_cannot_exist() -> None:
    with pytest.raises(detachnet.StepDownError, match="no bridge is known from a feature 4×2×2 to one"):
        detachnet.make_detachable(Growing(), {"a": SubModel(drop=["1:2"])}, (3, 8, 8))


def test_everything_left_out() -> None:
    class Bare(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    with pytest.raises(detachnet.CutError, match="a would have no layer with weights"):
        detachnet.make_detachable(
            Bare(), {"a": SubModel(drop=[":1"])}, (3, 8, 8), stepdown=lambda image, feature: nn.Identity()
        )


@pytest.mark.slow
def test_a_callable_builds_every_bridge() -> None:
    asked = []

    def build(before: tuple[int, ...], after: tuple[int, ...]) -> nn.Module:
        asked.append((before, after))
        return nn.Conv2d(before[0], after[0], 1, before[1] // after[1])

    model = detachnet.create_model("detachnet:resnet_cifar", width=0.25)
    net = detachnet.make_detachable(
        model, {"a": SubModel(drop=["layer1:layer2"]), "b": SubModel(drop=[":layer1"])}, stepdown=build
    )
    assert asked == [((4, 32, 32), (8, 16, 16)), ((3, 32, 32), (4, 32, 32))]
    bridges = [span.bridge for model in net.plan.models for span in model.spans]
    assert [bridge.kind for bridge in bridges] == ["custom", "custom"]
    assert [bridge.macs for bridge in bridges] == [4 * 8 * 16 * 16, 3 * 4 * 32 * 32]
    assert net.plan.entry == "custom"


@pytest.mark.slow
def test_with_private_norms_keeps_bridges_and_facts() -> None:
    net = family("resnet", norm="shared")
    net.facts, net.active = net.facts.updated(accuracy={"base": 0.5}), "exit"
    copied = net.with_private_norms()
    assert (copied.facts, copied.active) == (net.facts, "exit")
    images = torch.randn(2, 3, 32, 32)
    for name in net.names:
        assert torch.equal(copied.eval()(images, which=name), net.eval()(images, which=name))


@pytest.mark.slow
def test_a_family_is_copied_and_pickled_with_its_routes() -> None:
    net = family("mobilenet").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(net)(images, which="blocks"), net(images, which="blocks"))


def test_the_plan_prints_routes() -> None:
    plan = family("resnet").plan
    assert plan.table.header == ("model", "left out", "bridges", "MACs", "of base", "shared", "parameters", "own")
    rows = {row[0]: row for row in plan.table.rows}
    assert rows["bridge"][1:3] == ("layer1.1:layer3.0", "4×4 stride 4×4")
    assert rows["blocks"][1:3] == ("layer1.0:layer1.1, layer3.0:layer3.1", "–, –")
    assert rows["front"][5] == "0"
    assert str(plan).splitlines()[1].startswith("model ")
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan


def test_plans_of_before_there_were_spans_load() -> None:
    plan = detachnet.make_detachable(
        detachnet.create_model("detachnet:resnet_cifar", width=0.25), ["layer1"], check="none"
    ).plan
    fields = plan["sub0"].model_dump()
    (span,) = fields.pop("spans")
    for new in ("shared_macs", "own_params"):
        del fields[new]
    old = type(plan["sub0"]).model_validate(fields | {"cut": span["end"], "stepdown": span["bridge"]})
    assert (old.cut, old.stepdown, old.is_cut) == ("layer1", plan["sub0"].stepdown, True)


IDENTITY = {
    "detachnet:vgg16_cifar": ["features.2:features.5", "features.9:features.12", "features.16:features.19"],
    "torchvision:resnet18": ["maxpool:layer1.0", "layer1.0:layer1", "layer2.0:layer2"],
    "timm:convnext_atto": [
        "stem:stages.0.blocks.0",
        "stages.0.blocks.0:stages.0",
        "stages.1.downsample:stages.1.blocks.0",
    ],
    "timm:efficientnet_b0": ["blocks.1.0:blocks.1", "blocks.2.0:blocks.2", "blocks.3.0:blocks.3.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(["detachnet:vgg16_cifar", "torchvision:resnet18"], IDENTITY))
def test_spans_are_found(name: str) -> None:
    """Each is a sub-model that saves what it says."""
    model = detachnet.create_model(name)
    spans = detachnet.find_spans(model)
    assert [span.name for span in spans if span.bridge is None][:3] == IDENTITY[name]
    for span in spans[:: max(1, len(spans) // 4)]:
        plan = detachnet.make_detachable(model, {"a": SubModel(drop=[span.name])}, check="none").plan
        assert plan["base"].macs - plan["a"].macs == span.macs_saved
        assert plan["base"].num_params - plan["a"].num_params == span.params_saved
        assert plan["a"].spans[0].bridge == span.bridge


@pytest.mark.slow
def test_spans_that_follow_each_other_are_one() -> None:
    model = detachnet.create_model("torchvision:resnet50")
    found = [span for span in detachnet.find_spans(model) if span.name.startswith("layer3.") and not span.bridge]
    assert [span.name for span in found][:2] == ["layer3.0:layer3.1", "layer3.1:layer3.2"]
    plan = detachnet.make_detachable(model, {"a": SubModel(drop=["layer3.0:layer3.2"])}, check="none").plan
    assert plan["base"].macs - plan["a"].macs == sum(span.macs_saved for span in found[:2])


class Scaled(nn.Module):
    """A network with what prepares its images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(2 * x - 1)


def test_what_prepares_the_image_is_no_block() -> None:
    net = detachnet.create_model("detachnet:resnet_cifar", depth=14, width=0.25)
    plain, scaled = ([span.name for span in detachnet.find_spans(m, (3, 32, 32))] for m in (net, Scaled(net)))
    assert scaled == [":".join(f"net.{end}" for end in name.split(":")) for name in plain]
    assert len(plain) > 4
