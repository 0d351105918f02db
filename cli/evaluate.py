"""`detachnet evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import friendly, note, print_json, progress, show
from .opening import all_test_images, check_new, fastest_device, known_root, open_family
from .options import AsJson, Checkpoint, DataRoot, Download, ModelFile

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet


@friendly
def evaluate(
    checkpoint: Checkpoint,
    data_root: DataRoot = None,
    data: Annotated[str | None, typer.Option(help="Another data set than the one it was trained on.")] = None,
    download: Download = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the family to this new file, which says it.")
    ] = None,
    as_json: AsJson = False,
    model_file: ModelFile = None,
) -> None:
    """Measure the test accuracy of each trained model of a family."""
    if out is not None and data is not None:
        raise typer.BadParameter("a file says the accuracy on its own data set: not with --data", param_hint="-o")
    if out is not None:
        check_new(out)
    from detachnet.evaluation import evaluate as score
    from detachnet.memory import keep_freed
    from detachnet.text import Table, si

    path, net = open_family(checkpoint, model_file)
    name = data or net.facts.known_data.name
    device = fastest_device()
    keep_freed()
    images, count = all_test_images(net, known_root(checkpoint, data_root), download, device, data)
    with progress():
        scores = score(net, images, device)
    if out is not None:
        _write(net, out, {model: score["accuracy"] for model, score in scores.items()}, count)
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
    if out is not None:
        note(f"\nSaved in {out}.")


def _write(net: DetachableNet, out: Path, accuracy: dict[str, float], num_test: int) -> None:
    """The family with what was measured."""
    from detachnet.checkpoint.saving import save

    data = net.facts.known_data.model_copy(update={"num_test": num_test})
    net.facts = net.facts.updated(accuracy=accuracy, data=data)
    save(net, out)
