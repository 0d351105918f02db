"""Name of a data set -> its images in memory, as uint8."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from detachnet.errors import DataError, first_line, nearest
from detachnet.facts import DataInfo
from detachnet.storage import LOCK, locked, read_file

COLUMNS = 100
"""Tiles per row of the embedded pictures."""
_CIFAR10_BINARY = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
"""SHA-256 of the files of the official binary layout, 10 000 records of 1 + 3072 bytes each."""
_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""SHA-256 of the official files, unpacked."""
_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))
"""Names of splits of image files that stand for one another, as in timm's `create_dataset`."""
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Split:
    """One split of a data set in memory.

    Attributes:
        images: `(N, C, H, W)`, uint8.
        labels: `(N,)`, int64.
        classes: Name of each class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def check(self) -> None:
        """Refuse what only looks like a split.

        Raises:
            DataError: Images and labels are no such tensors, or not as many.
        """
        images, labels = self.images, self.labels
        if not (isinstance(images, Tensor) and images.ndim == 4 and images.dtype == torch.uint8):
            raise DataError(
                f"images of a Split are a tensor (N, C, H, W) of uint8, not {_said(images)}",
                hint="images in [0, 1] are (255 * images).round().byte()",
            )
        if not (isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype == torch.int64):
            raise DataError(f"labels of a Split are a tensor (N,) of int64, not {_said(labels)}")
        if len(images) != len(labels):
            raise DataError(f"a Split has {len(images)} images and {len(labels)} labels")

    def part(self, start: int, stop: int | None = None) -> Split:
        """The images from one on, up to but without another; all that follow if none is given."""
        return self._at(slice(start, stop))

    def spread(self, count: int) -> Split:
        """So many of the images, evenly spaced; all if there are fewer."""
        return self if count >= len(self) else self._at(self._evenly(count))

    def without(self, count: int) -> tuple[Split, Split]:
        """The same without so many images, evenly spaced ones, and these."""
        out = self._evenly(count)
        return self._at(~out), self._at(out)

    def _evenly(self, count: int) -> Tensor:
        """Which images so many evenly spaced ones are, `(N,)`."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.arange(count) * len(self) // count] = True
        return chosen

    def _at(self, which: slice | Tensor) -> Split:
        """Some of the images."""
        return Split(self.images[which], self.labels[which], self.classes)


def _said(value: object) -> str:
    """What something is that is no such tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def load_data(name: str, root: str | Path | None = None, download: bool = False) -> tuple[Split, Split]:
    """Load the training and the test split of a data set.

    Args:
        name: `cifar10`, `cifar10-mini` (4000 + 1000 of its images, embedded in the package), or `mnist`.
        root: Where to look first; then `$DETACHNET_DATA`, then `./data`.
        download: Fetch the data set into the first of these places if it is in none.

    Raises:
        DataError: It is in none of the places, or a file is missing, truncated or changed.
    """
    if not isinstance(name, str):
        raise DataError(
            f"load_data takes the name of a data set, not {type(name).__name__}", nearest=list(_LOADERS)
        )
    if is_files(name):
        raise DataError(
            f"{name} is read image by image: it is not held in memory",
            hint="detachnet train, evaluate and predict work with such data",
        )
    if name not in _LOADERS:
        raise DataError(f"unknown data set {name!r}", nearest=nearest(name, _LOADERS) or list(_LOADERS))
    return _LOADERS[name](places_of(root), download)


def is_files(name: str) -> bool:
    """Whether a data set is one of image files: `folder`, `FILE.csv`, and timm's `wds/NAME` and `hfds/NAME`."""
    return name == "folder" or name.endswith(".csv") or name.startswith(("wds/", "hfds/"))


def synonyms(split: str) -> tuple[str, ...]:
    """A split's name, and those that stand for it."""
    return (split, *(s for group in _SYNONYMS if split in group for s in group if s != split))


def select(splits: tuple[Split, Split], num_train: int = 0, holdout: int = 0) -> tuple[Split, Split]:
    """The first `num_train` training images, 0 for all, and the test images.

    With `holdout` so many training images, evenly spaced ones, take the place of the test images and are not
    trained on: a set's last images need not have its classes alike.

    Raises:
        DataError: There are not as many.
    """
    train, test = splits
    rest = len(train) - holdout
    count = num_train or rest
    if not 0 < count <= rest:
        wanted = f"{num_train} (data.num_train)" if num_train else "a training"
        raise DataError(
            f"{len(train)} training images are not enough for {wanted} and {holdout} held out (data.holdout)",
            hint=f"data.holdout of {len(train) - 1} at most" if rest <= 0 else f"data.num_train of {rest} at most",
        )
    if holdout:
        train, test = train.without(holdout)
    return train.part(0, count), test


def data_names() -> list[str]:
    """The data sets `load_data` knows."""
    return list(_LOADERS)


def describe_data(name: str, splits: tuple[Split, Split], normalize: str = "channel") -> DataInfo:
    """Name, classes, number of test images and, for each channel of the training images, mean and deviation."""
    train, test = splits
    num_chs = train.images.shape[1]
    mean, std = torch.zeros(num_chs), torch.ones(num_chs)
    if normalize == "channel":
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([train.images[:, c].flatten().bincount(minlength=256) for c in range(num_chs)])
        shares = counts.double() / counts.sum(1, keepdim=True)
        mean = shares @ values
        std = (shares @ values**2 - mean**2).sqrt()
    return DataInfo(
        name=name,
        classes=train.classes,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        num_test=len(test),
    )


