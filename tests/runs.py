"""Small training runs, and what several tests do with them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import detachnet
from detachnet.data.datasets import Split, load_data, select
from detachnet.training import trainer
from detachnet.training.data import MemorySource
from detachnet.training.loop import Listener, Loop
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.runs import RunFolder
from detachnet.training.start import starting_family
from detachnet.training.state import new_state

ROOT = Path(__file__).parents[1]

DETACHNET = str(Path(sys.executable).with_name("detachnet"))


def torchrun(processes: int, *args: str, check: bool = True) -> str:
    """What the processes print together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    out = result.stdout + result.stderr
    assert not check or result.returncode == 0, out
    return out


QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"

SMALL = [
    "model.kwargs.width=0.05",
    "train.epochs=3",
    "train.batch_size=50",
    "schedule.warmup_epochs=1",
    "family.models={}",
]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*SMALL, *overrides])


def tenth(*_: object, **__: object) -> tuple[Split, Split]:
    """Every tenth image of cifar10-mini, so that an epoch takes a fraction of a second."""
    train_split, test_split = (
        Split(split.images[::10], split.labels[::10], split.classes) for split in load_data("cifar10-mini")
    )
    return train_split, test_split


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class KillAfter(Listener):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert (one / "results.json").read_bytes() == (other / "results.json").read_bytes()
    for name in ("last.safetensors", "best.safetensors"):
        first, second = detachnet.load(one / name), detachnet.load(other / name)
        for (key, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
            assert torch.equal(a, b), (name, key)


def loop(chosen: Recipe, folder: Path) -> Loop:
    """What a run has before its first step."""
    source = MemorySource(chosen.data, select(tenth(), chosen.data.num_train, chosen.data.holdout))
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16" if chosen.train.precision == "bf16" else "no")
    net = starting_family(chosen, source, accelerator.device, several=False, resuming=False)
    batches, test = trainer._deal(chosen, source, net, accelerator)
    state = new_state(chosen, net, accelerator.device)
    step = trainer._make_step(chosen, state, accelerator)
    return Loop(chosen, RunFolder(folder), accelerator, batches, test, state, step, Listener())
