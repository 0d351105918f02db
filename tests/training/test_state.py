"""What a run must not lose: counted, kept in a file, and put back."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import detachnet
from detachnet.checkpoint.content import read
from detachnet.checkpoint.saving import write
from detachnet.training.runs import Saved
from detachnet.training.state import RunState, new_state
from tests import models
from tests.runs import recipe

CHOSEN = recipe("train.ema_decay=0.5", "optimizer.name=momentum")
ALL = ("base", "sub0", "sub1")


def fresh(seed: int = 0) -> RunState:
    torch.manual_seed(seed)
    model = models.Plain()
    model.fc = models.Keeping(8, 5)
    net = detachnet.make_detachable(model, ["conv1", "pool"], (3, 8, 8), head="private", check="none")
    return new_state(CHOSEN, net, torch.device("cpu"))


def count(state: RunState, losses: Sequence[float], names: Sequence[str], updates: int) -> None:
    state.count(torch.tensor(losses), names, updates)


def test_steps_are_counted_for_the_models_they_trained() -> None:
    state = fresh()
    count(state, [1.0, 2.0, 3.0], ALL, 1)
    count(state, [10.0, 30.0], ("base", "sub1"), 2)
    assert (state.sums.tolist(), state.counts.tolist()) == ([11.0, 2.0, 33.0], [2, 1, 2])
    assert (state.finite.tolist(), state.step, state.epoch) == ([2, 2, 2], 2, 0)
    count(state, [1.0, math.nan, 1.0], ALL, 3)
    count(state, [1.0, 1.0, 1.0], ALL, 4)
    assert (state.finite.tolist(), state.step) == ([4, 2, 4], 4)
    state.end_epoch({"epoch": 1})
    assert (state.epoch, state.step, state.rows) == (1, 0, [{"epoch": 1}])
    assert not state.sums.any()
    assert not state.counts.any()
    assert not state.finite.any()


def test_the_average_is_told_the_number_of_the_update() -> None:
    """Its decay rises with that: 1 - n ** (-2 / 3), up to 0.5."""
    state = fresh()
    before = state.family.base.get_parameter("fc.weight").clone()
    weight = state.net.base.get_parameter("fc.weight")
    weight.data += 1
    count(state, [0.0] * 3, ALL, 2)
    decay = min(0.5, 1 - 2 ** (-2 / 3))
    torch.testing.assert_close(state.family.base.get_parameter("fc.weight").data, before + 1 - decay)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("norms.sub1.bn2.running_var", "a running statistic of sub1"),
        ("base.bn1.running_mean", "a running statistic of base"),
        ("heads.sub0.fc.bias", "a weight of sub0"),
        ("base.conv2.weight", "a weight of base"),
    ],
)
def test_what_is_not_finite_is_named_and_whose_it_is(name: str, what: str) -> None:
    state = fresh()
    assert state.not_finite() == ""
    state.net.state_dict()[name][0] = math.inf
    assert state.not_finite() == f"{name!r}, {what}"


def test_the_share_of_waiting_is_rounded_once() -> None:
    """What is printed is what `run.json` has: 0.9254 rounded to 93 %, but as 0.925 to 92."""
    state = fresh()
    assert state.wait_share is None
    state.train_s, state.wait_s = 10.0, 9.254
    assert state.wait_share == 0.925


def moved() -> RunState:
    """A state in the midst of its second epoch."""
    state = fresh()
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    state.end_epoch({"epoch": 1})
    state.net.base.fc.state = {"scale": 4}  # type: ignore[union-attr]
    for number in range(2):
        loss = detachnet.MultiModelLoss()(state.net.train()(images, which="all"), labels)
        loss.backward()
        state.optimizer.step()
        count(state, [1.0, 2.0, 3.0][: 3 - number], ALL[: 3 - number], number + 1)
    state.train_s, state.wait_s = 7.0, 2.0
    return state


@pytest.mark.parametrize("old", [False, True])
def test_a_file_puts_everything_back(tmp_path: Path, old: bool) -> None:
    """Files from before models were sampled do not say how many steps trained each."""
    one, two = moved(), fresh(1)
    numbers = one.numbers(CHOSEN)
    write(one.family, tmp_path / "f", numbers.model_copy(update={"counts": {}}) if old else numbers, one.tensors())
    header, tensors = read(tmp_path / "f")
    assert header.training is not None
    two.restore(Saved(header, header.training, tensors))
    for a, b in ((one.net, two.net), (one.family, two.family)):
        assert_same(a.state_dict(), b.state_dict())
    assert two.net.heads.sub1.fc.state == {"scale": 4}  # type: ignore[union-attr]
    assert not torch.equal(one.net.base.fc.weight, one.family.base.fc.weight)  # type: ignore[union-attr,arg-type]
    for (name, a), b in zip(one.parameters.items(), two.parameters.values(), strict=True):
        assert_same(one.optimizer.state[a], two.optimizer.state[b])
        assert "momentum_buffer" in one.optimizer.state[a], name
    assert (two.epoch, two.step, two.rows) == (1, 2, [{"epoch": 1}])
    assert (two.train_s, two.wait_s) == (7.0, 2.0)
    assert two.sums.tolist() == [2.0, 4.0, 3.0]
    assert two.counts.tolist() == ([2, 2, 2] if old else [2, 2, 1])
    assert two.finite.tolist() == [2, 2, 2]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name
