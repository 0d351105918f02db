"""Trainings that diverge, are hung up on, or meet another one in their folder."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.checkpoint.content import read
from detachnet.storage import LOCK, locked
from detachnet.training.loop import Listener, Loop
from detachnet.training.runs import RunFolder
from detachnet.training.step import TrainingStep
from detachnet.training.trainer import train
from tests.runs import SMALL, KillAfter, Killed, assert_same_run, recipe

pytestmark = pytest.mark.usefixtures("little_data")
DIVERGING = ("optimizer.lr=1e10", "train.epochs=2", "schedule.warmup_epochs=0")


def is_finite(path: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in read(path)[1].values())


class Spoil(Listener):
    """After a step, or an epoch, a weight is infinite."""

    def __init__(self, name: str, step: int = 0, epoch: int = 0) -> None:
        self.name, self.step, self.epoch, self.steps = name, step, epoch, 0

    def on_start(self, net: detachnet.DetachableNet, done: int, total: int) -> None:
        self.weight = dict(net.named_parameters())[self.name]

    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        self.steps += 1
        if self.steps == self.step:
            self.weight.data.view(-1)[0] = math.inf

    def on_epoch(self, row: Mapping[str, object]) -> None:
        if row["epoch"] == self.epoch:
            self.weight.data.view(-1)[0] = math.nan


@pytest.mark.slow
def test_a_training_that_diverges_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    with pytest.raises(
        detachnet.TrainingError,
        match=r"went wrong in epoch 1, step [2-5] of 8: .*\n  what .*last.safetensors is the last good checkpoint",
    ):
        train(recipe(*DIVERGING), tmp_path / "run")
    assert is_finite(tmp_path / "run" / "last.safetensors")
    assert not (tmp_path / "run" / "best.safetensors").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 9])
def test_the_step_and_the_model_are_named(tmp_path: Path, step: int) -> None:
    name = "stepdowns.sub0.weight"
    epoch, number = divmod(step, 8)  # the next one, from 0
    said = f"in epoch {epoch + 1}, step {number + 1} of 8: the training loss of sub0 is not finite"
    with pytest.raises(detachnet.TrainingError, match=said):
        train(recipe(), tmp_path / "run", listener=Spoil(name, step=step))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == epoch
    assert (tmp_path / "run" / "best.safetensors").exists() == bool(epoch)


@pytest.mark.slow
def test_a_weight_that_no_loss_has_seen_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    folder = RunFolder(tmp_path / "run")
    said = r"in epoch 1, step 8 of 8: 'stepdowns.sub1.weight', a weight of sub1, is not finite"
    with pytest.raises(detachnet.TrainingError, match=said):
        train(recipe(), folder.path, listener=Spoil("stepdowns.sub1.weight", epoch=1))
    assert is_finite(folder.last)
    assert is_finite(folder.best)
    assert read(folder.last)[0].training.step == 7  # type: ignore[union-attr]
    train(recipe(), folder.path, resume=True)  # from there it goes on


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_resumes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_check_finite", lambda self: None)
        patch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
        with pytest.raises(Killed):
            train(recipe(*DIVERGING), tmp_path / "run", listener=KillAfter(6))
    with pytest.raises(detachnet.TrainingError, match=r"went wrong in epoch 1, step .* is not finite"):
        train(recipe(*DIVERGING), tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_test_loss_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = {"accuracy": 0.5, "loss": math.nan}
    monkeypatch.setattr(Loop, "_evaluate", lambda self: {"base": score})
    with pytest.raises(detachnet.TrainingError, match="step 8 of 8: the test loss of base is nan"):
        train(recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / "best.safetensors").exists()


@pytest.mark.slow
def test_the_command_leaves_with_1(tmp_path: Path) -> None:
    words = [word for option in [*SMALL, *DIVERGING] for word in ("--set", option)]
    result = CliRunner().invoke(app, ["train", "quickstart", "--out", str(tmp_path / "run"), *words])
    assert result.exit_code == 1, result.output
    assert "Error: the training went wrong in epoch 1" in result.output


SHORTAGES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: str(error)[:20])
def test_no_memory_left_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    step, left = TrainingStep.__call__, [3]

    def short(self: TrainingStep, *batch: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return step(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", short)
    said = r"no memory left in epoch 1, step 3 of 8\n  what .*last.safetensors is the last good checkpoint; torch"
    with pytest.raises(detachnet.TrainingError, match=said) as told:
        train(recipe("train.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")
    assert "smaller train.batch_size" in str(told.value)
    assert len(str(told.value).splitlines()) == 3
    assert read(tmp_path / "run" / "last.safetensors")[0].training.step == 2  # type: ignore[union-attr]
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.slow
def test_other_errors_of_a_step_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("the tensors do not fit")

    monkeypatch.setattr(TrainingStep, "__call__", broken)
    with pytest.raises(RuntimeError, match="do not fit"):
        train(recipe("train.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")


@pytest.mark.slow
def test_a_batch_without_statistics_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(*_: Any) -> torch.Tensor:
        return torch.nn.functional.batch_norm(torch.ones(1, 8, 1, 1), None, None, training=True)

    monkeypatch.setattr(TrainingStep, "__call__", alone)
    with pytest.raises(detachnet.TrainingError, match=r"a batch of one image[\s\S]*larger train.batch_size"):
        train(recipe("train.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")


class HangUp(Listener):
    """The terminal is closed: from then on nothing can be written to it."""

    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        raise OSError(5, "Input/output error")


@pytest.mark.slow
def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGHUP)
    chosen = recipe("train.epochs=1", "schedule.warmup_epochs=0")
    assert train(chosen, tmp_path / "run", listener=HangUp()).status == "interrupted"
    assert signal.getsignal(signal.SIGHUP) is handler
    train(chosen, tmp_path / "run", resume=True)
    train(chosen, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


class Hang(Listener):
    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.slow
def test_under_nohup_it_goes_on(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        chosen = recipe("train.epochs=1", "schedule.warmup_epochs=0")
        assert train(chosen, tmp_path / "run", listener=Hang()).status == "finished"
    finally:
        signal.signal(signal.SIGHUP, before)


class Second(Listener):
    """Starts another training of the same folder in the midst of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []

    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        leftover = self.folder / ".last.safetensors.1.tmp"
        leftover.touch()
        for resume in (True, False) if not self.said else ():
            with pytest.raises(detachnet.CheckpointError, match=f"process {os.getpid()} on ") as error:
                train(recipe(), self.folder, resume=resume)
            self.said.append(error.value.summary)
        assert leftover.exists()


@pytest.mark.slow
def test_a_folder_belongs_to_one_training_at_a_time(tmp_path: Path) -> None:
    listener = Second(tmp_path / "run")
    train(recipe(), tmp_path / "run", listener=listener)
    assert listener.said == [f"{tmp_path / 'run'} is being written by another process"] * 2
    assert not (tmp_path / "run" / LOCK).exists()
    train(recipe(), tmp_path / "run", resume=True)


DYING = """
import os, sys, time
from pathlib import Path
from detachnet.storage import locked
with locked(Path(sys.argv[1])):
    if not os.fork():
        print("locked", flush=True)
        os.close(1)
        time.sleep(60)
    time.sleep(60)
"""


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(detachnet.CheckpointError, match=f"process {process.pid} on "), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):  # though a child of it lives on
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_is_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(detachnet.CheckpointError, match="cannot write in"), locked(tmp_path / "nothing"):
        pass
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(detachnet.CheckpointError, match="cannot write in"), locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("minutes", [math.nan, -1])
def test_minutes_are_a_number(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(detachnet.RecipeError, match="max_minutes is a number of minutes, not"):
        train(recipe(), tmp_path / "run", max_minutes=minutes)
