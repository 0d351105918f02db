"""What commands that use a family have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detachnet.detachable import DetachableNet


def open_family(checkpoint: Path) -> tuple[Path, DetachableNet]:
    """A family and its file; of a folder, the last checkpoint of the run in it."""
    from detachnet.checkpoint import load_family
    from detachnet.runs import family_file

    path = family_file(checkpoint)
    return path, load_family(path)


def fastest_device() -> str:
    """A CUDA device if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
