"""Make `cifar10-mini` from the full CIFAR-10: the first 400 training and 100 test images of each class.

    python scripts/make_cifar10_mini.py DATA_ROOT

Each split becomes one lossless WebP picture, a grid of 32×32 tiles in the order of the full set; its labels
go to `cifar10_mini.json` with the checksum of the pixels.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from detachnet.data.datasets import COLUMNS, load_data

TARGET = Path(__file__).parents[1] / "detachnet" / "data" / "embedded"


def main(root: str) -> None:
    labels: dict[str, object] = {}
    for split, data, per_class in zip(("train", "test"), load_data("cifar10", root), (400, 100), strict=True):
        first = [(data.labels == c).nonzero().flatten()[:per_class] for c in range(len(data.classes))]
        index = torch.cat(first).sort().values
        images = data.images[index]
        rows = len(index) // COLUMNS
        grid = images.reshape(rows, COLUMNS, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(rows * 32, COLUMNS * 32, 3)
        picture = TARGET / f"cifar10_mini_{split}.webp"
        Image.fromarray(grid.contiguous().numpy()).save(picture, lossless=True, quality=100, method=6)
        labels["classes"] = data.classes
        labels[split] = "".join(map(str, data.labels[index].tolist()))
        labels[f"{split}_sha256"] = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
        print(f"{picture.name}: {len(index)} images, {picture.stat().st_size / 1e6:.1f} MB")
    (TARGET / "cifar10_mini.json").write_text(json.dumps(labels, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
