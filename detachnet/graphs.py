"""plain module <-> a graph in a file: ONNX, torch.export's pt2, ExecuTorch's pte."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from detachnet.errors import ExportError

Format = Literal["onnx", "pt2", "pte"]
Runner = Callable[[Tensor], Tensor]
"""Images `(B, C, H, W)` to outputs `(B, num_classes)`, through another runtime than the module's own."""

INPUT, OUTPUT = "images", "logits"
"""Names of every graph's input and output."""
WEIGHTS = "weights.bin"
"""The one file of weights that all ONNX graphs of a folder refer to."""
MAX_BATCH: dict[Format, int | None] = {"onnx": None, "pt2": None, "pte": 8}
"""The most images at once; ExecuTorch plans its memory for them when a model is exported."""

_EXTRAS: dict[Format, tuple[str, tuple[str, ...]]] = {
    "onnx": ("export", ("onnx", "onnxscript", "onnxruntime")),
    "pt2": ("", ()),
    "pte": ("executorch", ("executorch",)),
}
_PICKLED = ("custom_obj", "opaque_obj", "serialized_")
"""Members of pt2 archives that torch unpickles: constants of other classes, and all of the formats before."""
_ALIGNMENT = 64
_INLINE_BYTES = 256
"""Smaller tensors stay in the graph: shapes must be there when it is loaded, and sharing them saves nothing."""


class SharedWeights:
    """A file of tensors in which the same bytes are stored once.

    Attributes:
        used: Bytes of the tensors that were asked for since `used` was last set to 0, each counted once.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}
        self._counted: set[int] = set()
        self.used = 0

    def start(self) -> None:
        """Count `used` anew, for the next model."""
        self._counted.clear()
        self.used = 0

    def place(self, content: bytes) -> int:
        """Where some bytes are in the file, in bytes from its start; written if they are new."""
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
            self._places[key] = self._file.tell()
            self._file.write(content)
        place = self._places[key]
        if place not in self._counted:
            self._counted.add(place)
            self.used += len(content)
        return place


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


def trace_export(module: nn.Module, example: Tensor, format: Format) -> torch.export.ExportedProgram:
    """`torch.export` of a module, with the number of images left free."""
    batch = torch.export.Dim("batch", max=MAX_BATCH[format])
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))


def onnx_model(module: nn.Module, example: Tensor, fold: bool = False) -> Any:
    """A module as an `onnx.ModelProto` with its weights inside.

    Args:
        module: In evaluation mode, on the CPU.
        example: Some images.
        fold: Fold batch norms into the convolutions in front of them. That changes the convolutions' weights, so
            models with norms of their own do not share them any more.
    """
    from onnxscript import optimizer

    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        optimize=fold,
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
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


def write_onnx(model: Any, path: Path, weights: SharedWeights, metadata: Mapping[str, str]) -> None:
    """Write a graph that refers to a shared file of weights.

    Args:
        model: An `onnx.ModelProto`; its weights are taken out of it.
        path: The graph's file, in the folder of the weights.
        weights: Where the weights go.
        metadata: Becomes the graph's `metadata_props`.
    """
    from onnx import helper
    from onnx.external_data_helper import set_external_data

    for tensor in model.graph.initializer:
        content = bytes(tensor.raw_data)
        if len(content) >= _INLINE_BYTES:
            set_external_data(tensor, WEIGHTS, offset=weights.place(content), length=len(content))
            tensor.ClearField("raw_data")
    helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())


def write_pt2(module: nn.Module, example: Tensor, path: Path) -> None:
    """Write `torch.export`'s file; without example inputs there is no pickle in it."""
    program = trace_export(module, example, "pt2")
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def write_pte(module: nn.Module, example: Tensor, path: Path) -> None:
    """Write an ExecuTorch program for the XNNPACK backend (float32 on the CPU)."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = trace_export(module, example, "pte")
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def open_graph(path: str | Path) -> Runner:
    """A graph's file as a function of images, through the runtime its format is for.

    Nothing is unpickled: a pt2 file that would make torch do so is refused.

    Raises:
        ExportError: The file is of no known format, holds a pickle, or the format's packages are not installed.
    """
    path = Path(path)
    open_format = {".onnx": _open_onnx, ".pt2": _open_pt2, ".pte": _open_pte}.get(path.suffix)
    if open_format is None:
        raise ExportError(f"{path} is no graph of a known format", hint=".onnx, .pt2 or .pte")
    check_installed(path.suffix[1:])  # type: ignore[arg-type]
    return open_format(path)


def _open_onnx(path: Path) -> Runner:
    """Through ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _open_pt2(path: Path) -> Runner:
    """Through torch, after a look whether it would unpickle anything."""
    pickles = list(_pickles(path))
    if pickles:
        raise ExportError(
            f"{path} holds pickled objects, which may run any code; detachnet writes none and opens none",
            where=", ".join(pickles),
        )
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = module(images)
        return outputs

    return run


def _pickles(path: Path) -> Iterator[str]:
    """The members of a pt2 archive that `torch.export.load` would unpickle."""
    with _archive(path) as archive:
        for member in archive.infolist():
            name = member.filename
            last = name.rpartition("/")[2]
            if last.startswith(_PICKLED) or (last.endswith((".pt", ".pkl")) and member.file_size):
                yield name
            elif name.endswith("_config.json"):
                entries = json.loads(archive.read(name)).get("config", {}).values()
                yield from (f"{name}: {entry['path_name']}" for entry in entries if entry.get("use_pickle"))


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/archive_format") for name in archive.namelist()):
                raise ExportError(f"{path} is no pt2 archive of this version of torch.export")
            yield archive
    except (zipfile.BadZipFile, json.JSONDecodeError, AttributeError, KeyError) as error:
        raise ExportError(f"{path} is no complete pt2 file", what=str(error)) from error


def _open_pte(path: Path) -> Runner:
    """Through ExecuTorch's own runtime."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> Tensor:
        outputs: Tensor = method.execute([images])[0]
        return outputs.clone()

    return run
