"""Write WebDataset shards from folders of images, in an order that is random once and for all.

    python scripts/make_shards.py DIR OUT     # DIR/train/CLASS/*, DIR/val/CLASS/* to OUT/train-000000.tar, ...

Beside them come `_info.json`, which timm reads the splits from, and `classes.txt` with the names of the classes.
"""

import argparse
import io
import json
import random
import tarfile
from pathlib import Path

from detachnet.files import CLASSES, Files, open_files

SPLITS = ("train", "validation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--per-shard", type=int, default=5000, help="images; a worker needs a shard at least")
    args = parser.parse_args()
    make_shards(args.folder, args.out, args.per_shard)


def make_shards(folder: Path, out: Path, per_shard: int) -> None:
    out.mkdir(parents=True)
    train = open_files("folder", folder, SPLITS[0])
    splits = {SPLITS[0]: train, SPLITS[1]: open_files("folder", folder, SPLITS[1], train.classes)}
    info = {"splits": {split: write_split(files, split, out, per_shard) for split, files in splits.items()}}
    (out / CLASSES).write_text("".join(f"{name}\n" for name in train.classes), encoding="utf-8")
    (out / "_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def write_split(files: Files, split: str, out: Path, per_shard: int) -> dict[str, object]:
    order = list(range(files.num_images))
    random.Random(0).shuffle(order)
    parts = [order[start : start + per_shard] for start in range(0, len(order), per_shard)]
    names = [f"{split}-{number:06}.tar" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with tarfile.open(out / name, "w") as tar:
            for index in part:
                path, label = files.reader.samples[index]
                number = files.labels.get(label, label)
                add(tar, f"{index:08}{Path(path).suffix.lower()}", Path(path).read_bytes())
                add(tar, f"{index:08}.cls", str(number).encode())
    lengths = [len(part) for part in parts]
    return {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": len(order)}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
