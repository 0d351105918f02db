"""`detachnet recalibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import friendly, note, progress, show
from .opening import all_test_images, check_new, in_memory, known_root, open_family, run_recipe
from .options import Checkpoint, DataRoot, ModelFile


@friendly
def recalibrate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file.")],
    data_root: DataRoot = None,
    images: Annotated[int, typer.Option(min=1, help="Training images to measure on.")] = 5000,
    model_file: ModelFile = None,
) -> None:
    """Give each model batch norms of its own, with statistics measured anew."""
    check_new(out)
    from detachnet.checkpoint.saving import save
    from detachnet.data.batches import Batches
    from detachnet.data.datasets import is_files, load_data, select
    from detachnet.evaluation import EVAL_BATCH, evaluate
    from detachnet.memory import keep_freed
    from detachnet.surgery.recalibration import recalibrate as measure
    from detachnet.text import Table
    from detachnet.training.data import open_train_files

    keep_freed()
    _, net = open_family(checkpoint, model_file)
    data = net.facts.known_data
    root = known_root(checkpoint, data_root)
    with progress():
        augmented: dict[str, Any] = {}
        if is_files(data.name):
            train = in_memory(net, open_train_files(data, root), images, "training")
        else:
            table = run_recipe(checkpoint).get("data", {})  # what it was trained on of all that there is
            augmented = {key: table[key] for key in ("pad", "flip") if key in table}  # as what was trained on was
            splits = load_data(data.name, root)
            train = select(splits, table.get("num_train", 0), table.get("holdout", 0))[0].part(0, images)
        fresh = measure(net, (batch for batch, _ in Batches(train, data, EVAL_BATCH, **augmented).epoch()))
        test, num_test = all_test_images(net, root, download=False)
        before, after = evaluate(net, test), evaluate(fresh, test)
    fresh.facts = fresh.facts.updated(
        accuracy={name: score["accuracy"] for name, score in after.items()},
        data=data.model_copy(update={"num_test": num_test}),
    )
    save(fresh, out)
    rows = tuple((n, *(f"{100 * scores[n]['accuracy']:.2f} %" for scores in (before, after))) for n in before)
    title = f"{data.name} test accuracy, n = {num_test}; statistics of {len(train)} training images"
    show(Table(("model", "before", "after"), rows, title))
    note(f"\nSaved in {out}, with private norms.")
