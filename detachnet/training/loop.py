"""batches, state, step -> the epochs of a run: evaluated, saved, stopped in time, refused where they go wrong."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import Tensor

from detachnet.checkpoint.saving import write
from detachnet.data.batches import BatchSource, mix
from detachnet.errors import TrainingError, one_line
from detachnet.evaluation import score_batches, scores
from detachnet.memory import is_shortage
from detachnet.surgery.detachable import DetachableNet
from detachnet.training.optimizer import make_schedule
from detachnet.training.processes import track
from detachnet.training.recipe import Recipe
from detachnet.training.runs import RunFolder
from detachnet.training.state import RunState
from detachnet.training.step import TrainingStep, sample_models

SAVE_EVERY_S = 60.0
"""Seconds between two checkpoints; one is written at the end in any case."""
AGREE_EVERY = 20
"""Steps after which several processes agree whether to save or to stop."""
Status = Literal["finished", "time is up", "interrupted"]


class Listener:
    """Is told how a training run goes; every method may be overridden."""

    def on_start(self, net: DetachableNet, done: int, total: int) -> None:
        """Before the first of `total` steps, `done` of which an earlier run has made."""

    def on_step(self, epoch: int, images: int, losses: Mapping[str, Tensor]) -> None:
        """After a step on `images` images; reading a loss waits for the device."""

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch, with its row of metrics."""


