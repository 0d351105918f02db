"""net -> a folder for a device: a graph per model, shared weights, and a manifest with checksums over all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from detachnet import graphs, quantize
from detachnet.data import Split
from detachnet.detachable import DetachableNet
from detachnet.errors import ExportError, nearest
from detachnet.graphs import INPUT, OUTPUT, WEIGHTS, Format, Runner, SharedWeights

MANIFEST = "manifest.json"
TOLERANCE = 1e-5
"""Largest difference to PyTorch, relative to the largest output where that is above 1."""
CHECKED_BATCHES = (1, 3)
"""Numbers of images at which every graph is compared with PyTorch."""

_Splits = tuple[Split, Split]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(_Frozen):
    """Measured seconds of one run; a part of `measure.Measurement`.

    Attributes:
        runtime: What ran the model.
        device: Where.
        batch: Images per run.
        threads: CPU threads per run.
        n: Timed runs.
        p50_s: Median seconds per run.
        p90_s: Nine of ten runs take no longer.
        p99_s: 99 of 100 runs take no longer.
    """

    runtime: str
    device: str
    batch: int
    threads: int
    n: int
    p50_s: float
    p90_s: float
    p99_s: float


class ExportedFile(_Frozen):
    """A file of an export folder.

    Attributes:
        file: Its name in the folder.
        num_bytes: Its size.
        sha256: Checksum of its content, hexadecimal.
    """

    file: _FileName
    num_bytes: int
    sha256: str


class ExportedModel(_Frozen):
    """One model of an export folder.

    Attributes:
        name: `base`, `sub0`, …
        file: Its graph's file in the folder.
        sha256: Checksum of that file, hexadecimal.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters.
        num_bytes: Bytes of its graph and of the weights it uses: what it takes alone.
        accuracy: Test accuracy, in [0, 1], if it is known: of the trained model in float32, of this very file in
            int8.
        float_accuracy: That of the trained model, where `accuracy` is that of an int8 file.
        latency: As measured before the export; None if it was not.
    """

    name: str
    file: _FileName
    sha256: str
    macs: int
    num_params: int
    num_bytes: int
    accuracy: float | None = None
    float_accuracy: float | None = None
    latency: Latency | None = None


class ImageInput(_Frozen):
    """What every graph takes: float32 images `(B, *shape)`, of values `(pixel / 255 - mean) / std`.

    Attributes:
        name: Of the input.
        shape: Of one image, `(C, H, W)`.
        mean: Per channel; empty if the family does not know what it was trained on.
        std: Per channel.
        crop_pct: As in `DataInfo`.
        max_batch: The most images at once; None for any number.
    """

    name: str
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop_pct: float | None = None
    max_batch: int | None = None


class Manifest(_Frozen):
    """What is in an export folder.

    Attributes:
        format_version: Raised when the meaning of a folder changes.
        format: `onnx`, `pt2` or `pte`.
        precision: `float32` or `int8`.
        models: The base-model first, if it is there.
        weights: The file that all graphs of `onnx` share; None where each model's file has its own.
        input: What every graph takes.
        output: Name of every graph's output, `(B, num_classes)`.
        labels: Name of each class; empty if they are not known.
        num_test: Number of test images that accuracies are measured on; 0 if that is not known.
    """

    format_version: Literal[1] = 1
    format: Format
    precision: Literal["float32", "int8"]
    models: tuple[ExportedModel, ...]
    weights: ExportedFile | None
    input: ImageInput
    output: str
    labels: tuple[str, ...]
    num_test: int

    @property
    def names(self) -> tuple[str, ...]:
        """The models."""
        return tuple(model.name for model in self.models)

    def __getitem__(self, name: str) -> ExportedModel:
        return next(model for model in self.models if model.name == name)


def export(
    net: DetachableNet,
    folder: str | Path,
    format: Format = "onnx",
    models: Sequence[str] | None = None,
    *,
    int8: tuple[Split, Split] | None = None,
    latency: Mapping[str, Latency] | None = None,
) -> Manifest:
    """Write the models of a family as graphs that other runtimes run, in a new folder.

    `onnx` writes a small graph per model and one file of weights in which tensors that are equal are stored once;
    batch norms stay layers of their own, so that the models go on sharing the weights in front of them. `pt2`
    (torch.export) and `pte` (ExecuTorch, XNNPACK) write a file per model with weights of its own. The number of
    images per run is free (up to 8 in `pte`).

    Every graph is run before this returns, on several images at two batch sizes, and compared with PyTorch. The
    folder appears complete or not at all.

    Args:
        net: The family, in float32; left as it is.
        folder: A new folder.
        format: `onnx`, `pt2` or `pte`.
        models: Names of the models to export; all by default.
        int8: A training and a test split, as `load_data` gives them: quantize the ONNX graphs to int8, calibrated
            on 256 training images, and measure each one's accuracy on the test images. Batch norms are folded
            first, so models with private ones share only the tensors that rounding leaves equal.
        latency: Model → what was measured of it, for the manifest.

    Returns:
        What is in the folder's `manifest.json`.

    Raises:
        ExportError: The folder exists or cannot be written, a package is missing, a model cannot be expressed in
            the format, or a graph's output differs from PyTorch's.
        CutError: No model has one of the names.

    Examples:
        >>> manifest = detachnet.export(net, "family-onnx")
        >>> manifest.names
        ('base', 'sub0', 'sub1')
    """
    names = _chosen(net, models)
    _check(net, format, int8)
    graphs.check_installed(format)
    with _new_folder(Path(folder)) as inside:
        with (inside / WEIGHTS).open("wb", buffering=0) if format == "onnx" else nullcontext() as file:
            writer = _Writer(net, inside, format, file, int8)
            written = tuple(writer.write(name, (latency or {}).get(name)) for name in names)
        manifest = _manifest(net, format, written, _file(inside / WEIGHTS) if file else None, int8)
        (inside / MANIFEST).write_text(_dump(manifest), encoding="utf-8")
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """What is in an export folder, all files checked against their checksums.

    Raises:
        ExportError: There is no manifest, it is of an unknown version, or a file is missing or changed.
    """
    folder = Path(folder)
    manifest = _parse(folder / MANIFEST)
    files = {model.file: model.sha256 for model in manifest.models}
    if manifest.weights is not None:
        files[manifest.weights.file] = manifest.weights.sha256
    for name, sha256 in files.items():
        try:
            content = _file(folder / name)
        except OSError as error:
            raise ExportError(f"{folder / name} cannot be read", what=str(error), hint="export again") from error
        if content.sha256 != sha256:
            raise ExportError(
                f"{folder / name} is damaged: its content does not match its checksum in {MANIFEST}",
                hint="copy the folder again, or export again",
            )
    return manifest


def _manifest(
    net: DetachableNet,
    format: Format,
    models: tuple[ExportedModel, ...],
    weights: ExportedFile | None,
    int8: _Splits | None,
) -> Manifest:
    """What is true of all models of the folder."""
    data = net.data
    constants: dict[str, Any] = {"mean": data.mean, "std": data.std, "crop_pct": data.crop_pct} if data else {}
    shape, limit = net.plan.input_size, graphs.MAX_BATCH[format]
    return Manifest(
        format=format,
        precision="int8" if int8 else "float32",
        models=models,
        weights=weights,
        input=ImageInput(name=INPUT, shape=shape, max_batch=limit, **constants),
        output=OUTPUT,
        labels=data.classes if data else (),
        num_test=len(int8[1]) if int8 else data.num_test if data else 0,
    )


def _dump(manifest: Manifest) -> str:
    """A manifest as JSON, with a checksum over itself."""
    fields = manifest.model_dump(mode="json")
    return json.dumps(fields | {"sha256": _digest(fields)}, indent=1) + "\n"


def _digest(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _parse(path: Path) -> Manifest:
    """A manifest's file, checked."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if (found := fields.get("format_version")) != 1:
            raise ExportError(
                f"{path} has format version {found}; this version of detachnet reads 1",
                hint="pip install --upgrade detachnet",
            )
        if fields.pop("sha256", None) != _digest(fields):
            raise ExportError(
                f"{path} is damaged: its content does not match its checksum", hint="copy the folder again"
            )
        return Manifest.model_validate_json(json.dumps(fields))
    except FileNotFoundError as error:
        raise ExportError(
            f"{path.parent} is no export folder: it has no {MANIFEST}",
            hint="detachnet export CHECKPOINT -o DIR makes one",
        ) from error
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        what = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ExportError(f"{path} is no manifest of detachnet's", what=what) from error


