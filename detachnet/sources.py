"""recipe -> the batches a training reads, from a data set in memory or from image files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from detachnet.data import Batches, BatchSource, DataInfo, Split, describe_data
from detachnet.errors import ModelError
from detachnet.evaluation import EVAL_BATCH
from detachnet.files import Files, open_files
from detachnet.loader import EVAL_BATCH as FILES_EVAL_BATCH
from detachnet.loader import Augmentation, FileBatches
from detachnet.recipe import DataTable, FilesTable, TrainTable


class Source(Protocol):
    """The images of an experiment.

    Attributes:
        info: What the family's file says of them.
        input_size: Shape of one image, `(C, H, W)`.
    """

    info: DataInfo
    input_size: tuple[int, ...]

    def batches(
        self, train: TrainTable, device: torch.device, share: tuple[int, int]
    ) -> tuple[BatchSource, BatchSource]:
        """The training and the test batches of one of the processes, `share = (index, count)`."""


class MemorySource:
    """A data set in memory."""

    def __init__(self, table: DataTable, splits: tuple[Split, Split]) -> None:
        self.table, self.splits = table, splits
        info = describe_data(table.name, splits, table.normalize)
        self.info = info.model_copy(update={"num_test": 0}) if table.holdout else info
        self.input_size = tuple(splits[0].images.shape[1:])

    def batches(self, train: TrainTable, device: torch.device, share: tuple[int, int]) -> tuple[Batches, Batches]:
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
        )
        return batches, Batches(self.splits[1], self.info, EVAL_BATCH, device, share=share)


class FileSource:
    """A data set of image files.

    Raises:
        DataError: It is missing or incomplete.
    """

    def __init__(self, table: FilesTable, root: str | Path | None, model: str) -> None:
        self.table = table
        self.train = open_files(table.name, root, table.train_split)
        self.test = open_files(table.name, root, table.val_split, self.train.classes)
        mean, std = normalization(model)
        self.info = DataInfo(
            name=table.name,
            classes=self.train.classes,
            mean=mean,
            std=std,
            num_test=self.test.num_images,
            test_split=table.val_split,
            crop_pct=table.crop_pct,
        )
        self.input_size: tuple[int, ...] = (3, table.image_size, table.image_size)

    def batches(
        self, train: TrainTable, device: torch.device, share: tuple[int, int]
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
        )
        return batches, evaluation_batches(self.test, self.info, size, device, table.num_workers, share)


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


def normalization(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a model's published weights expect: timm's for it, else ImageNet's.

    Raises:
        ModelError: timm has the model, but not these weights of it.
    """
    library, _, name = model.partition(":")
    try:
        cfg = timm.models.get_pretrained_cfg(name) if library == "timm" else None
    except RuntimeError as error:
        raise ModelError(f"unknown model {model!r}", what=str(error)) from error
    return (tuple(cfg.mean), tuple(cfg.std)) if cfg else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
