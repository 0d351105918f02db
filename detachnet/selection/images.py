"""run -> the images a search needs: some that the run was not trained on, and some that it was."""

from __future__ import annotations

from pathlib import Path

from detachnet.data.datasets import Split, load_data, select
from detachnet.errors import DataError
from detachnet.training.data import FileSource, hold
from detachnet.training.recipe import load_recipe
from detachnet.training.runs import RunFolder
from detachnet.training.tables import FilesTable


def run_images(run: str | Path, images: int, data_root: str | Path | None = None) -> tuple[Split, Split]:
    """Held-out training images of a run, and as many that it was trained on, in memory.

    Args:
        run: The folder of the run.
        images: How many at most.
        data_root: Where data sets are.

    Returns:
        At most so many, evenly spaced ones, of `data.holdout`, or without it of the training images behind those
        that it was trained on; and of those that it was trained on. Image files as an evaluation takes them in.
        Test images are not looked at.

    Raises:
        CheckpointError: There is no run in that folder.
        DataError: It was trained on all training images, or an image cannot be read.
    """
    folder = RunFolder(run)
    folder.check()
    recipe = load_recipe(folder.recipe)
    if isinstance(recipe.data, FilesTable):
        if not recipe.data.holdout:
            raise _none_held_out(run, "its", "N")
        source = FileSource(recipe.data, data_root, recipe.model.name)
        _, height, width = source.input_size
        held_out, calibration = (
            hold(files, source.info, (height, width), images) for files in (source.test, source.train)
        )
        return held_out, calibration
    splits = load_data(recipe.data.name, data_root)
    trained, held_out = select(splits, recipe.data.num_train, recipe.data.holdout)
    if not recipe.data.holdout:
        held_out = splits[0].part(len(trained))
    if not len(held_out):
        raise _none_held_out(run, str(len(trained)), str(min(2000, max(1, len(trained) // 5))))
    return held_out.spread(images), trained.spread(images)


def _none_held_out(run: str | Path, which: str, some: str) -> DataError:
    """What is said where a run was trained on everything."""
    return DataError(
        f"{run} was trained on all {which} training images: none is held out, and search needs some",
        hint=f"train with --set data.holdout={some}",
    )
