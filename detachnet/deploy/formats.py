"""What graphs of all formats have in common: names, packages, and the face of what writes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from detachnet.errors import ExportError
from detachnet.surgery.widths.reading import Pick

Format = Literal["onnx", "pt2", "pte"]
Precision = Literal["float32", "float16", "int8"]
Runner = Callable[[Tensor], Tensor]
"""Images `(B, C, H, W)` to outputs `(B, num_classes)`, through another runtime than the module's own."""
INPUT, OUTPUT = "images", "logits"
"""Names of every model's input and output."""
FEATURE_IN, FEATURE_OUT = "feature", "feature_out"
"""Names of the input and output of graphs that begin or end inside the network."""
MAX_BATCH: dict[Format, int | None] = {"onnx": None, "pt2": None, "pte": 8}
"""The most images at once; ExecuTorch plans its memory for them when a model is exported."""
_EXTRAS: dict[Format, tuple[str, tuple[str, ...]]] = {
    "onnx": ("export", ("onnx", "onnxscript", "onnxruntime")),
    "pt2": ("", ()),
    "pte": ("executorch", ("executorch",)),
}


@dataclass(frozen=True)
class Piece:
    """What becomes one graph: a model, or a part of one between two places.

    Attributes:
        name: What errors call it.
        module: In evaluation mode, on the CPU, with one tensor as its output.
        images: What it takes in, `(B, …)`.
        names: Of its input and output.
        metadata: What the graph says of itself, where the format has a place for it.
        parts: Name of a weight → the tensor of another model that it is a part of, and which part.
    """

    name: str
    module: nn.Module
    images: Tensor
    names: tuple[str, str] = (INPUT, OUTPUT)
    metadata: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[Tensor, Pick]] = field(default_factory=dict)


class Written(NamedTuple):
    """A graph that was written.

    Attributes:
        num_bytes: Of the graph and of the weights it uses: what it takes alone.
        accuracy: Measured on this very graph, in [0, 1]; None where it computes what the module does.
        float_accuracy: That of the module on the same images, where `accuracy` is measured.
    """

    num_bytes: int
    accuracy: float | None = None
    float_accuracy: float | None = None


class Writer(Protocol):
    """Writes modules as graphs into one folder.

    Attributes:
        precision: What the weights are stored in; in int8 the graphs compute in it, too.
        weights: Name of the file of weights that all graphs share; None where each one has its own.
        file: Name of the one file that all graphs are in; None where each has its own.
        num_test: Images that accuracies were measured on; None where they were not.
    """

    precision: Precision
    weights: str | None
    file: str | None
    num_test: int | None

    def write(self, piece: Piece, path: Path) -> Written:
        """Write a graph, and compare it with its module.

        Raises:
            ExportError: It does not compute what the module does.
        """

    def finish(self) -> None:
        """Write what can be written only when all modules are known.

        Raises:
            ExportError: It does not compute what the modules do.
        """


def check_installed(format: Format) -> None:
    """Refuse a format whose packages are not there.

    Raises:
        ExportError: One is missing.
    """
    extra, packages = _EXTRAS[format]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f"exporting to {format} needs {' and '.join(missing)}, which is not installed",
            hint=f"pip install 'detachnet[{extra}]'",
        )
