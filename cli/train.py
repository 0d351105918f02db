"""`detachnet train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .console import TrainingDisplay, friendly, note, table
from .recipes import find_recipe

WORTH_SAYING = 0.05
"""Share of the training's time spent waiting for images."""


@friendly
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override one key; repeatable."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets are; then $DETACHNET_DATA, then ./data.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a data set that is not found.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/RECIPE if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after that time, with a checkpoint to go on from.")
    ] = None,
) -> None:
    """Train a recipe's family of models."""
    path = find_recipe(recipe)
    from detachnet.recipe import load_recipe

    checked = load_recipe(path, overrides or [])
    folder = out or Path("runs") / path.stem
    import torch

    from detachnet import trainer
    from detachnet.heap import keep_freed
    from detachnet.report import COLUMNS, result_cells

    class Display(TrainingDisplay, trainer.Listener):
        """The terminal as a listener."""

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    display = Display() if first else None
    keep_freed()
    torch.backends.cudnn.benchmark = True  # the shapes of a training stay the same
    try:
        result = trainer.train(
            checked,
            folder,
            resume=resume,
            data_root=data_root,
            download=download,
            max_minutes=max_minutes,
            listener=display,
        )
    finally:
        if display:
            display.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if not first:
        return
    if result.table:
        epochs = f"{result.epochs} of {checked.train.epochs} epochs"
        images = "held-out" if checked.data.holdout else "test"
        table(
            f"{checked.data.name} {images} accuracy, {epochs}, seed {checked.train.seed}",
            COLUMNS,
            result_cells(result.table),
        )
        note("\nBest is over the accuracies of all epochs, as in the paper; last is the last epoch's.")
    if result.wait_share > WORTH_SAYING:
        note(f"{100 * result.wait_share:.0f} % of the time went into waiting for images.")
    if result.status == "finished":
        note(f"Run: {result.folder.path}  Best family: {result.folder.best}")
        return
    words = ["detachnet", "train", recipe]
    words += [word for override in overrides or [] for word in ("--set", override)]
    words += ["--data-root", str(data_root)] if data_root else []
    words += ["--out", str(out)] if out else []
    note(f"\nStopped ({result.status}); saved in {result.folder.last}. Go on with:")
    note(f"  {shlex.join([*words, '--resume'])}")
    if result.status == "interrupted":
        raise typer.Exit(130)
