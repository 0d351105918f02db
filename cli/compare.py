"""`detachnet compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import friendly, note, plain, print_json, show
from .options import AsJson


@friendly
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs; seeds of one recipe are averaged.")
    ],
    figure: Annotated[
        Path | None, typer.Option(help="Also draw accuracy against MACs: a .png, .svg or .pdf.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: accuracies over seeds, and the differences to training alone."""
    from detachnet.report import comparison

    entries = comparison.compare(runs)
    if figure is not None:
        comparison.figure(entries, figure)
    table = comparison.table(entries)
    if as_json:
        print_json([asdict(entry) for entry in entries])
    elif as_markdown:
        typer.echo(plain(table.markdown()), nl=False)
    else:
        show(table)
        note(
            "\nBest is chosen over the epochs on the images it is measured on; differences are of the last epoch,"
        )
        note("in points, to the base-model and to the same model trained alone, where such runs were given.")
