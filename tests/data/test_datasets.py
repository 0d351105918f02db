import hashlib
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
import torch
import torchvision

import detachnet
from detachnet.data import datasets as data
from detachnet.data.batches import Batches, augment
from detachnet.data.datasets import Split, describe_data, load_data
from tests.folders import write_binary, write_python

FULL = Path(__file__).parents[3] / "shared" / "data"
needs_full = pytest.mark.skipif(not FULL.is_dir(), reason="the full CIFAR-10 is not on this machine")


@pytest.fixture
def mini() -> tuple[Split, Split]:
    return load_data("cifar10-mini")


def test_mini_is_balanced(mini: tuple[Split, Split]) -> None:
    for split, per_class in zip(mini, (400, 100), strict=True):
        assert split.images.shape == (10 * per_class, 3, 32, 32)
        assert split.labels.bincount().tolist() == [per_class] * 10
        assert split.classes[0] == "airplane"


def test_mini_is_small() -> None:
    folder = resources.files("detachnet.data.embedded")
    assert sum(len(file.read_bytes()) for file in folder.iterdir() if file.is_file()) < 12e6


@needs_full
def test_mini_is_the_first_of_each_class(mini: tuple[Split, Split]) -> None:
    for small, full in zip(mini, load_data("cifar10", FULL), strict=True):
        per_class = len(small) // 10
        first = torch.cat([(full.labels == c).nonzero().flatten()[:per_class] for c in range(10)]).sort().values
        assert torch.equal(small.images, full.images[first])
        assert torch.equal(small.labels, full.labels[first])


def test_damaged_mini(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.hashlib, "sha256", hashlib.md5)
    with pytest.raises(detachnet.DataError, match="cifar10-mini is damaged"):
        load_data("cifar10-mini")


@pytest.mark.parametrize("inside", [False, True])
def test_binary_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    records = write_binary(folder, monkeypatch)
    train, test = load_data("cifar10", folder if inside else tmp_path)
    assert len(train) == 50
    assert torch.equal(test.images.flatten(1), torch.from_numpy(records[5, :, 1:]))
    assert test.labels.tolist() == list(range(10))


def test_python_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_python(tmp_path / "cifar-10-batches-py", monkeypatch)
    train, test = load_data("cifar10", tmp_path)
    assert torch.equal(train.images.flatten(1), torch.from_numpy(pixels[:5].reshape(50, -1)))
    assert test.labels.tolist() == list(range(10))


@pytest.mark.parametrize("write", [write_binary, write_python])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object, damage: str) -> None:
    folder = tmp_path / ("cifar-10-batches-bin" if write is write_binary else "cifar-10-batches-py")
    write(folder, monkeypatch)  # type: ignore[operator]
    file = sorted(folder.glob("*3*"))[0]
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-100])
    else:
        content[5000] ^= 1
        file.write_bytes(content)
    with pytest.raises(detachnet.DataError, match=r"cannot read|damaged"):
        load_data("cifar10", tmp_path)


def test_places_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETACHNET_DATA", str(tmp_path / "environment"))
    with pytest.raises(detachnet.DataError, match="cifar10 is not on this machine") as error:
        load_data("cifar10", tmp_path / "given")
    at = [str(error.value).index(place) for place in ("given", "environment", f"data{os.sep}cifar")]
    assert at == sorted(at)
    write_binary(tmp_path / "environment" / "cifar-10-batches-bin", monkeypatch)
    assert len(load_data("cifar10", tmp_path / "given")[1]) == 10


def test_download_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(root: str, download: bool = False, train: bool = True) -> None:
        asked.append(root)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetch)
    with pytest.raises(detachnet.DataError, match="is not on this machine"):
        load_data("cifar10", tmp_path)
    assert asked == []
    with pytest.raises(detachnet.DataError, match="could not be downloaded"):
        load_data("cifar10", tmp_path, download=True)
    assert asked == [str(tmp_path)]


