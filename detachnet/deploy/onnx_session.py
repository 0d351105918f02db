"""ONNX graph of anybody's -> a session of ONNX Runtime, after a look at what the graph refers to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detachnet.deploy.formats import Runner
from detachnet.deploy.weights import WEIGHTS
from detachnet.errors import ExportError, one_line
from detachnet.storage import open_file, read_file

_LOOPS = ("Loop", "Scan", "If")
"""Operators with graphs inside, which detachnet never writes: some never end."""
_ERROR = 3


def open_onnx(path: Path) -> Runner:
    """Through ONNX Runtime, on the CPU.

    Raises:
        ExportError: It is no graph, or holds what detachnet never writes.
    """
    session = onnx_session(path, torch.get_num_threads(), {WEIGHTS})
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    return lambda images: run_onnx(session, path, made.name, given.name, images)


def onnx_session(
    path: Path, threads: int, weights: Set[str], optimized: Path | None = None, without: Sequence[str] = ()
) -> Any:
    """A graph opened by ONNX Runtime on the CPU, after a look at the files it refers to.

    Args:
        path: The graph.
        threads: Threads per run.
        weights: Names of the files in its folder that it may read.
        optimized: Where to write the graph as it is run here.
        without: Names of optimizations to leave out.

    Raises:
        ExportError: It is none, or refers to another file, or holds a loop.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = _ERROR  # it warns that such a graph is for this machine only
    try:
        _check_onnx(path, weights)
        return onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
        )
    except ExportError:
        raise
    except Exception as error:  # the runtime's own classes
        raise ExportError(f"ONNX Runtime cannot open {path}", what=one_line(error)) from error


def run_onnx(session: Any, path: Path, output: str, name: str, images: Tensor) -> Tensor:
    """One output of a graph.

    Raises:
        ExportError: ONNX Runtime cannot run it on these images.
    """
    try:
        return torch.from_numpy(session.run([output], {name: images.numpy()})[0])
    except Exception as error:  # the runtime's own classes
        raise ExportError(f"ONNX Runtime cannot run {path}", what=one_line(error)) from error


def _check_onnx(path: Path, weights: Set[str]) -> None:
    """Refuse a graph that reads a file it should not, or that may never end.

    Raises:
        ExportError: It does.
    """
    import onnx

    try:
        model = onnx.ModelProto.FromString(read_file(path))
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {path}") from error
    except Exception as error:  # protobuf's own classes
        raise ExportError(f"{path} is no ONNX graph", what=one_line(error)) from error
    for part in _parts(model):
        if isinstance(part, onnx.NodeProto) and part.op_type in _LOOPS:
            raise ExportError(f"{path} holds a {part.op_type}, which detachnet never writes; it is not opened")
        if isinstance(part, onnx.TensorProto):
            for entry in part.external_data:
                if entry.key == "location" and entry.value not in weights:
                    raise ExportError(
                        f"{path} refers to a file that is none of its own; it is not opened",
                        where=repr(entry.value),
                    )
    for name in weights:
        if (path.parent / name).exists():
            open_file(path.parent / name).close()


def _parts(model: Any) -> Iterator[Any]:
    """Every message in an ONNX model, however deep."""
    waiting = [model]
    while waiting:
        part = waiting.pop()
        yield part
        for field, value in part.ListFields():
            if field.message_type is not None:
                waiting += value if _is_repeated(value) else [value]


def _is_repeated(value: Any) -> bool:
    return hasattr(value, "__len__") and not hasattr(value, "ListFields")
