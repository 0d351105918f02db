"""`detachnet detach`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import friendly, note
from .opening import check_new, open_family
from .options import Checkpoint, ModelFile


@friendly
def detach(
    checkpoint: Checkpoint,
    model: Annotated[str, typer.Option(help="The model to take out: base, sub0, …")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new file.")],
    model_file: ModelFile = None,
) -> None:
    """Write one model of a family to a file of its own, with only the weights it needs."""
    check_new(out)
    from detachnet.checkpoint.saving import save
    from detachnet.text import si

    path, net = open_family(checkpoint, model_file)
    save(net, out, which=model)
    plan, sizes = net.plan[model], (out.stat().st_size / 1e6, path.stat().st_size / 1e6)
    note(
        f"{model}: {si(plan.macs)} MACs, {si(plan.num_params)} parameters; {sizes[0]:.2f} MB of {sizes[1]:.2f} MB"
    )
    own = "" if net.source else f", model={net.plan.model}(...)"
    note(f"Read it: detachnet.load({str(out)!r}{own})")
