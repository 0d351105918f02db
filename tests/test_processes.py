"""Several processes under torchrun, with gloo on the CPU: the same gradients, one writer, any number resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import convert_sync_batchnorm

import detachnet
from tests.test_trainer import SMALL

ROOT = Path(__file__).parents[1]
DETACHNET = str(Path(sys.executable).with_name("detachnet"))
OPTIONS = [part for override in [*SMALL, "train.epochs=2", "data.num_train=1000"] for part in ("--set", override)]


def torchrun(processes: int, *args: str, check: bool = True) -> str:
    """What the processes print together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_gradients_are_those_of_one_process_with_the_whole_batch() -> None:
    out = torchrun(2, "tests/two_processes.py")
    assert "process 0 of 2: equal" in out
    assert "process 1 of 2: equal" in out


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, first: int, then: int) -> None:
    run = [DETACHNET, "train", "quickstart", *OPTIONS, "--out", str(tmp_path / "run")]
    torchrun(first, *run, "--max-minutes", "0")
    torchrun(then, *run, "--resume")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert detachnet.load(tmp_path / "run" / "last.safetensors").accuracy == rows[-1]["test_accuracy"]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_synchronized_norms_keep_their_activations() -> None:
    net = detachnet.make_detachable(
        detachnet.create_model("timm:efficientnet_b0"), ["blocks.2"], (3, 32, 32)
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = net(images, which="all")
    same = convert_sync_batchnorm(net)
    found = {type(m).__name__ for m in same.modules()}
    assert "SyncBatchNormAct" in found
    # On a CPU they run in evaluation mode only.
    for name, out in same(images, which="all").items():
        torch.testing.assert_close(out, expected[name])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=25", "train.batch_size = 25 is no multiple of 2 processes"),
        ("train.compile=true", "train.compile is for one process"),
        ("train.strategy=separate", "train.strategy = 'separate' is for one process"),
    ],
)
def test_what_several_processes_cannot_do(tmp_path: Path, override: str, message: str) -> None:
    run = [DETACHNET, "train", "quickstart", *OPTIONS, "--out", str(tmp_path / "run")]
    assert message in torchrun(2, *run, "--set", override, check=False)
