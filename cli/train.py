"""`detachnet train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detachnet.ranks import is_first
from detachnet.training.shipped import find_recipe

from .console import TrainingDisplay, friendly, note, show
from .opening import known_root
from .options import DataRoot, Download

if TYPE_CHECKING:
    from detachnet.training.recipe import Recipe
    from detachnet.training.trainer import RunResult

WORTH_SAYING = 0.05
"""Share of the run's time spent waiting for images."""


@friendly
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override one key; repeatable."),
    ] = None,
    data_root: DataRoot = None,
    download: Download = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/RECIPE if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in that folder.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after that time, with a checkpoint to resume from.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show plan, data and steps, and train nothing.")
    ] = False,
) -> None:
    """Train a recipe's family of models."""
    path = find_recipe(recipe)  # before anything heavy is loaded
    from detachnet.training import trainer
    from detachnet.training.loop import Listener
    from detachnet.training.recipe import load_recipe
    from detachnet.training.runs import default_folder

    checked = load_recipe(path, overrides or [])

    if resume:
        data_root = known_root(out or default_folder(checked), data_root)
    if dry_run:
        _preview(checked, out, data_root, download)
        return

    class Display(TrainingDisplay, Listener):
        """The terminal as a listener."""

    display = Display() if is_first() else None
    try:
        result = trainer.train(
            checked,
            out,
            resume=resume,
            data_root=data_root,
            download=download,
            max_minutes=max_minutes,
            listener=display,
        )
    finally:
        if display:
            display.close()
    if not is_first():
        return
    _show_result(result, checked)
    if result.status == "finished":
        note(f"Run: {result.folder.path}  Best family: {result.folder.best}")
        return
    again = _resume_command(recipe, overrides or [], data_root, out)
    note(f"\nStopped ({result.status}); saved in {result.folder.last}. Resume with:\n  {again}")
    if result.status == "interrupted":
        raise typer.Exit(130)


def _show_result(result: RunResult, recipe: Recipe) -> None:
    """The accuracies of a run, and what its time went into."""
    from detachnet.training.results import result_table

    if result.table:
        epochs = f"{result.epochs} of {recipe.train.epochs} epochs"
        images = "held-out" if recipe.data.holdout else "test"
        title = f"{recipe.data.name} {images} accuracy, {epochs}, seed {recipe.train.seed}"
        show(result_table(result.table, title))
        note("\nBest is over the accuracies of all epochs, as in the paper; last is the last epoch's.")
    if result.wait_share > WORTH_SAYING:
        note(f"{100 * result.wait_share:.0f} % of the time went into waiting for images.")


def _resume_command(recipe: str, overrides: list[str], data_root: Path | None, out: Path | None) -> str:
    """What a person types to resume a run."""
    words = ["detachnet", "train", recipe]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--data-root", str(data_root)] if data_root else []
    words += ["--out", str(out)] if out else []
    return shlex.join([*words, "--resume"])


def _preview(recipe: Recipe, out: Path | None, data_root: Path | None, download: bool) -> None:
    """Show what a run would be."""
    from detachnet.text import number_of, si
    from detachnet.training.preview import preview
    from detachnet.training.runs import RunFolder, default_folder

    seen = preview(recipe, data_root, download)
    show(seen.plan.table)
    table, data = seen.recipe.train, seen.data
    if seen.recipe.family.chosen:
        note(f"\nChosen for {seen.recipe.family.chosen}; the run's recipe names them.")
    test = f", {data.num_test} test images" if data.num_test else f", {recipe.data.holdout} held out"
    note(f"\nData: {data.name}, {seen.num_train} training images{test}, {len(data.classes)} classes")
    note(f"Trained: {', '.join(seen.recipe.models)}: {si(seen.num_trained)} of {si(seen.num_params)} parameters")
    steps = seen.steps_per_epoch
    size = number_of(table.batch_size, "image")
    note(f"Steps: {table.epochs} epochs of {steps}, {table.epochs * steps} together, of {size}")
    folder = RunFolder(out or default_folder(recipe))
    there = ": there is a run in it already, --resume goes on with it" if folder.recipe.exists() else ""
    note(f"Folder: {folder.path}{there}")
