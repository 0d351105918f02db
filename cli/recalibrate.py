"""`detachnet recalibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detachnet.errors import CheckpointError

from .console import friendly, note, table
from .family import open_family


@friendly
def recalibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A family's file, or the folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file.")],
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets are; then $DETACHNET_DATA, then ./data.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Training images to measure on.")] = 5000,
) -> None:
    """Give each model batch norms of its own, with statistics measured anew."""
    if out.exists():
        raise CheckpointError(f"{out} exists already", hint="name a new file, or remove this one")
    from detachnet.checkpoint import save
    from detachnet.data import Batches, load_data, select
    from detachnet.evaluation import EVAL_BATCH, evaluate
    from detachnet.heap import keep_freed
    from detachnet.recalibration import recalibrate as measure

    keep_freed()
    path, net = open_family(checkpoint)
    if net.data is None:
        raise CheckpointError(
            f"{path} does not say what it was trained on", hint="recalibrate a file that train wrote"
        )
    splits = load_data(net.data.name, data_root)
    train, test = select(splits, num_train=min(images, len(splits[0])))
    fresh = measure(net, (batch for batch, _ in Batches(train, net.data, EVAL_BATCH).epoch()))
    before, after = evaluate(net, test), evaluate(fresh, test)
    fresh.accuracy = {name: score["accuracy"] for name, score in after.items()}
    fresh.data = net.data.model_copy(update={"num_test": len(test)})
    save(fresh, out)
    table(
        f"{net.data.name} test accuracy, n = {len(test)}; statistics of {len(train)} training images",
        ("model", "before", "after"),
        [(n, *(f"{100 * scores[n]['accuracy']:.2f} %" for scores in (before, after))) for n in before],
    )
    note(f"\nSaved in {out}, with private norms.")
