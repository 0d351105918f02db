"""What commands that use a family have in common."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detachnet.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from detachnet.data.datasets import Split
    from detachnet.data.folders import Files
    from detachnet.data.loader import FileBatches
    from detachnet.surgery.detachable import DetachableNet

logger = logging.getLogger("detachnet")
MOST = 2000
"""Test images of a data set of image files that are held in memory, where nobody says how many."""
WORKERS = 4
"""Processes that read image files, where there are as many cores."""


def check_new(file: Path) -> None:
    """Refuse to write over a file, or into a folder that is not there, before anything takes time.

    Raises:
        CheckpointError: It is such.
    """
    if file.exists():
        raise CheckpointError(f"{file} exists already", hint="name a new file, or remove this one")
    check_folder(file)


def check_folder(file: Path) -> None:
    """Refuse to write into a folder that is not there, before anything takes time.

    Raises:
        CheckpointError: There is none.
    """
    if not file.parent.is_dir():
        raise CheckpointError(f"cannot write {file}: there is no folder {file.parent}")


def open_family(checkpoint: Path, model_file: str | None = None) -> tuple[Path, DetachableNet]:
    """A family and its file; of a folder, the last checkpoint of the run in it."""
    from detachnet.checkpoint.loading import load_family
    from detachnet.storage import locate_checkpoint

    path = locate_checkpoint(checkpoint)
    return path, load_family(path, own_model(path, model_file))


def own_model(checkpoint: Path, model_file: str | None) -> nn.Module | None:
    """What a function of the user's file makes: with the arguments of the run's recipe if that names it, too.

    Else with as many classes as the family has been trained on, if it takes their number.
    """
    if model_file is None:
        return None
    from detachnet.errors import ModelError
    from detachnet.zoo import build_model, is_own, takes_num_classes

    if not is_own(model_file):
        hint = (
            "the function in it that makes the model"
            if model_file.endswith(".py")
            else "a model of the zoo needs none"
        )
        raise ModelError(f"--model-file {model_file} is no FILE.py:FUNCTION", hint=hint)
    table = run_recipe(checkpoint).get("model", {})
    if str(table.get("name", "")).rpartition(":")[2] == model_file.rpartition(":")[2]:
        return build_model(model_file, **table.get("kwargs", {}))
    kwargs = _num_classes(checkpoint) if takes_num_classes(model_file) else {}
    return build_model(model_file, **kwargs)


def _num_classes(checkpoint: Path) -> dict[str, Any]:
    """As an argument, how many classes the data has that a family was trained on, as far as its file says it."""
    from detachnet.checkpoint.content import read
    from detachnet.storage import locate_checkpoint

    data = read(locate_checkpoint(checkpoint))[0].data
    return {} if data is None else {"num_classes": len(data.classes)}


def run_recipe(checkpoint: Path) -> dict[str, Any]:
    """The tables of the recipe of the run that a checkpoint lies in; none if it lies in none."""
    import tomllib

    from detachnet.storage import read_file

    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        return tomllib.loads(read_file(folder / "recipe.toml").decode())
    except (OSError, ValueError, RecursionError):
        return {}


def known_root(checkpoint: Path, data_root: Path | None) -> Path | None:
    """Where data sets are: as given, else where the run found them, if they are still there."""
    from detachnet.storage import read_file
    from detachnet.text import parse_json

    if data_root is not None:
        return data_root
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        told = parse_json(read_file(folder / "run.json")).get("data_root")
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(told, str):
        return None
    if not Path(told).is_dir():
        logger.info("%s, where the run found its data, is gone", told)
        return None
    return Path(told)


def all_test_images(
    net: DetachableNet, data_root: Path | None, download: bool, device: str = "cpu", name: str | None = None
) -> tuple[Split | FileBatches, int]:
    """Test images of a family, or of another data set, and how many; image files are read as they are needed."""
    from detachnet.data.datasets import is_files, load_data
    from detachnet.training.data import evaluation_batches, open_test_files

    data, (_, *size) = net.facts.known_data, net.plan.input_size
    if not is_files(name or data.name):
        test = load_data(name or data.name, data_root, download)[1]
        return test, len(test)
    files = open_test_files(data, data_root, name)
    workers = min(WORKERS, os.cpu_count() or 1)
    return evaluation_batches(files, data, (size[0], size[1]), device, workers), files.num_images


def in_memory(net: DetachableNet, files: Files, most: int, kind: str) -> Split:
    """Images of files as a family takes them in, at most so many; it is said where those are not all."""
    from detachnet.training.data import hold

    if files.num_images > most:
        logger.info("%d of %d %s images, evenly spaced", most, files.num_images, kind)
    _, *size = net.plan.input_size
    return hold(files, net.facts.known_data, (size[0], size[1]), most)


def fastest_device() -> str:
    """A CUDA device if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
