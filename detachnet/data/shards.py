"""folders of images -> WebDataset shards, in an order that is random once and for all.

    python -m detachnet.data.shards DIR OUT     # DIR/train/CLASS/*, DIR/val/CLASS/* to OUT/train-000000.tar, ...

Beside them come `_info.json`, which timm reads the splits from, and `classes.txt` with the names of the classes.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

from detachnet.data.folders import CLASSES, Files, open_files
from detachnet.errors import DataError

SPLITS = ("train", "validation")
PER_SHARD = 5000


def make_shards(folder: str | Path, out: str | Path, per_shard: int = PER_SHARD) -> None:
    """Write the training and validation images of a folder as WebDataset shards.

    Args:
        folder: Has a folder per split with a folder per class, as `open_files("folder", ...)` reads them.
        out: A new folder.
        per_shard: Images in each shard, but for the last of a split; a worker needs a shard at least.

    Raises:
        DataError: Images are missing, there is something at `out` already, or shards would be empty.
    """
    if per_shard < 1:
        raise DataError(f"{per_shard} images are no shard", hint="--per-shard 5000")
    train = open_files("folder", folder, SPLITS[0])
    splits = {SPLITS[0]: train, SPLITS[1]: open_files("folder", folder, SPLITS[1], train.classes)}
    out = _new_folder(Path(out))
    info = {"splits": {split: _write_split(files, split, out, per_shard) for split, files in splits.items()}}
    (out / CLASSES).write_text("".join(f"{name}\n" for name in train.classes), encoding="utf-8")
    (out / "_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def _new_folder(path: Path) -> Path:
    """The folder, made."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"the folder {path} cannot be made for shards", what=str(error)) from error
    return path


def _write_split(files: Files, split: str, out: Path, per_shard: int) -> dict[str, object]:
    """Write the shards of a split; what `_info.json` says of them."""
    order = list(range(files.num_images))
    random.Random(0).shuffle(order)
    parts = [order[start : start + per_shard] for start in range(0, len(order), per_shard)]
    names = [f"{split}-{number:06}.tar" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with tarfile.open(out / name, "w") as tar:
            for index in part:
                path, label = files.reader.samples[index]
                number = files.labels.get(label, label)
                _add(tar, f"{index:08}{Path(path).suffix.lower()}", Path(path).read_bytes())
                _add(tar, f"{index:08}.cls", str(number).encode())
    lengths = [len(part) for part in parts]
    return {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": len(order)}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file with some content to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def main(words: Sequence[str] | None = None) -> None:
    """What `python -m detachnet.data.shards` runs."""
    parser = argparse.ArgumentParser(
        "python -m detachnet.data.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="of the images")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--per-shard", type=int, default=PER_SHARD, help="images; a worker needs a shard at least")
    given = parser.parse_args(words)
    try:
        make_shards(given.folder, given.out, given.per_shard)
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
