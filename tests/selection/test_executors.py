"""Candidates that are tried elsewhere: sent once, the same answers, and one message when a process ends."""

import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from detachnet.errors import MeasurementError
from detachnet.facts import Facts
from detachnet.selection import worth
from detachnet.selection.candidate import Candidate
from detachnet.selection.cluster import RayExecutor
from detachnet.selection.journal import Journal, Trials
from detachnet.selection.worth import Judge
from detachnet.surgery.making import make_detachable
from detachnet.zoo import build_model
from tests.searched import DATA, SIZE, images, trained

NARROW = Candidate().with_widths({"one.inner": 4})


@pytest.fixture
def judge() -> Iterator[Judge]:
    yield Judge(trained(), images(40, 2), images(40, 1))
    worth._here.clear()


@pytest.mark.slow
def test_a_judge_is_unpacked_once(judge: Judge) -> None:
    sent = pickle.dumps(judge)
    there = pickle.loads(sent)
    assert there is not judge
    assert pickle.loads(sent) is there
    assert there(NARROW)[:2] == judge(NARROW)[:2]
    other = pickle.loads(pickle.dumps(Judge(judge.net, images(20, 2), judge.calibration)))
    assert other is not there
    assert list(worth._here.values()) == [other]


@pytest.mark.slow
def test_a_network_that_no_other_process_knows(judge: Judge) -> None:
    class Mine(nn.Module):
        pass

    judge.net.add_module("mine", Mine())
    with pytest.raises(MeasurementError, match="the network cannot be sent to other processes"):
        pickle.dumps(judge)


@pytest.mark.slow
def test_another_process_says_the_same(judge: Judge) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        trials = Trials(judge, Journal(None, {}), executor)
        found = [w[:2] for w in trials([Candidate(), NARROW])]
    assert found == [judge(Candidate())[:2], judge(NARROW)[:2]]


OWN = """
import beside
from tests.searched import Tiny

class Mine(Tiny):
    def __init__(self):
        super().__init__()
        self.one.relu = beside.Act()

def make():
    return Mine()
"""


@pytest.mark.slow
def test_another_process_knows_what_a_file_of_ones_own_defines(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("from torch import nn\n\nclass Act(nn.ReLU):\n    pass\n")
    (tmp_path / "mine.py").write_text(OWN)
    net = make_detachable(build_model(f"{tmp_path / 'mine.py'}:make"), {}, SIZE, check="none")
    net.facts = Facts(data=DATA)
    judge = Judge(net, images(40, 2), images(40, 1))
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        assert next(executor.map(judge, [NARROW]))[:2] == judge(NARROW)[:2]
    worth._here.clear()


def test_a_process_that_ends() -> None:
    class Broken:
        def map(self, function: object, candidates: list[Candidate]) -> Iterator[Any]:
            raise BrokenProcessPool("killed")
            yield

    with pytest.raises(MeasurementError, match="a process that tried candidates has ended"):
        Trials(lambda candidate: worth.Worth(0, 0), Journal(None, {}), Broken())([Candidate()])  # type: ignore[arg-type]


class Ray:
    """What RayExecutor needs of Ray, in this process."""

    def __init__(self, running: bool) -> None:
        self.running, self.started, self.put_count = running, False, 0

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        self.running = self.started = True

    def shutdown(self) -> None:
        self.running = False

    def put(self, value: Any) -> Any:
        self.put_count += 1
        return value

    def remote(self, function: Callable[..., Any]) -> Any:
        def call(*args: Any) -> Any:
            future: Future[Any] = Future()
            future.set_result(function(*args))
            return SimpleNamespace(future=lambda: future)

        return SimpleNamespace(remote=call)


@pytest.mark.parametrize("running", [False, True])
def test_a_ray_cluster(monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    ray = Ray(running)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ray)

    def double(number: int) -> int:
        return 2 * number

    with RayExecutor(2) as executor:
        assert ray.started is not running
        assert list(executor.map(double, range(5))) == [0, 2, 4, 6, 8]
        assert executor.submit(int, "12", base=3).result() == 5
    assert ray.put_count == 2
    # A cluster that was there before is left as it is.
    assert ray.running is running


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MeasurementError, match=r"needs ray, which is not installed[\s\S]*detachnet\[ray\]"):
        RayExecutor()
