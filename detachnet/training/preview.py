"""recipe -> what its run would be: the plan, what is trained, the steps and the data, with nothing written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from detachnet.checkpoint.saving import check_storable
from detachnet.facts import DataInfo
from detachnet.surgery.plan import DetachPlan
from detachnet.training.processes import check_tracker
from detachnet.training.recipe import Recipe
from detachnet.training.start import decided, starting_family
from detachnet.training.trainer import open_source


@dataclass(frozen=True)
class Preview:
    """A run before it is started.

    Attributes:
        recipe: The recipe, with what its images decide: the number of classes, and routes that were to be chosen.
        plan: The family.
        data: Its images.
        num_train: Number of training images.
        num_params: Number of the family's parameters, each counted once.
        num_trained: Number of those that are trained.
        steps_per_epoch: Steps of one epoch, in one process.
    """

    recipe: Recipe
    plan: DetachPlan
    data: DataInfo
    num_train: int
    num_params: int
    num_trained: int
    steps_per_epoch: int


def preview(recipe: Recipe, data_root: str | Path | None = None, download: bool = False) -> Preview:
    """Check all that a run checks before its first step, and say what it would be.

    Args:
        recipe: The experiment.
        data_root: Where data sets are looked for first; image files nowhere else.
        download: Fetch a data set that is not found.

    Raises:
        DetachNetError: As `train`.
    """
    check_tracker(recipe.train.log_with)
    source = open_source(recipe, data_root, download)
    recipe = decided(recipe, source)
    device = torch.device("cpu")
    net = starting_family(recipe, source, device, several=False, resuming=False)
    check_storable(net)
    batches, _ = source.batches(recipe.train, device, (0, 1), torch.contiguous_format)
    parameters = list(net.parameters())
    return Preview(
        recipe=recipe,
        plan=net.plan,
        data=source.info,
        num_train=source.num_train,
        num_params=sum(parameter.numel() for parameter in parameters),
        num_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        steps_per_epoch=len(batches),
    )
