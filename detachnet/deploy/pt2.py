"""plain module <-> torch.export's pt2 file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from detachnet.deploy.archive import clean_archive
from detachnet.deploy.formats import Piece, Precision, Runner, Written
from detachnet.deploy.program import trace
from detachnet.deploy.verify import compare
from detachnet.errors import ExportError, one_line


class Pt2Writer:
    """Writes `torch.export`'s files; without example inputs there is no pickle in them."""

    precision: Precision = "float32"
    weights: str | None = None
    file: str | None = None
    num_test: int | None = None

    def write(self, piece: Piece, path: Path) -> Written:
        """Write a module's program, and compare it."""
        program = trace(piece, "pt2")
        program.example_inputs = None
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, path)
        compare(piece, open_pt2(path))
        return Written(path.stat().st_size)

    def finish(self) -> None:
        """All is written already."""


def open_pt2(path: Path) -> Runner:
    """Through torch, which sees a cleaned copy.

    Raises:
        ExportError: It is none of torch's, or holds what detachnet never writes.
    """
    cleaned = clean_archive(path)
    try:
        module = torch.export.load(cleaned).module()
    except Exception as error:  # torch raises anything on what is no program
        raise ExportError(f"torch cannot open {path}", what=one_line(error)) from error

    def run(images: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                outputs: Tensor = module(images)
        except Exception as error:  # a program checks what it is given in many ways
            raise ExportError(f"torch cannot run {path}", what=one_line(error)) from error
        return outputs

    return run
