import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import detachnet
from detachnet.data.folders import open_files
from detachnet.data.images import read_image, to_tensor
from detachnet.data.loader import Augmentation, FileBatches, deal
from detachnet.facts import DataInfo
from detachnet.zoo import normalization
from tests.folders import make_shards, write_folder

INFO = DataInfo(name="folder", classes=("9", "10", "cat", "dog"), mean=(0.4,) * 3, std=(0.2,) * 3, crop_pct=0.875)
MUCH = Augmentation("rand-m9-mstd0.5-inc1", reprob=0.5)
Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"))


def batches(
    folder: Path, split: str = "train", name: str = "folder", size: int = 16, **options: Any
) -> FileBatches:
    return FileBatches(open_files(name, folder, split), INFO, (32, 32), size, **options)


def assert_equal(one: Pairs, other: Pairs) -> None:
    assert len(one) == len(other)
    for (images, labels), (others, truths) in zip(one, other, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, truths)


def test_an_epoch_of_training(folder: Path) -> None:
    source = batches(folder, augmentation=MUCH)
    first, again, second = (list(source.epoch(epoch)) for epoch in (0, 0, 1))
    assert len(source) == len(first) == 3
    assert [tuple(images.shape) for images, _ in first] == [(16, 3, 32, 32)] * 3
    assert first[0][0].dtype == torch.float32
    assert torch.cat([labels for _, labels in first]).bincount().tolist() == [12] * 4
    assert_equal(first, again)
    assert not torch.equal(first[0][1], second[0][1])
    assert_equal(list(source.epoch(1, start=2)), second[2:])
    other = batches(folder, augmentation=MUCH, seed=1)
    assert not torch.equal(next(other.epoch())[0], first[0][0])


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.2, "cutmix": 1.0}])
def test_the_number_of_workers_changes_nothing(folder: Path, mixing: dict[str, float]) -> None:
    augmentation = Augmentation("rand-m9-mstd0.5-inc1", 0.5, **mixing)
    none, two = (batches(folder, augmentation=augmentation, num_workers=n) for n in (0, 2))
    assert_equal(list(none.epoch(3)), list(two.epoch(3)))
    assert_equal(list(none.epoch(4, start=1)), list(two.epoch(4, start=1)))


def pixels(images: Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.2, "cutmix": 1.0}])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batch_of_one(folder: Path, count: int, mixing: dict[str, float]) -> None:
    augmentation = Augmentation(**mixing)
    whole = list(batches(folder, augmentation=augmentation).epoch())
    shares = [list(batches(folder, augmentation=augmentation, share=(i, count)).epoch()) for i in range(count)]
    for step, (images, labels) in enumerate(whole):
        parts = [share[step] for share in shares]
        assert {len(part[1]) for part in parts} == {16 // count}
        assert pixels(torch.cat([part[0] for part in parts])) == pixels(images)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]).sum(0), labels.sum(0))


def test_pairs_stay_together() -> None:
    shares = [deal(list(range(12)), (i, 3), pairs=True) for i in range(3)]
    assert shares == [[0, 3, 8, 11], [1, 4, 7, 10], [2, 5, 6, 9]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_evaluation_counts_every_image_once(folder: Path, tmp_path: Path, workers: int, count: int) -> None:
    pytest.importorskip("webdataset")
    once = pixels(torch.cat([images for images, _ in batches(folder, "val").epoch()]))
    assert len(once) == 12
    shards = make_shards(folder, tmp_path / "shards", 5)
    for root, name, split in ((folder, "folder", "val"), (shards, "wds/x", "validation")):
        options: dict[str, Any] = {"num_workers": workers, "size": 5 * count}
        parts = [batches(root, split, name, share=(i, count), **options) for i in range(count)]
        assert pixels(torch.cat([images for part in parts for images, _ in part.epoch()])) == once


def test_an_image_is_evaluated_as_it_is_predicted(folder: Path) -> None:
    source = batches(folder, "val", size=12)
    images, _ = next(source.epoch())
    for index, image in enumerate(images):
        path = source.files.reader.filename(index, absolute=True)
        torch.testing.assert_close(image, to_tensor(read_image(path), INFO, (3, 32, 32)), rtol=0, atol=1e-5)


def test_mixing(folder: Path) -> None:
    _, labels = next(batches(folder, augmentation=Augmentation(mixup=0.5)).epoch())
    assert labels.shape == (16, 4)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))
    assert ((labels > 0).sum(1) == 2).any()
    with pytest.raises(
        detachnet.RecipeError, match=r"mixing needs an even number of images in each of 2 processes"
    ):
        batches(folder, augmentation=Augmentation(cutmix=1), size=6, share=(0, 2))


