"""recipe -> the processes of a run: accelerate's, opened and closed, with the experiment tracker they write to."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from detachnet.errors import RecipeError, nearest
from detachnet.ranks import are_several
from detachnet.training.recipe import Recipe
from detachnet.training.runs import RunFolder

PROJECT = "detachnet"
"""What trackers file runs under."""


@contextmanager
def open_processes(recipe: Recipe, folder: RunFolder) -> Iterator[Accelerator]:
    """This process among those of a run; a process group that is opened for it is closed afterwards.

    An accelerator of the user's own is afterwards what it was.

    Raises:
        RecipeError: The recipe cannot be trained by so many processes, or its tracker cannot be used.
    """
    check_tracker(recipe.train.log_with)
    theirs = torch.distributed.is_initialized()
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    several = are_several()
    if several and not theirs and (number := next(_groups)):
        _open_group(number)
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.train.precision == "bf16" else "no",
        cpu=True if several and not torch.cuda.is_available() else None,
        log_with=recipe.train.log_with or None,
        project_dir=folder.path,
    )
    try:
        _check_number(recipe, accelerator.num_processes)
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        if torch.distributed.is_initialized() and not theirs:
            torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)  # which would take the group for open
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


@contextmanager
def no_group_left() -> Iterator[None]:
    """Nothing is left afterwards of a process group that was closed inside.

    A group lives as long as the modules that were trained in it, and these refer to themselves. Threads of gloo's
    that are still there when Python ends now and then abort the process.
    """
    try:
        yield
    finally:
        if are_several():
            gc.collect()


_groups = count()
"""Numbers of the process groups that are opened in this process; the first one is accelerate's to open."""


def _open_group(number: int) -> None:
    """Open another process group, with keys of its own: for those that the last one left it would wait."""
    store, rank, world_size = next(rendezvous("env://"))
    own = PrefixStore(f"{PROJECT}{number}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=world_size)


def _check_number(recipe: Recipe, processes: int) -> None:
    """Refuse what several processes cannot do."""
    if (size := recipe.train.batch_size) % processes:
        raise RecipeError(f"train.batch_size = {size} is no multiple of {processes} processes")
    if recipe.train.compile and processes > 1:
        raise RecipeError("train.compile is for one process: synchronized norms and gradients break the graph")
    if recipe.train.sample and processes > 1:
        raise RecipeError("train.sample is for one process: several wait for the gradients of all models")
    if recipe.train.strategy == "separate" and processes > 1:
        raise RecipeError("train.strategy = 'separate' is for one process: several add up one pass's gradients")


def check_tracker(name: str) -> None:
    """Refuse a tracker that accelerate does not know or that is not installed, which it would pass over."""
    if not name:
        return
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    if name not in known:
        raise RecipeError(
            f"train.log_with = {name!r} is no experiment tracker that accelerate knows",
            nearest=nearest(name, known) or known,
        )
    if name not in map(str, get_available_trackers()):
        raise RecipeError(
            f"train.log_with = {name!r}, but that is not installed", hint=f"pip install {name.replace('_', '-')}"
        )


def start_tracking(accelerator: Accelerator, recipe: Recipe, folder: RunFolder) -> None:
    """Open the recipe's tracker, if it names one, and tell it the recipe."""
    if recipe.train.log_with:
        tables = json.loads(recipe.model_dump_json())
        accelerator.init_trackers(PROJECT, {"run": str(folder.path)} | dict(_flat(tables)))


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """Tell the tracker, if there is one, an epoch's row of metrics: `test_accuracy/base` and so on."""
    accelerator.log(dict(_flat(row, "/")), step=row["epoch"])


def _flat(table: Mapping[str, Any], join: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and plain values of nested tables; lists as JSON."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, join, f"{prefix}{key}{join}")
        else:
            yield prefix + key, json.dumps(value) if isinstance(value, list) else value
