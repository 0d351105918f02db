"""two functions, images -> a refusal where they do not compute the same."""

from __future__ import annotations

import torch
from torch import Tensor

from detachnet.deploy.formats import Piece, Runner
from detachnet.errors import ExportError

TOLERANCE = 1e-5
"""Largest difference to PyTorch, relative to the largest output where that is above 1."""
CHECKED_BATCHES = (1, 3)
"""Numbers of images at which every graph is compared with PyTorch."""


def compare(piece: Piece, run: Runner, tolerance: float = TOLERANCE) -> None:
    """Refuse a graph whose output is not the module's, at several batch sizes.

    Raises:
        ExportError: They differ by more than `tolerance`.
    """

    def wanted(images: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = piece.module(images)
        return output

    check_equal(f"the exported {piece.name}", "PyTorch", wanted, run, piece.images, tolerance)


def check_equal(
    name: str, other: str, wanted: Runner, run: Runner, images: Tensor, tolerance: float = TOLERANCE
) -> None:
    """Refuse what does not compute the same as another one, at several batch sizes.

    Args:
        name: What the first is.
        other: What the second is.
        wanted: The second.
        run: The first.
        images: What both take in, `(B, …)`.
        tolerance: Largest difference, relative to the largest output where that is above 1.

    Raises:
        ExportError: They differ by more.
    """
    for batch in CHECKED_BATCHES:
        right = wanted(images[:batch].clone())  # some models change their images
        found = run(images[:batch].clone())
        bound = tolerance * max(1.0, float(right.abs().max()))
        same_shape = found.shape == right.shape
        difference = float((found - right).abs().max()) if same_shape else float("inf")
        if not difference <= bound:  # also where it is no number
            raise ExportError(
                f"{name} does not compute what {other} does",
                what=f"outputs differ by {difference:.1e} on {batch} images, {bound:.1e} is allowed",
                hint="report it with the model's name; nothing was written",
            )
