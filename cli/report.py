"""`detachnet report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detachnet.errors import CheckpointError

from .console import friendly, note, progress
from .opening import check_folder, own_model
from .options import DataRoot, ModelFile


@friendly
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    data_root: DataRoot = None,
    model_file: ModelFile = None,
) -> None:
    """Put runs on one HTML page: results, curves, trade-offs, the family, predictions, hardware and recipe."""
    if out.suffix != ".html":
        raise CheckpointError(f"{out} is no name for a page", hint="-o report.html; an older page is replaced")
    check_folder(out)
    from detachnet.report.page import make_page
    from detachnet.storage import replace_file

    with progress():
        page = make_page(runs, data_root, [own_model(run, model_file) for run in runs])
    content = page.html.encode()
    replace_file(out, content)
    for sentence in page.missing:
        note(sentence)
    note(f"{out}: {len(content) / 1e3:.0f} kB, needs no other file and no network")
