"""name, root, split -> images of files: listed here, or opened through timm's data factory."""

from __future__ import annotations

import csv
import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from detachnet.data.datasets import places_of, synonyms
from detachnet.data.images import SUFFIXES, read_image, to_mode
from detachnet.data.listing import entries, folders_in, images_below, in_order, is_image
from detachnet.errors import DataError, first_line, nearest
from detachnet.storage import open_file, read_file

_SPLITS = {"test", *synonyms("train"), *synonyms("validation")}
"""Names of folders that are no classes where a data set may be undivided."""
CLASSES = "classes.txt"
"""Beside shards: the name of each class, one a line."""
Sample = Mapping[str, Any]
"""An image of a shard: the bytes of its files by suffix, its `__key__` and the `__url__` of its shard."""


@dataclass(frozen=True)
class Held:
    """How images that nobody has divided are: so many of each class, but one at least, are no training images.

    Which ones depends on the seed and on their paths, not on their order or on what else there is.

    Attributes:
        split: The split that they are then.
        share: Share of each class, in (0, 1).
        seed: Decides which ones.
    """

    split: str
    share: float
    seed: int = 0

    def part(self, samples: Sequence[tuple[str, int]], root: str, split: str) -> list[tuple[str, int]]:
        """The samples of one of the two splits, in their order.

        Raises:
            DataError: A class has one image, which cannot be both.
        """
        of: dict[int, list[str]] = {}
        for path, label in samples:
            of.setdefault(label, []).append(path)
        held: set[str] = set()
        for paths in of.values():
            if len(paths) < 2:
                raise DataError(
                    f"a class has one image, {paths[0]}, which cannot be in both splits",
                    hint="add another image of it, or leave the class out",
                )
            count = min(len(paths) - 1, max(1, round(self.share * len(paths))))
            held.update(sorted(paths, key=lambda path: self._place(os.path.relpath(path, root)))[:count])
        return [sample for sample in samples if (sample[0] in held) == (split == self.split)]

    def _place(self, path: str) -> bytes:
        """Where an image comes in the order that the seed makes."""
        return hashlib.sha256(f"{self.seed}/{Path(path).as_posix()}".encode()).digest()


@dataclass(frozen=True)
class Listed:
    """Images by their paths, as timm's readers have them.

    Attributes:
        samples: Path and label of each.
        root: What the paths are below.
    """

    samples: Sequence[tuple[str, int]]
    root: str

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open_file(path), label

    def filename(self, index: int, *, absolute: bool) -> str:
        """The path of an image."""
        path = self.samples[index][0]
        return path if absolute else os.path.relpath(path, self.root)


