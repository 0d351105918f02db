"""What a training computes, beside the same with torch's own optimizers and losses and with rates by hand."""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detachnet
from detachnet.checkpoint.content import read
from detachnet.training.loop import Listener, Loop
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.trainer import train
from tests.runs import QUICKSTART, SMALL, KillAfter, Killed, loop

pytestmark = pytest.mark.usefixtures("little_data")

STEPS = 3
"""Per epoch, of two."""
SHORT = ("data.num_train=150", "train.epochs=2", "optimizer.lr=0.005", "optimizer.weight_decay=2.0")
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


MODEL = """
from torch import nn

def small(p=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Dropout(p), nn.Flatten(), nn.Linear(128, 10),
    )
"""


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of a model that trains in no time."""
    (tmp_path / "own.py").write_text(MODEL)
    model = json.dumps(str(tmp_path / "own.py:small"))

    def make(*overrides: str, p: float = 0.0) -> Recipe:
        own = (f"model={{name={model}, kwargs={{p={p}}}}}", 'family.cuts=["2", "5"]')
        return load_recipe(QUICKSTART, [*SMALL[1:], *own, *SHORT, *overrides])

    return make


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.0, momentum=0.6, weight_decay=2.0)


def nesterov(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.0, momentum=0.6, weight_decay=2.0, nesterov=True)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.0, weight_decay=2.0)


COSINE = [0.005 * i / 3 for i in range(3)] + [0.0025 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
"""A first epoch of warming up, then half a wave."""
MULTISTEP = [0.005 * i / 2 for i in range(2)] + [0.005] + [0.001] * 3
"""Half an epoch of warming up (rounded to two steps), a fifth after the first epoch."""


def smoothed(outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Cross entropy with a tenth of the label spread over all ten classes, as its definition has it."""
    target = 0.9 * F.one_hot(labels, 10) + 0.01
    return {name: -(target * out.log_softmax(1)).sum(1).mean() for name, out in outputs.items()}


