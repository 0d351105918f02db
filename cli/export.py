"""`detachnet export`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detachnet.errors import ExportError

from .console import friendly, note, progress, show
from .opening import MOST, in_memory, known_root, open_family
from .options import Checkpoint, DataRoot, Download, ModelFile

if TYPE_CHECKING:
    from detachnet.data.datasets import Split
    from detachnet.deploy.manifest import Manifest
    from detachnet.deploy.measurement import Latency
    from detachnet.surgery.detachable import DetachableNet


@friendly
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    format: Annotated[
        Literal["onnx", "pt2", "pte"],
        typer.Option(help="onnx: ONNX Runtime, one file of weights; pt2: torch.export; pte: ExecuTorch, XNNPACK."),
    ] = "onnx",
    model: Annotated[
        list[str] | None, typer.Option(help="Export this model; repeatable. All if not given.")
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Store the weights of the ONNX graphs in float16: half the bytes.")
    ] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Quantize the ONNX graphs to int8, with training images of the data set."),
    ] = False,
    legs: Annotated[
        bool,
        typer.Option("--legs", help="Also what models share and what each has behind, to go on from a feature."),
    ] = False,
    images: Annotated[
        int | None,
        typer.Option(min=1, help=f"Of --int8: test images at most; all, or {MOST} of image files, if not given."),
    ] = None,
    data_root: DataRoot = None,
    download: Download = False,
    model_file: ModelFile = None,
) -> None:
    """Write the models of a family as graphs for another runtime, each one checked against PyTorch."""
    from detachnet.deploy.export import export as write

    path, net = open_family(checkpoint, model_file)
    if images is not None and not int8:
        raise ExportError("--images is for --int8: float32 graphs are not measured on images")
    with _only_our_words(), progress():
        splits = _splits(net, known_root(checkpoint, data_root), download, images) if int8 else None
        precision: Literal["float32", "float16"] = "float16" if fp16 else "float32"
        manifest = write(
            net, out, format, model, precision=precision, int8=splits, latency=_latency(net, path), legs=legs
        )
    _show(manifest, out)


def _splits(net: DetachableNet, data_root: Path | None, download: bool, images: int | None) -> tuple[Split, Split]:
    """Images to calibrate with, and test images."""
    from detachnet.data.datasets import is_files, load_data
    from detachnet.deploy.quantize import CALIBRATION_IMAGES
    from detachnet.training.data import open_test_files, open_train_files

    data = net.facts.known_data
    if is_files(data.name):
        training = in_memory(net, open_train_files(data, data_root), CALIBRATION_IMAGES, "training")
        return training, in_memory(net, open_test_files(data, data_root), images or MOST, "test")
    training, test = load_data(data.name, data_root, download)
    return training, test.part(0, images)


def _latency(net: DetachableNet, path: Path) -> dict[str, Latency]:
    """What detachnet profile measured of the family, if it did."""
    from detachnet.deploy.profile import profile_of

    profile = profile_of(net, path)
    return {row.model: row for row in profile.rows} if profile else {}


@contextmanager
def _only_our_words() -> Iterator[None]:
    """The exporters' libraries warn of what they deprecate between themselves; that is not for the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _show(manifest: Manifest, out: Path) -> None:
    """A row per model, and what is in the folder."""
    from detachnet.text import Table, si

    header = ["model", "file", "MACs", "parameters", "alone", "test accuracy"]
    if manifest.precision == "int8":
        header.append("before int8")
    cells = [
        (
            model.name,
            model.file,
            si(model.macs),
            si(model.num_params),
            f"{model.num_bytes / 1e6:.2f} MB",
            *[_percent(model.accuracy), _percent(model.float_accuracy)][: len(header) - 5],
        )
        for model in manifest.models
    ]
    total = sum(file.stat().st_size for file in out.iterdir())
    title = f"{out}: {manifest.format}, {manifest.precision}, {total / 1e6:.2f} MB together"
    show(Table(tuple(header), tuple(cells), title, left=2))
    for part in manifest.legs:
        note(f"{part.file}: {part.leg}, {si(part.macs)} MACs")
    if manifest.num_test and any(model.accuracy is not None for model in manifest.models):
        of = ", of the weights before rounding" if manifest.precision == "float16" else ""
        note(f"\nAccuracy on n = {manifest.num_test} test images{of}.")
    when = {"int8": "before int8, each", "float16": "with the rounded weights, each"}.get(
        manifest.precision, "each"
    )
    note(f"Compared with PyTorch on 1 and 3 images, {when} graph is equal; checksums are in manifest.json.")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
