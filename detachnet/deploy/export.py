"""net -> a folder for a device: a graph per model, shared weights, and a manifest with checksums over all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from detachnet.data.datasets import Split
from detachnet.deploy.formats import (
    FEATURE_IN,
    FEATURE_OUT,
    INPUT,
    MAX_BATCH,
    OUTPUT,
    Format,
    Piece,
    Precision,
    Writer,
    Written,
    check_installed,
)
from detachnet.deploy.half import rounded
from detachnet.deploy.manifest import (
    FILE_NAME,
    ExportedLeg,
    ExportedModel,
    ImageInput,
    Manifest,
    dump,
    exported_file,
)
from detachnet.deploy.measurement import Latency
from detachnet.deploy.onnx_writer import OnnxWriter
from detachnet.deploy.program import MainOutput
from detachnet.deploy.pt2 import Pt2Writer
from detachnet.deploy.pte import PteWriter
from detachnet.deploy.quantize import Int8Writer
from detachnet.deploy.verify import CHECKED_BATCHES
from detachnet.errors import ExportError, nearest
from detachnet.evaluation import check_fits
from detachnet.losses import logits
from detachnet.progress import counted
from detachnet.storage import MANIFEST, new_folder, write_new
from detachnet.surgery.detachable import DetachableNet, family_in
from detachnet.surgery.legs import Leg

logger = logging.getLogger("detachnet")
_Splits = tuple[Split, Split]
_T = TypeVar("_T")


def export(
    net: DetachableNet,
    folder: str | Path,
    format: Format = "onnx",
    models: Sequence[str] | None = None,
    *,
    precision: Precision = "float32",
    int8: tuple[Split, Split] | None = None,
    latency: Mapping[str, Latency] | None = None,
    legs: bool = False,
) -> Manifest:
    """Write the models of a family as graphs that other runtimes run, in a new folder.

    `onnx` writes a small graph per model and one file of weights in which tensors that are equal are stored once;
    batch norms stay layers of their own, so that the models go on sharing the weights in front of them. Models
    with fewer filters read parts of the tensors that are there; without the base-model they have small ones. `pte`
    (ExecuTorch, XNNPACK) is one file with a method of each model's name, in which tensors that are equal are there
    once, too. `pt2` (torch.export) is a file per model with weights of its own. The number of images per run is
    free (up to 8 in `pte`).

    Every graph is run before this returns, on several images at two batch sizes, and compared with PyTorch. The
    folder appears complete or not at all.

    Args:
        net: The family, in float32; left as it is.
        folder: A new folder.
        format: `onnx`, `pt2` or `pte`.
        models: Names of the models to export; all by default.
        precision: `float16` stores the weights of the ONNX graphs in it, which takes half the bytes; runtimes cast
            them when they load a graph, and compute in float32. Biases and norms stay float32. Each graph is
            compared with PyTorch on the rounded weights, and how far those move the outputs is logged.
        int8: A training and a test split, as `load_data` gives them: quantize the ONNX graphs to int8, calibrated
            on 256 training images, and measure each one's accuracy on the test images, in int8 and before. Batch
            norms are folded first, so models with private ones share only the tensors that rounding leaves equal.
        latency: Model → what was measured of it, for the manifest.
        legs: Also write what models share, and what each has behind, as ONNX graphs of their own
            (`Manifest.legs`): a model can then go on from where another one parted.

    Returns:
        What is in the folder's `manifest.json`.

    Raises:
        ExportError: The folder exists or cannot be written, a package is missing, a model cannot be expressed in
            the format, or a graph's output differs from PyTorch's.
        CutError: No model has one of the names.
        TraceError: This is no family.

    Examples:
        >>> manifest = detachnet.export(net, "family-onnx")
        >>> manifest.names
        ('base', 'sub0', 'sub1')
    """
    net = family_in(net)
    names = _chosen(net, models)
    _check(net, format, precision, int8, legs)
    check_installed(format)
    with new_folder(Path(folder)) as inside:
        writer = _writer(net, inside, format, precision, int8)
        exporting = _Export(net, inside, format, writer)
        models_written = exporting.models(names, latency or {})
        manifest = exporting.manifest(models_written, exporting.legs(names) if legs else ())
        write_new(inside / MANIFEST, dump(manifest).encode())
    return manifest


def _chosen(net: DetachableNet, models: Sequence[str] | None) -> list[str]:
    """The models to export, in the family's order."""
    asked = net.facts.models(net.names) if models is None else [models] if isinstance(models, str) else models
    net.parameters_of(asked)  # refuses unknown names
    if not asked:
        raise ExportError("no model to export was named", hint=f"the models are {', '.join(net.names)}")
    for name in asked:
        if not FILE_NAME.fullmatch(f"{name}.onnx"):
            raise ExportError(
                f"{name!r} is no name for a file that every device has",
                hint="name the sub-model in letters, digits and _ when the family is made",
            )
        if name not in net.facts.models(net.names):
            logger.warning("%s is exported as it was made: it was not trained", name)
    return [name for name in net.names if name in asked]


