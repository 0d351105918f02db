"""`detachnet profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import friendly, note, print_json, table


@friendly
def profile(
    family: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A family's file, or the folder of a run.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the CPU; torch's choice if not given.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Timed runs per model.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Runs per model before these.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure latency, throughput, peak memory and size of each model on this machine."""
    from detachnet.checkpoint import load
    from detachnet.measure import profile as measure
    from detachnet.measure import write_profile

    path = family / "last.safetensors" if family.is_dir() else family
    measured = measure(load(path), device, batch, threads, n, warmup)
    written = write_profile(measured, path)
    if as_json:
        print_json(measured.model_dump(mode="json"))
        return
    table(measured.title, measured.header, measured.cells())
    note(f"\nPeak MB: {measured.memory}.")
    note(f"Written to {written}, from where models are chosen.")