def test_erasing(folder: Path) -> None:
    plain, erased = (batches(folder, augmentation=Augmentation(reprob=p)) for p in (0, 1))
    mean = next(erased.epoch())[0].abs() < 0.01
    assert (mean.flatten(1).float().mean(1) > 0.01).all()
    assert not torch.equal(next(plain.epoch())[0], next(erased.epoch())[0])


def test_random_numbers_of_others_stay(folder: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    list(batches(folder, augmentation=Augmentation("rand-m9-mstd0.5-inc1", mixup=1)).epoch())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path: Path, workers: int) -> None:
    broken = write_folder(tmp_path) / "train" / "dog" / "4.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(detachnet.DataError, match=r"^\S+train/dog/4.jpg is not an image\n  try") as error:
        list(batches(tmp_path, augmentation=MUCH, num_workers=workers).epoch())
    assert error.value.summary == f"{broken} is not an image"


def test_what_cannot_be_made_batches_of(folder: Path) -> None:
    with pytest.raises(detachnet.DataError, match="48 training images do not fill a batch of 49"):
        batches(folder, augmentation=MUCH, size=49)
    with pytest.raises(detachnet.RecipeError, match=r"auto_augment = 'rnad-m9' is no policy of timm's"):
        batches(folder, augmentation=Augmentation("rnad-m9"))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("webdataset")
    return make_shards(folder, tmp_path_factory.mktemp("wds") / "shards", 10)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 2])
def test_shards_go_on_exactly(shards: Path, workers: int, start: int) -> None:
    source = batches(shards, name="wds/x", size=8, augmentation=MUCH, num_workers=workers)
    whole = list(source.epoch(1))
    assert len(whole) == len(source) == 6
    assert_equal(list(source.epoch(1, start)), whole[start:])
    assert not torch.equal(whole[0][1], next(source.epoch(2))[1])


def test_shards_of_one_worker_are_read_once_an_epoch(shards: Path) -> None:
    for workers in (0, 1):
        source = batches(shards, name="wds/x", augmentation=Augmentation(), num_workers=workers)
        labels = torch.cat([labels for _, labels in source.epoch()])
        assert labels.bincount().tolist() == [12] * 4


def test_a_worker_whose_shards_run_out_starts_again(shards: Path) -> None:
    parts = [
        list(batches(shards, name="wds/x", augmentation=Augmentation(), share=(i, 2)).epoch()) for i in range(2)
    ]
    assert [[len(labels) for _, labels in part] for part in parts] == [[8, 8, 8]] * 2


def test_too_few_shards(shards: Path) -> None:
    with pytest.raises(detachnet.DataError, match="5 shards are too few for 3 processes with 2 workers each"):
        batches(shards, name="wds/x", augmentation=MUCH, num_workers=2, share=(0, 3), size=6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_shard_is_named(folder: Path, tmp_path: Path, workers: int) -> None:
    pytest.importorskip("webdataset")
    shard = make_shards(folder, tmp_path / "shards", 48) / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    source = batches(shard.parent, name="wds/x", augmentation=MUCH, num_workers=workers)
    with pytest.raises(detachnet.DataError, match=r"^the shard \S+train-000000.tar cannot be read"):
        list(source.epoch())


def test_normalization_is_that_of_the_published_weights() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalization("torchvision:resnet50") == normalization("timm:resnet50") == imagenet
    assert normalization("timm:inception_v3.tf_in1k") == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(
        detachnet.ModelError, match=r"unknown model 'timm:resnet50.nothing'\n  what     Invalid pretr"
    ):
        normalization("timm:resnet50.nothing")
