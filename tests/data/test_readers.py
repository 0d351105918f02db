"""What is read and augmented, beside torchvision's own readers and by counting."""

import hashlib
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from detachnet.data import datasets as data
from detachnet.data.batches import Batches, augment
from detachnet.data.datasets import Split, describe_data, load_data, select
from detachnet.data.folders import open_files
from detachnet.facts import DataInfo, scale_and_shift
from tests.folders import write_binary, write_folder, write_python


def test_the_binary_cifar10_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images in both layouts; torchvision reads the other one."""
    records = write_binary(tmp_path / "cifar-10-batches-bin", monkeypatch)
    write_python(tmp_path / "theirs" / "cifar-10-batches-py", monkeypatch, records[:, :, 1:])
    for ours, train in zip(load_data("cifar10", tmp_path), (True, False), strict=True):
        theirs = torchvision.datasets.CIFAR10(str(tmp_path / "theirs"), train=train)
        assert len(ours) == len(theirs) == (50 if train else 10)
        for i, (image, label) in enumerate(theirs):
            assert torch.equal(ours.images[i], transforms.pil_to_tensor(image))
            assert int(ours.labels[i]) == label


def write_mnist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images and labels in IDX files, whose headers are of numbers that no image has."""
    folder.mkdir(parents=True)
    generator, sums = np.random.default_rng(0), {}
    for file in data._MNIST:
        if "images" in file:
            header = struct.pack(">IIII", 0x0803, 7, 28, 28)
            content = header + generator.integers(0, 256, (7, 28, 28), dtype=np.uint8).tobytes()
        else:
            content = struct.pack(">II", 0x0801, 7) + generator.integers(0, 10, 7, dtype=np.uint8).tobytes()
        (folder / file).write_bytes(content)
        sums[file] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "_MNIST", sums)


def test_mnist_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", monkeypatch)
    for ours, train in zip(load_data("mnist", tmp_path), (True, False), strict=True):
        theirs = torchvision.datasets.MNIST(str(tmp_path), train=train)
        assert torch.equal(ours.images[:, 0], theirs.data)
        assert torch.equal(ours.labels, theirs.targets)


def test_a_folder_is_what_torchvision_reads(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for split in ("train", "val"):
        ours, theirs = open_files("folder", tmp_path, split), torchvision.datasets.ImageFolder(tmp_path / split)
        wanted = {
            (Path(path).parent.name, Path(path).name): (image, Path(path).parent.name)
            for (path, _), (image, _) in zip(theirs.samples, theirs, strict=True)
        }
        assert ours.num_images == len(theirs) == len(wanted)
        for i in range(ours.num_images):
            image, label = ours.read(i)
            path = Path(ours.reader.filename(i, absolute=True))
            pixels, name = wanted.pop((path.parent.name, path.name))
            assert ours.classes[label] == name
            assert image.tobytes() == pixels.tobytes()
        assert not wanted


def numbered(count: int, side: int = 4) -> Split:
    """Images whose corners are their number, and of which no crop is like another one."""
    images = torch.arange(1, side * side + 1, dtype=torch.uint8).view(1, 1, side, side).repeat(count, 1, 1, 1)
    return Split(images, torch.arange(count), ("a",) * count)


INFO = DataInfo(name="n", classes=("a",), mean=(0.0,), std=(1 / 255,))
"""Pixels come out as they are."""


def crops(epoch: int, batch_size: int = 16, share: tuple[int, int] = (0, 1), seed: int = 0) -> dict[int, Tensor]:
    """Image → what became of it in an epoch."""
    split = numbered(64)
    source = Batches(split, INFO, batch_size, pad=2, flip=True, shuffle=True, seed=seed, share=share)
    return {
        int(i): image for images, labels in source.epoch(epoch) for i, image in zip(labels, images, strict=True)
    }


def alike(one: dict[int, Tensor], other: dict[int, Tensor]) -> float:
    return sum(torch.equal(one[i], other[i]) for i in one) / len(one)


def test_crops_differ_from_epoch_to_epoch_and_from_step_to_step() -> None:
    """There are 50 for an image, so that two are alike by chance once in 50 times."""
    first = crops(0)
    assert alike(first, crops(0)) == 1
    assert alike(first, crops(1)) < 0.15
    assert alike(first, crops(0, seed=1)) < 0.15
    source = Batches(numbered(64), INFO, 16, pad=2, flip=True, shuffle=True)
    batches = [images for epoch in range(3) for images, _ in source.epoch(epoch)]
    for i, one in enumerate(batches):  # the images are all alike but for their crop
        for other in batches[:i]:
            assert sum(torch.equal(a, b) for a, b in zip(one, other, strict=True)) < 6


@pytest.mark.parametrize("count", [2, 4])
def test_an_image_is_augmented_alike_whatever_the_number_of_processes(count: int) -> None:
    whole, parts = crops(3), [crops(3, share=(i, count)) for i in range(count)]
    assert sum(map(len, parts)) == len(whole) == 64
    for part in parts:
        for i, image in part.items():
            assert torch.equal(image, whole[i])


def test_each_is_mirrored_in_every_other_epoch() -> None:
    """Half of them in the first, drawn by the seed; the same wherever an epoch goes on."""
    images = torch.arange(2, dtype=torch.uint8).expand(400, 1, 1, 2).clone()
    split = Split(images, torch.arange(400), ("a",) * 400)

    def mirrored(epoch: int, seed: int = 0, start: int = 0) -> dict[int, bool]:
        source = Batches(split, INFO, 40, flip="alternating", shuffle=True, seed=seed)
        return {
            int(i): bool(image[0, 0, 0] > image[0, 0, 1])
            for images, labels in source.epoch(epoch, start)
            for i, image in zip(labels, images, strict=True)
        }

    first = mirrored(0)
    assert sum(first.values()) == pytest.approx(200, abs=5 * 10)
    assert mirrored(1) == mirrored(3) == {i: not was for i, was in first.items()}
    assert mirrored(2) == first != mirrored(0, seed=1)
    rest = mirrored(2, start=7)
    assert len(rest) == 120
    assert rest.items() <= first.items()


def test_half_are_mirrored_and_every_corner_is_as_likely() -> None:
    count = 20_000
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).repeat(count, 1, 1, 1)
    out = augment(images, 1, True, torch.Generator().manual_seed(0))
    inner = out[:, 0, 1:3, 1:3].int()  # never padding
    mirrored = inner[:, 0, 0] > inner[:, 0, 1]
    assert mirrored.float().mean() == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / count))
    inner = torch.where(mirrored[:, None, None], inner.flip(2), inner)
    corners = inner[:, 0, 0].bincount()
    assert sorted(corners.nonzero().flatten().tolist()) == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    spread = 5 * math.sqrt(count / 9 * 8 / 9)
    assert all(abs(int(n) - count / 9) < spread for n in corners[corners > 0])


