"""`detachnet cascade`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import friendly, note, print_json, table
from .family import fastest_device, open_family


@friendly
def cascade(
    checkpoint: Annotated[Path, typer.Argument(help="A family's file, or the folder of a run.")],
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets are; then $DETACHNET_DATA, then ./data.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a data set that is not found.")] = False,
    target_accuracy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Choose the cheapest cascade that reaches it, such as 0.8."),
    ] = None,
    target_macs: Annotated[
        float | None, typer.Option(metavar="MACS", help="Choose the most accurate one within it, such as 12e6.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Run small models first and larger ones where those are not confident: what that costs and gains."""
    from detachnet.cascade import calibrate
    from detachnet.data import load_data
    from detachnet.errors import CheckpointError
    from detachnet.heap import keep_freed

    keep_freed()
    path, net = open_family(checkpoint)
    if net.data is None:
        raise CheckpointError(f"{path} does not say what it was trained on", hint="use a file that train wrote")
    test = load_data(net.data.name, data_root, download)[1]
    curve = calibrate(net, test, target_accuracy, target_macs, fastest_device())
    if as_json:
        beaten = [curve.better_single(point) for point in curve.points]
        print_json({"checkpoint": str(path), "data": net.data.name, **curve.model_dump(), "worse_than": beaten})
        return
    n = curve.singles[0].n
    table(f"Cascades of {path} on {net.data.name}, n = {n}", curve.header, curve.cells(), left=2)
    note(
        f"\nChosen on {curve.num_calibration} test images; the figures are of the other {n}, which chose nothing."
    )
    note(f"One standard error of an accuracy is at most {50 / n**0.5:.1f} points.")
    note("An image that goes on costs all models it went through: each starts from the image again.")
    for line in curve.verdicts():
        note(line)
