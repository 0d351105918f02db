"""`detachnet profile`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from detachnet.errors import MeasurementError

from .console import friendly, note, print_json, progress, show
from .opening import open_family
from .options import AsJson, CheckpointOrExport, ModelFile


@friendly
def profile(
    family: CheckpointOrExport,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    runtime: Annotated[
        Literal["torch", "onnx"] | None, typer.Option(help="What runs it: torch a checkpoint, onnx an export.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the CPU; torch's choice if not given.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Timed runs per model.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Runs per model before these.")] = 10,
    as_json: AsJson = False,
    model_file: ModelFile = None,
) -> None:
    """Measure latency, throughput, peak memory and size of each model on this machine."""
    from detachnet.deploy.profile import profile as measure, write_profile
    from detachnet.storage import locate

    place = locate(family)
    found = "onnx" if place.is_export else "torch"
    if runtime not in (None, found):
        raise _other_runtime(family, runtime, model_file)
    path, subject = (family, family) if place.is_export else open_family(family, model_file)
    with progress():
        measured = measure(subject, device, batch, threads, n, warmup)
    written = write_profile(measured, path)
    if as_json:
        print_json(measured.model_dump(mode="json"))
        return
    show(replace(measured.table, notes=()))
    note(f"\nPeak MB: {measured.memory}.")
    chosen = "models are chosen" if batch == 1 else "models are chosen by memory; by latency only with --batch 1"
    note(f"Written to {written}, from where {chosen}.")


def _other_runtime(family: Path, runtime: str | None, model_file: str | None) -> MeasurementError:
    if runtime == "torch":
        return MeasurementError(f"{family} is an export; torch runs a checkpoint", hint="give the checkpoint")
    own = f" --model-file {model_file}" if model_file else ""
    return MeasurementError(
        f"ONNX Runtime runs an export, not {family}",
        hint=f"detachnet export {family}{own} -o DIR, then profile DIR",
    )