def test_an_order_holds_every_image_once() -> None:
    orders = [
        torch.cat([labels for _, labels in Batches(numbered(64), INFO, 16, shuffle=True, seed=s).epoch(e)])
        for s, e in ((0, 0), (0, 1), (1, 0))
    ]
    for i, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(64))
        assert all((order == other).float().mean() < 0.2 for other in orders[:i])


def test_which_images_are_trained_on_and_which_are_held_out() -> None:
    train, test = numbered(10), numbered(3)
    assert select((train, test))[0].labels.tolist() == list(range(10))
    assert select((train, test))[1] is test
    few, held = select((train, test), num_train=4, holdout=3)
    assert (few.labels.tolist(), held.labels.tolist()) == ([1, 2, 4, 5], [0, 3, 6])
    rest = [1, 2, 4, 5, 7, 8, 9]
    assert select((train, test), holdout=3)[0].labels.tolist() == rest
    assert select((train, test), num_train=7, holdout=3)[0].labels.tolist() == rest
    assert select((train, test), holdout=9)[0].labels.tolist() == [9]


def test_held_out_images_have_the_classes_alike() -> None:
    mini = load_data("cifar10-mini")
    for count in (100, 500, 1000):  # its last images are of the classes that CIFAR-10 came to 400 of last
        held_out = select(mini, holdout=count)[1]
        assert len(held_out) == count
        assert held_out.labels.bincount(minlength=10).float().std() < 0.05 * count


@pytest.mark.parametrize("normalize", ["channel", "none"])
def test_normalization_is_torchvisions(normalize: str) -> None:
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    split = Split(images, torch.zeros(20, dtype=torch.int64), ("a",))
    info = describe_data("cifar10", (split, split), normalize)
    if normalize == "none":
        assert (info.mean, info.std) == ((0.0,) * 3, (1.0,) * 3)
    (made, _), *_ = Batches(split, info, 20).epoch()
    wanted = transforms.normalize(images.float() / 255, list(info.mean), list(info.std))
    torch.testing.assert_close(made, wanted)
    scale, shift = scale_and_shift(info)
    torch.testing.assert_close((images.float() * scale - shift), wanted)
