"""`detachnet cascade`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from .console import friendly, note, print_json, progress, show
from .opening import fastest_device, known_root, open_family
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
    from detachnet.data.datasets import load_data
    from detachnet.deploy.cascade import calibrate
    from detachnet.memory import keep_freed

    keep_freed()
    path, net = open_family(checkpoint, model_file)
    data = net.facts.known_data
    test = load_data(data.name, known_root(checkpoint, data_root), download)[1]
    with progress():
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
    if curve.reuses:
        note("A model goes on from where the one in front parted; 'from the image': the cost without that.")
    else:
        note("An image that goes on costs all models it went through: they part at the image.")
    for line in curve.verdicts():
        note(line)
