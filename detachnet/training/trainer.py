"""recipe -> run folder: a training from beginning to end, exact to resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from detachnet.checkpoint.saving import check_storable
from detachnet.data.batches import BatchSource
from detachnet.data.datasets import load_data, select
from detachnet.errors import RecipeError
from detachnet.memory import keep_freed
from detachnet.ranks import is_first
from detachnet.storage import replace_file
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.layout import image_layout
from detachnet.training.data import FileSource, MemorySource, Source
from detachnet.training.loop import Listener, Loop, Status
from detachnet.training.optimizer import make_loss
from detachnet.training.processes import no_group_left, open_processes, start_tracking
from detachnet.training.recipe import Recipe
from detachnet.training.results import result_rows, result_table
from detachnet.training.runs import RunFolder, default_folder
from detachnet.training.start import decided, starting_family
from detachnet.training.state import RunState, new_state
from detachnet.training.step import TrainingStep
from detachnet.training.tables import FilesTable


@dataclass(frozen=True)
class RunResult:
    """How a training run ended.

    Attributes:
        status: `finished`, `time is up` (`max_minutes`) or `interrupted` (Ctrl-C).
        folder: The run's.
        table: The final table (`results.result_rows`); empty before the first epoch is complete.
        epochs: Epochs completed.
        wait_share: Share of the run's time spent waiting for images, in [0, 1].
    """

    status: Status
    folder: RunFolder
    table: list[dict[str, Any]]
    epochs: int
    wait_share: float


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    data_root: str | Path | None = None,
    download: bool = False,
    max_minutes: float | None = None,
    listener: Listener | None = None,
) -> RunResult:
    """Train a recipe's family, or resume its run: what the command `detachnet train` does.

    From here on this process keeps the memory it frees (`keep_freed`). During the run cuDNN searches for the
    fastest kernels; a process group that is opened for it (`torchrun`) is closed at its end.

    Args:
        recipe: The experiment.
        out: The run's folder; a new one, or with `resume` that of a run of the same recipe. `runs/NAME` if not
            given, of the recipe's file.
        resume: Resume from the last checkpoint. On a CPU the metrics equal an uninterrupted run's exactly; with
            WebDataset shards, if the numbers of processes and workers are the same.
        data_root: Where data sets are looked for first; image files nowhere else.
        download: Fetch a data set that is not found.
        max_minutes: Stop with a checkpoint after that time.
        listener: Is told how it goes.

    Raises:
        DetachNetError: The data, the model, the cuts or the folder are not as they must be, or another process
            writes the folder.
        TrainingError: A loss or a weight is not finite any more, or memory is short; the last good checkpoint is
            kept.

    Examples:
        >>> result = detachnet.train(detachnet.load_recipe("quickstart"))
        >>> net = detachnet.load(result.folder.best)
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"train takes a recipe, not {recipe!r}", hint=f"detachnet.train(detachnet.load_recipe({recipe!r}))"
        )
    if max_minutes is not None and not max_minutes >= 0:
        raise RecipeError(f"max_minutes is a number of minutes, not {max_minutes}")
    keep_freed()
    folder = RunFolder(out or default_folder(recipe), data_root)
    with no_group_left(), ExitStack() as held:
        if resume and is_first():
            held.enter_context(folder.reopened())
        return _train(recipe, folder, held, resume, data_root, download, max_minutes, listener or Listener())


def _train(
    recipe: Recipe,
    folder: RunFolder,
    held: ExitStack,
    resume: bool,
    data_root: str | Path | None,
    download: bool,
    max_minutes: float | None,
    listener: Listener,
) -> RunResult:
    """`train`, in a folder that is kept for this process until `held` is closed."""
    recipe = folder.as_started(recipe) if resume else recipe
    saved = folder.saved(recipe) if resume else None
    source = open_source(recipe, data_root, download)
    folder.data_root = source.place or folder.data_root
    recipe = decided(recipe, source)
    with _own_random_numbers_and_search(), open_processes(recipe, folder) as accelerator:
        several = accelerator.num_processes > 1
        net = starting_family(
            recipe,
            source,
            accelerator.device,
            several=several,
            resuming=saved is not None,
            like=saved.header.plan if saved else None,
        )
        check_storable(net)
        batches, test = _deal(recipe, source, net, accelerator)
        state = new_state(recipe, net, accelerator.device)
        step = _make_step(recipe, state, accelerator)
        if not resume and accelerator.is_main_process:
            held.enter_context(folder.started(recipe))
        if saved:
            state.restore(saved)
        start_tracking(accelerator, recipe, folder)
        loop = Loop(recipe, folder, accelerator, batches, test, state, step, listener)
        return _record(loop, loop.run(max_minutes))


def open_source(recipe: Recipe, data_root: str | Path | None, download: bool) -> Source:
    """The recipe's images."""
    data = recipe.data
    if isinstance(data, FilesTable):
        return FileSource(data, data_root, recipe.model.name)
    return MemorySource(data, select(load_data(data.name, data_root, download), data.num_train, data.holdout))


@contextmanager
def _own_random_numbers_and_search() -> Iterator[None]:
    """Random numbers come back as they were; and so does whether cuDNN searches, which it does inside."""
    searched = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # the shapes of a run stay the same
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.backends.cudnn.benchmark = searched


def _deal(
    recipe: Recipe, source: Source, net: DetachableNet, accelerator: Accelerator
) -> tuple[BatchSource, BatchSource]:
    """This process's training and test batches."""
    device, share = accelerator.device, (accelerator.process_index, accelerator.num_processes)
    return source.batches(recipe.train, device, share, image_layout(net, device))


def _make_step(recipe: Recipe, state: RunState, accelerator: Accelerator) -> TrainingStep:
    """The recipe's step, as this process makes it."""
    model, optimizer = accelerator.prepare(state.net, state.optimizer)
    return TrainingStep(
        state.net.train(),
        recipe.models,
        make_loss(recipe),
        optimizer,
        strategy=recipe.train.strategy,
        forward=model,
        backward=accelerator.backward,
        compiled=recipe.train.compile,
    )


def _record(loop: Loop, status: Status) -> RunResult:
    """The result of a run; written into its folder if it is finished."""
    state, folder = loop.state, loop.folder
    table = result_rows(state.net.plan, loop.recipe.models, state.rows) if state.rows else []
    if status == "finished" and loop.accelerator.is_main_process:
        replace_file(folder.results, (json.dumps(table, indent=1) + "\n").encode())
        replace_file(folder.table, result_table(table).markdown().encode())
    loop.accelerator.wait_for_everyone()  # what one process wrote, the others may read from here on
    return RunResult(status, folder, table, state.epoch, state.wait_share or 0.0)
