"""plain module <-> a graph in a file: ONNX, torch.export's pt2, ExecuTorch's pte."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor, nn

from detachnet.deploy.archive import clean_archive
from detachnet.errors import ExportError, one_line
from detachnet.losses import logits
from detachnet.storage import open_file, read_file
from detachnet.surgery.widths.reading import Pick

Format = Literal["onnx", "pt2", "pte"]
Runner = Callable[[Tensor], Tensor]
"""Images `(B, C, H, W)` to outputs `(B, num_classes)`, through another runtime than the module's own."""
INPUT, OUTPUT = "images", "logits"
"""Names of every model's input and output."""
FEATURE_IN, FEATURE_OUT = "feature", "feature_out"
"""Names of the input and output of graphs that begin or end inside the network."""
WEIGHTS = "weights.bin"
"""The one file of weights that all ONNX graphs of a folder refer to."""
MAX_BATCH: dict[Format, int | None] = {"onnx": None, "pt2": None, "pte": 8}
"""The most images at once; ExecuTorch plans its memory for them when a model is exported."""
_EXTRAS: dict[Format, tuple[str, tuple[str, ...]]] = {
    "onnx": ("export", ("onnx", "onnxscript", "onnxruntime")),
    "pt2": ("", ()),
    "pte": ("executorch", ("executorch",)),
}
_LOOPS = ("Loop", "Scan", "If")
"""Operators with graphs inside, which detachnet never writes: some never end."""
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

    def __contains__(self, content: bytes) -> bool:
        return hashlib.sha256(content).digest() in self._places

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


class MainOutput(nn.Module):
    """A model without what it returns besides its main output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The main output."""
        return logits(self.module(x))


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


def onnx_model(
    module: nn.Module, example: Tensor, fold: bool = False, names: tuple[str, str] = (INPUT, OUTPUT)
) -> Any:
    """A module as an `onnx.ModelProto` with its weights inside.

    Args:
        module: In evaluation mode, on the CPU.
        example: Some images.
        fold: Fold batch norms into the convolutions in front of them. That changes the convolutions' weights, so
            models with norms of their own do not share them any more.
        names: Of its input and output.
    """
    from onnxscript import optimizer

    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        optimize=fold,
        verbose=False,
        input_names=names[:1],
        output_names=names[1:],
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


def read_parts(model: Any, parts: Mapping[str, tuple[Tensor, Pick]], weights: SharedWeights) -> int:
    """Let a graph read parts of tensors that the file of weights has already, in place of copies of its own.

    Runtimes take the parts when they load the graph; it runs as fast.

    Args:
        model: An `onnx.ModelProto` with its weights inside.
        parts: Name of a weight → the tensor it is a part of, and which part; weights are found by what they hold.
        weights: Where the weights go.

    Returns:
        Bytes of those tensors that the graph does not read.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes, unread = list[Any](), 0
    known: dict[tuple[tuple[int, ...], bytes], tuple[Tensor, Pick]] = {}
    for whole, pick in parts.values():
        turned = [(whole.t(), pick.t())] if whole.ndim == 2 else []  # as layers with channels last have them
        for one, its in [(whole, pick), *turned]:
            known.setdefault((tuple(its(one).shape), _bytes_of(its(one))), (one, its))
    for tensor in list(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or len(tensor.raw_data) < _INLINE_BYTES:
            continue
        part = known.get((tuple(tensor.dims), bytes(tensor.raw_data)))
        if part is None or not (part[1].front or part[1].indices):
            continue
        whole, pick = part
        if (content := _bytes_of(whole)) not in weights:
            continue
        name, taken = tensor.name, f"{tensor.name}.whole"
        unread += len(content) - len(tensor.raw_data)
        model.graph.initializer.remove(tensor)
        constants = [helper.make_tensor(taken, TensorProto.FLOAT, whole.shape, content, raw=True)]
        steps: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        if pick.front:
            axes, ends = list(pick.front), list(pick.front.values())
            steps.append(("Slice", {"starts": [0] * len(axes), "ends": ends, "axes": axes}, {}))
        for axis, index in pick.indices.items():
            steps.append(("Gather", {f"kept.{axis}": index.tolist()}, {"axis": axis}))
        for i, (kind, inputs, attributes) in enumerate(steps):
            made = name if i == len(steps) - 1 else f"{name}.{i}"
            numbers = {f"{name}.{key}": np.array(value, np.int64) for key, value in inputs.items()}
            constants += [numpy_helper.from_array(value, key) for key, value in numbers.items()]
            nodes.append(helper.make_node(kind, [taken, *numbers], [made], **attributes))
            taken = made
        model.graph.initializer.extend(constants)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    return unread


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


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

    Nothing of the file's is run but its graph: a pt2 file is read, checked and written anew with tensors and known
    operators only before torch sees it, and an ONNX graph may read no file but the weights beside it.

    Raises:
        ExportError: The file is of no known format, holds what detachnet never writes, or the format's packages
            are not installed.
    """
    path = Path(path)
    open_format = {".onnx": _open_onnx, ".pt2": _open_pt2, ".pte": _open_pte}.get(path.suffix)
    if open_format is None:
        raise ExportError(f"{path} is no graph of a known format", hint=".onnx, .pt2 or .pte")
    check_installed(path.suffix[1:])  # type: ignore[arg-type]
    return open_format(path)


def _open_onnx(path: Path) -> Runner:
    """Through ONNX Runtime, on the CPU."""
    session = onnx_session(path, torch.get_num_threads(), {WEIGHTS})
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    return lambda images: run_onnx(session, path, made.name, given.name, images)


def onnx_session(path: Path, threads: int, weights: Set[str]) -> Any:
    """A graph opened by ONNX Runtime on the CPU, after a look at the files it refers to.

    Args:
        path: The graph.
        threads: Threads per run.
        weights: Names of the files in its folder that it may read.

    Raises:
        ExportError: It is none, or refers to another file, or holds a loop.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        _check_onnx(path, weights)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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


def _open_pt2(path: Path) -> Runner:
    """Through torch, which sees a cleaned copy."""
    cleaned = clean_archive(path)
    try:
        module = torch.export.load(cleaned).module()
    except Exception as error:  # torch raises anything on what is no program
        raise ExportError(f"torch cannot open {path}", what=one_line(error)) from error

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = module(images)
        return outputs

    return run


def _open_pte(path: Path) -> Runner:
    """Through ExecuTorch's own runtime."""
    from executorch.runtime import Runtime

    open_file(path).close()  # a pipe would never end
    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> Tensor:
        outputs: Tensor = method.execute([images])[0]
        return outputs.clone()

    return run
