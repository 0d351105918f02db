"""Recipe -> run folder: the training loop, exact to resume."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import Tensor

from detachnet.averaging import AveragedWeights
from detachnet.checkpoint import (
    LIVE,
    TRAINER,
    Header,
    TrainingState,
    load_weights,
    replace_file,
    untied,
    with_prefix,
    without_prefix,
    write,
)
from detachnet.data import BatchSource, load_data, mix, select
from detachnet.detachable import DetachableNet
from detachnet.errors import CheckpointError, RecipeError
from detachnet.evaluation import score_batches, scores
from detachnet.family import build_family, check_classes, start_from
from detachnet.optimizer import make_optimizer, make_schedule
from detachnet.propagation import Propagation
from detachnet.recipe import FilesTable, Recipe
from detachnet.report import COLUMNS, markdown, result_cells, result_rows
from detachnet.runs import RunFolder
from detachnet.sources import FileSource, MemorySource, Source

SAVE_EVERY_S = 60.0
"""Seconds between two checkpoints; one is written at the end in any case."""

AGREE_EVERY = 20
"""Steps after which several processes agree whether to save or to stop."""


class Listener:
    """Is told how a training goes; every method may be overridden."""

    def on_start(self, net: DetachableNet, done: int, total: int) -> None:
        """Before the first of `total` steps, `done` of which an earlier run has made."""

    def on_step(self, epoch: int, images: int, losses: Mapping[str, Tensor]) -> None:
        """After a step on `images` images; reading a loss waits for the device."""

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch, with its row of metrics."""


@dataclass(frozen=True)
class RunResult:
    """How a training ended.

    Attributes:
        status: `finished`, `time is up` (`max_minutes`) or `interrupted` (Ctrl-C).
        folder: The run's.
        table: The final table (`report.result_rows`); empty before the first epoch is complete.
        epochs: Epochs completed.
        wait_share: Share of the training's time spent waiting for images, in [0, 1].
    """

    status: Literal["finished", "time is up", "interrupted"]
    folder: RunFolder
    table: list[dict[str, Any]]
    epochs: int
    wait_share: float


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    data_root: str | Path | None = None,
    download: bool = False,
    max_minutes: float | None = None,
    listener: Listener | None = None,
) -> RunResult:
    """Train a recipe's family, or go on with it.

    Args:
        recipe: The experiment.
        out: The run's folder; a new one, or with `resume` that of a run of the same recipe.
        resume: Go on from the last checkpoint. On a CPU the metrics equal an uninterrupted run's exactly; with
            WebDataset shards, if the numbers of processes and workers are the same.
        data_root: Where data sets are looked for first.
        download: Fetch a data set that is not found.
        max_minutes: Stop with a checkpoint after that time.
        listener: Is told how it goes.

    Raises:
        DetachNetError: The data, the model, the cuts or the folder are not as they must be.
    """
    folder = RunFolder(out)
    restored = folder.reopen(recipe) if resume else None
    source = _source(recipe, data_root, download)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        trainer = _Trainer(recipe, folder, source, listener or Listener(), restored is not None)
        if not resume and trainer.accelerator.is_main_process:
            folder.start(recipe)
        if restored:
            trainer.restore(*restored)
        return trainer.run(max_minutes)


def _source(recipe: Recipe, data_root: str | Path | None, download: bool) -> Source:
    """The recipe's images."""
    data = recipe.data
    if isinstance(data, FilesTable):
        return FileSource(data, data_root, recipe.model.name)
    return MemorySource(data, select(load_data(data.name, data_root, download), data.num_train, data.holdout))


@dataclass
class _Progress:
    """Where the training is."""

    epoch: int = 0
    step: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


