"""family or run -> a repository on the Hugging Face Hub, with a card."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from detachnet.checkpoint.loading import load_family
from detachnet.checkpoint.saving import loads_alone, save
from detachnet.errors import CheckpointError, one_line
from detachnet.hub import FAMILY, upload
from detachnet.report.card import FIGURE, figure, make_card
from detachnet.report.chart import write
from detachnet.storage import locate_checkpoint, read_file
from detachnet.surgery.detachable import DetachableNet, family_in
from detachnet.training.runs import RunFolder


def push_to_hub(
    family: DetachableNet | str | Path,
    repo: str,
    *,
    license: str,
    base_model: str = "",
    private: bool = False,
    model: nn.Module | None = None,
) -> str:
    """Put a family on the Hugging Face Hub: its file, a card made from its plan and its run, a figure.

    `detachnet.load("hf-hub:OWNER/NAME")` reads it from there. Who you are, and which Hub it is, says
    huggingface_hub: `hf auth login`, `HF_TOKEN`, `HF_ENDPOINT`.

    Args:
        family: The family, its file, or the folder of its run, whose recipe then is on the card.
        repo: `OWNER/NAME`; it is made if it is not there.
        license: The licence of the weights, by the Hub's name for it, such as `apache-2.0`: that of the base
            weights if it started from such.
        base_model: The repository on the Hub that those come from.
        private: Whether a new repository is seen by its owner only.
        model: A user's own architecture, as `load` takes it.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: The family cannot be read or stored, or the Hub refuses it or cannot be reached.

    Examples:
        >>> detachnet.push_to_hub("runs/mine", "me/mine", license="apache-2.0")
    """
    if not license:
        raise CheckpointError("the Hub wants to know the licence of the weights", hint="license='apache-2.0'")
    recipe = ""
    if not isinstance(family, str | Path):
        family = family_in(family)
    else:
        path = locate_checkpoint(family)
        recipe = _recipe_of(RunFolder(path.parent))
        family = load_family(path, model)
    alone = loads_alone(family)
    card = make_card(family, repo, license, recipe=recipe, base_model=base_model, loads_alone=alone)
    with tempfile.TemporaryDirectory() as folder:
        save(family, file := Path(folder, FAMILY))
        files: dict[str, bytes | Path] = {FAMILY: file, "README.md": card.encode()}
        if chart := figure(family):
            write(chart, drawn := Path(folder, FIGURE))
            files[FIGURE] = drawn
        return upload(repo, files, f"{family.plan.model} and {len(family.names) - 1} sub-models", private)


def _recipe_of(folder: RunFolder) -> str:
    """A run's recipe, TOML; nothing where there is none.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return read_file(folder.recipe).decode()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder.recipe}", what=one_line(error)) from error
