"""Budgets of latency, with a stopwatch that counts: nothing here depends on how fast a machine is."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from detachnet.deploy.stopwatch import Stopwatch
from detachnet.errors import BudgetError, MeasurementError
from detachnet.machine import OtherWork
from detachnet.report.fronts import figure
from detachnet.selection.candidate import Candidate
from detachnet.selection.costs import checked, counted
from detachnet.selection.front import Front, name_of
from detachnet.selection.journal import Journal
from detachnet.selection.latency import Latency
from detachnet.selection.searching import JOURNAL
from detachnet.selection.worth import Judge, Worth
from tests.searched import everything, images, space_of_tiny, trained


class Counting:
    """A stopwatch by which a module takes a second for each MAC, and whatever else is said.

    Attributes:
        modules: How many were measured.
        other_work: Nothing was measured.
    """

    def __init__(self, *options: Any) -> None:
        self.modules, self.other_work = 0, OtherWork(1)

    def __call__(self, module: nn.Module, value: Tensor) -> float:
        self.modules += 1
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert module(value.clone()).shape[0] == 1
        return counter.get_total_flops() / 2

    def __str__(self) -> str:
        return "counting, 1 thread, no machine"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Counting]:
    """Candidates are not run, and modules are counted; the stopwatches that were made."""
    made: list[Counting] = []

    def worth(self: Judge, candidate: Candidate) -> Worth:
        lost = 0.1 * len(candidate.drop) + 0.05 * len(candidate.eighths)
        return Worth(0.9 - lost, lost)

    def stopwatch(*_: Any) -> Counting:
        made.append(Counting())
        return made[-1]

    monkeypatch.setattr(Judge, "__call__", worth)
    monkeypatch.setattr("detachnet.selection.searching.Stopwatch", stopwatch)
    return made


def search(budgets: list[float], **options: Any) -> Front:
    return detachnet.search(
        trained(), images(100, 2), budgets, by="latency_ms", calibration=images(100, 1), **options
    )


@pytest.mark.slow
def test_segments_add_up_to_the_whole() -> None:
    """Where nothing but MACs takes time, what is added up is what is counted, of every candidate."""
    space, stopwatch = space_of_tiny(), Counting()
    latency, macs = Latency(space, Journal(None, {}), stopwatch), counted(space, "macs")
    for candidate in everything(space, macs):
        assert latency(candidate) == pytest.approx(1e3 * (macs(candidate) or 0))
    # The stem of 16 or 8, each block of both and of 16 or 8 inside, the head of 16 or 8; and the base-model.
    assert stopwatch.modules == 2 + 2 * 4 + 2 + 1
    narrow = Candidate(("one:two",)).with_widths({"stem.0": 4})
    assert latency.whole(narrow) == pytest.approx(latency(narrow))


def test_what_a_segment_has_of_filters() -> None:
    space = space_of_tiny()
    assert [(s.start, s.end, s.groups) for s in space.segments] == [
        ("", "stem", ("stem.0",)),
        ("stem", "one", ("one.inner", "stem.0")),
        ("one", "two", ("stem.0", "two.inner")),
        ("two", "", ("stem.0",)),
    ]
    assert [s.end for s in space.segments_of(Candidate(("one:two",)))] == ["stem", "one", ""]


@pytest.mark.slow
def test_a_budget_of_milliseconds(tmp_path: Path, quick: list[Counting]) -> None:
    macs = trained().plan["base"].macs
    front = search([600.0 * macs, 300.0 * macs], folder=tmp_path)
    assert front.how == "counting, 1 thread, no machine"
    assert front.deviation == pytest.approx(0)
    for found in front.found:
        assert found.name.startswith("ms")
        assert found.cost == pytest.approx(1e3 * front.net.plan[found.name].macs)
        assert found.measured == pytest.approx(found.cost)
        assert found.cost <= min(found.budgets)
    assert "segments added up are off by 0.0 % at most" in str(front)
    assert front.to_json()["measured_with"] == front.how
    figure(front, tmp_path / "search.svg")
    assert "milliseconds for one image" in (tmp_path / "search.svg").read_text(encoding="utf-8")
    # What was measured is kept, and not measured again.
    assert quick[0].modules
    assert search([600.0 * macs, 300.0 * macs], folder=tmp_path).to_json() == front.to_json()
    assert not quick[1].modules
    assert "no machine: stem:one" in (tmp_path / JOURNAL).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_what_is_chosen_keeps_its_budget_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all but the base-model take longer than their segments, and the cheapest way to a budget breaks it."""
    whole, macs = Latency.whole, trained().plan["base"].macs

    def slower(times: float) -> Callable[[Latency, Candidate], float]:
        def measured(self: Latency, candidate: Candidate) -> float:
            self.measured[candidate] = whole(self, candidate) * (1 if candidate.is_base else times)
            return self.measured[candidate]

        return measured

    (before,) = search([600.0 * macs]).found
    assert before.measured == pytest.approx(before.cost)
    monkeypatch.setattr(Latency, "whole", slower(1.5))
    (found,) = search([600.0 * macs]).found
    assert found.measured == pytest.approx(1.5 * found.cost)
    assert found.measured <= 600.0 * macs < 1.5 * before.cost
    # Even the smallest takes too long, measured as it is.
    monkeypatch.setattr(Latency, "whole", slower(100))
    with pytest.raises(BudgetError, match=r"no sub-model of Tiny costs .* ms or less: the least is") as refused:
        search([600.0 * macs])
    assert "nearest" in str(refused.value)


