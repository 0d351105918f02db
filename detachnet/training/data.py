"""recipe -> the batches a training reads, from a data set in memory or from image files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

from detachnet.data.batches import Batches, BatchSource
from detachnet.data.datasets import Split, describe_data
from detachnet.data.folders import Files, Held, open_files
from detachnet.data.images import evaluation_transform
from detachnet.data.loader import EVAL_BATCH as FILES_EVAL_BATCH, Augmentation, FileBatches
from detachnet.errors import DataError
from detachnet.evaluation import EVAL_BATCH
from detachnet.facts import DataInfo
from detachnet.progress import counted
from detachnet.training.tables import DataTable, FilesTable, TrainTable
from detachnet.zoo import normalization


class Source(Protocol):
    """The images of an experiment.

    Attributes:
        info: What the family's file says of them.
        input_size: Shape of one image, `(C, H, W)`.
        num_train: Number of training images.
        place: Where image files were found, of the places that were looked in.
    """

    info: DataInfo
    input_size: tuple[int, ...]
    num_train: int
    place: Path | None

    def batches(
        self, train: TrainTable, device: torch.device, share: tuple[int, int], layout: torch.memory_format
    ) -> tuple[BatchSource, BatchSource]:
        """The training batches, which lie in memory as `layout`, and the test batches.

        Both are those of one of the processes, `share = (index, count)`.
        """


class MemorySource:
    """A data set in memory."""

    def __init__(self, table: DataTable, splits: tuple[Split, Split]) -> None:
        self.table, self.splits = table, splits
        info = describe_data(table.name, splits, table.normalize)
        self.info = info.model_copy(update={"num_test": 0}) if table.holdout else info
        self.input_size = tuple(splits[0].images.shape[1:])
        self.num_train = len(splits[0])
        self.place: Path | None = None

    def batches(
        self, train: TrainTable, device: torch.device, share: tuple[int, int], layout: torch.memory_format
    ) -> tuple[Batches, Batches]:
        """As `Source` has it."""
        batches = Batches(
            self.splits[0],
            self.info,
            train.batch_size,
            device,
            pad=self.table.pad,
            flip=self.table.flip,
            shuffle=True,
            seed=train.seed,
            share=share,
            layout=layout,
        )
        return batches, Batches(self.splits[1], self.info, EVAL_BATCH, device, share=share)


class FileSource:
    """A data set of image files.

    Raises:
        DataError: It is missing or incomplete.
    """

    def __init__(self, table: FilesTable, root: str | Path | None, model: str) -> None:
        self.table = table
        held = Held(table.val_split, table.val_share, table.split_seed)
        self.train = open_files(table.name, root, table.train_split, held=held)
        if len(self.train.classes) < 2:
            raise DataError(
                f"all training images are of one class, {self.train.classes[0]!r}",
                hint="in a folder of images the folders right below DIR/train, or DIR, are the classes",
            )
        if table.holdout:
            self.train, self.test = self.train.without(table.holdout)
        else:
            place = self.train.place or root
            self.test = open_files(table.name, place, table.val_split, self.train.classes, self.train.held)
            _check_apart(self.train, self.test)
        is_divided = self.train.held is None
        mean, std = normalization(model)
        self.info = DataInfo(
            name=table.name,
            classes=self.train.classes,
            mean=mean,
            std=std,
            num_test=0 if table.holdout else self.test.num_images,
            train_split=table.train_split,
            test_split=table.val_split,
            test_share=0.0 if is_divided else table.val_share,
            test_seed=0 if is_divided else table.split_seed,
            crop_pct=table.crop_pct,
        )
        self.input_size: tuple[int, ...] = (3, table.image_size, table.image_size)
        self.num_train = self.train.num_images
        self.place = self.train.place

    def batches(
        self, train: TrainTable, device: torch.device, share: tuple[int, int], layout: torch.memory_format
    ) -> tuple[FileBatches, FileBatches]:
        """As `Source` has it."""
        table, size = self.table, (self.table.image_size, self.table.image_size)
        batches = FileBatches(
            self.train,
            self.info,
            size,
            train.batch_size,
            device,
            augmentation=Augmentation(table.auto_augment, table.reprob, table.mixup, table.cutmix),
            num_workers=table.num_workers,
            seed=train.seed,
            share=share,
            layout=layout,
        )
        return batches, evaluation_batches(self.test, self.info, size, device, table.num_workers, share)


def _check_apart(train: Files, test: Files) -> None:
    """Refuse splits of shards or of folders that are the same under two names."""
    same = min({*train.shards} & {*test.shards}, default=None)
    if train.name == "folder" and train.held is None and os.path.samefile(train.reader.root, test.reader.root):
        same = test.reader.root
    if same is not None:
        raise DataError(f"the splits {train.split!r} and {test.split!r} both have the images of {same}")


def evaluation_batches(
    files: Files,
    info: DataInfo,
    size: tuple[int, int],
    device: torch.device | str,
    num_workers: int,
    share: tuple[int, int] = (0, 1),
) -> FileBatches:
    """The batches of an evaluation on image files, each image exactly once."""
    batch_size = FILES_EVAL_BATCH * share[1]
    return FileBatches(files, info, size, batch_size, device, num_workers=num_workers, share=share)


def open_test_files(info: DataInfo, root: str | Path | None, name: str | None = None) -> Files:
    """The test images of a family that was trained on image files, or those of another data set of such.

    Args:
        info: What the family was trained on.
        root: Where to look, as `open_files` has it.
        name: The other data set.

    Raises:
        DataError: As `open_files`.
    """
    return open_files(name or info.name, root, info.test_split or "validation", info.classes, _held(info))


def open_train_files(info: DataInfo, root: str | Path | None) -> Files:
    """The training images of a family that was trained on image files, those that were held out among them.

    Args:
        info: What the family was trained on.
        root: Where to look, as `open_files` has it.

    Raises:
        DataError: As `open_files`.
    """
    return open_files(info.name, root, info.train_split or "train", info.classes, _held(info))


def _held(info: DataInfo) -> Held | None:
    """How its images are divided, where the data set does not say so itself."""
    return Held(info.test_split, info.test_share, info.test_seed) if info.test_share else None


def hold(files: Files, info: DataInfo, size: tuple[int, int], count: int) -> Split:
    """At most so many images of files in memory, as an evaluation takes them in.

    Args:
        files: The images.
        info: How they are resized and cropped.
        size: Height and width.
        count: How many; evenly spaced ones, in an order that is drawn: files lie class by class.

    Raises:
        DataError: One cannot be read.
    """
    transform = evaluation_transform(size, info.crop_pct or 1.0)
    count = min(count, files.num_images)
    pairs = [(transform(image), label) for image, label in counted(files.some(count), count, "images read")]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    images, labels = zip(*(pairs[i] for i in order), strict=True)
    return Split(torch.stack(images), torch.tensor(labels), files.classes)
