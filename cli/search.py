"""`detachnet search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detachnet.errors import BudgetError, CheckpointError

from .console import friendly, note, print_json, progress, show
from .opening import check_new, known_root, open_family
from .options import AsJson, DataRoot, ModelFile

if TYPE_CHECKING:
    from detachnet.selection.front import Front

Budgets = list[float] | None


@friendly
def search(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or the checkpoint in it.")],
    macs: Annotated[Budgets, typer.Option(help="A budget: MACs for one image; below 1 a share.")] = None,
    num_bytes: Annotated[Budgets, typer.Option("--bytes", help="Bytes of parameters; below 1 a share.")] = None,
    latency_ms: Annotated[Budgets, typer.Option(help="Milliseconds for one image on this machine.")] = None,
    runtime: Annotated[
        Literal["torch", "onnx"] | None, typer.Option(help="Of latencies: torch, or ONNX Runtime.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of latencies: threads of the CPU; torch's choice if not given.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Held-out images that decide, at most.")] = 1000,
    evolve: Annotated[int, typer.Option(min=0, help="Candidates more that evolve from the best.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at random.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that try candidates.")] = 1,
    adopt: Annotated[Path | None, typer.Option(help="Write the family with what was found to this file.")] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    model_file: ModelFile = None,
) -> None:
    """Find the sub-models of a trained network that are the most accurate within budgets.

    What was tried is kept in the folder: the same command goes on where one was stopped.
    """
    if adopt is not None and adopt.suffix == ".toml":
        raise CheckpointError(f"{adopt} is for a family", hint=f"--adopt {adopt.with_suffix('.safetensors')}")
    for file in (adopt, adopt.with_suffix(".toml")) if adopt is not None else ():
        check_new(file)
    by, budgets = _asked(macs=macs, bytes=num_bytes, latency_ms=latency_ms)
    from detachnet.checkpoint.saving import save
    from detachnet.memory import keep_freed
    from detachnet.selection.images import run_images
    from detachnet.selection.searching import search as find

    keep_freed()
    path, net = open_family(run, model_file)
    folder = path.parent
    held_out, calibration = run_images(folder, images, known_root(path, data_root))
    options: dict[str, Any] = {"by": by, "calibration": calibration, "evolve": evolve, "seed": seed}
    options |= {"runtime": runtime, "threads": threads}
    with progress(), _pool(workers) as executor:
        front = find(net, held_out, budgets, folder=folder, executor=executor, **options)
    _write(front, folder)
    if adopt is not None:
        save(front.net, adopt)
        _write_recipe(front, folder, adopt)
    if as_json:
        print_json(front.to_json())
        return
    show(front.table)
    note(f"\nIn {folder}: search.jsonl, search.json, search.svg.")
    if adopt is not None:
        note(f"The family with {', '.join(front.models)} is in {adopt}; to train it on:")
        where = known_root(path, data_root)
        told = f" --data-root {where}" if where else ""
        note(f"detachnet train {adopt.with_suffix('.toml')}{told}")


def _asked(**budgets: Budgets) -> tuple[str, Sequence[float]]:
    """What budgets are of, and the budgets."""
    given = {by: some for by, some in budgets.items() if some}
    if len(given) != 1:
        raise BudgetError(
            "search takes budgets of one kind", hint="--macs 0.4 --macs 0.2, --bytes 0.4 or --latency-ms 5"
        )
    return next(iter(given.items()))


def _write(front: Front, folder: Path) -> None:
    """The answer in the folder of the run."""
    import json

    from detachnet.report.fronts import figure
    from detachnet.storage import replace_file

    replace_file(folder / "search.json", (json.dumps(front.to_json(), indent=1) + "\n").encode())
    figure(front, folder / "search.svg")


def _write_recipe(front: Front, folder: Path, file: Path) -> None:
    """A recipe that trains on what was found, beside the family's file."""
    from detachnet.selection.adopting import adopting
    from detachnet.storage import replace_file
    from detachnet.training.recipe import load_recipe
    from detachnet.training.runs import RunFolder

    recipe = load_recipe(RunFolder(folder).recipe)
    replace_file(file.with_suffix(".toml"), adopting(recipe, front, file).to_toml().encode())


def _pool(workers: int) -> Any:
    """Processes that try candidates, each with its share of the threads; None for this one."""
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import nullcontext
    from multiprocessing import get_context

    import torch

    if workers == 1:
        return nullcontext()
    threads = max(1, torch.get_num_threads() // workers)
    return ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,))