def _chosen(net: DetachableNet, models: Sequence[str] | None) -> list[str]:
    """The models to export, in the family's order."""
    asked = net.names if models is None else [models] if isinstance(models, str) else models
    net.parameters_of(asked)  # refuses unknown names
    if not asked:
        raise ExportError("no model to export was named", hint=f"the models are {', '.join(net.names)}")
    return [name for name in net.names if name in asked]


def _check(net: DetachableNet, format: Format, int8: _Splits | None) -> None:
    """Refuse what no format here can express, before anything is written."""
    known = get_args(Format)
    if format not in known:
        raise ExportError(f"unknown format {format!r}", nearest=nearest(format, known) or known)
    types = {t.dtype for t in net.state_dict().values() if t.is_floating_point()} - {torch.float32}
    if types:
        found = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise ExportError(f"the family has weights in {found}; export writes float32", hint="export(net.float())")
    if int8 is not None and format != "onnx":
        raise ExportError(f"int8 is for the format 'onnx' only, not {format!r}")
    if int8 is not None and net.data is None:
        raise ExportError("int8 needs to know how images are normalized: the family has no data info")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, put in its place when all went well and removed when not, Ctrl-C included."""
    if os.path.lexists(folder):
        raise ExportError(f"{folder} exists already", hint="name a new folder, or remove this one")
    inside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside.mkdir()
        yield inside
        inside.rename(folder)
    except OSError as error:
        raise ExportError(f"cannot write {folder}", what=str(error)) from error
    finally:
        shutil.rmtree(inside, ignore_errors=True)


class _Writer:
    """Writes and checks the models of a family, one after another, into one folder."""

    def __init__(
        self, net: DetachableNet, folder: Path, format: Format, weights: BinaryIO | None, int8: _Splits | None
    ) -> None:
        self.net, self.folder, self.format, self.int8 = net, folder, format, int8
        self.shared = SharedWeights(weights) if weights else None
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(max(CHECKED_BATCHES), *net.plan.input_size, generator=generator)

    def write(self, name: str, latency: Latency | None) -> ExportedModel:
        """Write one model; what the manifest says of it."""
        module, path = self.net.detach(name).cpu(), self.folder / f"{name}.{self.format}"
        with torch.no_grad():
            output = module(self.images)
        if not isinstance(output, Tensor):
            raise ExportError(
                f"{name} returns a {type(output).__name__}, not one tensor",
                hint="wrap the model in a module that returns its main output",
            )
        try:
            own_bytes = self._write_file(name, module, path)
        except (ExportError, OSError):
            raise
        except Exception as error:  # whatever an exporter raises
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = ": ".join([type(error).__name__, "; ".join(lines[:3])])
            raise ExportError(f"{name} cannot be exported as {self.format}", what=what) from error
        file, plan = _file(path), self.net.plan[name]
        return ExportedModel(
            name=name,
            file=file.file,
            sha256=file.sha256,
            macs=plan.macs,
            num_params=plan.num_params,
            num_bytes=file.num_bytes + own_bytes,
            latency=latency,
            **self._accuracies(name, path),
        )

    def _write_file(self, name: str, module: nn.Module, path: Path) -> int:
        """One model's graph, compared with the model; the bytes it uses of the shared weights."""
        if self.shared is None:
            {"pt2": graphs.write_pt2, "pte": graphs.write_pte}[self.format](module, self.images, path)
            compare(name, module, graphs.open_graph(path), self.images)
            return 0
        model = graphs.onnx_model(module, self.images, fold=self.int8 is not None)
        if self.int8 is not None and self.net.data is not None:
            path.write_bytes(model.SerializeToString())
            compare(name, module, graphs.open_graph(path), self.images)  # before rounding to int8
            model = quantize.quantize(model, quantize.calibration(self.int8[0], self.net.data))
        self.shared.start()
        graphs.write_onnx(model, path, self.shared, _metadata(self.net, name))
        if self.int8 is None:
            compare(name, module, graphs.open_graph(path), self.images)
        return self.shared.used

    def _accuracies(self, name: str, path: Path) -> dict[str, float | None]:
        """The trained model's; and of an int8 file its own, measured."""
        known = self.net.accuracy.get(name)
        if self.int8 is None or self.net.data is None:
            return {"accuracy": known}
        measured = quantize.accuracy(graphs.open_graph(path), self.int8[1], self.net.data)
        return {"accuracy": measured, "float_accuracy": known}