@dataclass(eq=False)
class Loop:
    """The epochs of a run, in one of its processes."""

    recipe: Recipe
    folder: RunFolder
    accelerator: Accelerator
    batches: BatchSource
    test: BatchSource
    state: RunState
    step: TrainingStep
    listener: Listener
    schedule: Scheduler = field(init=False)
    deadline: float = float("inf")
    saved_at: float = field(default_factory=time.monotonic)
    interrupted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.schedule = make_schedule(self.recipe, self.state.optimizer, len(self.batches))

    @property
    def updates(self) -> int:
        """Steps made since the run was started."""
        return self.state.epoch * len(self.batches) + self.state.step

    def run(self, max_minutes: float | None) -> Status:
        """Train to the end, or until time is up or the user stops it."""
        epochs = self.recipe.train.epochs
        if max_minutes is not None:
            self.deadline = time.monotonic() + 60 * max_minutes
        if self.accelerator.is_main_process:
            self.folder.write_metrics(self.state.rows)
        self.listener.on_start(self.state.net, self.updates, epochs * len(self.batches))
        if self.updates:
            self._check_finite()
        with _interruptible(self.interrupted), self._told():
            while self.state.epoch < epochs:
                if self._train_epoch():
                    self._end_epoch()
                if self._must_stop():
                    break
                self._save_if_due()
        self._save()
        if self.state.epoch == epochs:
            return "finished"
        return "interrupted" if self.interrupted.is_set() else "time is up"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A training that finds no memory, or no batch statistics, says so.

        Raises:
            TrainingError: In the place of whatever torch raises then.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            epoch, step = self.state.epoch + 1, self.state.step + 1
            raise TrainingError(
                f"there is no memory left in epoch {epoch}, step {step} of {len(self.batches)}",
                what=f"{self._kept()}; torch says: {one_line(error) or type(error).__name__}",
                hint="free some and --resume; or start anew with a smaller train.batch_size or "
                "train.strategy = 'separate'",
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                "a batch of one image has no statistics in a batch norm whose features are single pixels",
                what=one_line(error),
                hint="a larger train.batch_size, or larger images",
            ) from error

    def _train_epoch(self) -> bool:
        """Make the rest of the current epoch's steps; False if that was stopped."""
        self.state.net.train()
        if self.recipe.train.freeze_base:
            self.state.net.base.eval()
        began = time.monotonic()
        for images, labels in self._waiting(self.batches.epoch(self.state.epoch, self.state.step)):
            named = self.update(images, labels)
            self.state.train_s += time.monotonic() - began
            began = time.monotonic()
            self._tell_step(len(images) * self.accelerator.num_processes, named)
            if self.state.step < len(self.batches):
                if self._must_stop():
                    return False
                self._save_if_due()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the last steps may be queued only
        self.state.train_s += time.monotonic() - began
        return True

    def _tell_step(self, images: int, losses: Mapping[str, Tensor]) -> None:
        """Tell the listener of a step."""
        try:
            self.listener.on_step(self.state.epoch, images, losses)
        except OSError:
            if not self.interrupted.is_set():
                raise
            # a terminal that hung up takes no output; the run is saved all the same

    def _waiting(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, with the time it takes to get them added up."""
        began = time.monotonic()
        for batch in batches:
            self.state.wait_s += time.monotonic() - began
            yield batch
            began = time.monotonic()

    def update(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Make one step; the loss of each model that it trained."""
        number = self.updates
        models = self._models_of(number)
        torch.manual_seed(mix(self.recipe.train.seed, "model", number, self.accelerator.process_index))
        self.schedule.step_update(number)
        losses = self.step(images, labels, models)
        self.state.count(losses, models, number + 1)
        return dict(zip(models, losses, strict=True))

    def _models_of(self, number: int) -> tuple[str, ...]:
        """The models that a step trains; the same in all processes."""
        if not (count := self.recipe.train.sample):
            return self.recipe.models
        macs = {model.name: model.macs for model in self.state.net.plan.models}
        return sample_models(self.recipe.models, macs, count, mix(self.recipe.train.seed, "sample", number))

    def _must_stop(self) -> bool:
        """True on all processes if one of them must stop."""
        return self._agreed(self.interrupted.is_set() or time.monotonic() > self.deadline)

    def _agreed(self, wish: bool) -> bool:
        """True on all processes if it is on any; several look at each other's wishes every few steps only."""
        if self.accelerator.num_processes == 1:
            return wish
        if self.state.step % AGREE_EVERY:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(wish), device=self.accelerator.device), "sum"))

    def _end_epoch(self) -> None:
        """Evaluate, add a row of metrics, keep the best."""
        state = self.state
        self._check_finite()
        sums = self.accelerator.reduce(state.sums, "mean") / state.counts.clamp_min(1).to(state.sums.device)
        scores = self._evaluate()
        for name, score in scores.items():
            if not math.isfinite(score["loss"]):
                raise self._gone_wrong(f"the test loss of {name} is {score['loss']}", state.step)
        row = {
            "epoch": state.epoch + 1,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": {
                name: loss
                for name, loss, count in zip(self.recipe.models, sums.tolist(), state.counts, strict=True)
                if count  # with `train.sample` a model may have been trained in no step
            },
            "test_loss": {name: score["loss"] for name, score in scores.items()},
            "test_accuracy": {name: score["accuracy"] for name, score in scores.items()},
        }
        if not self.recipe.data.holdout:
            state.family.facts = state.family.facts.updated(accuracy=row["test_accuracy"])
        state.end_epoch(row)
        if self.accelerator.is_main_process:
            means = [sum(earlier["test_accuracy"].values()) for earlier in state.rows]
            if means[-1] > max(means[:-1], default=-1.0):
                write(state.family, self.folder.best)
            self.folder.write_metrics(state.rows)
        track(self.accelerator, row)
        self.listener.on_epoch(row)

    def _evaluate(self) -> dict[str, dict[str, float]]:
        """Accuracy and loss of each model on the test images of all processes."""
        if self.accelerator.num_processes > 1:
            distribute_bn(self.state.family, self.accelerator.num_processes)  # the statistics that are written
        with self.accelerator.autocast():
            totals = score_batches(self.state.family, self.test, self.recipe.models)
        return scores(self.accelerator.reduce(totals, "sum"), self.recipe.models)

    def _save_if_due(self) -> None:
        """Write a checkpoint if the last one is old enough."""
        if self._agreed(time.monotonic() - self.saved_at > SAVE_EVERY_S):
            self._save()

    def _check_finite(self) -> None:
        """Refuse to go on with, and to save, what is not finite; the only place where this waits for the device.

        Raises:
            TrainingError: A loss of this epoch, a weight or a running statistic is not.
        """
        state, gather = self.state, self.accelerator.gather
        sums, finite = gather(state.sums[None]).cpu(), gather(state.finite[None]).cpu().amin(0)
        if not sums.isfinite().all():
            first = int(finite.argmin())
            name, step = self.recipe.models[first], int(finite[first]) + 1
            raise self._gone_wrong(f"the training loss of {name} is not finite", step)
        if what := state.not_finite():
            raise self._gone_wrong(f"{what}, is not finite", state.step)

    def _kept(self) -> str:
        """What there is to go on from."""
        saved = [path for path in (self.folder.last, self.folder.best) if path.exists()]
        return f"{saved[0]} is the last good checkpoint" if saved else "nothing was saved before"

    def _gone_wrong(self, what: str, step: int) -> TrainingError:
        """What is said of a training that cannot go on."""
        epoch = self.state.epoch + 1
        if not step and self.state.rows:
            epoch, step = epoch - 1, len(self.batches)
        return TrainingError(
            f"the training went wrong in epoch {epoch}, step {step} of {len(self.batches)}: {what}",
            what=f"{self._kept()}; the learning rate is {self.state.optimizer.param_groups[0]['lr']:g}",
            hint="start again in another folder with a smaller optimizer.lr or more schedule.warmup_epochs",
        )

    def _save(self) -> None:
        """Write the checkpoint the run resumes from."""
        self._check_finite()
        state = self.state
        self.saved_at = time.monotonic()
        state.sums = self.accelerator.reduce(state.sums, "mean")
        if self.accelerator.is_main_process:
            write(state.family, self.folder.last, state.numbers(self.recipe), state.tensors())
            images = self.updates * self.recipe.train.batch_size
            self.folder.write_info(self.accelerator.device, state.train_s, state.wait_share, images)


@contextmanager
def _interruptible(asked: threading.Event) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP (a closed terminal) ask the loop to stop after the current step; a second Ctrl-C
    stops at once. A signal that is ignored, as under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {s: signal.getsignal(s) for s in known if signal.getsignal(s) is not signal.SIG_IGN}

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
