"""Progress is told to who listens, and to nobody else."""

import sys
from typing import Any

import pytest
import torch
from detachnet_cli import console

from detachnet.data.datasets import Split
from detachnet.deploy.profile import profile
from detachnet.evaluation import evaluate
from detachnet.progress import counted, listening, tell
from tests import families


def test_things_are_counted_and_come_out_as_they_are() -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *told: heard.append(told)):
        assert list(counted("ab", 2, "letters")) == ["a", "b"]
    assert heard == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]
    tell("letters", 1, 2)
    assert len(heard) == 3


@pytest.mark.slow
def test_evaluations_and_measurements_tell() -> None:
    net, heard = families.make(), set[str]()
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with listening(lambda what, _done, _total: heard.add(what)):
        evaluate(net, Split(images, torch.zeros(4, dtype=torch.long), ("a", "b")))
        profile(net, n=2, warmup=0, peak_memory=False)
    assert heard == {"batches of images", "runs of each model"}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_only_in_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress():
        things: Any = counted(range(3), 3, "steps of a test")
        assert list(things) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("steps of a test" in err) == terminal
