"""The folder of a run: what is in it, and what may be started there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from detachnet.checkpoint.content import read
from detachnet.checkpoint.header import Header, TrainingState
from detachnet.errors import CheckpointError, RecipeError
from detachnet.storage import LAST, locked, replace_file
from detachnet.training.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a run resumes from: the family, where its training is, and the tensors of both."""

    header: Header
    training: TrainingState
    tensors: dict[str, torch.Tensor]


_ITS_FOLDER = "give the folder that detachnet train --out made"


class RunFolder:
    """Paths and files of a run.

    Attributes:
        data_root: Where the run looks for its data first, if it was told, or found it; evaluations, too.
        recipe: The resolved recipe, TOML.
        info: Versions, machine and seconds, JSON.
        metrics: One line of JSON per epoch; depends on nothing but the recipe.
        last: The checkpoint the run resumes from.
        best: The family at its best mean test accuracy over the trained models.
        results: The final table, JSON.
        table: The final table, Markdown.
    """

    def __init__(self, path: str | Path, data_root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.data_root = data_root or os.environ.get("DETACHNET_DATA")
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # a name that is none, or a folder that may not be looked into
            raise CheckpointError(f"{path} can be no folder of a run", what=str(error)) from error
        else:
            if not self.path.is_dir():
                raise CheckpointError(
                    f"{path} can be no folder of a run", what="it is no folder", hint=_ITS_FOLDER
                )
        self.recipe = self.path / "recipe.toml"
        self.info = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / LAST
        self.best = self.path / "best.safetensors"
        self.results = self.path / "results.json"
        self.table = self.path / "table.md"

    @contextmanager
    def started(self, recipe: Recipe) -> Iterator[None]:
        """Make the folder for a new run, and keep it for this process.

        Raises:
            CheckpointError: There is a run in it already, another process has it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot make the run folder {self.path}", what=str(error)) from error
        with locked(self.path):
            if self.recipe.exists():
                raise CheckpointError(
                    f"there is a run in {self.path} already",
                    hint="resume it: --resume; or choose another --out",
                )
            replace_file(self.recipe, recipe.to_toml().encode())
            yield

    def as_started(self, recipe: Recipe) -> Recipe:
        """The recipe with what the run in this folder decided, where it leaves that open: classes and routes."""
        if not self.recipe.exists():
            return recipe
        begun = load_recipe(self.recipe)
        classes = {key: value for key, value in begun.model.kwargs.items() if key == "num_classes"}
        model = recipe.model.model_copy(update={"kwargs": classes | recipe.model.kwargs})
        recipe = recipe.model_copy(update={"model": model})
        if not recipe.family.asked:
            return recipe
        started = begun.family
        if started.chosen != recipe.family.asked:
            return recipe
        chosen = {name: sub for name, sub in started.models.items() if name in recipe.family.names}
        routes = {"cuts": started.cuts, "sub_models": (), "chosen": started.chosen}
        models = chosen | recipe.family.models
        return recipe.model_copy(update={"family": recipe.family.model_copy(update=routes | {"models": models})})

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Keep the folder of a run for this process, and remove what a process that was killed has left.

        Raises:
            CheckpointError: There is no run here, or another process has it.
        """
        self._check_started()
        with locked(self.path):
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield

    def check(self) -> None:
        """Refuse a folder without a run.

        Raises:
            CheckpointError: It is one.
        """
        if not self.recipe.exists():
            raise CheckpointError(f"there is no run in {self.path}", hint=_ITS_FOLDER)

    def _check_started(self) -> None:
        if not self.recipe.exists():
            raise CheckpointError(f"there is no run in {self.path} to resume", hint="start it without --resume")

    def saved(self, recipe: Recipe) -> Saved | None:
        """The last checkpoint of the run in this folder; None if it was killed before its first.

        Raises:
            CheckpointError: There is no run here, or its checkpoint is damaged.
            RecipeError: The run was started with another recipe.
        """
        self._check_started()
        if (started := load_recipe(self.recipe)) != recipe:
            raise RecipeError(
                f"the run in {self.path} was started with another recipe",
                what=_first_difference(started.to_toml(), recipe.to_toml()),
                hint="use the recipe and the --set options it was started with, or another --out",
            )
        if not self.last.exists():
            return None
        header, tensors = read(self.last)
        if header.training is None:
            raise CheckpointError(f"{self.last} does not say where its training is")
        return Saved(header, header.training, tensors)

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `metrics.jsonl`."""
        replace_file(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write_info(self, device: torch.device, train_s: float, wait_share: float | None, images: int) -> None:
        """Write `run.json`."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        packages = ("detachnet", "torch", "torchvision", "timm", "accelerate")
        info = {
            "device": f"{device.type}: {name}",
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
            "data_root": str(Path(self.data_root).resolve()) if self.data_root else None,
            "train_s": round(train_s, 1),
            "wait_share": wait_share,
            "images_per_s": round(images / train_s, 1) if train_s else None,
        }
        replace_file(self.info, (json.dumps(info, indent=1) + "\n").encode())


def default_folder(recipe: Recipe) -> Path:
    """Where a run goes if its folder is not named: `runs/NAME`, of the recipe's file.

    Raises:
        RecipeError: The recipe comes from no file.
    """
    if not recipe.name:
        raise RecipeError(
            "the recipe comes from no file, which would name its run", hint='train(recipe, out="runs/one")'
        )
    return Path("runs") / recipe.name


def _first_difference(old: str, new: str) -> str:
    """The first lines in which two recipes differ."""
    pairs = zip(old.splitlines(), new.splitlines(), strict=False)
    for was, now in pairs:
        if was != now:
            return f"then {was.strip()}, now {now.strip()}"
    return "one has more lines than the other"