def distilled(outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Hinton's, with torch's own divergence at a temperature of 3."""
    losses = {name: nn.CrossEntropyLoss()(out, labels) for name, out in outputs.items()}
    above = {"sub0": "base", "sub1": "sub0"}
    for name, teacher in above.items():
        theirs = (outputs[teacher].detach() / 3).softmax(1)
        divergence = nn.KLDivLoss(reduction="batchmean")((outputs[name] / 3).log_softmax(1), theirs)
        losses[name] = losses[name] + 0.7 * 9 * divergence
    return losses


def plain(outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    return {name: nn.CrossEntropyLoss()(out, labels) for name, out in outputs.items()}


def by_hand(
    begun: Loop, make: Make, rates: list[float], loss: Any, weights: Mapping[str, float]
) -> tuple[detachnet.DetachableNet, list[dict[str, Any]]]:
    """The weights after the last step; and of each epoch the mean losses and what the test images give."""
    net, rows, number = copy.deepcopy(begun.state.net), [], 0
    models = begun.recipe.models
    optimizer = make(list(net.parameters_of(models).values()))
    for epoch in range(2):
        net.train()
        losses: list[dict[str, Tensor]] = []
        for images, labels in begun.batches.epoch(epoch):
            optimizer.param_groups[0]["lr"] = rates[number]
            losses.append(loss(net(images, which=models), labels))
            total = sum(weights.get(name, 1.0) * value for name, value in losses[-1].items())
            optimizer.zero_grad()
            total.backward()  # type: ignore[union-attr]
            optimizer.step()
            number += 1
        pairs = list(begun.test.epoch())
        images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        with torch.no_grad():
            outputs = net.eval()(images, which=models)
        row: dict[str, Any] = {"lr": rates[number - 1], "train_loss": {}, "test_loss": {}, "test_accuracy": {}}
        for name in models:
            row["train_loss"][name] = sum(float(each[name].detach()) for each in losses) / STEPS
            row["test_loss"][name] = float(F.cross_entropy(outputs[name], labels))
            row["test_accuracy"][name] = sum(outputs[name].argmax(1) == labels).item() / len(labels)
        rows.append(row)
    return net, rows


TERMS: dict[str, tuple[tuple[str, ...], Make, list[float], Any, dict[str, float]]] = {
    "momentum": (
        ("optimizer.name=momentum", "loss.label_smoothing=0.1", "loss.weights={sub1=0.3, base=2}"),
        sgd,
        COSINE,
        smoothed,
        {"sub1": 0.3, "base": 2.0},
    ),
    "nesterov": (
        (
            "optimizer.name=nesterov",
            'schedule={name="multistep", milestones=[1], decay=0.2, warmup_epochs=0.5}',
            "loss.distillation=0.7",
            "loss.temperature=3",
            "loss.teacher=larger",
        ),
        nesterov,
        MULTISTEP,
        distilled,
        {},
    ),
    "adamw": (("optimizer.name=adamw", "train.strategy=separate"), adamw, COSINE, plain, {}),
    "alone": (
        (
            "optimizer.name=momentum",
            'train.models=["sub1"]',
            "optimizer.weight_decay=0",
            "optimizer.weight_decay_alone={sub1=2.0}",
            "loss.weights={sub1=0.3}",
        ),
        sgd,
        COSINE,
        plain,
        {},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_every_term_of_a_step_is_what_torch_has(tmp_path: Path, small: Callable[..., Recipe], name: str) -> None:
    options, make, rates, loss, weights = TERMS[name]
    one = loop(small("optimizer.momentum=0.6", *options), tmp_path)
    net, rows = by_hand(one, make, rates, loss, weights)
    assert one.run(None) == "finished"
    for row, ours in zip(one.state.rows, rows, strict=True):
        assert row["lr"] == pytest.approx(ours["lr"])
        assert row["train_loss"] == pytest.approx(ours["train_loss"], rel=2e-3)
        assert row["test_loss"] == pytest.approx(ours["test_loss"], rel=2e-3)
        assert row["test_accuracy"] == pytest.approx(ours["test_accuracy"], abs=0.021)
    for (key, mine), (_, other) in zip(one.state.net.state_dict().items(), net.state_dict().items(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
def test_an_average_of_the_weights(tmp_path: Path, small: Callable[..., Recipe]) -> None:
    """Whose decay rises with the number of updates, as timm's documentation has it: 1 - n ** (-2 / 3)."""
    one = loop(small("train.ema_decay=0.45"), tmp_path)
    average = {name: tensor.clone() for name, tensor in one.state.net.named_parameters()}
    for number, batch in enumerate(one.batches.epoch(), 1):
        one.update(*batch)
        decay = min(0.45, 1 - number ** (-2 / 3))
        for name, tensor in one.state.net.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * tensor.detach()
    moved = dict(one.state.family.named_parameters())
    for name, tensor in average.items():
        torch.testing.assert_close(moved[name].detach(), tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert one.state.family is not one.state.net


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What dropout kept in each training step."""
    seen: list[Tensor] = []
    forward = nn.Dropout.forward

    def spy(self: nn.Dropout, x: Tensor) -> Tensor:
        if self.training and not isinstance(x, torch.fx.Proxy) and not x.is_meta:
            ones = forward(self, torch.ones_like(x))
            seen.append(ones.detach().clone() > 0)
            return x * ones
        return forward(self, x)

    monkeypatch.setattr(nn.Dropout, "forward", spy)
    return seen


@pytest.mark.slow
def test_dropout_differs_in_every_step_and_is_the_same_on_resume(
    tmp_path: Path, small: Callable[..., Recipe], masks: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = small(p=0.5)
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    train(chosen, tmp_path / "whole")
    whole = masks[-6:]
    masks.clear()
    for i, one in enumerate(whole):
        assert 0.4 < one.float().mean() < 0.6
        assert not any(torch.equal(one, other) for other in whole[:i])
    with pytest.raises(Killed):
        train(chosen, tmp_path / "cut", listener=KillAfter(4))
    masks.clear()
    torch.manual_seed(99)
    train(chosen, tmp_path / "cut", resume=True)
    assert all(torch.equal(one, other) for one, other in zip(masks[-2:], whole[-2:], strict=True))


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[dict[str, float]]) -> None:
    """Evaluations say these accuracies, one after another."""
    left = iter(scores)
    monkeypatch.setattr(
        Loop,
        "_evaluate",
        lambda self: {name: {"accuracy": value, "loss": 1.0} for name, value in next(left).items()},
    )


@pytest.mark.slow
def test_the_best_epoch_is_that_of_the_mean_over_all_models(
    tmp_path: Path, small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [
        {"base": 0.5, "sub0": 0.5, "sub1": 0.5},
        {"base": 0.4, "sub0": 0.9, "sub1": 0.6},
        {"base": 0.8, "sub0": 0.3, "sub1": 0.3},
        {"base": 0.6, "sub0": 0.6, "sub1": 0.7},  # as good as the second one: the first of them counts
        {"base": 0.1, "sub0": 0.1, "sub1": 0.1},
    ]
    scripted(monkeypatch, scores)
    run = train(small("train.epochs=5"), tmp_path / "run")
    best, last = (read(path)[0].accuracy for path in (run.folder.best, run.folder.last))
    assert (best, last) == (scores[1], scores[4])
    found = {row["model"]: (row["best_epoch"], row["best_accuracy"], row["last_accuracy"]) for row in run.table}
    assert found == {"base": (3, 0.8, 0.1), "sub0": (2, 0.9, 0.1), "sub1": (4, 0.7, 0.1)}


class Watch(Listener):
    """A clock on which a step takes 25 seconds; and what was on disk after each."""

    def __init__(self, last: Path) -> None:
        self.now, self.last = time.monotonic(), last
        self.saved: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def on_step(self, epoch: int, images: int, losses: Mapping[str, Tensor]) -> None:
        self.now += 25.0
        state = read(self.last)[0].training if self.last.exists() else None
        self.saved.append(state.step if state else 0)


@pytest.mark.slow
def test_a_checkpoint_every_minute(
    tmp_path: Path, small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path / "run" / "last.safetensors")
    monkeypatch.setattr("detachnet.training.loop.time.monotonic", watch.monotonic)
    train(small("data.num_train=0", "train.epochs=1"), tmp_path / "run", listener=watch)
    assert watch.saved == [0, 0, 0, 3, 3, 3, 6, 6]
