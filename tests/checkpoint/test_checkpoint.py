import copy
import json
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import detachnet
from detachnet.checkpoint import content
from detachnet.checkpoint.answer import answer, is_asked
from detachnet.checkpoint.fingerprint import fingerprint
from detachnet.checkpoint.loading import load_family
from detachnet.checkpoint.saving import check_storable
from detachnet.surgery.plan import Head, Norm
from detachnet.zoo import ModelSource
from tests import models
from tests.disks import disk_of
from tests.helpers import nightly_but, shift


@pytest.fixture
def net() -> detachnet.DetachableNet:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    return detachnet.make_detachable(model, ["features.6", "features.23"], check="none").eval()


IMAGES = torch.randn(2, 3, 32, 32)
SIZE = (3, 16, 16)


def assert_same(
    one: detachnet.DetachableNet, other: detachnet.DetachableNet, images: torch.Tensor = IMAGES
) -> None:
    assert one.plan == other.plan
    for name in one.names:
        assert torch.equal(one(images, which=name), other(images, which=name))


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "head"), [("private", "shared"), ("shared", "private"), ("private", "private")])
def test_round_trip(tmp_path: Path, norm: Norm, head: Head) -> None:
    model = detachnet.create_model("timm:test_efficientnet", num_classes=7)
    net = detachnet.make_detachable(
        model, {"small": "blocks.2"}, (3, 64, 64), norm=norm, head=head, check="none"
    ).eval()
    for parameter in net.heads.parameters():
        parameter.data += 1
    detachnet.save(net, tmp_path / "family.safetensors")
    assert_same(detachnet.load(tmp_path / "family.safetensors"), net, torch.randn(2, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(net: detachnet.DetachableNet, tmp_path: Path, dtype: torch.dtype) -> None:
    detachnet.save(net.to(dtype), tmp_path / "family.safetensors")
    assert_same(detachnet.load(tmp_path / "family.safetensors"), net, IMAGES.to(dtype))


@pytest.mark.parametrize("which", [None, "sub0"])
def test_layers_of_several_types(net: detachnet.DetachableNet, tmp_path: Path, which: str | None) -> None:
    net.half()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.float()
    detachnet.save(net, tmp_path / "family", which=which)
    there = detachnet.load(tmp_path / "family").state_dict()
    ours = (net if which is None else net.detach(which)).state_dict()
    assert {t.dtype for t in ours.values()} == {torch.float16, torch.float32, torch.int64}
    assert all(there[name].dtype == tensor.dtype and there[name].equal(tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(("name", "value"), [("eps", 0.1), ("momentum", None)])
def test_norms_that_are_set_otherwise_than_the_base_models(
    net: detachnet.DetachableNet, tmp_path: Path, name: str, value: object
) -> None:
    norm = net.norms.get_submodule("sub0.features.8")
    setattr(norm, name, value)
    said = (
        rf"{name} of net.norms.sub0.features.8 is {value}, that of the base-model's norm [\d.e-]+: a file has one"
    )
    with pytest.raises(detachnet.CheckpointError, match=said):
        detachnet.save(net, tmp_path / "family")
    setattr(net.base.get_submodule("features.8"), name, value)
    setattr(net.norms.get_submodule("sub0.features.8"), name, value)
    with pytest.raises(detachnet.CheckpointError, match="it was changed afterwards"):
        detachnet.save(net, tmp_path / "family")
    detachnet.save(net, tmp_path / "family", own=True)
    own = detachnet.load(tmp_path / "family", model=net.base)
    assert getattr(own.norms.get_submodule("sub0.features.8"), name) == value


@pytest.mark.slow
def test_loading_leaves_the_random_state_alone(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    detachnet.save(net, tmp_path / "family.safetensors")
    before = torch.get_rng_state()
    detachnet.load(tmp_path / "family.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_users_own_model(tmp_path: Path) -> None:
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), stepdown=shift).eval()
    path = tmp_path / "own.safetensors"
    detachnet.save(net, path)
    with pytest.raises(detachnet.CheckpointError, match=r"a model of the user's own, Plain[\s\S]*model=Plain"):
        detachnet.load(path)
    with pytest.raises(detachnet.CheckpointError, match=r"a user's own step-down[\s\S]*stepdown=it"):
        detachnet.load(path, models.Plain())
    assert_same(detachnet.load(path, models.Plain(), stepdown=shift), net, torch.randn(2, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    found = detachnet.Family.load(path, models.Plain(), stepdown=shift).run(images, "sub0").output
    torch.testing.assert_close(found, net(images, which="sub0"))
    with pytest.raises(detachnet.CheckpointError, match=r"model is a network, not <class.*\n  try      model=Net"):
        detachnet.load(path, models.Plain)  # type: ignore[arg-type]
    with pytest.raises(detachnet.CheckpointError, match="load takes the path of a file, not None"):
        detachnet.load(None)  # type: ignore[arg-type]
    with torch.device("meta"), pytest.raises(detachnet.CheckpointError, match="on the meta device"):
        detachnet.load(path, models.Plain(), stepdown=shift)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.two = nn.Conv2d(3, 3, 3, padding=1)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)).mean((2, 3))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    net = detachnet.make_detachable(Tied(), ["one"], (3, 8, 8)).eval()
    detachnet.save(net, tmp_path / "tied.safetensors")
    header, tensors = content.read(tmp_path / "tied.safetensors")
    assert header.tied == {"base.two.weight": "base.one.weight"}
    assert "base.two.weight" not in tensors
    assert_same(detachnet.load(tmp_path / "tied.safetensors", Tied()), net, torch.randn(2, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{"drop_path_rate": 0.1}, {"num_classes": 3}])
def test_arguments_of_the_zoo(tmp_path: Path, kwargs: dict[str, float]) -> None:
    net = detachnet.make_detachable(
        detachnet.create_model("timm:resnet10t", **kwargs), ["layer2"], (3, 64, 64), check="none"
    ).eval()
    detachnet.save(net, tmp_path / "family.safetensors")
    assert_same(detachnet.load(tmp_path / "family.safetensors"), net, torch.randn(1, 3, 64, 64))


def test_building_a_model_fetches_no_backbone() -> None:
    assert detachnet.create_model("torchvision:fcn_resnet50", num_classes=2) is not None


def test_leaf_modules_are_given_again(tmp_path: Path) -> None:
    leaves = {"leaf_modules": [models.Chooser]}
    net = detachnet.make_detachable(models.ControlFlow(), ["block.0"], (3, 8, 8), **leaves).eval()
    detachnet.save(net, tmp_path / "own.safetensors")
    with pytest.raises(detachnet.TraceError, match="Chooser"):
        detachnet.load(tmp_path / "own.safetensors", models.ControlFlow())
    again = detachnet.load(tmp_path / "own.safetensors", models.ControlFlow(), **leaves)
    assert_same(again, net, torch.randn(2, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    family = detachnet.Family.load(tmp_path / "own.safetensors", models.ControlFlow(), **leaves)
    torch.testing.assert_close(family.run(images, "sub0").output, net(images, which="sub0"))


@pytest.mark.slow
def test_another_model(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    path = tmp_path / "family.safetensors"
    detachnet.save(net, path)
    for other in (models.Plain(), detachnet.create_model("detachnet:vgg16_cifar", width=0.1)):
        with pytest.raises(detachnet.CheckpointError, match="was made from another model") as refused:
            detachnet.load(path, other)
        assert "find_cuts" not in str(refused.value)  # advice for another mistake


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(detachnet.CheckpointError, match="there is no file"):
        detachnet.load(tmp_path / "nothing.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_file(net: detachnet.DetachableNet, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "family.safetensors"
    detachnet.save(net, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(detachnet.CheckpointError, match="is not a complete safetensors file"):
        detachnet.load(path)


@pytest.mark.slow
def test_any_flipped_bit_is_noticed(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    path = tmp_path / "family.safetensors"
    detachnet.save(net, path)
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    metadata = [content.index(text) + 1 for text in (b'"format"', b'"pt"')]
    for place in [*metadata, *range(8, header, 97), header, (header + len(content)) // 2, len(content) - 1]:
        broken = bytearray(content)
        broken[place] ^= 0b100
        path.write_bytes(broken)
        with pytest.raises(detachnet.CheckpointError):
            detachnet.load(path)


@pytest.mark.slow
def test_a_folder_where_a_file_is_meant(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    with pytest.raises(detachnet.CheckpointError, match=r"is a folder[\s\S]*last.safetensors"):
        detachnet.load(tmp_path)
    with pytest.raises(detachnet.CheckpointError, match=r"there is no folder .*nowhere"):
        detachnet.save(net, tmp_path / "nowhere" / "family.safetensors")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(detachnet.CheckpointError, match=r"it is an archive, as torch\.save"):
        detachnet.load(tmp_path / "other.pth")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(detachnet.CheckpointError, match="not one of detachnet's"):
        detachnet.load(tmp_path / "other.safetensors")


def rewrite(path: Path, change: dict[str, object]) -> None:
    """Change a header and give it a right checksum, as a malicious writer would."""
    header, tensors = content.read(path)
    text = json.dumps(json.loads(header.model_dump_json()) | change)
    metadata = {"format": "pt", content.KEY: text, "sha256": content._digest(text, tensors)}
    save_file(tensors, path, metadata)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2"),
        ({"run_this": "import os"}, "says something unknown"),
        ({"plan": {}}, "says something unknown"),
        ({"source": {"name": "os:system", "kwargs": {}}}, "cannot be built"),
        ({"source": {"name": "timm:resnet18", "kwargs": {"checkpoint_path": "/tmp/x"}}}, "loading does not allow"),
        ({"source": {"name": "timm:resnet18", "kwargs": {"pretrained": True}}}, "loading does not allow"),
        ({"source": {"name": "timm:resnet18", "kwargs": {"act_layer": {"a": 1}}}}, "says something unknown"),
        ({"source": {"name": "timm:resnet18", "kwargs": {}}}, "was made from another model"),
    ],
)
def test_a_header_that_asks_for_something_unknown(
    net: detachnet.DetachableNet, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "family.safetensors"
    detachnet.save(net, path)
    rewrite(path, change)
    with pytest.raises(detachnet.CheckpointError, match=message):
        detachnet.load(path)


@pytest.mark.slow
def test_arguments_that_fetch_are_not_stored(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(detachnet.create_model("timm:resnet18", num_classes=7).state_dict(), weights)
    model = detachnet.create_model("timm:resnet18", num_classes=7, checkpoint_path=str(weights))
    net = detachnet.make_detachable(model, ["layer1"], (3, 32, 32), check="none").eval()
    detachnet.save(net, tmp_path / "family.safetensors")
    weights.unlink()
    assert_same(detachnet.load(tmp_path / "family.safetensors"), net)


@pytest.mark.slow
def test_what_a_pretrained_cfg_decided_is_stored(tmp_path: Path) -> None:
    overlay = {"num_classes": 5, "input_size": (1, 32, 32)}
    model = detachnet.create_model("timm:resnet10t", pretrained_cfg_overlay=overlay)
    net = detachnet.make_detachable(model, ["layer1"], (1, 32, 32), check="none").eval()
    detachnet.save(net, tmp_path / "family.safetensors")
    assert_same(detachnet.load(tmp_path / "family.safetensors"), net, torch.randn(2, 1, 32, 32))


def test_arguments_that_cannot_be_stored(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    net.base.detachnet_source = ModelSource("timm:resnet18", {"act_layer": nn.ReLU})  # type: ignore[assignment]
    with pytest.raises(detachnet.CheckpointError, match="cannot be stored"):
        detachnet.save(net, tmp_path / "family.safetensors")


@pytest.mark.slow
def test_full_disk_leaves_the_old_checkpoint(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    path = tmp_path / "family.safetensors"
    detachnet.save(net, path)
    before = path.read_bytes()
    with (
        disk_of(1000),
        pytest.raises(detachnet.CheckpointError, match=r"cannot write .*; the previous file is unchanged"),
    ):
        detachnet.save(net, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_unwritable_folder(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    with pytest.raises(detachnet.CheckpointError, match="cannot write"):
        detachnet.save(net, tmp_path / "nowhere" / "family.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "sub0", "sub1"])
def test_one_model_alone(
    net: detachnet.DetachableNet, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    net.facts = net.facts.updated(accuracy={"base": 0.5, "sub1": 0.25}, trained=("base", "sub1"))
    path = tmp_path / "alone.safetensors"
    detachnet.save(net, path, which=name)
    assert ("sub0 is written as it was made: it was not trained" in caplog.text) == (name == "sub0")
    alone = detachnet.load(path)
    assert not any(module.training for module in alone.modules())
    assert torch.equal(alone(IMAGES), net(IMAGES, which=name))
    header, tensors = content.read(path)
    assert (header.detached, header.plan.names) == (name, tuple(dict.fromkeys(["base", name])))
    assert header.accuracy == {model: value for model, value in net.facts.accuracy.items() if model == name}
    assert tensors.keys() == net.detach(name).state_dict().keys()


def test_one_model_alone_of_a_users_own(tmp_path: Path) -> None:
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8), stepdown=shift).eval()
    path = tmp_path / "alone.safetensors"
    detachnet.save(net, path, which="sub0")
    with pytest.raises(detachnet.CheckpointError, match=r"a model of the user's own, Plain"):
        detachnet.load(path)
    with pytest.raises(detachnet.CheckpointError, match=r"a user's own step-down"):
        detachnet.load(path, models.Plain())
    images = torch.randn(2, 3, 8, 8)
    alone = detachnet.load(path, models.Plain(), stepdown=shift)
    assert torch.equal(alone(images), net(images, which="sub0"))
    with pytest.raises(detachnet.CheckpointError, match="was made from another model"):
        detachnet.load(path, models.Skip(), stepdown=shift)


def test_one_model_is_no_family(net: detachnet.DetachableNet, tmp_path: Path) -> None:
    path = tmp_path / "alone.safetensors"
    detachnet.save(net, path, which="sub1")
    with pytest.raises(detachnet.CheckpointError, match=r"holds sub1 alone[\s\S]*the file of the whole family"):
        load_family(path)
    rewrite(path, {"detached": "sub7"})
    with pytest.raises(
        detachnet.CheckpointError, match=r"says something unknown[\s\S]*'sub7', which is none of the models"
    ):
        detachnet.load(path)
    with pytest.raises(detachnet.CutError, match="no model is called 'sub9'"):
        detachnet.save(net, tmp_path / "other.safetensors", which="sub9")


class Swap:
    """Ways to change a model of the zoo: what its file says then."""

    @staticmethod
    def activation(model: nn.Module) -> None:
        model.act1 = nn.SiLU()

    @staticmethod
    def epsilon(model: nn.Module) -> None:
        model.bn1.eps = 0.1  # type: ignore[union-attr, assignment]

    @staticmethod
    def stride(model: nn.Module) -> None:
        model.maxpool.stride = 1  # type: ignore[union-attr, assignment]

    @staticmethod
    def pooling(model: nn.Module) -> None:
        model.maxpool = nn.Identity()

    @staticmethod
    def classes(model: nn.Module) -> None:
        model.fc = nn.Linear(512, 3)


CHANGES = {
    Swap.activation: "class of 'act1' is SiLU, not ReLU",
    Swap.epsilon: "eps of 'bn1' is 0.1, not 1e-05",
    Swap.stride: "stride of 'maxpool' is 1, not 2",
    Swap.pooling: "class of 'maxpool' is Identity, not MaxPool2d",
    Swap.classes: r"out_features of 'fc' is 3, not 1000",
}


@pytest.mark.slow
@pytest.mark.parametrize("change", nightly_but([Swap.activation, Swap.stride], CHANGES))
def test_a_changed_model_of_the_zoo_is_saved_as_ones_own(
    tmp_path: Path, change: Callable[[nn.Module], None]
) -> None:
    model = detachnet.create_model("timm:resnet18")
    change(model)
    net, path = (
        detachnet.make_detachable(model, ["layer2"], (3, 64, 64), check="none").eval(),
        tmp_path / "family.safetensors",
    )
    with pytest.raises(
        detachnet.CheckpointError, match=rf"was changed afterwards[\s\S]*{CHANGES[change]}[\s\S]*own=True"
    ):
        detachnet.save(net, path)
    detachnet.save(net, path, own=True)
    with pytest.raises(
        detachnet.CheckpointError, match=r"a model of the user's own, ResNet[\s\S]*load\(path, model=|model="
    ):
        detachnet.load(path)
    assert_same(detachnet.load(path, model=model), net, torch.randn(2, 3, 64, 64))


def test_loading_says_when_layers_are_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, path = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8)), tmp_path / "own.safetensors"
    detachnet.save(net, path)
    caplog.clear()
    detachnet.load(path, models.Plain())
    assert not caplog.records
    other = models.Plain()
    other.bn2.eps = 0.1
    detachnet.load(path, other)
    assert "was made from a Plain whose layers had other classes, attributes, shapes or hooks" in caplog.text


def scaling(state: object) -> detachnet.DetachableNet:
    model = models.Plain()
    model.fc = models.Keeping(8, 5)
    model.fc.state = state
    return detachnet.make_detachable(model, ["pool"], (3, 8, 8)).eval()


@pytest.mark.parametrize("state", [{"scale": 3}, [1, "two", None], torch.ones(3)], ids=["dict", "list", "tensor"])
@pytest.mark.parametrize("which", [None, "sub0"])
def test_extra_state_comes_back(tmp_path: Path, state: object, which: str | None) -> None:
    detachnet.save(scaling(state), tmp_path / "own.safetensors", which)
    fresh = models.Plain()
    fresh.fc = models.Keeping(8, 5)
    again = detachnet.load(tmp_path / "own.safetensors", fresh)
    layer = again.fc if which else again.base.fc
    assert torch.equal(layer.state, state) if isinstance(state, torch.Tensor) else layer.state == state


@pytest.mark.parametrize("state", [{1: 2}, object(), (1, 2)], ids=["keys", "object", "tuple"])
def test_extra_state_that_is_no_json(tmp_path: Path, state: object) -> None:
    with pytest.raises(detachnet.CheckpointError, match="the extra state of 'fc' cannot be stored"):
        detachnet.save(scaling(state), tmp_path / "own.safetensors")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"act_layer": nn.SiLU}, "the arguments the model was made with cannot be stored"),
        ({"norm_layer": nn.BatchNorm2d}, "the arguments the model was made with cannot be stored"),
    ],
)
def test_what_loading_refuses_is_refused_before(kwargs: dict[str, object], message: str) -> None:
    model = detachnet.create_model("timm:resnet18", num_classes=5, **kwargs)
    net = detachnet.make_detachable(model, ["layer1"], (3, 32, 32), check="none")
    with pytest.raises(detachnet.CheckpointError, match=message):
        check_storable(net)
    check_storable(net, own=True)


@pytest.mark.slow
def test_what_timm_made_loads_without_its_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(
        timm.create_model("resnet10t", num_classes=7, in_chans=1), ["layer2"], (1, 32, 32)
    )
    images = torch.randn(2, 1, 32, 32)
    with caplog.at_level("INFO"):
        detachnet.save(net, tmp_path / "net.safetensors")
        again = detachnet.load(tmp_path / "net.safetensors")
        assert torch.equal(again(images), net.eval()(images))
        assert not caplog.text
        net.base.layer1 = torch.nn.Sequential(*net.base.layer1.children(), torch.nn.Identity())  # type: ignore[union-attr]
        changed = detachnet.make_detachable(net.base, ["layer2"], (1, 32, 32))
        detachnet.save(changed, tmp_path / "changed.safetensors")
    assert "changed.safetensors: loading it needs the model: load(path, model=ResNet(...))" in caplog.text
    assert "; unlike timm:resnet10t, there is 'layer1.1'" in caplog.text
    with pytest.raises(detachnet.CheckpointError, match="a model of the user's own, ResNet"):
        detachnet.load(tmp_path / "changed.safetensors")
    assert detachnet.load(tmp_path / "changed.safetensors", model=net.base).names == ("base", "sub0")


def test_tied_weights_are_not_what_the_zoo_builds(tmp_path: Path) -> None:
    model = detachnet.create_model("timm:test_resnet", num_classes=3)
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    net = detachnet.make_detachable(model, ["layer2"], (3, 32, 32), check="none")
    with pytest.raises(
        detachnet.CheckpointError, match=r"weight of 'layer1\.0\.conv2' is that of 'layer1\.0\.conv1\.weight'"
    ):
        detachnet.save(net, tmp_path / "family.safetensors")


def test_hooks_are_said_not_to_be_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = detachnet.create_model("timm:test_resnet", num_classes=3)
    model.layer1.register_forward_hook(lambda _module, _args, out: out * 2)
    net = detachnet.make_detachable(model, ["layer2"], (3, 32, 32), check="none")
    detachnet.save(net, tmp_path / "family.safetensors")
    assert "is without those of 'layer1'; save(net, path, own=True)" in caplog.text


class Positions(models.Plain):
    """Adds what no state dict has."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("grid", scale * torch.linspace(-1, 1, 8), persistent=False)
        self.shift = scale * torch.ones(1, 4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool((self.bn1(self.conv1(x + self.grid)) + self.shift).relu())
        return self.fc(self.bn2(self.conv2(x)).mean((2, 3)))


def test_tensors_that_no_file_holds_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(Positions(1.0), ["pool"], (3, 8, 8), check="none")
    detachnet.save(net, path := tmp_path / "family.safetensors")
    detachnet.load(path, Positions(1.0))
    assert "holds no" not in caplog.text
    detachnet.load(path, Positions(1.1))
    assert f"{path} holds no 'grid', 'shift', which was another one" in caplog.text


def test_a_model_whose_weights_hooks_compute_comes_back(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = models.Plain()
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model.conv2)
        return model

    net = detachnet.make_detachable(made(), ["pool"], (3, 8, 8))
    net.train()(torch.randn(2, 3, 8, 8), which="base").sum().backward()
    detachnet.save(net, path := tmp_path / "family.safetensors")
    assert_same(detachnet.load(path, made()), net.eval(), torch.randn(2, 3, 8, 8))
    assert detachnet.recalibrate(net, [torch.randn(2, 3, 8, 8)]).names == net.names


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@dataclass
class Slope:
    negative: float = 0.01


class Leaky(nn.Module):
    """A slope that is kept in one of several ways; a fingerprint does not see the first two."""

    def __init__(self, way: str, slope: float) -> None:
        super().__init__()
        kept: dict[str, Any] = {
            "private": slope,
            "function": lambda x: F.leaky_relu(x, slope),
            "partial": partial(F.leaky_relu, negative_slope=slope),
            "field": Slope(slope),
            "space": SimpleNamespace(slope=Slope(slope)),
        }
        self.way, self._kept = way, kept[way]
        if way not in ("private", "function"):
            self.held = kept[way]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if callable(self._kept):
            return self._kept(x)  # type: ignore[no-any-return]
        slope = getattr(self._kept, "slope", self._kept)
        return F.leaky_relu(x, getattr(slope, "negative", slope))


@pytest.mark.parametrize("way", ["private", "function", "partial", "field", "space"])
@pytest.mark.parametrize("which", [None, "sub0"])
def test_loading_says_when_the_same_layers_answer_otherwise(
    way: str, which: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def built(slope: float) -> nn.Module:
        return models.Around(nn.Sequential(nn.Conv2d(8, 8, 1), Leaky(way, slope)))

    net = detachnet.make_detachable(built(0.1), ["a"], (3, 16, 16), check="none")
    detachnet.save(net, tmp_path / "one", which=which)
    detachnet.load(tmp_path / "one", model=built(0.1))
    assert not warnings_in(caplog)
    detachnet.load(tmp_path / "one", model=built(0.2))
    seen = way not in ("private", "function")
    assert f"{which or 'Around'} answers otherwise than when it was written, with the same" in caplog.text or seen
    assert ("layers had other classes, attributes" in caplog.text) == seen


def test_loading_says_when_a_step_down_of_ones_own_is_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def entry(image: Any, feature: Any, act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(image[0], feature[0], 2, 2), act)

    net = detachnet.make_detachable(
        models.Around(nn.Identity()), ["a"], SIZE, stepdown=lambda i, f: entry(i, f, nn.ReLU())
    )
    detachnet.save(net, path := tmp_path / "own")
    detachnet.load(path, models.Around(nn.Identity()), stepdown=lambda i, f: entry(i, f, nn.ReLU()))
    assert not warnings_in(caplog)
    detachnet.load(path, models.Around(nn.Identity()), stepdown=lambda i, f: entry(i, f, nn.SiLU()))
    assert f"{path} was made with another step-down: its layers had other classes" in caplog.text


@pytest.mark.parametrize("which", [None, "base", "front", "inner"])
def test_each_file_knows_the_step_downs_that_are_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, which: str | None
) -> None:
    def entry(image: Any, feature: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(image[0], feature[0], 1, image[1] // feature[1]), nn.ReLU())

    asked = {"front": "a", "inner": detachnet.SubModel(drop=["mid:b"])}
    net = detachnet.make_detachable(models.Around(nn.Identity()), asked, SIZE, stepdown=entry)
    detachnet.save(net, path := tmp_path / "own", which)
    if which != "base":
        with pytest.raises(detachnet.CheckpointError, match="made with a user's own step-down"):
            detachnet.load(path, models.Around(nn.Identity()))
    detachnet.load(path, models.Around(nn.Identity()), stepdown=entry)
    assert not warnings_in(caplog)


class Bytes(models.Around):
    """Takes images of bytes, or of numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = super().forward(x.float() / 255 if x.dtype == torch.uint8 else x)
        return logits


@pytest.mark.parametrize("which", [None, "sub0"])
def test_a_family_of_images_of_bytes_comes_back(tmp_path: Path, which: str | None) -> None:
    x = torch.randint(0, 256, (2, *SIZE), dtype=torch.uint8)
    net = detachnet.make_detachable(Bytes(nn.Identity()), ["a"], example_input=x).eval()
    detachnet.save(net, tmp_path / "own", which)
    again = detachnet.load(tmp_path / "own", Bytes(nn.Identity()))
    torch.testing.assert_close(again(x) if which else again(x, which="sub0"), net(x, which="sub0"))


class Counting(nn.Module):
    """It never answers twice alike."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_what_no_answer_says() -> None:
    assert answer(models.Around(nn.Identity()), (3, 16, 16)) is not None
    for layer in (Counting(), nn.Threshold(0, float("nan")), nn.Conv2d(8, 9, 1)):
        assert answer(models.Around(layer), (3, 16, 16)) is None
    assert answer(models.Around(nn.Identity()).half(), (3, 16, 16)) is None
    assert answer(models.Around(nn.Identity()).to("meta"), (3, 16, 16)) is None
    hooked, called = models.Around(nn.Identity()), []
    hooked.register_forward_hook(lambda module, inputs, output: called.append(output))
    hooked.train()
    assert answer(hooked, (3, 16, 16)) is not None
    assert hooked.training
    assert not called


@pytest.mark.parametrize("inside", ["save", "load"])
def test_autocast_changes_no_answer(inside: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(models.Around(nn.Identity()), ["a"], (3, 16, 16), check="none")
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "save"):
        detachnet.save(net, tmp_path / "net")
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "load"):
        detachnet.load(tmp_path / "net", model=models.Around(nn.Identity()))
    assert not warnings_in(caplog)


class StaysInTraining(models.Around):
    def train(self, mode: bool = True) -> "StaysInTraining":
        super().train(mode)
        self.a[1].training = True
        return self


@pytest.mark.parametrize("which", [None, "base", "sub0"])
def test_a_mode_that_a_model_keeps_changes_no_answer(
    which: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = detachnet.make_detachable(StaysInTraining(nn.Identity()), ["a"], (3, 16, 16), check="none").eval()
    detachnet.save(net, tmp_path / "net", which)
    detachnet.load(tmp_path / "net", model=StaysInTraining(nn.Identity()))
    assert not warnings_in(caplog)


def test_hooks_that_a_users_model_had_are_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = detachnet.make_detachable(models.Around(nn.Identity()), ["a"], (3, 16, 16), check="none")
    net.base.get_submodule("b").register_forward_hook(lambda module, inputs, output: output * 3)
    detachnet.save(net, tmp_path / "net")
    detachnet.load(tmp_path / "net", model=net.base)
    assert not warnings_in(caplog)
    detachnet.load(tmp_path / "net", model=models.Around(nn.Identity()))
    assert "whose layers had other classes, attributes, shapes or hooks" in caplog.text


@pytest.mark.parametrize("limit", ["MOST_MACS", "MOST_VALUES"])
def test_a_large_model_is_not_asked(
    limit: str, net: detachnet.DetachableNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's small file may describe a network that takes hours, or all memory, for one image."""
    assert is_asked(net)
    detachnet.save(net, tmp_path / "asked")
    monkeypatch.setattr(f"detachnet.checkpoint.answer.{limit}", 1000)
    assert not is_asked(net)
    detachnet.save(net, tmp_path / "unasked")
    assert content.read(tmp_path / "asked")[0].answer is not None
    assert content.read(tmp_path / "unasked")[0].answer is None
    monkeypatch.setattr("detachnet.checkpoint.loading.answer", None)  # nothing may ask
    detachnet.load(tmp_path / "asked")


class Kind(Enum):
    ONE, TWO = 1, 2


def test_a_fingerprint_of_what_objects_hold() -> None:
    def of(value: object) -> str:
        model = models.Plain()
        model.held = value  # type: ignore[assignment]
        return fingerprint(model)

    alike = [Slope(0.1), SimpleNamespace(a=[Slope(0.1)]), {"b", "a", "c"}, Kind.ONE, Decimal("0.1"), Path("a")]
    others = [Slope(0.2), SimpleNamespace(a=[Slope(0.2)]), {"b", "a", "d"}, Kind.TWO, Decimal("0.2"), Path("b")]
    assert [of(copy.deepcopy(value)) for value in alike] == [of(value) for value in alike]
    assert not {of(value) for value in alike} & {of(value) for value in others}
    assert list({0, 8}) != list({8, 0})
    assert of({0, 8}) == of({8, 0})
    endless = SimpleNamespace()
    endless.itself = endless
    assert of(endless)
