"""`detachnet demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import friendly, note, progress
from .opening import open_family
from .options import Checkpoint, ModelFile


@friendly
def demo(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    model_file: ModelFile = None,
) -> None:
    """Write a page that runs all models of a family in a browser, side by side, on a photograph you drop."""
    from detachnet.report.demo import make_demo

    _, net = open_family(checkpoint, model_file)
    with progress():
        make_demo(net, out)
    note(f"Written: {out}. It runs in a browser with onnxruntime-web, which npm fetches once:")
    note(f"  cd {out} && npm install && python -m http.server 8000 --bind 127.0.0.1")
    note("Then open http://127.0.0.1:8000")