class _Trainer:
    """Everything one run needs, built from its recipe."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        source: Source,
        listener: Listener,
        resuming: bool = False,
    ) -> None:
        self.recipe, self.folder, self.listener = recipe, folder, listener
        self.at = _Progress()
        precision = "bf16" if recipe.train.precision == "bf16" else "no"
        AcceleratorState._reset_state()  # an earlier training of this process may have had another precision
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.accelerator = Accelerator(
            mixed_precision=precision, cpu=True if several and not torch.cuda.is_available() else None
        )
        self.device = self.accelerator.device
        self.net = build_family(recipe, source.input_size)
        on_cuda = self.device.type == "cuda"
        if self.accelerator.num_processes > 1 and on_cuda:
            self.net = convert_sync_batchnorm(self.net)  # timm's, which keeps the activations of its norms
        self.net.data = source.info
        if isinstance(recipe.data, FilesTable):
            check_classes(self.net)
        if recipe.train.init and not resuming:
            start_from(self.net, recipe.train.init)
        self.net.to(self.device)
        if on_cuda:
            self.net.to(memory_format=torch.channels_last)
        self.parameters = self.net.parameters_of(recipe.models)
        for name, parameter in self.net.named_parameters():
            frozen = recipe.train.freeze_base and name.startswith("base.")
            parameter.requires_grad_(parameter.requires_grad and name in self.parameters and not frozen)
        self.batches, self.test = self._batches(source)
        trained = [p for p in self.parameters.values() if p.requires_grad]
        self.optimizer = make_optimizer(recipe, trained, on_cuda)
        self.schedule = make_schedule(recipe, self.optimizer, len(self.batches))
        self.averaged: AveragedWeights | None = None
        if decay := recipe.train.ema_decay:
            self.averaged = AveragedWeights(self.net, decay, use_warmup=True)
        self.model, self.prepared = self.accelerator.prepare(self.net, self.optimizer)
        self.propagate = Propagation(recipe, self.net, self.model, self.accelerator)
        self.sums = torch.zeros(len(recipe.models), dtype=torch.float64, device=self._sum_device)
        self.saved_at = time.monotonic()

    @property
    def _sum_device(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device  # no float64 there

    @property
    def family(self) -> DetachableNet:
        """What is evaluated and written: the averaged weights if there are such, else those that are trained."""
        family: DetachableNet = self.averaged.module if self.averaged else self.net
        return family

    def _batches(self, source: Source) -> tuple[BatchSource, BatchSource]:
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        if (size := self.recipe.train.batch_size) % share[1]:
            raise RecipeError(f"train.batch_size = {size} is no multiple of {share[1]} processes")
        if self.recipe.train.compile and share[1] > 1:
            raise RecipeError("train.compile is for one process: synchronized norms and gradients break the graph")
        if self.recipe.train.strategy == "separate" and share[1] > 1:
            raise RecipeError(
                "train.strategy = 'separate' is for one process: several add up one pass's gradients"
            )
        return source.batches(self.recipe.train, self.device, share)

    def restore(self, header: Header, tensors: dict[str, Tensor]) -> None:
        """Put everything back as the checkpoint has it."""
        state = header.training
        if state is None:
            raise CheckpointError(f"{self.folder.last} does not say where its training is")
        load_weights(self.family, header, tensors)
        if self.averaged:
            load_weights(self.net, header, without_prefix(tensors, LIVE))
        for name, tensor in without_prefix(tensors, TRAINER).items():
            parameter, _, key = name.rpartition(".")
            owner = self.parameters[parameter]
            on_cpu = key == "step" and self.device.type != "cuda"  # where fused updates have it on the device
            alike = tensor.shape == owner.shape  # fused updates want the parameter's layout, too
            here = torch.empty_like(owner, dtype=tensor.dtype) if alike else tensor.to(owner.device)
            self.optimizer.state[owner][key] = tensor.clone() if on_cpu else here.detach().copy_(tensor)
        self.family.accuracy = dict(header.accuracy)
        self.at = _Progress(state.epoch, state.step, state.train_s, state.wait_s, list(state.rows))
        self.sums.copy_(torch.tensor([state.sums[name] for name in self.recipe.models], dtype=torch.float64))

    def run(self, max_minutes: float | None) -> RunResult:
        """Train to the end, or until time is up or the user stops it."""
        deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
        steps = len(self.batches)
        if self.accelerator.is_main_process:
            self.folder.write_metrics(self.at.rows)
        self.listener.on_start(self.net, self.at.epoch * steps + self.at.step, self.recipe.train.epochs * steps)
        with _interruptible() as interrupted:
            while self.at.epoch < self.recipe.train.epochs:
                complete = self._train_epoch(deadline, interrupted)
                if complete:
                    self._end_epoch()
                if self._must_stop(deadline, interrupted):
                    break
                self._save_if_due()
        self._save()
        finished = self.at.epoch == self.recipe.train.epochs
        return self._finish("finished" if finished else "interrupted" if interrupted.is_set() else "time is up")

    def _train_epoch(self, deadline: float, interrupted: threading.Event) -> bool:
        """The rest of the current epoch; False if it was stopped."""
        self.model.train()
        if self.recipe.train.freeze_base:
            self.net.base.eval()
        steps = len(self.batches)
        began = time.monotonic()
        for images, labels in self._waiting(self.batches.epoch(self.at.epoch, self.at.step)):
            losses = self._step(images, labels)
            self.at.step += 1
            self.at.train_s += time.monotonic() - began
            began = time.monotonic()
            named = dict(zip(self.recipe.models, losses, strict=True))
            self.listener.on_step(self.at.epoch, len(images) * self.accelerator.num_processes, named)
            if self.at.step < steps:
                if self._must_stop(deadline, interrupted):
                    return False
                self._save_if_due()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the last steps may be queued only
        self.at.train_s += time.monotonic() - began
        return True

    def _waiting(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, with the time it takes to get them added up."""
        began = time.monotonic()
        for batch in batches:
            self.at.wait_s += time.monotonic() - began
            yield batch
            began = time.monotonic()

    def _must_stop(self, deadline: float, interrupted: threading.Event) -> bool:
        return self._agreed(interrupted.is_set() or time.monotonic() > deadline)

    def _agreed(self, wish: bool) -> bool:
        """What one process wishes, all do; several look at each other's wishes every few steps only."""
        if self.accelerator.num_processes == 1:
            return wish
        if self.at.step % AGREE_EVERY:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(wish), device=self.device), "sum"))

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update; each model's loss, `(num_models,)`."""
        update = self.at.epoch * len(self.batches) + self.at.step
        torch.manual_seed(mix(self.recipe.train.seed, "model", update, self.accelerator.process_index))
        self.schedule.step_update(update)
        losses = self.propagate(images, labels)
        self.prepared.step()
        self.prepared.zero_grad()
        if self.averaged:
            self.averaged.update(self.net, update + 1)
        self.sums += losses.to(self._sum_device, torch.float64)
        return losses

    def _end_epoch(self) -> None:
        """Evaluate, add a row of metrics, keep the best."""
        sums = self.accelerator.reduce(self.sums, "mean") / len(self.batches)
        scores = self._evaluate()
        self.at.rows.append(
            {
                "epoch": self.at.epoch + 1,
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": dict(zip(self.recipe.models, sums.tolist(), strict=True)),
                "test_loss": {name: score["loss"] for name, score in scores.items()},
                "test_accuracy": {name: score["accuracy"] for name, score in scores.items()},
            }
        )
        if not self.recipe.data.holdout:
            self.family.accuracy = dict(self.at.rows[-1]["test_accuracy"])
        self.at.epoch, self.at.step = self.at.epoch + 1, 0
        self.sums.zero_()
        means = [sum(row["test_accuracy"].values()) for row in self.at.rows]
        if self.accelerator.is_main_process:
            if means[-1] > max(means[:-1], default=-1.0):
                write(self.family, self.folder.best)
            self.folder.write_metrics(self.at.rows)
        self.listener.on_epoch(self.at.rows[-1])

    def _evaluate(self) -> dict[str, dict[str, float]]:
        if self.accelerator.num_processes > 1:
            distribute_bn(self.family, self.accelerator.num_processes)  # the statistics that are written
        with self.accelerator.autocast():
            totals = score_batches(self.family, self.test, self.recipe.models)
        return scores(self.accelerator.reduce(totals, "sum"), self.recipe.models)

    def _save_if_due(self) -> None:
        if self._agreed(time.monotonic() - self.saved_at > SAVE_EVERY_S):
            self._save()

    def _save(self) -> None:
        """Write the checkpoint the training goes on from."""
        self.saved_at = time.monotonic()
        self.sums = self.accelerator.reduce(self.sums, "mean")
        if not self.accelerator.is_main_process:
            return
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        extra = {
            f"{names[parameter]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        training = TrainingState(
            recipe=self.recipe.model_dump_json(),
            epoch=self.at.epoch,
            step=self.at.step,
            sums=dict(zip(self.recipe.models, self.sums.tolist(), strict=True)),
            rows=tuple(self.at.rows),
            train_s=self.at.train_s,
            wait_s=self.at.wait_s,
        )
        extra = with_prefix(extra, TRAINER)
        if self.averaged:
            extra |= with_prefix(untied(self.net.state_dict())[0], LIVE)
        write(self.family, self.folder.last, training, extra)
        seen = (self.at.epoch * len(self.batches) + self.at.step) * self.recipe.train.batch_size
        self.folder.write_info(self.device, self.at.train_s, self.at.wait_s, seen)

    def _finish(self, status: Literal["finished", "time is up", "interrupted"]) -> RunResult:
        table = result_rows(self.net.plan, self.recipe.models, self.at.rows) if self.at.rows else []
        if status == "finished" and self.accelerator.is_main_process:
            replace_file(self.folder.results, (json.dumps(table, indent=1) + "\n").encode())
            replace_file(self.folder.table, markdown(COLUMNS, result_cells(table)).encode())
        self.accelerator.wait_for_everyone()  # what one process wrote, the others may read from here on
        waited = self.at.wait_s / self.at.train_s if self.at.train_s else 0.0
        return RunResult(status, self.folder, table, self.at.epoch, waited)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask the loop to stop after the current step; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
