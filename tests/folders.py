"""Little data sets in files, made by the tests that read them."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from detachnet.data import datasets, shards
from detachnet.training.recipe import Recipe, parse_recipe

CLASSES = ("10", "9", "cat", "dog")
"""Sorted as text; timm sorts numbers as numbers."""
PER_CLASS = {"train": 12, "val": 3}


def write_folder(root: Path) -> Path:
    """A folder per split with a folder per class of pictures of different sizes, modes and formats."""
    random = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(20, 60, 2)
                pixels = random.integers(0, 120, (height, width, 3)) + 40 * np.eye(4, 3)[label].astype(int) * 3
                image = Image.fromarray(pixels.astype(np.uint8))
                if i % 3 == 0:
                    image.convert("L").save(folder / f"{i}.png")
                else:
                    image.save(folder / f"{i}.jpg")
    return root


def recipe(**changes: object) -> Recipe:
    """A training of 3 steps an epoch; `changes` are `table__key=value`, or `table=` all of it."""
    tables: dict[str, Any] = {
        "model": {"name": "detachnet:resnet_cifar", "kwargs": {"depth": 8, "width": 0.25, "num_classes": 4}},
        "family": {"cuts": ["layer1", "layer2"]},
        "data": {"name": "folder", "image_size": 32, "num_workers": 0, "auto_augment": "rand-m9-mstd0.5-inc1"},
        "optimizer": {"lr": 0.05},
        "train": {"epochs": 2, "batch_size": 16},
    }
    for path, value in changes.items():
        table, _, key = path.partition("__")
        if key:
            tables.setdefault(table, {})[key] = value
        else:
            tables[table] = value
    return parse_recipe({"description": "a test's", **tables})


def make_shards(folder: Path, out: Path, per_shard: int) -> Path:
    """The folder of shards, made."""
    shards.make_shards(folder, out, per_shard)
    return out


def write_binary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A CIFAR-10 of ten records a file in the binary layout, with checksums to match."""
    folder.mkdir(parents=True)
    records = np.random.randint(0, 256, (6, 10, 3073), dtype=np.uint8)
    records[:, :, 0] = np.arange(10)
    sums = {}
    for name, content in zip(datasets._CIFAR10_BINARY, records, strict=True):
        (folder / name).write_bytes(content.tobytes())
        sums[name] = hashlib.sha256(content.tobytes()).hexdigest()
    monkeypatch.setattr(datasets, "_CIFAR10_BINARY", sums)
    return records


def write_python(folder: Path, monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray | None = None) -> np.ndarray:
    """The same, or those given, in torchvision's Python layout."""
    folder.mkdir(parents=True)
    pixels = np.random.randint(0, 256, (6, 10, 3072), dtype=np.uint8) if pixels is None else pixels
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    listed = []
    for name, content in zip(names, pixels, strict=True):
        raw = pickle.dumps({"data": content, "labels": list(range(10))})
        (folder / name).write_bytes(raw)
        listed.append((name, hashlib.md5(raw).hexdigest()))
    raw = pickle.dumps({"label_names": list(datasets._CIFAR10_CLASSES)})
    (folder / "batches.meta").write_bytes(raw)
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", listed[:5])
    monkeypatch.setattr(cifar, "test_list", listed[5:])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": hashlib.md5(raw).hexdigest()})
    return pixels
