"""`detachnet compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import friendly, note, print_json, table


@friendly
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs; seeds of one recipe are averaged.")
    ],
    figure: Annotated[
        Path | None, typer.Option(help="Also draw accuracy against MACs: a .png, .svg or .pdf.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Put runs side by side: accuracies over seeds, and the differences to training alone."""
    from detachnet import comparison
    from detachnet.report import markdown

    entries = comparison.compare(runs)
    if figure is not None:
        comparison.figure(entries, figure)
    cells = comparison.cells(entries)
    if as_json:
        print_json([asdict(entry) for entry in entries])
    elif as_markdown:
        typer.echo(markdown(comparison.COLUMNS, cells), nl=False)
    else:
        table("Accuracy, mean ± standard deviation over seeds", comparison.COLUMNS, cells, left=2)
        note(
            "\nBest is chosen over the epochs on the images it is measured on; differences are of the last epoch,"
        )
        note("in points, to the base-model and to the same model trained alone, where such runs were given.")
