"""The folder of a run: what is in it, and what may be started there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from detachnet.checkpoint import Header, read, replace_file
from detachnet.errors import CheckpointError, RecipeError
from detachnet.recipe import Recipe


class RunFolder:
    """Paths and files of a run.

    Attributes:
        recipe: The resolved recipe, TOML.
        info: Versions, machine and seconds, JSON.
        metrics: One line of JSON per epoch; depends on nothing but the recipe.
        last: The checkpoint the training goes on from.
        best: The family at its best mean test accuracy over the trained models.
        results: The final table, JSON.
        table: The final table, Markdown.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.info = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.results = self.path / "results.json"
        self.table = self.path / "table.md"

    def start(self, recipe: Recipe) -> None:
        """Make the folder for a new run.

        Raises:
            CheckpointError: There is a run in it already, or it cannot be written.
        """
        if self.recipe.exists():
            raise CheckpointError(
                f"there is a run in {self.path} already",
                hint="go on with it: --resume; or choose another --out",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the run folder {self.path}", what=str(error)) from error
        replace_file(self.recipe, recipe.to_toml().encode())

    def reopen(self, recipe: Recipe) -> tuple[Header, dict[str, torch.Tensor]] | None:
        """The last checkpoint of the run in this folder; None if it was killed before its first.

        Raises:
            CheckpointError: There is no run here, or its checkpoint is damaged.
            RecipeError: The run was started with another recipe.
        """
        if not self.recipe.exists():
            raise CheckpointError(f"there is no run in {self.path} to resume", hint="start it without --resume")
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)  # another process may be faster
        if self.recipe.read_text(encoding="utf-8") != recipe.to_toml():
            raise RecipeError(
                f"the run in {self.path} was started with another recipe",
                what=_first_difference(self.recipe.read_text(encoding="utf-8"), recipe.to_toml()),
                hint="use the recipe and the --set options it was started with, or another --out",
            )
        if not self.last.exists():
            return None
        header, tensors = read(self.last)
        if header.training is None:
            raise CheckpointError(f"{self.last} does not say where its training is")
        return header, tensors

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `metrics.jsonl`."""
        replace_file(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write_info(self, device: torch.device, train_s: float, wait_s: float, images: int) -> None:
        """Write `run.json`."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        packages = ("detachnet", "torch", "torchvision", "timm", "accelerate")
        info = {
            "device": f"{device.type}: {name}",
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
            "train_s": round(train_s, 1),
            "wait_share": round(wait_s / train_s, 3) if train_s else None,
            "images_per_s": round(images / train_s, 1) if train_s else None,
        }
        replace_file(self.info, (json.dumps(info, indent=1) + "\n").encode())


def family_file(path: str | Path) -> Path:
    """A family's file: the one given, or the last checkpoint of the run in a folder.

    Raises:
        CheckpointError: A folder without a run.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    last = RunFolder(path).last
    if not last.exists():
        is_export = (path / "manifest.json").exists()
        raise CheckpointError(
            f"there is no family in the folder {path}: it has no {last.name}",
            hint="it is an export; give the checkpoint it was made from" if is_export else "",
            nearest=[str(found) for found in sorted(path.glob("**/*.safetensors"))[:3]],
        )
    return last


def _first_difference(old: str, new: str) -> str:
    """The first lines in which two recipes differ."""
    pairs = zip(old.splitlines(), new.splitlines(), strict=False)
    for was, now in pairs:
        if was != now:
            return f"then {was.strip()}, now {now.strip()}"
    return "one has more lines than the other"