@dataclass(frozen=True)
class Files:
    """One split of a data set of image files.

    Attributes:
        name: `folder`, `FILE.csv`, `wds/NAME` or `hfds/NAME`.
        split: Which split.
        classes: Name of each class.
        num_images: Images in the split.
        shards: Paths of the WebDataset shards, which are read from front to back; empty where each image can be
            read by its number.
        lengths: Images in each shard, where that is known.
        reader: timm's, of images that can be.
        numbers: Those of the reader's images that the split has, where it has not all.
        labels: timm's labels to ours, where they differ.
        held: How the data set is divided, where it does not say so itself.
        place: Which of the places that were looked in they are in; its other splits are there, too.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    num_images: int
    shards: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    reader: Any = None
    numbers: Sequence[int] | None = None
    labels: Mapping[int, int] = field(default_factory=dict)
    held: Held | None = None
    place: Path | None = None

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image in colours, and its label.

        Raises:
            DataError: It cannot be read; the message names it.
        """
        index = index if self.numbers is None else self.numbers[index]
        name = self._name(index)
        try:
            file, label = self.reader[index]
        except OSError as error:
            raise DataError(f"{name} cannot be read", what=str(error)) from error
        with file:
            return self._checked(file, self.labels.get(label, label), name)

    def samples(self, shards: Sequence[str]) -> Iterator[Sample]:
        """Yield the images of some shards, not yet decoded.

        Raises:
            DataError: A shard is missing, truncated or damaged.
        """
        from webdataset.tariterators import group_by_keys, tar_file_expander  # an extra

        for shard in shards:
            try:
                with open(shard, "rb") as stream:
                    yield from group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))
            except (OSError, tarfile.TarError, ValueError) as error:
                what = str(error.args[0]) if error.args else type(error).__name__
                raise DataError(f"the shard {shard} cannot be read", what=what) from error

    def decode(self, sample: Sample) -> tuple[Image.Image, int]:
        """The image of a shard's sample in colours, and its label.

        Raises:
            DataError: It cannot be read, or has no image or no `.cls` with a number.
        """
        name = f"{sample['__key__']} of {sample['__url__']}"
        image = next((sample[key] for key in sample if f".{key}" in SUFFIXES), None)
        if image is None:
            raise DataError(f"{name} has no image", hint=f"suffixes looked for: {' '.join(SUFFIXES)}")
        try:
            label = int(sample["cls"])
        except (KeyError, ValueError) as error:
            raise DataError(f"{name} has no label", hint="its .cls file holds the number of its class") from error
        return self._checked(BytesIO(image), self.labels.get(label, label), name)

    def _checked(self, file: Any, label: Any, name: str) -> tuple[Image.Image, int]:
        """An open file's picture and its label, if that is one of the classes'."""
        if not isinstance(label, int) or not 0 <= label < len(self.classes):
            raise DataError(f"{name} has the label {label!r}, but there are {len(self.classes)} classes")
        return to_mode(read_image(file, name), 3), label

    def _name(self, index: int) -> str:
        """What errors call an image."""
        if isinstance(self.reader, Listed):
            return str(self.reader.filename(index, absolute=True))
        return f"image {index} of {self.name}, {self.split}"

    def some(self, count: int) -> Iterator[tuple[Image.Image, int]]:
        """Yield at most so many images in colours and their labels: evenly spaced ones; of shards the first.

        Raises:
            DataError: One cannot be read.
        """
        count = min(count, self.num_images)
        if self.shards:
            yield from map(self.decode, islice(self.samples(self.shards), count))
            return
        yield from map(self.read, self._spread(count))

    def _spread(self, count: int) -> list[int]:
        """So many numbers of images, evenly spaced."""
        return [i * self.num_images // count for i in range(count)]

    def without(self, count: int) -> tuple[Files, Files]:
        """The same without some images, and these: evenly spaced ones; of shards the last, as many as hold them.

        Args:
            count: How many; of shards at least.

        Raises:
            DataError: Nothing would be left, or it is not known how many images each shard holds.
        """
        if not 0 < count < self.num_images:
            raise DataError(f"{self.num_images} {self.split} images are not enough to hold out {count}")
        if self.shards:
            return self._without_shards(count)
        out = set(self._spread(count))
        rest = [index for index in range(self.num_images) if index not in out]
        return self._of(rest), self._of(sorted(out))

    def _of(self, indices: Sequence[int]) -> Files:
        """Some of the images."""
        numbers = indices if self.numbers is None else [self.numbers[index] for index in indices]
        return replace(self, num_images=len(indices), numbers=numbers)

    def _without_shards(self, count: int) -> tuple[Files, Files]:
        """The first shards, and the last."""
        if len(self.lengths) != len(self.shards):
            raise DataError(
                f"it is not known how many images each of the shards {self.split!r} holds",
                hint="python -m detachnet.data.shards writes an _info.json that says it",
            )
        first = len(self.shards)
        while sum(self.lengths[first:]) < count:
            first -= 1
        if not first:
            raise DataError(
                f"{len(self.shards)} shards are not enough to hold out {count} images: whole ones are",
                hint="make more shards, with fewer images each",
            )
        parts = (slice(first), slice(first, None))
        shards, held = (
            replace(self, shards=self.shards[p], lengths=self.lengths[p], num_images=sum(self.lengths[p]))
            for p in parts
        )
        return shards, held


def open_files(
    name: str, root: str | Path | None, split: str, classes: Sequence[str] = (), held: Held | None = None
) -> Files:
    """Open one split of a data set of image files.

    Args:
        name: `folder`: a folder per class; `FILE.csv`: a table of paths and labels; `wds/NAME`: WebDataset shards;
            `hfds/NAME`: a data set of Hugging Face's, or the folder of one, which `datasets` fetches if it is not
            there.
        root: Where to look, and nowhere else. If not given, the first of `$DETACHNET_DATA` and `./data` that has
            such images decides. A CSV file may lie where its name says, too. For `hfds/NAME` the folder in which
            `datasets` keeps what it has fetched; its own if none is given.
        split: A folder's name or a synonym of it (`val` for `validation`), a value of the column `split`, a split
            of the shards' `_info.json` or `NAME-{0000..0127}.tar|COUNT`, or a split of the data set.
        classes: Those of the training split, for another split of it.
        held: How a folder of classes without splits, or a table without a column `split`, is divided.

    Raises:
        DataError: The data, one of its classes or a package is missing.
    """
    if name.endswith(".csv"):
        opened = _table(name, root, split, held)
    elif name == "folder":
        opened = _folder(name, root, split, held)
    else:
        opened = {"wds": _shards, "hfds": _hub}[name.partition("/")[0]](name, root, split)
    if not classes or opened.classes == tuple(classes):
        return opened
    if unknown := [c for c in opened.classes if c not in classes]:
        raise DataError(
            f"the split {split!r} has a class {unknown[0]!r} that the training images do not have",
            nearest=nearest(unknown[0], classes),
        )
    labels = {i: classes.index(c) for i, c in enumerate(opened.classes)}
    return replace(opened, classes=tuple(classes), labels=labels)


def _places(root: str | Path | None) -> list[Path]:
    """Where image files are looked for: in a given folder alone, for other places have other images."""
    return places_of(root)[:1] if root else places_of(None)


def _folder(name: str, root: str | Path | None, split: str, held: Held | None) -> Files:
    """A folder with a folder of images per class."""
    places = _places(root)
    place = places[0] if root else next((path for path in places if _decides(path, split, held)), None)
    looked = [path / folder for path in ([place] if place else places) for folder in synonyms(split)]
    if (folder := next((path for path in looked if path.is_dir()), None)) is not None:
        return replace(_classes_of(name, folder, split), place=place)
    if place and held and _is_undivided(place, split, held):
        whole = _classes_of(name, place, split)
        samples = held.part(whole.reader.samples, str(place), split)
        divided = Listed(samples, str(place))
        return replace(whole, num_images=len(samples), reader=divided, held=held, place=place)
    missing = f"; {root} does not exist" if root and not places[0].exists() else ""
    undivided = ", or DIR/CLASS/*.jpg" if held else ""
    raise DataError(
        f"there is no folder of {split} images{missing}",
        what="looked for " + ", ".join(map(str, looked)),
        hint=f"--data-root DIR or DETACHNET_DATA=DIR says where it is: DIR/train/CLASS/*.jpg{undivided}",
    )


def _decides(place: Path, split: str, held: Held | None) -> bool:
    """Whether a place has splits, be it others than this one, or images to divide: no other is looked at then."""
    inside = folders_in(place)
    if any(name.lower() in _SPLITS or name in synonyms(split) for name in inside):
        return True
    if held is None or not _is_undivided(place, split, held):
        return False
    return any(path for name in inside for path in images_below(place / name))


def _is_undivided(place: Path, split: str, held: Held) -> bool:
    """Whether a place has folders, none of which is a split or has one for trainings: those are classes."""
    known = {*_SPLITS, split.lower(), held.split.lower()}
    inside = folders_in(place)
    return bool(inside) and not any(
        name.lower() in known or any(path.is_dir() for path in (place / name / s for s in synonyms("train")))
        for name in inside
    )


def _classes_of(name: str, folder: Path, split: str) -> Files:
    """A folder of classes: the first folder on the way to an image is its class."""
    found: dict[str, list[str]] = {}
    for path in entries(folder):
        if path.is_dir():
            found[path.name] = list(images_below(path))
        elif is_image(path.name):
            raise DataError(
                f"there are images in {folder} itself, which belong to no class",
                what=str(path),
                hint=f"put them in a folder per class: {folder}/CLASS/*.jpg",
            )
    if empty := [each for each, paths in found.items() if not paths]:
        raise DataError(
            f"the class {empty[0]!r} is empty: there is no image in {folder / empty[0]}",
            hint=f"suffixes looked for: {' '.join(SUFFIXES)}",
        )
    if not found:
        raise DataError(f"there is no folder of a class in {folder}", hint=f"it has {folder}/CLASS/*.jpg")
    samples = [(path, label) for label, paths in enumerate(found.values()) for path in paths]
    samples.sort(key=lambda sample: in_order(sample[0]))
    return Files(name, split, tuple(found), len(samples), reader=Listed(samples, str(folder)))


def _table(name: str, root: str | Path | None, split: str, held: Held | None) -> Files:
    """A CSV file with the columns `path`, `label` and, where it says the splits, `split`."""
    places = [*_places(root), Path()]
    place = next((path for path in places if (path / name).is_file()), None)
    if place is None:
        raise DataError(
            f"there is no file {name}",
            what="looked for " + ", ".join(dict.fromkeys(str(path / name) for path in places)),
            hint="--data-root DIR or DETACHNET_DATA=DIR says which folder it is in",
        )
    file = place / name
    rows = _rows(file)
    if missing := next((path for path, *_ in rows if not os.path.isfile(path)), None):
        raise DataError(
            f"{file} names an image that is not there: {missing}", hint=f"paths are relative to {file.parent}"
        )
    splits = {where for *_, where in rows}
    if divided := splits != {""}:
        rows = [row for row in rows if row[2] in synonyms(split)]
    if not rows or (not divided and held is None):
        raise DataError(
            f"{file} names no {split} images" if splits else f"{file} names no images",
            what=_said_of(splits),
            nearest=nearest(split, splits),
        )
    classes = tuple(sorted({label for _, label, _ in rows}, key=in_order))
    samples = [(path, classes.index(label)) for path, label, _ in rows]
    if divided:
        held = None
    elif held is not None:
        samples = held.part(samples, str(file.parent), split)
    reader = Listed(samples, str(file.parent))
    found_in = None if file == Path(name) and file.is_absolute() else place
    return Files(name, split, classes, len(samples), reader=reader, held=held, place=found_in)


def _said_of(splits: Set[str]) -> str:
    """What a CSV file has in place of the images that are looked for."""
    if not splits:
        return "nothing follows its header"
    return "it has no column 'split'" if splits == {""} else f"its splits are {', '.join(sorted(splits))}"


def _rows(file: Path) -> list[tuple[str, str, str]]:
    """The path, label and split of each image that a CSV file names.

    Raises:
        DataError: It is no such file, or a line lacks its path or its label, or repeats a path.
    """
    try:
        lines = read_file(file).decode("utf-8-sig").splitlines()
        table = csv.DictReader(lines, strict=True)
        names = [name.strip().lower() for name in table.fieldnames or ()]
        table.fieldnames = names
        read = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no table", what=str(error), hint="save it as CSV, in UTF-8") from error
    if lacking := [name for name in ("path", "label") if name not in names]:
        raise DataError(
            f"{file} has no column {lacking[0]!r}",
            what=f"its first line is {lines[0] if lines else 'missing'}",
            hint="the first line is path,label or path,label,split",
        )
    rows: list[tuple[str, str, str]] = []
    line_of: dict[str, int] = {}
    for number, row in read:
        path, label, split = ((row.get(name) or "").strip() for name in ("path", "label", "split"))
        if not path or not label or ("split" in names and not split):
            lack = "path" if not path else "label" if not label else "split"
            raise DataError(f"line {number} of {file} has no {lack}")
        full = str(file.parent / path)
        plain = os.path.normcase(os.path.abspath(full))  # without x/.. and ./
        if plain in line_of:
            raise DataError(f"lines {line_of[plain]} and {number} of {file} name the same image, {path}")
        line_of[plain] = number
        rows.append((full, label, split))
    return rows


def _shards(name: str, root: str | Path | None, split: str) -> Files:
    """WebDataset shards: `KEY.jpg` and `KEY.cls` in tar files."""
    _need("webdataset", "WebDataset shards", "wds")
    places = _places(root)
    place = next((path for path in places if any(path.glob("*.tar"))), None)
    if place is None:
        raise DataError(
            f"there are no shards of {name}",
            what="looked for *.tar in " + ", ".join(map(str, places)),
            hint="--data-root DIR or DETACHNET_DATA=DIR says where they are",
        )
    info = _create(name, str(place), split).reader.split_info
    if not info.num_samples:
        raise DataError(
            f"it is not known how many images the shards {split!r} in {place} hold",
            hint=f"write {split}|COUNT, or have python -m detachnet.data.shards make an _info.json beside them",
        )
    shards = tuple(str(place / file) for file in info.filenames)
    if missing := [shard for shard in shards if not Path(shard).is_file()]:
        raise DataError(f"{len(missing)} of {len(shards)} shards are missing", what=missing[0])
    lengths = tuple(info.shard_lengths)
    return Files(name, split, _class_names(place), info.num_samples, shards, lengths, place=place)


def _class_names(place: Path) -> tuple[str, ...]:
    """What `classes.txt` says."""
    try:
        lines = read_file(place / CLASSES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the shards in {place} do not say their classes",
            what=str(error),
            hint=f"put the name of each class into {place / CLASSES}, one a line, in the order of the labels",
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def _hub(name: str, root: str | Path | None, split: str) -> Files:
    """A data set of Hugging Face's, with the columns `image` and `label`."""
    _need("datasets", "Hugging Face data sets", "hfds")
    reader = _create(name, str(root) if root else None, split).reader
    if not reader.class_to_idx:
        raise DataError(f"{name} does not name its classes", hint="its column 'label' must be a ClassLabel")
    return Files(name, split, tuple(reader.class_to_idx), len(reader), reader=reader)


def _create(name: str, root: str | None, split: str) -> Any:
    """timm's `create_dataset`, whose libraries raise anything where data is missing."""
    try:
        return create_dataset(name, root, split)
    except Exception as error:
        what = first_line(error)
        where = f" in {root}" if root else ""
        raise DataError(f"the split {split!r} of {name} cannot be opened{where}", what=what) from error


def _need(package: str, what: str, extra: str) -> None:
    """Refuse what an optional package reads where that is not installed."""
    if find_spec(package) is None:
        raise DataError(f"{what} need the package {package}", hint=f"pip install 'detachnet[{extra}]'")
