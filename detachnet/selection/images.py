"""run -> the images a search needs: some that the run was not trained on, and some that it was."""

from __future__ import annotations

from pathlib import Path

from detachnet.data.datasets import Split, load_data, select
from detachnet.errors import DataError
from detachnet.training.recipe import load_recipe
from detachnet.training.runs import RunFolder
from detachnet.training.tables import FilesTable


def run_images(run: str | Path, images: int, data_root: str | Path | None = None) -> tuple[Split, Split]:
    """Held-out training images of a run, and as many that it was trained on.

    Args:
        run: The folder of the run.
        images: How many at most.
        data_root: Where data sets are.

    Returns:
        The training images behind those that it was trained on, at most so many; and the first of those that it
        was trained on. Test images are not looked at.

    Raises:
        DataError: It was trained on all training images, or on image files.
    """
    recipe = load_recipe(RunFolder(run).recipe)
    if isinstance(recipe.data, FilesTable):
        raise DataError(f"search reads data sets in memory; {recipe.data.name} is one of image files")
    splits = load_data(recipe.data.name, data_root)
    trained, _ = select(splits, recipe.data.num_train, recipe.data.holdout)
    held_out = splits[0].part(len(trained), len(trained) + images)
    if not len(held_out):
        raise DataError(
            f"{run} was trained on all {len(trained)} training images: none is held out, and search needs some",
            hint="train with --set data.holdout=2000",
        )
    return held_out, trained.part(0, images)