def _check(net: DetachableNet, format: Format, precision: Precision, int8: _Splits | None, legs: bool) -> None:
    """Refuse what no format here can express, before anything is written."""
    known = get_args(Format)
    if format not in known:
        raise ExportError(f"unknown format {format!r}", nearest=nearest(format, known) or known)
    types = {t.dtype for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()} - {torch.float32}
    if types:
        found = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise ExportError(f"the family has weights in {found}; export writes float32", hint="export(net.float())")
    if int8 is not None and format != "onnx":
        raise ExportError(f"int8 is for the format 'onnx' only, not {format!r}")
    if precision not in ("float32", "float16"):
        hint = "export(net, folder, int8=(training, test)), with images to calibrate with"
        raise ExportError(f"precision={precision!r}: it is 'float32' or 'float16'", hint=hint)
    if precision == "float16" and (format != "onnx" or int8 is not None):
        raise ExportError("float16 is for the format 'onnx' only, and not together with int8")
    if legs and (format != "onnx" or int8 is not None):
        raise ExportError("legs are written for the format 'onnx' only, and not in int8")
    if int8 is not None:
        if not (
            isinstance(int8, tuple | list) and len(int8) == 2 and all(isinstance(split, Split) for split in int8)
        ):
            raise ExportError(
                "int8 is a training and a test split, to calibrate and to measure with",
                hint="export(net, folder, int8=detachnet.load_data('cifar10'))",
            )
        _ = net.facts.known_data  # of which the calibration images are
        for split in int8:
            check_fits(net, split)


def _writer(
    net: DetachableNet, folder: Path, format: Format, precision: Precision, int8: _Splits | None
) -> Writer:
    """What writes the graphs that were asked for."""
    if int8 is not None:
        return Int8Writer(folder, *int8, net.facts.known_data)
    if format == "onnx":
        return OnnxWriter(folder, precision)
    return Pt2Writer() if format == "pt2" else PteWriter(folder)


