"""front + the recipe of its run -> a recipe that trains on what was found."""

from __future__ import annotations

import logging
from pathlib import Path

from detachnet.selection.front import Front
from detachnet.surgery.plan import BASE
from detachnet.training.recipe import Recipe

logger = logging.getLogger("detachnet")


def adopting(recipe: Recipe, front: Front, file: str | Path) -> Recipe:
    """The recipe of a run, with the sub-models that were found in its network, from where they are.

    Args:
        recipe: What the network was trained with.
        front: What was found.
        file: The family with what was found, as `save` wrote it.

    Returns:
        The same recipe for all models of that family: it starts from the file, base-model and sub-models alike.
        Where each model learns from the next larger one and they are not in that order any more, all learn from
        the base-model, which is logged.
    """
    family, train = recipe.family, recipe.train
    new = {name: sub for name, sub in front.models.items() if name not in family.names}
    told = front.net.facts.trained or front.net.names
    models = () if not train.models else tuple(n for n in (*family.names, *new) if n in told or n == BASE)
    loss, costs = recipe.loss, [model.macs for model in front.net.plan.models]
    if loss.distillation and loss.teacher == "larger" and costs != sorted(costs, reverse=True):
        logger.warning("loss.teacher is 'base' for what was found: the models are not in the order of their size")
        loss = loss.model_copy(update={"teacher": "base"})
    return recipe.model_copy(
        update={
            "loss": loss,
            "description": f"{recipe.description}; with what a search found",
            "family": family.model_copy(update={"models": family.models | new}),
            "train": train.model_copy(update={"init": str(file), "models": models}),
        }
    )