@pytest.mark.slow
def test_other_work_is_told(
    quick: list[Counting], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tell(self: OtherWork) -> None:
        logging.getLogger("detachnet").warning("told once by %s", self.threads)

    monkeypatch.setattr(OtherWork, "tell", tell)
    with caplog.at_level(logging.WARNING):
        search([600.0 * trained().plan["base"].macs])
    assert caplog.messages.count("told once by 1") == len(quick) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "latency_ms", "runtime": "tpu"}, "runtime='tpu': it is torch or onnx"),
        ({"by": "latency_ms", "threads": 0}, "threads=0: it is at least 1"),
        ({"runtime": "onnx"}, "runtime and threads are for budgets of latency_ms; macs are counted"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises((BudgetError, MeasurementError), match=said):
        detachnet.search(trained(), images(8, 2), [0.5], **options)


def test_milliseconds_are_no_shares() -> None:
    assert checked([0.5, 2], "latency_ms", 3.0) == [2, 0.5]
    assert name_of("latency_ms", 0.25, 3.0) == "ms0_25"
    with pytest.raises(BudgetError, match="the base-model keeps it already, with 3"):
        checked([4], "latency_ms", 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_stopwatch(runtime: Any) -> None:
    """It runs the module through the runtime, so many times, and leaves the number of threads."""
    threads, stopwatch = torch.get_num_threads(), Stopwatch(runtime, 1)
    assert stopwatch(nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8)) > 0
    assert str(stopwatch).startswith(f"{runtime}, 1 thread, cpu (")
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_what_is_measured_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no other device everywhere: that the module itself is not moved stands for it."""
    module, moved, move = nn.Conv2d(3, 4, 3).eval(), [], nn.Module.cpu
    monkeypatch.setattr(nn.Module, "cpu", lambda self: (moved.extend(self.modules()), move(self))[1])
    Stopwatch("onnx", 1)(module, torch.zeros(1, 3, 8, 8))
    assert moved
    assert module not in moved


@pytest.mark.slow
def test_what_cannot_be_exported_is_not_measured() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(MeasurementError, match="a part of the network cannot be exported"):
        Stopwatch("onnx", 1)(Odd(), torch.ones(1, 3, 8, 8))
