"""plain module -> an ONNX graph that shares a file of weights with others."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from detachnet.deploy.formats import Piece, Precision, Written
from detachnet.deploy.onnx_session import open_onnx
from detachnet.deploy.parts import put_first, read_parts
from detachnet.deploy.program import decompose, trace
from detachnet.deploy.verify import compare
from detachnet.deploy.weights import INLINE_BYTES, WEIGHTS, SharedWeights
from detachnet.errors import ExportError


class OnnxWriter:
    """Writes graphs that compute in float32; batch norms stay layers of their own, so that models share weights.

    Args:
        folder: Where the graphs will be, with their file of weights.
        precision: `float16` stores weights that float16 has in it; graphs cast them when they are loaded.
    """

    weights: str | None = WEIGHTS
    file: str | None = None
    num_test: int | None = None

    def __init__(self, folder: Path, precision: Precision = "float32") -> None:
        self.precision = precision
        self._shared = SharedWeights(folder / WEIGHTS, half=precision == "float16")

    def write(self, piece: Piece, path: Path) -> Written:
        """Write a module's graph, and compare it."""
        model = onnx_model(piece)
        unread = read_parts(model, piece.parts, self._shared)
        written = self._write(model, piece.metadata, path)
        compare(piece, open_onnx(path))
        return Written(written - unread)

    def finish(self) -> None:
        """All is written already."""

    def _write(self, model: Any, metadata: Mapping[str, str], path: Path) -> int:
        """Write a graph that refers to the file of weights; the bytes it takes alone."""
        from onnx import helper

        self._shared.start()
        place(model, self._shared)
        helper.set_model_props(model, dict(metadata))
        path.write_bytes(model.SerializeToString())
        return path.stat().st_size + self._shared.used


def onnx_model(piece: Piece, fold: bool = False) -> Any:
    """A module as an `onnx.ModelProto` with its weights inside.

    Args:
        piece: The module.
        fold: Fold batch norms into the convolutions in front of them. That changes the convolutions' weights, so
            models with norms of their own do not share them any more.
    """
    from onnxscript import optimizer

    program = torch.onnx.export(
        decompose(trace(piece, "onnx")),
        dynamo=True,
        optimize=fold,
        verbose=False,
        input_names=piece.names[:1],
        output_names=piece.names[1:],
    )
    if program is None:
        raise ExportError("torch.onnx.export made no program")
    if not fold:
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
    model = program.model_proto
    _strip(model)
    return model


def _strip(model: Any) -> None:
    """Take out what the exporter noted for debugging: long, and full of paths of the machine it ran on."""
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        parts = [graph, *graph.node, *graph.value_info]
        if graph is model.graph:
            parts += [*graph.input, *graph.output, *graph.initializer]
        for part in parts:
            del part.metadata_props[:]
            part.doc_string = ""
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "detachnet", version("detachnet")


def place(model: Any, weights: SharedWeights) -> None:
    """Move a graph's tensors to a file of weights, but for the small ones.

    Args:
        model: An `onnx.ModelProto` with its weights inside.
        weights: Where they go, in the folder of the graph.
    """
    from onnx import TensorProto, helper
    from onnx.external_data_helper import set_external_data

    casts = []
    for tensor in model.graph.initializer:
        content = bytes(tensor.raw_data)
        if len(content) < INLINE_BYTES:
            continue
        if tensor.data_type == TensorProto.FLOAT and (stored := weights.encode(content)) is not content:
            name, content = tensor.name, stored
            tensor.name, tensor.data_type = f"{name}.half", TensorProto.FLOAT16
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
        set_external_data(tensor, weights.path.name, offset=weights.place(content), length=len(content))
        tensor.ClearField("raw_data")
    put_first(model.graph, casts)
