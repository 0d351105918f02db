"""Several processes under torchrun, with gloo on the CPU: the same gradients, one writer, any number resumes."""

import json
import sys
from pathlib import Path

import pytest
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.training.processes import _check_number
from detachnet.training.recipe import load_recipe
from tests.helpers import nightly_but
from tests.runs import DETACHNET, SMALL, torchrun

pytestmark = pytest.mark.slow  # each starts processes that start processes
OPTIONS = [part for override in [*SMALL, "train.epochs=2", "data.num_train=1000"] for part in ("--set", override)]


def test_gradients_are_those_of_one_process_with_the_whole_batch() -> None:
    out = torchrun(2, "tests/training/two_processes.py")
    assert "process 0 of 2: equal" in out
    assert "process 1 of 2: equal" in out


@pytest.mark.parametrize(("first", "then"), nightly_but([(2, 1)], [(2, 1), (1, 2)]))
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, first: int, then: int) -> None:
    run = [DETACHNET, "train", "quickstart", *OPTIONS, "--out", str(tmp_path / "run")]
    for processes, *more in ((first, "--max-minutes", "0"), (then, "--resume")):
        if processes > 1:
            torchrun(processes, *run, *more)
        else:
            assert CliRunner().invoke(app, [*run[1:], *more]).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert detachnet.load(tmp_path / "run" / "last.safetensors").facts.accuracy == rows[-1]["test_accuracy"]
    assert not list((tmp_path / "run").glob("*.tmp"))


RUN_TWICE = """
import os, sys
from pathlib import Path
import torch
import detachnet
theirs = len(sys.argv) > 3
if theirs:
    torch.distributed.init_process_group("gloo")
for name in ("one", "two"):
    result = detachnet.train(detachnet.load_recipe("quickstart", sys.argv[2].split()), f"{sys.argv[1]}/{name}")
    assert torch.distributed.is_initialized() == theirs
    threads = sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    print(f"process {os.environ['RANK']}: {name} {result.status}, {threads} threads of gloo's")
if theirs:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for threads in /proc")
@pytest.mark.parametrize("theirs", nightly_but([False], [False, True]))
def test_the_library_closes_the_process_group_it_opened(tmp_path: Path, theirs: bool) -> None:
    (tmp_path / "twice.py").write_text(RUN_TWICE)
    overrides = " ".join([*SMALL, "train.epochs=1", "data.num_train=200"])
    words = [str(tmp_path / "twice.py"), str(tmp_path), overrides, *(["theirs"] if theirs else [])]
    out = torchrun(2, *words)
    names = ("one", "two")
    left = "" if theirs else ", 0 threads of gloo's"
    assert all(f"process {i}: {name} finished{left}" in out for i in range(2) for name in names)
    assert len({(tmp_path / name / "metrics.jsonl").read_bytes() for name in names}) == 1


AUXILIARY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.head, self.other = nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x):
        h = self.front(x).relu()
        out = self.head(self.back(h).relu().mean((2, 3)))
        return (out, self.other(h.mean((2, 3)))) if self.training else out

def make():
    return Net()
"""


def test_what_the_loss_gives_no_gradient_stays_as_it_is(tmp_path: Path) -> None:
    """A head that is for training only, and whose output the loss does not take: two steps of two processes."""
    (tmp_path / "own.py").write_text(AUXILIARY)
    words = [
        f"model.name={tmp_path / 'own.py'}:make",
        "model.kwargs={}",
        "family.cuts=['front']",
        "data.num_train=100",
    ]
    options = [part for word in [*SMALL, "train.epochs=1", *words] for part in ("--set", word)]
    torchrun(2, DETACHNET, "train", "quickstart", *options, "--out", str(tmp_path / "run"))
    assert (tmp_path / "run" / "results.json").exists()


REFUSED = {
    "train.batch_size=25": "train.batch_size = 25 is no multiple of 2 processes",
    "train.compile=true": "train.compile is for one process",
    "train.strategy=separate": "train.strategy = 'separate' is for one process",
    "train.sample=1": "train.sample is for one process",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_several_processes_cannot_do(override: str) -> None:
    chosen = load_recipe("quickstart", [override])
    _check_number(chosen, 1)
    with pytest.raises(detachnet.RecipeError, match=REFUSED[override]):
        _check_number(chosen, 2)


@pytest.mark.nightly
def test_a_run_of_several_processes_is_refused(tmp_path: Path) -> None:
    run = [DETACHNET, "train", "quickstart", *OPTIONS, "--out", str(tmp_path / "run")]
    assert REFUSED["train.batch_size=25"] in torchrun(2, *run, "--set", "train.batch_size=25", check=False)
