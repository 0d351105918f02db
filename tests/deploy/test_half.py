"""Weights stored in float16, by request."""

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import detachnet
from detachnet.deploy.half import halved, rounded
from tests import models


def net_of(model: nn.Module, subs: object, size: int) -> detachnet.DetachableNet:
    """A family whose norms differ from model to model, as after training."""
    torch.manual_seed(0)
    net = detachnet.make_detachable(model, subs, (3, size, size)).eval()  # type: ignore[arg-type]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    return net


@pytest.fixture(scope="module")
def family() -> detachnet.DetachableNet:
    """One sub-model that leaves a layer out, and one that reads parts of the base-model's tensors."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1)]
    for _ in range(3):
        layers += [nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]  # type: ignore[list-item]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 7))
    return net_of(model, {"short": detachnet.SubModel(drop=["6:9"]), "thin": detachnet.SubModel(width=0.5)}, 12)


@pytest.mark.slow
def test_half_the_bytes_and_what_pytorch_computes_with_rounded_weights(
    family: detachnet.DetachableNet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {key: value.clone() for key, value in family.state_dict().items()}
    whole = detachnet.export(family, tmp_path / "whole")
    with caplog.at_level(logging.INFO, "detachnet"):
        half = detachnet.export(family, tmp_path / "half", precision="float16", legs=True)
    assert all(torch.equal(value, before[key]) for key, value in family.state_dict().items())
    assert (whole.precision, half.precision) == ("float32", "float16")
    assert whole.weights is not None
    assert half.weights is not None
    assert half.weights.num_bytes < 0.53 * whole.weights.num_bytes  # what is shared is there once in both
    graph = onnx.load(tmp_path / "half" / "base.onnx", load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    means = [kind for name, kind in types.items() if "running_mean" in name]
    assert means == 3 * [onnx.TensorProto.FLOAT]  # what rounding would change stays
    assert list(types.values()).count(onnx.TensorProto.FLOAT16) >= 5
    images, near = torch.randn(5, 3, 12, 12), rounded(family)
    half_family = detachnet.Family.load(tmp_path / "half")
    work = half_family.resumable(images)
    for name in family.names:
        with torch.no_grad():
            wanted, trained = near(images, which=name), family(images, which=name)
        for found in (half_family.run(images, name).output, work.run(name).output):  # whole, and through legs
            assert float((found - wanted).abs().max()) < 0.3 * float((found - trained).abs().max())
        assert f"{name}: weights in float16 move its outputs by up to 0.0" in caplog.text
        assert half[name].num_bytes < whole[name].num_bytes


@pytest.mark.slow
def test_legs_of_one_model(family: detachnet.DetachableNet, tmp_path: Path) -> None:
    manifest = detachnet.export(family, tmp_path / "out", models=["short"], legs=True)
    assert {leg.models for leg in manifest.legs} == {("short",)}
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        wanted = family(images, which="short")
    found = detachnet.Family.load(tmp_path / "out").resumable(images).run("short").output
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_rounding_is_that_of_float16_and_leaves_vectors_alone() -> None:
    net = net_of(models.Plain(), ["pool"], 8)
    near = rounded(net)
    for (name, weight), (_, other) in zip(near.named_parameters(), net.named_parameters(), strict=True):
        assert torch.equal(weight, other.half().float() if weight.ndim > 1 else other), name
    assert not torch.equal(near.base.conv1.weight, net.base.conv1.weight)


def test_numbers_are_halved_only_where_that_changes_none() -> None:
    numbers = np.array([0.5, -65504.0, 6e-8 * 0, 2.0**-24], np.float32)
    assert halved(numbers.tobytes()) == numbers.astype(np.float16).tobytes()
    for other in (0.1, 65520.0, 1e9, 2.0**-25, float("nan")):
        assert halved(np.array([0.5, other], np.float32).tobytes()) is None


def test_weights_that_float16_does_not_have(tmp_path: Path) -> None:
    net = net_of(models.Plain(), ["pool"], 8)
    with torch.no_grad():
        net.base.conv1.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(detachnet.ExportError, match=r"base\.conv1\.weight has weights above 65504"):
        detachnet.export(net, tmp_path / "out", precision="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, r"precision='int8': it is 'float32' or 'float16'[\s\S]*int8=\(training, test\)"),
        ({"precision": "float16", "format": "pt2"}, "float16 is for the format 'onnx' only"),
        ({"precision": "float16", "int8": (None, None)}, "not together with int8"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(detachnet.ExportError, match=message):
        detachnet.export(net_of(models.Plain(), ["pool"], 8), tmp_path / "out", **options)  # type: ignore[arg-type]
