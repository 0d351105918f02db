"""Tracing replaces functions of torch; what other threads see of that."""

import ast
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import detachnet
from detachnet.surgery import codegen

CONV = nn.Conv2d(3, 4, 1)
MAKE = (
    *(lambda: torch.randn(2), lambda: torch.rand(2), lambda: torch.randperm(2), lambda: torch.zeros(2)),
    lambda: CONV(torch.ones(1, 3, 2, 2)).detach(),
)
PATIENCE_S = 30


class Noisy(nn.Module):
    """Adds noise, and runs a function in the middle of its forward pass."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self._meanwhile = [meanwhile]

    def __deepcopy__(self, memo: object) -> "Noisy":
        return Noisy(*self._meanwhile)  # events and functions have no copies

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self._meanwhile[0]()
        return self.last(x + torch.randn(4, 1, 1)).mean((2, 3))


def test_other_threads_get_tensors_while_a_model_is_traced() -> None:
    original, inside, made = torch.randn, threading.Event(), threading.Event()
    results: list[object] = []

    def keep_making() -> None:
        while not made.is_set():
            results.extend(make() for make in MAKE)
            if inside.is_set():  # the trace waits, so these were made in the middle of it
                results.extend(make() for make in MAKE)
                made.set()

    def meanwhile() -> None:
        inside.set()
        assert made.wait(PATIENCE_S)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(keep_making)
        cuts = detachnet.find_cuts(Noisy(meanwhile), (3, 8, 8))
        done.result(PATIENCE_S)
    assert "first" in [cut.name for cut in cuts]
    assert {type(result) for result in results} == {Tensor}
    assert torch.randn is original


class Counting(nn.Module):
    """Says while it runs, in the comparison of a family with its model too, that it does."""

    def __init__(self, running: list[str], overlaps: list[int], name: str) -> None:
        super().__init__()
        self.conv, self.said = nn.Conv2d(3, 5, 1), (running, overlaps, name)

    def __deepcopy__(self, memo: object) -> "Counting":
        made = Counting(*self.said)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        running, overlaps, name = self.said
        running.append(name)
        time.sleep(0.005)
        overlaps.append(len(set(running)))
        running.remove(name)
        out: Tensor = self.conv(x)
        return out


def test_comparisons_take_turns() -> None:
    """They set the random state, which all threads share."""
    running, overlaps = list[str](), list[int]()

    def make(name: str) -> str:
        layer = Counting(running, overlaps, name)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Flatten(), nn.Linear(5 * 16, 2))
        return detachnet.make_detachable(model, ["0"], (3, 4, 4), leaf_modules=["1"]).plan.checked

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(make, "abc")) == [""] * 3
    assert set(overlaps) == {1}


def test_traces_take_turns() -> None:
    original, inside, released = torch.randn, threading.Event(), threading.Event()
    running: list[str] = []
    overlaps: list[list[str]] = []

    def trace(name: str, wait: Callable[[], object]) -> list[str]:
        def meanwhile() -> None:
            running.append(name)
            inside.set()
            wait()
            overlaps.append(list(running))
            running.remove(name)

        return [cut.name for cut in detachnet.find_cuts(Noisy(meanwhile), (3, 8, 8))]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(trace, "first", lambda: released.wait(PATIENCE_S))
        assert inside.wait(PATIENCE_S)
        second = pool.submit(trace, "second", lambda: None)
        threading.Timer(0.5, released.set).start()  # time enough for the second to be where it must not be
        assert first.result(PATIENCE_S) == second.result(PATIENCE_S)
    assert all(len(names) == 1 for names in overlaps)
    assert torch.randn is original


def test_one_thread_at_a_time_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.7 and older count the depth of all syntax trees in one place."""
    parse, inside, most = ast.parse, [0], [0]

    def slowly(*args: object, **options: object) -> ast.AST:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return parse(*args, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(codegen.ast, "parse", slowly)
    source = "def forward(self, x):\n    return self.layer(x)\n"
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda i: codegen.compile_source(source, {}, str(i)), range(4)))
    layers = nn.ModuleDict({"layer": nn.Identity()})
    assert [run(layers, torch.ones(1)).item() for run in runs] == [1] * 4
    assert most == [1]
