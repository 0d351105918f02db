"""All that the folder of a run says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from detachnet.checkpoint.loading import load_family
from detachnet.deploy.profile import Profile, profile_of
from detachnet.storage import locate_checkpoint
from detachnet.surgery.detachable import DetachableNet
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.results import read_info, read_metrics, result_rows
from detachnet.training.runs import RunFolder


@dataclass(frozen=True)
class RunRecord:
    """All that a run's folder says.

    Attributes:
        name: The folder's, or its path where two are called alike.
        recipe: The resolved recipe.
        toml: The same, as it is written.
        info: Hardware, versions and seconds; empty if the run did not get so far.
        metrics: One row per epoch.
        net: The family at its last epoch.
        profile: What was measured, if anything.
    """

    name: str
    recipe: Recipe
    toml: str
    info: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    net: DetachableNet
    profile: Profile | None

    @property
    def table(self) -> list[dict[str, Any]]:
        """The final table; empty before the first epoch is complete."""
        return result_rows(self.net.plan, self.recipe.models, self.metrics) if self.metrics else []


def read_run(path: str | Path, name: str | None = None, model: nn.Module | None = None) -> RunRecord:
    """Read a run's folder.

    Raises:
        CheckpointError: There is no run, or one of its files is damaged.
        RecipeError: Its recipe is damaged.
    """
    folder = RunFolder(path)
    folder.check()
    recipe = load_recipe(folder.recipe)
    net = load_family(locate_checkpoint(folder.path), model)
    return RunRecord(
        name=name or folder.path.resolve().name,
        recipe=recipe,
        toml=folder.recipe.read_text(encoding="utf-8"),
        info=read_info(folder.info),
        metrics=read_metrics(folder.metrics, recipe.models),
        net=net,
        profile=profile_of(net, folder.path),
    )