class _Export:
    """Writes the models of a family, one after another, into one folder."""

    def __init__(self, net: DetachableNet, folder: Path, format: Format, writer: Writer) -> None:
        self.trained, self.folder, self.format, self.writer = net, folder, format, writer
        self.net = rounded(net) if writer.precision == "float16" else net
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(max(CHECKED_BATCHES), *net.plan.input_size, generator=generator)

    def models(self, names: Sequence[str], latency: Mapping[str, Latency]) -> tuple[ExportedModel, ...]:
        """Write the models; what the manifest says of each."""
        each = counted(names, len(names), "models written and compared")
        written = {name: self._model(name) for name in each}
        self._guard("the family", self.writer.finish)
        return tuple(self._described(name, latency.get(name), written[name]) for name in names)

    def _path(self, name: str) -> Path:
        """The file of a model."""
        return self.folder / (self.writer.file or f"{name}.{self.format}")

    def _model(self, name: str) -> Written:
        """Write one model."""
        metadata, parts = _metadata(self.net, name), self.net.parts(name)
        piece = Piece(name, self._module(name), self.images, metadata=metadata, parts=parts)
        written = self._write(piece, self._path(name))
        if self.net is not self.trained:
            self._log_rounding(name)
        return written

    def _described(self, name: str, latency: Latency | None, written: Written) -> ExportedModel:
        """What the manifest says of a model."""
        file, plan = exported_file(self._path(name)), self.net.plan[name]
        known = self.net.facts.accuracy.get(name)
        return ExportedModel(
            name=name,
            file=file.file,
            sha256=file.sha256,
            macs=plan.macs,
            num_params=plan.num_params,
            num_bytes=written.num_bytes,
            accuracy=known if written.accuracy is None else written.accuracy,
            float_accuracy=written.float_accuracy,
            latency=latency,
        )

    def _log_rounding(self, name: str) -> None:
        """Say what rounding its weights does to a model's outputs."""
        with torch.no_grad():
            right, found = (
                logits(net.detach(name).cpu()(self.images.clone())) for net in (self.trained, self.net)
            )
        moved = float((found - right).abs().max() / right.abs().max())
        logger.info("%s: weights in float16 move its outputs by up to %.1g %% of the largest", name, 100 * moved)

    def legs(self, names: Sequence[str]) -> tuple[ExportedLeg, ...]:
        """Write the legs of some models that go on from another one's feature, or give one; in running order."""
        in_front = {leg: front for name in names for front, leg in pairwise([None, *self.net.legs[name]])}
        found = [leg for leg in in_front if leg is not None and (leg.start or leg.end)]
        made: dict[Leg | None, Tensor] = {None: self.images}
        written = []
        for number, leg in counted(enumerate(found), len(found), "legs written and compared"):
            row, made[leg] = self._leg(number, leg, made[in_front[leg]], names)
            written.append(row)
        return tuple(written)

    def _leg(self, number: int, leg: Leg, example: Tensor, names: Sequence[str]) -> tuple[ExportedLeg, Tensor]:
        """Write one; what the manifest says of it, and what it makes of an example."""
        module = self.net.detach_leg(leg).cpu()
        path = self.folder / f"leg.{number}.{self.format}"  # no model can be called so
        module = module if leg.end else MainOutput(module).eval()
        with torch.no_grad():
            output = module(example)
        ends = (FEATURE_IN if leg.start else INPUT, FEATURE_OUT if leg.end else OUTPUT)
        self._write(Piece(str(leg), module, example, ends, {"leg": str(leg)}), path)
        file = exported_file(path)
        row = ExportedLeg(
            models=tuple(name for name in leg.models if name in names),
            start=leg.start,
            end=leg.end,
            macs=leg.macs,
            file=file.file,
            sha256=file.sha256,
        )
        return row, output

    def _write(self, piece: Piece, path: Path) -> Written:
        """Write a graph.

        Raises:
            ExportError: The format cannot express it, or it does not compute what PyTorch does.
        """
        return self._guard(piece.name, lambda: self.writer.write(piece, path))

    def _guard(self, name: str, write: Callable[[], _T]) -> _T:
        """Write something; whatever an exporter raises is one of ours."""
        try:
            return write()
        except (ExportError, OSError):
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = ": ".join([type(error).__name__, "; ".join(lines[:3])])
            raise ExportError(f"{name} cannot be exported as {self.format}", what=what) from error

    def _module(self, name: str) -> nn.Module:
        """One model, which returns its main output alone."""
        module = self.net.detach(name).cpu()
        with torch.no_grad():
            output = module(self.images.clone())
        if isinstance(output, Tensor):
            return module
        if not isinstance(logits(output), Tensor):
            raise ExportError(
                f"{name} returns a {type(output).__name__} that does not begin with a tensor",
                hint="wrap the model in a module that returns its main output",
            )
        return MainOutput(module).eval()

    def manifest(self, models: tuple[ExportedModel, ...], legs: tuple[ExportedLeg, ...]) -> Manifest:
        """What is true of all models of the folder."""
        data, writer = self.net.facts.data, self.writer
        constants: dict[str, Any] = {"mean": data.mean, "std": data.std, "crop_pct": data.crop_pct} if data else {}
        shape, limit = self.net.plan.input_size, MAX_BATCH[self.format]
        return Manifest(
            format=self.format,
            precision=writer.precision,
            models=models,
            weights=exported_file(self.folder / writer.weights) if writer.weights else None,
            input=ImageInput(name=INPUT, shape=shape, max_batch=limit, **constants),
            output=OUTPUT,
            labels=data.classes if data else (),
            num_test=writer.num_test or (data.num_test if data else 0),
            legs=legs,
        )


def _metadata(net: DetachableNet, name: str) -> dict[str, str]:
    """What an ONNX graph says about itself, so that it can be used without the manifest."""
    data = net.facts.data
    said = {"model": name, "input_size": json.dumps(net.plan.input_size)}
    if data is not None:
        said |= {"labels": json.dumps(data.classes), "mean": json.dumps(data.mean), "std": json.dumps(data.std)}
    return said