def compare(name: str, module: nn.Module, run: Runner, images: Tensor) -> None:
    """Refuse a graph whose output is not the module's, at several batch sizes.

    Raises:
        ExportError: They differ by more than `TOLERANCE`.
    """
    for batch in CHECKED_BATCHES:
        with torch.no_grad():
            wanted = module(images[:batch])
        found = run(images[:batch])
        bound = TOLERANCE * max(1.0, float(wanted.abs().max()))
        same_shape = found.shape == wanted.shape
        difference = float((found - wanted).abs().max()) if same_shape else float("inf")
        if not difference <= bound:  # also where it is no number
            raise ExportError(
                f"the exported {name} does not compute what PyTorch does",
                what=f"outputs differ by {difference:.1e} on {batch} images, {bound:.1e} is allowed",
                hint="report it with the model's name; nothing was written",
            )


def _metadata(net: DetachableNet, name: str) -> dict[str, str]:
    """What an ONNX graph says about itself, so that it can be used without the manifest."""
    data = net.data
    said = {"model": name, "input_size": json.dumps(net.plan.input_size)}
    if data is not None:
        said |= {"labels": json.dumps(data.classes), "mean": json.dumps(data.mean), "std": json.dumps(data.std)}
    return said


def _file(path: Path) -> ExportedFile:
    """A file's name, size and checksum; safe on the disk when this returns."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return ExportedFile(file=path.name, num_bytes=path.stat().st_size, sha256=digest)
