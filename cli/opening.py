"""What commands that use a family have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from detachnet.surgery.detachable import DetachableNet


def open_family(checkpoint: Path, model_file: str | None = None) -> tuple[Path, DetachableNet]:
    """A family and its file; of a folder, the last checkpoint of the run in it."""
    from detachnet.checkpoint.loading import load_family
    from detachnet.storage import locate_checkpoint

    path = locate_checkpoint(checkpoint)
    return path, load_family(path, own_model(path, model_file))


def own_model(checkpoint: Path, model_file: str | None) -> nn.Module | None:
    """What a function of the user's file makes, with the arguments of the run's recipe if that names it, too."""
    if model_file is None:
        return None
    from detachnet.errors import ModelError
    from detachnet.zoo import build_model, is_own

    if not is_own(model_file):
        raise ModelError(f"{model_file!r} is no FILE.py:FUNCTION", hint="a model of the zoo needs no --model-file")
    table = run_recipe(checkpoint).get("model", {})
    same = str(table.get("name", "")).rpartition(":")[2] == model_file.rpartition(":")[2]
    return build_model(model_file, **(table.get("kwargs", {}) if same else {}))


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
    return Path(told) if isinstance(told, str) and Path(told).is_dir() else None


def fastest_device() -> str:
    """A CUDA device if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