def places_of(root: str | Path | None) -> list[Path]:
    """Where data is looked for, in order: the given folder, `$DETACHNET_DATA`, `./data`."""
    given = [root, os.environ.get("DETACHNET_DATA"), "data"]
    return [Path(place).expanduser() for place in given if place]


def _cifar10(places: list[Path], download: bool) -> tuple[Split, Split]:
    """CIFAR-10 from torchvision's Python layout or from the official binary layout."""
    layouts = {"cifar-10-batches-py": _cifar10_python, "cifar-10-batches-bin": _cifar10_binary}
    folder = _find("cifar10", places, list(layouts), download)
    return layouts[folder.name](folder)


def _mnist(places: list[Path], download: bool) -> tuple[Split, Split]:
    """MNIST from its official IDX files, where torchvision keeps them; each file's SHA-256 checked."""
    folder = _find("mnist", places, ["MNIST/raw"], download)
    images_train, labels_train, images_test, labels_test = (
        torch.from_numpy(np.frombuffer(_read_checked(folder / name, checksum), np.uint8).copy())
        for name, checksum in _MNIST.items()
    )
    classes = tuple(map(str, range(10)))
    train, test = (
        Split(images[16:].view(-1, 1, 28, 28), labels[8:].long(), classes)  # behind the headers
        for images, labels in ((images_train, labels_train), (images_test, labels_test))
    )
    return train, test


def _find(name: str, places: list[Path], folders: list[str], download: bool) -> Path:
    """The first of some folders that is in one of the places, downloaded if need be."""
    paths = [place if place.name == folder else place / folder for place in places for folder in folders]
    for path in paths:
        if path.is_dir():
            if download and (_root(path) / LOCK).exists():
                with locked(_root(path), wait=True):  # until the process that downloads it has unpacked it
                    pass
            return path
    if not download:
        raise DataError(
            f"{name} is not on this machine",
            what="looked for " + ", ".join(map(str, paths)),
            hint="root=DIR, --data-root DIR or DETACHNET_DATA=DIR says where it is; "
            "download=True, --download fetches it",
        )
    _download(name, paths[0])
    return paths[0]


def _root(path: Path) -> Path:
    """What torchvision calls the root of a data set's folder."""
    return path.parent.parent if path.name == "raw" else path.parent


def _download(name: str, path: Path) -> None:
    """Run torchvision's download, in one process of those that want it."""
    fetch = {"cifar10": torchvision.datasets.CIFAR10, "mnist": torchvision.datasets.MNIST}[name]
    root = _root(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root, wait=True):
            if not path.is_dir():
                fetch(str(root), download=True)
    except Exception as error:
        raise DataError(
            f"{name} could not be downloaded to {root}",
            what=first_line(error),
        ) from error


def _cifar10_python(folder: Path) -> tuple[Split, Split]:
    """Through torchvision, which checks each file's MD5."""
    try:
        parts = [torchvision.datasets.CIFAR10(str(folder.parent), train=train) for train in (True, False)]
    except Exception as error:
        raise DataError(
            f"the CIFAR-10 files in {folder} are incomplete or damaged",
            what=first_line(error),
            hint="remove the folder and run again with --download",
        ) from error
    train, test = (
        Split(
            torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(p.targets),
            _CIFAR10_CLASSES,
        )
        for p in parts
    )
    return train, test


def _cifar10_binary(folder: Path) -> tuple[Split, Split]:
    """Records of one label byte and 3072 pixel bytes (R, G, B planes of 32×32), each file's SHA-256 checked."""
    records = []
    for name, checksum in _CIFAR10_BINARY.items():
        data = _read_checked(folder / name, checksum)
        records.append(torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(-1, 3073))
    train, test = (
        Split(part[:, 1:].reshape(-1, 3, 32, 32).contiguous(), part[:, 0].long(), _CIFAR10_CLASSES)
        for part in (torch.cat(records[:5]), records[5])
    )
    return train, test


def _read_checked(path: Path, checksum: str) -> bytes:
    """A file's bytes.

    Raises:
        DataError: It is missing, or not the file the checksum belongs to.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise DataError(f"cannot read {path}", what=str(error)) from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise DataError(
            f"{path} is damaged: its checksum is not that of the official file",
            what=f"{len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()[:16]}…, expected {checksum[:16]}…",
            hint="fetch the data set again",
        )
    return data


def _cifar10_mini(_places: list[Path], _download: bool) -> tuple[Split, Split]:
    """The embedded subset."""
    folder = resources.files("detachnet.data.embedded")
    try:
        labels = json.loads(folder.joinpath("cifar10_mini.json").read_text())
        splits = []
        for name in ("train", "test"):
            with folder.joinpath(f"cifar10_mini_{name}.webp").open("rb") as file:
                grid = torch.from_numpy(np.array(Image.open(file)))
            rows = grid.shape[0] // 32
            tiles = grid.view(rows, 32, COLUMNS, 32, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
            checksum = hashlib.sha256(tiles.contiguous().numpy().tobytes()).hexdigest()
            if checksum != labels[f"{name}_sha256"]:
                raise DataError(f"the embedded cifar10-mini is damaged: {name}", hint="install detachnet again")
            target = torch.tensor([int(digit) for digit in labels[name]])
            splits.append(Split(tiles.contiguous(), target, tuple(labels["classes"])))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            "the embedded cifar10-mini cannot be read", what=str(error), hint="install detachnet again"
        ) from error
    return splits[0], splits[1]


_LOADERS: dict[str, Callable[[list[Path], bool], tuple[Split, Split]]] = {
    "cifar10": _cifar10,
    "cifar10-mini": _cifar10_mini,
    "mnist": _mnist,
}
