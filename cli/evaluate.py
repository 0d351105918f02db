"""`detachnet evaluate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import friendly, print_json, progress, show
from .opening import fastest_device, known_root, open_family
from .options import AsJson, Checkpoint, DataRoot, Download, ModelFile

if TYPE_CHECKING:
    from detachnet.data.datasets import Split
    from detachnet.data.loader import FileBatches
    from detachnet.surgery.detachable import DetachableNet

WORKERS = 4
"""Processes that read image files, where there are as many cores."""


@friendly
def evaluate(
    checkpoint: Checkpoint,
    data_root: DataRoot = None,
    data: Annotated[str | None, typer.Option(help="Another data set than the one it was trained on.")] = None,
    download: Download = False,
    as_json: AsJson = False,
    model_file: ModelFile = None,
) -> None:
    """Measure the test accuracy of each trained model of a family."""
    from detachnet.data.datasets import is_files, load_data
    from detachnet.evaluation import evaluate as score
    from detachnet.memory import keep_freed
    from detachnet.text import Table, si

    path, net = open_family(checkpoint, model_file)
    name = data or net.facts.known_data.name
    device = fastest_device()
    keep_freed()
    images: Split | FileBatches
    if is_files(name):
        images = _test_files(net, name, known_root(checkpoint, data_root), device)
        count = images.files.num_images
    else:
        images = load_data(name, known_root(checkpoint, data_root), download)[1]
        count = len(images)
    with progress():
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
    cells = tuple(
        (
            str(row["model"]),
            si(row["macs"]),
            si(row["num_params"]),
            f"{100 * row['test_accuracy']:.2f} %",
            f"{row['test_loss']:.4f}",
        )
        for row in rows
    )
    header = ("model", "MACs", "parameters", "test accuracy", "test loss")
    show(Table(header, cells, f"{path} on {name}, n = {count}"))


def _test_files(net: DetachableNet, name: str, data_root: Path | None, device: str) -> FileBatches:
    """The test images of a data set of image files, as the family takes them in."""
    from detachnet.training.data import evaluation_batches, open_test_files

    data, (_, height, width) = net.facts.known_data, net.plan.input_size
    files = open_test_files(data, data_root, name)
    return evaluation_batches(files, data, (height, width), device, min(WORKERS, os.cpu_count() or 1))
