"""Steps that train some of many models: the largest, the smallest and random others."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import detachnet
from detachnet.losses import MultiModelLoss
from detachnet.report.page import make_page
from detachnet.training.loop import Listener
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.step import TrainingStep, sample_models
from detachnet.training.trainer import train
from tests.runs import QUICKSTART, SMALL, KillAfter, Killed, assert_same_run

ROUTES = [
    "family.cuts=[]",
    'family.models.a.drop=["features.2:features.5"]',
    'family.models.b.drop=["features.9:features.12"]',
    'family.models.c.drop=["features.16:features.22"]',
    'family.models.d.drop=["features.9:features.12", "features.16:features.22", "features.26:features.32"]',
]
"""d is the smallest."""


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*SMALL, *ROUTES, *overrides])


pytestmark = pytest.mark.usefixtures("little_data")


class Seeing(Listener):
    def __init__(self) -> None:
        self.steps: list[tuple[str, ...]] = []

    def on_step(self, epoch: int, images: int, losses: Mapping[str, Tensor]) -> None:
        assert all(loss.isfinite() for loss in losses.values())
        self.steps.append(tuple(losses))


def test_the_largest_and_the_smallest_and_some_others() -> None:
    macs = {"base": 100, "a": 60, "b": 10, "c": 50, "d": 40}
    seen: Counter[str] = Counter()
    for seed in range(300):
        chosen = sample_models(list(macs), macs, 1, seed)
        assert len(chosen) == 3
        assert {"base", "b"} <= set(chosen)
        assert list(chosen) == [name for name in macs if name in chosen]
        seen.update(chosen)
    assert all(70 <= seen[name] <= 130 for name in ("a", "c", "d"))  # 100 on average, standard deviation 8
    assert sample_models(list(macs), macs, 9, 0) == tuple(macs)
    assert sample_models(["a"], macs, 1, 0) == ("a",)


def test_the_first_model_is_there_for_others_to_learn_from() -> None:
    """A front of many filters may make a sub-model cost more than the base-model."""
    macs = {"base": 100, "front": 130, "a": 60, "b": 10}
    for seed in range(9):
        assert sample_models(list(macs), macs, 0, seed) == ("base", "front", "b")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["joint", "separate"])
def test_each_step_trains_a_few_and_leaves_the_others(tmp_path: Path, strategy: str) -> None:
    seeing = Seeing()
    chosen = recipe("train.sample=1", f"train.strategy={strategy}")
    assert train(chosen, tmp_path / "run", listener=seeing).status == "finished"
    assert all(len(step) == 3 and step[0] == "base" and step[-1] == "d" for step in seeing.steps)
    assert {step[1] for step in seeing.steps} == {"a", "b", "c"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:  # means over the steps that trained a model, not over all of them
        assert 1.5 < min(row["train_loss"].values()) <= max(row["train_loss"].values()) < 4


def test_a_model_that_no_step_trained_has_no_training_loss(tmp_path: Path) -> None:
    """Neither in the metrics nor in a page of the run."""
    seeing = Seeing()
    chosen = recipe("train.sample=1", "train.epochs=2", "data.num_train=50", "schedule.warmup_epochs=0")
    train(chosen, tmp_path / "run", listener=seeing)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [tuple(row["train_loss"]) for row in rows] == seeing.steps  # an epoch is one step
    assert all(len(row["test_accuracy"]) == 5 for row in rows)
    assert "Training loss" in make_page([tmp_path / "run"]).html


def test_what_only_others_have_is_left_alone() -> None:
    torch.manual_seed(0)
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    drops = {"a": ["features.9:features.12"], "b": ["features.16:features.22"]}
    subs = {name: detachnet.SubModel(drop=drop) for name, drop in drops.items()}
    net = detachnet.make_detachable(model, subs, (3, 32, 32), head="private", check="none").train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    step = TrainingStep(net, net.names, MultiModelLoss(weights={"a": 0.5}), optimizer)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    step(images, labels)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert step(images, labels, ("base", "b")).shape == (2,)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if name.startswith(("norms.a.", "heads.a."))]
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in changed} >= {"norms.b", "heads.b"}


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    chosen = recipe("train.sample=1")
    train(chosen, tmp_path / "whole")
    with pytest.raises(Killed):
        train(chosen, tmp_path / "killed", listener=KillAfter(13))
    train(chosen, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_sampling_all_is_not_sampling(tmp_path: Path) -> None:
    train(recipe("train.sample=3"), tmp_path / "sampled")
    train(recipe(), tmp_path / "all")
    sampled, every = (tmp_path / name / "metrics.jsonl" for name in ("sampled", "all"))
    assert sampled.read_bytes() == every.read_bytes()


def test_refusals() -> None:
    with pytest.raises(detachnet.RecipeError, match=r"not with train.sample"):
        recipe("train.sample=1", "train.compile=true")
    with pytest.raises(detachnet.RecipeError, match=r"train.sample = -1"):
        recipe("train.sample=-1")
