"""`detachnet push`."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import friendly, note, progress
from .opening import own_model
from .options import Checkpoint, ModelFile


@friendly
def push(
    checkpoint: Checkpoint,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it is not there.")],
    license: Annotated[
        str, typer.Option(help="The licence of the weights, such as apache-2.0: that of those it started from.")
    ],
    base_model: Annotated[str, typer.Option(help="The repository that those come from, for the card.")] = "",
    private: Annotated[bool, typer.Option("--private", help="Make it for yourself only.")] = False,
    model_file: ModelFile = None,
) -> None:
    """Put a family on the Hugging Face Hub, with a card made from its run."""
    from detachnet.report.publishing import push_to_hub

    model = own_model(checkpoint, model_file)
    with progress():
        address = push_to_hub(
            checkpoint, repo, license=license, base_model=base_model, private=private, model=model
        )
    note(address)
    note(f"Read it: detachnet.load({f'hf-hub:{repo}'!r})")
