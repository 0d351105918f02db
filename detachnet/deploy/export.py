"""net -> a folder for a device: a graph per model, shared weights, and a manifest with checksums over all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch
from torch import Tensor, nn

from detachnet.data.datasets import Split
from detachnet.deploy import formats as graphs, quantize
from detachnet.deploy.formats import INPUT, OUTPUT, WEIGHTS, Format, MainOutput, Runner, SharedWeights
from detachnet.deploy.manifest import (
    ExportedFile,
    ExportedLeg,
    ExportedModel,
    ImageInput,
    Latency,
    Manifest,
    dump,
    exported_file,
)
from detachnet.errors import ExportError, nearest
from detachnet.losses import logits
from detachnet.progress import counted
from detachnet.storage import MANIFEST, new_folder, write_new
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.legs import Leg

TOLERANCE = 1e-5
"""Largest difference to PyTorch, relative to the largest output where that is above 1."""
CHECKED_BATCHES = (1, 3)
"""Numbers of images at which every graph is compared with PyTorch."""
_Splits = tuple[Split, Split]


def export(
    net: DetachableNet,
    folder: str | Path,
    format: Format = "onnx",
    models: Sequence[str] | None = None,
    *,
    int8: tuple[Split, Split] | None = None,
    latency: Mapping[str, Latency] | None = None,
    legs: bool = False,
) -> Manifest:
    """Write the models of a family as graphs that other runtimes run, in a new folder.

    `onnx` writes a small graph per model and one file of weights in which tensors that are equal are stored once;
    batch norms stay layers of their own, so that the models go on sharing the weights in front of them. Models
    with fewer filters read parts of the tensors that are there; without the base-model they have small ones. `pt2`
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
        legs: Also write what models share, and what each has behind, as ONNX graphs of their own
            (`Manifest.legs`): a model can then go on from where another one parted.

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
    _check(net, format, int8, legs)
    graphs.check_installed(format)
    with new_folder(Path(folder)) as inside:
        with (inside / WEIGHTS).open("wb", buffering=0) if format == "onnx" else nullcontext() as file:
            writer = _Writer(net, inside, format, file, int8)
            each = counted(names, len(names), "models written and compared")
            written = tuple(writer.write(name, (latency or {}).get(name)) for name in each)
            parts = writer.write_legs(names) if legs else ()
        manifest = _manifest(net, format, written, exported_file(inside / WEIGHTS) if file else None, int8, parts)
        write_new(inside / MANIFEST, dump(manifest).encode())
    return manifest


def _manifest(
    net: DetachableNet,
    format: Format,
    models: tuple[ExportedModel, ...],
    weights: ExportedFile | None,
    int8: _Splits | None,
    legs: tuple[ExportedLeg, ...],
) -> Manifest:
    """What is true of all models of the folder."""
    data = net.facts.data
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
        legs=legs,
    )


def _chosen(net: DetachableNet, models: Sequence[str] | None) -> list[str]:
    """The models to export, in the family's order."""
    asked = net.names if models is None else [models] if isinstance(models, str) else models
    net.parameters_of(asked)  # refuses unknown names
    if not asked:
        raise ExportError("no model to export was named", hint=f"the models are {', '.join(net.names)}")
    return [name for name in net.names if name in asked]


def _check(net: DetachableNet, format: Format, int8: _Splits | None, legs: bool) -> None:
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
    if legs and (format != "onnx" or int8 is not None):
        raise ExportError("legs are written for the format 'onnx' in float32 only")
    if int8 is not None:
        _ = net.facts.known_data  # of which the calibration images are


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
        module, path = self._module(name), self.folder / f"{name}.{self.format}"
        try:
            own_bytes = self._write_file(name, module, path)
        except (ExportError, OSError):
            raise
        except Exception as error:  # whatever an exporter raises
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = ": ".join([type(error).__name__, "; ".join(lines[:3])])
            raise ExportError(f"{name} cannot be exported as {self.format}", what=what) from error
        file, plan = exported_file(path), self.net.plan[name]
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

    def write_legs(self, names: Sequence[str]) -> tuple[ExportedLeg, ...]:
        """Write the legs of some models that go on from another one's feature, or give one; in running order."""
        made: dict[str, Tensor] = {"": self.images}
        found = dict.fromkeys(leg for name in names for leg in self.net.legs[name] if leg.start or leg.end)
        return tuple(self._write_leg(number, leg, made) for number, leg in enumerate(found))

    def _write_leg(self, number: int, leg: Leg, made: dict[str, Tensor]) -> ExportedLeg:
        """Write one, and keep the feature it makes of the images for those that take it in."""
        assert self.shared is not None
        module = self.net.detach_leg(leg).cpu()
        path = self.folder / f"leg.{number}.{self.format}"  # no model can be called so
        module = module if leg.end else MainOutput(module).eval()
        example = made[leg.start]
        with torch.no_grad():
            made |= {leg.end: module(example)} if leg.end else {}
        names = (graphs.FEATURE_IN if leg.start else INPUT, graphs.FEATURE_OUT if leg.end else OUTPUT)
        graphs.write_onnx(graphs.onnx_model(module, example, names=names), path, self.shared, {"leg": str(leg)})
        compare(str(leg), module, graphs.open_graph(path), example)
        file = exported_file(path)
        return ExportedLeg(
            models=leg.models,
            start=leg.start,
            end=leg.end,
            macs=leg.macs,
            file=file.file,
            sha256=file.sha256,
        )

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

    def _write_file(self, name: str, module: nn.Module, path: Path) -> int:
        """One model's graph, compared with the model; the bytes it uses of the shared weights."""
        if self.shared is None:
            {"pt2": graphs.write_pt2, "pte": graphs.write_pte}[self.format](module, self.images.clone(), path)
            compare(name, module, graphs.open_graph(path), self.images)
            return 0
        model = graphs.onnx_model(module, self.images.clone(), fold=self.int8 is not None)
        unread = 0
        if self.int8 is not None:
            path.write_bytes(model.SerializeToString())
            compare(name, module, graphs.open_graph(path), self.images)  # before rounding to int8
            model = quantize.quantize(model, quantize.calibration(self.int8[0], self.net.facts.known_data))
        else:
            unread = graphs.read_parts(model, self.net.parts(name), self.shared)
        self.shared.start()
        graphs.write_onnx(model, path, self.shared, _metadata(self.net, name))
        if self.int8 is None:
            compare(name, module, graphs.open_graph(path), self.images)
        return self.shared.used - unread

    def _accuracies(self, name: str, path: Path) -> dict[str, float | None]:
        """The trained model's; and of an int8 file its own, measured."""
        known = self.net.facts.accuracy.get(name)
        if self.int8 is None:
            return {"accuracy": known}
        measured = quantize.accuracy(graphs.open_graph(path), self.int8[1], self.net.facts.known_data)
        return {"accuracy": measured, "float_accuracy": known}


def compare(name: str, module: nn.Module, run: Runner, images: Tensor) -> None:
    """Refuse a graph whose output is not the module's, at several batch sizes.

    Raises:
        ExportError: They differ by more than `TOLERANCE`.
    """
    for batch in CHECKED_BATCHES:
        with torch.no_grad():
            wanted = module(images[:batch].clone())  # some models change their images
        found = run(images[:batch].clone())
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
    data = net.facts.data
    said = {"model": name, "input_size": json.dumps(net.plan.input_size)}
    if data is not None:
        said |= {"labels": json.dumps(data.classes), "mean": json.dumps(data.mean), "std": json.dumps(data.std)}
    return said
