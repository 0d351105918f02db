"""Figures that others quote, by other means: losses, accuracies, probabilities, checksums."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detachnet
from detachnet import evaluation
from detachnet.checkpoint import content as checkpoint
from detachnet.data.datasets import Split
from detachnet.evaluation import evaluate, predict
from tests import models

DATA = detachnet.DataInfo(name="n", classes=("a", "b", "c", "d", "e"), mean=(0.4,) * 3, std=(0.3,) * 3)


@pytest.fixture
def net() -> detachnet.DetachableNet:
    torch.manual_seed(0)
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8)).eval()
    net.facts = net.facts.updated(data=DATA)
    return net


@pytest.fixture
def split() -> Split:
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    return Split(images, torch.arange(23) % 5, DATA.classes)


def values(split: Split) -> Tensor:
    return (split.images / 255 - 0.4) / 0.3


@pytest.mark.parametrize("batch", [500, 10, 7])
def test_test_losses_are_means_over_images(
    net: detachnet.DetachableNet, split: Split, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batches, the last of which is smaller."""
    monkeypatch.setattr(evaluation, "EVAL_BATCH", batch)
    found = evaluate(net, split)
    assert list(found) == ["base", "sub0"]
    for name, score in found.items():
        with torch.no_grad():
            out = net(values(split), which=name).double().numpy()
        right = out.argmax(1) == split.labels.numpy()
        shares = np.exp(out) / np.exp(out).sum(1, keepdims=True)
        assert score["accuracy"] == pytest.approx(right.mean())
        assert score["loss"] == pytest.approx(-np.log(shares[range(23), split.labels]).mean(), rel=1e-5)


def test_predictions_are_the_softmax(net: detachnet.DetachableNet, split: Split) -> None:
    said = predict(net, values(split), "sub0", top=2)
    with torch.no_grad():
        shares = F.softmax(net(values(split), which="sub0"), 1)
    for row, prediction in zip(shares.tolist(), said, strict=True):
        ordered = sorted(zip(row, DATA.classes, strict=True), reverse=True)[:2]
        assert prediction.labels == tuple(name for _, name in ordered)
        assert prediction.probabilities == pytest.approx([share for share, _ in ordered])
    assert [len(p.labels) for p in predict(net, values(split), "base", top=9)] == [5] * 23


def altered(path: Path, change: object) -> None:
    """Another header of tensors over the same bytes, and the checksum as it was."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def exchange_names(header: dict[str, dict[str, object]]) -> None:
    """Of two tensors of one shape: those a network would take without a word."""
    first, second = "base.conv1.bias", "base.conv2.bias"
    assert header[first]["shape"] == header[second]["shape"]
    header[first], header[second] = header[second], header[first]


def rename(header: dict[str, object]) -> None:
    header["base.conv1.zias"] = header.pop("base.conv1.bias")


def reshape(header: dict[str, dict[str, list[int]]]) -> None:
    header["base.conv1.weight"]["shape"].reverse()


def retype(header: dict[str, dict[str, object]]) -> None:
    assert header["base.conv1.weight"]["dtype"] == "F32"
    header["base.conv1.weight"]["dtype"] = "I32"


@pytest.mark.parametrize("change", [exchange_names, rename, reshape, retype])
def test_the_checksum_is_over_names_types_and_shapes_too(tmp_path: Path, change: object) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))  # type: ignore[no-any-return]

    path = tmp_path / "f.safetensors"
    net = detachnet.make_detachable(Two(), ["conv1"], (3, 8, 8), check="none")
    detachnet.save(net, path)
    altered(path, lambda header: None)
    checkpoint.read(path)  # the file is whole however its header is laid out
    altered(path, change)
    with pytest.raises(detachnet.CheckpointError, match="does not match its checksum"):
        detachnet.load(path, Two())


@pytest.mark.parametrize("name", ["base", "sub0"])
def test_a_model_alone_keeps_what_is_known_of_it(net: detachnet.DetachableNet, tmp_path: Path, name: str) -> None:
    net.facts = net.facts.updated(trained=("base", "sub0"), accuracy={"base": 0.5, "sub0": 0.25})
    detachnet.save(net, tmp_path / "f.safetensors", which=name)
    header = checkpoint.read(tmp_path / "f.safetensors")[0]
    assert (header.trained, header.accuracy) == ((name,), {name: {"base": 0.5, "sub0": 0.25}[name]})
    assert header.data == DATA


def test_costs_by_hand(net: detachnet.DetachableNet) -> None:
    """conv1 64 positions × 4 × 27, conv2 16 × 8 × 36, fc 8 × 5; the step-down is 2×2 from 3 channels to 4."""
    base, sub0 = net.plan.models
    assert base.macs == 64 * 4 * 27 + 16 * 8 * 36 + 8 * 5
    assert base.num_params == (4 * 27 + 4) + 8 + (8 * 36 + 8) + 16 + (8 * 5 + 5)
    assert sub0.macs == 16 * 4 * 12 + 16 * 8 * 36 + 8 * 5
    assert sub0.num_params == (4 * 12 + 4) + (8 * 36 + 8) + 16 + (8 * 5 + 5)
    assert (base.own_params, sub0.own_params) == (0, (4 * 12 + 4) + 16)
    assert sub0.shared_macs == 0