def test_several_processes_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come while it is unpacked wait for all of it."""
    write_python(tmp_path / "there" / "cifar-10-batches-py", monkeypatch)
    began, downloads = threading.Event(), []

    class Slow(torchvision.datasets.CIFAR10):
        def download(self) -> None:
            downloads.append(self.root)
            (Path(self.root) / self.base_folder).mkdir()
            began.set()
            time.sleep(0.5)
            shutil.copytree(tmp_path / "there", self.root, dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Slow)
    root = tmp_path / "new" / "data"
    with ThreadPoolExecutor(3) as threads:
        early = [threads.submit(load_data, "cifar10", root, download=True) for _ in range(2)]
        began.wait(10)
        late = threads.submit(load_data, "cifar10", root, download=True)
        assert [len(job.result()[0]) for job in (*early, late)] == [50, 50, 50]
    assert downloads == [str(root)]
    assert [file.name for file in root.iterdir()] == ["cifar-10-batches-py"]


def test_unknown_data_set() -> None:
    with pytest.raises(detachnet.DataError, match="unknown data set 'cifar11'"):
        load_data("cifar11")
    with pytest.raises(detachnet.DataError, match="takes the name of a data set, not NoneType"):
        load_data(None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_statistics(mini: tuple[Split, Split]) -> None:
    info = describe_data("cifar10-mini", mini)
    pixels = mini[0].images.double() / 255
    torch.testing.assert_close(torch.tensor(info.mean), pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(info.std), pixels.std((0, 2, 3), correction=0).float())
    images = torch.cat([x for x, _ in Batches(mini[0], info, 500).epoch()])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def batches(split: Split, **options: object) -> Batches:
    return Batches(split, describe_data("cifar10-mini", (split, split)), 64, **options)  # type: ignore[arg-type]


def test_an_epoch_goes_on_from_any_step_exactly(mini: tuple[Split, Split]) -> None:
    loader = batches(mini[0], pad=4, flip=True, shuffle=True, seed=3)
    whole = list(loader.epoch(5))
    rest = list(loader.epoch(5, start=40))
    assert len(whole) == len(loader) == 62
    for (x, y), (x2, y2) in zip(whole[40:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(whole[0][1], next(iter(loader.epoch(6)))[1])


def test_evaluation_sees_every_image_once_in_order(mini: tuple[Split, Split]) -> None:
    labels = torch.cat([y for _, y in batches(mini[1]).epoch()])
    assert torch.equal(labels, mini[1].labels)


def test_processes_share_a_batch(mini: tuple[Split, Split]) -> None:
    whole = next(iter(batches(mini[0], shuffle=True).epoch()))[1]
    parts = [next(iter(batches(mini[0], shuffle=True, share=(i, 2)).epoch()))[1] for i in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(), whole)


def test_too_few_images(mini: tuple[Split, Split]) -> None:
    few = Split(mini[0].images[:10], mini[0].labels[:10], mini[0].classes)
    with pytest.raises(detachnet.DataError, match="10 training images do not fill a batch of 64"):
        batches(few, shuffle=True)


def test_augmentation_is_a_crop_of_the_padded_and_maybe_mirrored_image() -> None:
    images = torch.randint(1, 256, (200, 3, 6, 5), dtype=torch.uint8)
    out = augment(images, 2, True, torch.Generator().manual_seed(0))
    seen = set()
    for image, result in zip(images, out, strict=True):
        places = {
            (flip, top, left)
            for flip in (False, True)
            for top in range(5)
            for left in range(5)
            if torch.equal(crop(image, flip, top, left), result)
        }
        assert len(places) == 1
        seen |= places
    assert len(seen) > 45  # of 50


def crop(image: torch.Tensor, flip: bool, top: int, left: int) -> torch.Tensor:
    padded = torch.zeros(3, 10, 9, dtype=torch.uint8)
    padded[:, 2:8, 2:7] = image.flip(2) if flip else image
    # Mirroring the columns of a crop mirrors the image about its own middle.
    return padded[:, top : top + 6, left : left + 5]


def test_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    sums = {}
    for name in data._MNIST:
        count, header = (6, 16) if "images" in name else (6, 8)
        content = bytes(header) + bytes(range(count)) * (784 if "images" in name else 1)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "_MNIST", sums)
    train, test = load_data("mnist", tmp_path)
    assert train.images.shape == test.images.shape == (6, 1, 28, 28)
    assert test.labels.tolist() == list(range(6))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"no labels")
    with pytest.raises(detachnet.DataError, match="t10k-labels-idx1-ubyte is damaged"):
        load_data("mnist", tmp_path)


def test_mnist_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETACHNET_DATA", raising=False)
    with pytest.raises(detachnet.DataError, match=r"mnist is not on this machine[\s\S]*MNIST/raw"):
        load_data("mnist")


@needs_full
def test_the_real_mnist() -> None:
    train, test = load_data("mnist", FULL)
    assert (len(train), len(test)) == (60_000, 10_000)
    info = describe_data("mnist", (train, test))
    assert info.mean == pytest.approx((0.1307,), abs=1e-4)  # as torchvision's examples have it
    assert info.num_test == 10_000
