"""`detachnet export`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detachnet.errors import CheckpointError

from .console import friendly, note, table
from .family import open_family

if TYPE_CHECKING:
    from detachnet.data import Split
    from detachnet.detachable import DetachableNet
    from detachnet.export import Latency, Manifest


@friendly
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A family's file, or the folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    format: Annotated[
        Literal["onnx", "pt2", "pte"],
        typer.Option(help="onnx: ONNX Runtime, one file of weights; pt2: torch.export; pte: ExecuTorch, XNNPACK."),
    ] = "onnx",
    model: Annotated[
        list[str] | None, typer.Option(help="Export this model; repeatable. All if not given.")
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Quantize the ONNX graphs to int8, with training images of the data set."),
    ] = False,
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets are; then $DETACHNET_DATA, then ./data.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a data set that is not found.")] = False,
) -> None:
    """Write the models of a family as graphs for another runtime, each one checked against PyTorch."""
    from detachnet.export import export as write

    path, net = open_family(checkpoint)
    splits = _splits(net, path, data_root, download) if int8 else None
    with _only_our_words():
        manifest = write(net, out, format, model, int8=splits, latency=_latency(path))
    _show(manifest, out)


def _splits(net: DetachableNet, path: Path, data_root: Path | None, download: bool) -> tuple[Split, Split]:
    """The data the family was trained on."""
    from detachnet.data import load_data

    if net.data is None:
        raise CheckpointError(
            f"{path} does not say what it was trained on, so there are no images to calibrate int8 with",
            hint="export a file that train wrote, or leave out --int8",
        )
    return load_data(net.data.name, data_root, download)


def _latency(path: Path) -> dict[str, Latency]:
    """What detachnet profile measured of the family, if it did."""
    from detachnet.export import Latency
    from detachnet.measure import read_profile

    profile = read_profile(path)
    if profile is None:
        return {}
    fields = set(Latency.model_fields)
    return {row.model: Latency.model_validate(row.model_dump(include=fields)) for row in profile.rows}


@contextmanager
def _only_our_words() -> Iterator[None]:
    """The exporters' libraries warn of what they deprecate between themselves; that is not for the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _show(manifest: Manifest, out: Path) -> None:
    """A row per model, and what is in the folder."""
    from detachnet.plan import si

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
    table(f"{out}: {manifest.format}, {manifest.precision}, {total / 1e6:.2f} MB together", header, cells, left=2)
    if manifest.num_test:
        note(f"\nAccuracy on n = {manifest.num_test} test images.")
    when = "before int8, each" if manifest.precision == "int8" else "each"
    note(f"Compared with PyTorch on 1 and 3 images, {when} graph is equal; checksums are in manifest.json.")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
