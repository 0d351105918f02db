"""How many images per second come out of the in-memory pipeline, beside torchvision's data set and transforms?

    python benchmarks/data_pipeline.py [--quick] [--json FILE] [--device cuda] [--threads N]

An epoch of random pixels of CIFAR-10's size (50 000 images; --quick: 10 000), batch 128, random crop after padding
by 4, random mirroring, normalization. torchvision's side is its own `CIFAR10`, the usual transforms and a
`DataLoader`, without and with two worker processes, which stay from epoch to epoch; the faster of them is compared
with. On CUDA its batches are copied there from pinned memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

from common import Row, Target, arguments, begin, report, time_in_turn
from detachnet.data.batches import Batches
from detachnet.data.datasets import Split, describe_data

BATCH = 128
LIMIT = 10.0


def main() -> None:
    options = begin(arguments(__doc__))
    rows, ratio = measure(options, 10_000 if options.quick else 50_000, seconds=15 if options.quick else 40)
    report(options, rows, [Target("in memory ÷ the faster DataLoader, images/s", ratio, LIMIT, at_least=True)])


def measure(options: argparse.Namespace, num_images: int, seconds: float) -> tuple[list[Row], float]:
    """A row per pipeline, and how many times as fast as the faster `DataLoader` the one in memory is."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(10, (num_images,), generator=generator), tuple("0123456789"))
    runs = {"in memory": in_memory(split, options.device)}
    runs |= {f"DataLoader, {n} workers": loader(split, n, options.device) for n in (0, 2)}
    timing = time_in_turn(runs, options.device, seconds)
    rows = [
        {
            "pipeline": name,
            "images_per_s": 1e3 * (num_images // BATCH * BATCH) / timing.median_ms(name),
            "in_memory_to_this": 1 / timing.ratio("in memory", name),
            "n": timing.n,
        }
        for name in runs
    ]
    return rows, min(row["in_memory_to_this"] for row in rows[1:])


def in_memory(split: Split, device: torch.device) -> Callable[[], None]:
    """An epoch of `Batches`."""
    info = describe_data("random", (split, split))
    batches = Batches(split, info, BATCH, device, pad=4, flip=True, shuffle=True)

    def epoch() -> None:
        for _ in batches.epoch():
            pass

    return epoch


def loader(split: Split, num_workers: int, device: torch.device) -> Callable[[], None]:
    """An epoch of torchvision's pipeline."""
    info = describe_data("random", (split, split))
    cuda = device.type == "cuda"
    batches = DataLoader(
        cifar10(split, info.mean, info.std),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=cuda,
    )

    def epoch() -> None:
        for images, labels in batches:
            images.to(device, non_blocking=cuda)
            labels.to(device, non_blocking=cuda)

    return epoch


def cifar10(split: Split, mean: tuple[float, ...], std: tuple[float, ...]) -> CIFAR10:
    """torchvision's data set on pixels of one's own: all but reading its files."""
    dataset: CIFAR10 = CIFAR10.__new__(CIFAR10)
    dataset.data = np.ascontiguousarray(split.images.permute(0, 2, 3, 1).numpy())
    dataset.targets, dataset.target_transform = split.labels.tolist(), None
    dataset.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return dataset


if __name__ == "__main__":
    main()
