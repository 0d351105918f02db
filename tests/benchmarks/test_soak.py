"""Every request of the load test is accounted for."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

import detachnet
import soak
from detachnet.deploy.backends import TorchBackend
from detachnet.deploy.deadline import Served
from detachnet.deploy.family import Family
from tests.families import make, profile_of


@pytest.mark.slow
def test_what_becomes_of_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LOADS", (0.5, 1000.0))
    net = make()
    family = Family(TorchBackend(net, 1), "family.safetensors", profile_of(net))
    images = torch.randn(40, 3, 32, 32)
    with torch.no_grad():
        labels = net(images, which="sub1").argmax(1).tolist()
    rows = soak.soak(family, 100.0, 100.0, list(zip(images, labels, strict=True)))
    assert [(row["load"], row["models"]) for row in rows] == [
        (load, models) for load in (0.5, 1000.0) for models in ("base", "sub1", "all")
    ]
    for row in rows:
        assert row["sent"] == 40
        assert row["refused"] + row["in_time"] + row["late"] + row["lost"] == 40
        assert row["lost"] == 0
        if row["models"] == "sub1" and row["right_of_answered"] is not None:
            assert row["right_of_answered"] == 1
            assert row["right_of_sent"] == (row["in_time"] + row["late"]) / 40


class Scripted:
    """A runner that answers, refuses and forgets as told; a target of a second."""

    policy = SimpleNamespace(target_s=1.0)

    def __init__(self, *script: float | Exception | None) -> None:
        self.script = list(script)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, image: torch.Tensor) -> Future[Served]:
        future: Future[Served] = Future()
        what = self.script.pop(0)
        if isinstance(what, float):
            future.set_result(Served("base", image, 0.0, what))
        elif what is not None and str(what) == "at once":
            raise what
        elif what is not None:
            future.set_exception(what)
        return future


def test_how_it_is_counted() -> None:
    said = (0.5, 2.0, detachnet.LateError("at once"), detachnet.BudgetError("at once"))
    runner = Scripted(*said, detachnet.LateError("later"), None, OSError("later"), 0.9)
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    row = soak.serve(runner, [0.0] * 8, [(first, 0), (first, 0), *[(second, 1)] * 5, (second, 0)])  # type: ignore[arg-type]
    assert row == {
        **{"sent": 8, "refused": 3, "in_time": 2, "late": 1, "lost": 2},
        **{"p99_ms": pytest.approx(1978.0), "right_of_answered": 2 / 3, "right_of_sent": 2 / 8},
    }
