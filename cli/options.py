"""The arguments and options that several commands have, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_FAMILY = "A family's file, or the folder of a run."

Checkpoint = Annotated[Path, typer.Argument(help=_FAMILY)]
CheckpointOrExport = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=_FAMILY)]
ModelFile = Annotated[
    str | None,
    typer.Option(metavar="FILE.py:FUNCTION", help="Code that makes the base-model, where it is one of your own."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Where data sets are, image files only there; then $DETACHNET_DATA, then ./data."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch a data set that is not found.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
