"""`detachnet evaluate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import friendly, print_json, table
from .family import fastest_device, open_family

if TYPE_CHECKING:
    from detachnet.data import Split
    from detachnet.detachable import DetachableNet
    from detachnet.loader import FileBatches

WORKERS = 4
"""Processes that read image files, where there are as many cores."""


@friendly
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A family's file, or the folder of a run.")],
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets are; then $DETACHNET_DATA, then ./data.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another data set than the one it was trained on.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a data set that is not found.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure the test accuracy of each trained model of a family."""
    from detachnet.data import is_files, load_data
    from detachnet.errors import CheckpointError
    from detachnet.evaluation import evaluate as score
    from detachnet.heap import keep_freed
    from detachnet.plan import si

    path, net = open_family(checkpoint)
    name = data or (net.data.name if net.data else None)
    if name is None:
        raise CheckpointError(
            f"{path} does not say what it was trained on", hint="evaluate a file that train wrote"
        )
    device = fastest_device()
    keep_freed()
    images: Split | FileBatches
    if is_files(name):
        images = _test_files(net, name, data_root, device)
        count = images.files.num_images
    else:
        images = load_data(name, data_root, download)[1]
        count = len(images)
    scores = score(net, images, device)
    rows: list[dict[str, Any]] = [
        {
            "model": model,
            "macs": net.plan[model].macs,
            "num_params": net.plan[model].num_params,
            "test_accuracy": score["accuracy"],
            "test_loss": score["loss"],
        }
        for model, score in scores.items()
    ]
    if as_json:
        print_json({"checkpoint": str(path), "data": name, "n": count, "models": rows})
        return
    table(
        f"{path} on {name}, n = {count}",
        ("model", "MACs", "parameters", "test accuracy", "test loss"),
        [
            (
                str(row["model"]),
                si(row["macs"]),
                si(row["num_params"]),
                f"{100 * row['test_accuracy']:.2f} %",
                f"{row['test_loss']:.4f}",
            )
            for row in rows
        ],
    )


def _test_files(net: DetachableNet, name: str, data_root: Path | None, device: str) -> FileBatches:
    """The test images of a data set of image files, as the family takes them in."""
    from detachnet.files import open_files
    from detachnet.predictions import known_data
    from detachnet.sources import evaluation_batches

    data, (_, height, width) = known_data(net), net.plan.input_size
    files = open_files(name, data_root, data.test_split or "validation", data.classes)
    return evaluation_batches(files, data, (height, width), device, min(WORKERS, os.cpu_count() or 1))
