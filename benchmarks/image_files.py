"""How many images per second does one core read from files, and is that what timm's own loader reads?

    python benchmarks/image_files.py [--quick] [--json FILE]

Made-up photographs of ImageNet's usual size (500×375 pixels, about 90 kB of JPEG) become batches of 32 at 224×224
pixels, augmented as `recipes/resnet50_imagenet.toml` says: from a folder and from WebDataset shards by detachnet,
from the folder by timm's `create_loader`, in turn, with one worker process and with two. Mixing, which is the
training process's work, is left out on both sides. An epoch's time has starting the workers in it, which
tells with --quick; `per_core` counts no more workers than there are cores.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image

from common import Row, Target, arguments, begin, report, time_in_turn
from detachnet.data.folders import open_files
from detachnet.data.loader import Augmentation, FileBatches
from detachnet.data.shards import make_shards
from detachnet.training.data import FileSource
from detachnet.training.recipe import load_recipe
from detachnet.training.tables import FilesTable

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "resnet50_imagenet.toml"
WIDTH, HEIGHT, QUALITY, NOISE = 500, 375, 92, 12.0
BATCH = 32
WORKERS = (1, 2)
LIMIT = 0.95


def main() -> None:
    options = begin(arguments(__doc__, fixed=True))
    with TemporaryDirectory() as place:
        size = write_photographs(Path(place) / "folder", (10 if options.quick else 60) * BATCH)
        sources = {"folder": Path(place) / "folder"}
        if find_spec("webdataset"):
            sources["shards"] = write_shards(sources["folder"], Path(place) / "shards")
        seconds = 10 if options.quick else 120
        rows = [row for workers in WORKERS for row in measure(sources, workers, options, seconds)]
    targets = [
        Target(f"{row['pipeline']}, {row['workers']} workers: images/s ÷ timm's", row["to_timm"], LIMIT, True)
        for row in rows
        if row["pipeline"] == "folder"
    ]
    report(options, rows, targets, bytes_per_image=size)


def write_photographs(folder: Path, count: int) -> float:
    """A training and a validation split of two classes; the mean bytes of a file.

    Soft shapes with a camera's noise: what JPEG makes of them is as long as of photographs.
    """
    random = np.random.default_rng(0)
    sizes = []
    for split, number in (("train", count), ("validation", 2)):
        for i in range(number):
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
            soft = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
            pixels = (soft + random.normal(0, NOISE, soft.shape)).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "jpeg", quality=QUALITY)
            path = folder / split / f"class{i % 2}" / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sizes.append(path.write_bytes(file.getvalue()))
    return sum(sizes) / len(sizes)


def write_shards(folder: Path, out: Path) -> Path:
    """The same as WebDataset shards, enough of them for all workers."""
    make_shards(folder, out, per_shard=5 * BATCH)
    return out


def measure(
    sources: dict[str, Path], workers: int, options: argparse.Namespace, seconds: float, least: int = 2
) -> list[Row]:
    """A row per pipeline: an epoch of the training images."""
    table = load_recipe(RECIPE).data
    assert isinstance(table, FilesTable)
    batches = {name: ours(table, name, path, workers) for name, path in sources.items()}
    batches["timm"] = partial(iter, timms(table, sources["folder"], workers))
    counts = {name: run_through(made()) for name, made in batches.items()}
    runs = {name: partial(lambda made: run_through(made()), made) for name, made in batches.items()}
    timing = time_in_turn(runs, options.device, seconds, least)
    cores = min(max(1, workers), os.cpu_count() or 1)
    return [
        {
            "pipeline": name,
            "workers": workers,
            "images_per_s": (rate := 1e3 * counts[name] / timing.median_ms(name)),
            "per_core": rate / cores,
            "to_timm": counts[name] / counts["timm"] / timing.ratio(name, "timm"),
            "n": timing.n,
        }
        for name in runs
    ]


def ours(table: FilesTable, name: str, path: Path, workers: int) -> Callable[[], Iterable[Any]]:
    """An epoch of `FileBatches`."""
    named = table.model_copy(update={"name": "folder" if name == "folder" else "wds/photographs"})
    info = FileSource(named, path, "torchvision:resnet50").info
    files = open_files(named.name, path, named.train_split)
    size = (table.image_size, table.image_size)
    plain = Augmentation(table.auto_augment, table.reprob)
    return FileBatches(files, info, size, BATCH, augmentation=plain, num_workers=workers).epoch


def timms(table: FilesTable, path: Path, workers: int) -> Iterable[Any]:
    """timm's loader with the same transforms, its workers started anew for each epoch like ours."""
    loader: Iterable[Any] = timm.data.create_loader(
        timm.data.create_dataset("folder", str(path / "train"), is_training=True, search_split=False),
        (3, table.image_size, table.image_size),
        BATCH,
        is_training=True,
        auto_augment=table.auto_augment,
        interpolation="random",
        re_prob=table.reprob,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    return loader


def run_through(batches: Iterable[Any]) -> int:
    """The number of images."""
    return sum(len(images) for images, _ in batches)


if __name__ == "__main__":
    main()
