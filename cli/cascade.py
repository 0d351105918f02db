"""`detachnet cascade`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from .console import friendly, note, print_json, progress, show
from .opening import MOST, fastest_device, in_memory, known_root, open_family
from .options import AsJson, Checkpoint, DataRoot, Download, ModelFile


@friendly
def cascade(
    checkpoint: Checkpoint,
    data_root: DataRoot = None,
    download: Download = False,
    target_accuracy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Choose the cheapest cascade that reaches it, such as 0.8."),
    ] = None,
    target_macs: Annotated[
        float | None, typer.Option(metavar="MACS", help="Choose the most accurate one within it, such as 12e6.")
    ] = None,
    as_json: AsJson = False,
    model_file: ModelFile = None,
) -> None:
    """Run small models first and larger ones where those are not confident: what that costs and gains."""
    from detachnet.data.datasets import is_files, load_data
    from detachnet.deploy.cascade import calibrate
    from detachnet.memory import keep_freed
    from detachnet.training.data import open_test_files

    keep_freed()
    path, net = open_family(checkpoint, model_file)
    data = net.facts.known_data
    root = known_root(checkpoint, data_root)
    with progress():
        if is_files(data.name):
            test = in_memory(net, open_test_files(data, root), MOST, "test")
        else:
            test = load_data(data.name, root, download)[1]
        curve = calibrate(net, test, target_accuracy, target_macs, fastest_device())
    if as_json:
        beaten = [curve.better_single(point) for point in curve.points]
        print_json({"checkpoint": str(path), "data": data.name, **curve.model_dump(), "worse_than": beaten})
        return
    n = curve.singles[0].n
    show(replace(curve.table, title=f"Cascades of {path} on {data.name}, n = {n}"))
    note(
        f"\nChosen on {curve.num_calibration} test images; the figures are of the other {n}, which chose nothing."
    )
    note(f"One standard error of an accuracy is at most {50 / n**0.5:.1f} points.")
    for line in (curve.reading, *curve.verdicts()):
        note(line)
