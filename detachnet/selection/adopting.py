"""front + the recipe of its run -> a recipe that trains on what was found."""

from __future__ import annotations

from pathlib import Path

from detachnet.selection.front import Front
from detachnet.surgery.plan import BASE
from detachnet.training.recipe import Recipe


def adopting(recipe: Recipe, front: Front, file: str | Path) -> Recipe:
    """The recipe of a run, with the sub-models that were found in its network, from where they are.

    Args:
        recipe: What the network was trained with.
        front: What was found.
        file: The family with what was found, as `save` wrote it.

    Returns:
        The same recipe for all models of that family: it starts from the file, base-model and sub-models alike.
    """
    family, train = recipe.family, recipe.train
    new = {name: sub for name, sub in front.models.items() if name not in family.names}
    told = front.net.facts.trained or front.net.names
    models = () if not train.models else tuple(n for n in (*family.names, *new) if n in told or n == BASE)
    return recipe.model_copy(
        update={
            "description": f"{recipe.description}; with what a search found",
            "family": family.model_copy(update={"models": family.models | new}),
            "train": train.model_copy(update={"init": str(file), "models": models}),
        }
    )
