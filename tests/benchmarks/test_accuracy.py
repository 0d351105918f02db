"""The alternatives' trainings: that they are the study's, and how early exits are counted."""

import json
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import accuracy
import detachnet
from detachnet.training.recipe import load_recipe

COSTS = [1.0, 2.0, 4.0]
LABELS = torch.tensor([0, 0, 1, 1])
SURE, RIGHT = 20.0, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])


def outputs() -> list[torch.Tensor]:
    """Three exits of two classes: the first is sure of two images, the second of three, of which one is wrong."""
    first = torch.tensor([[SURE, 0.0], [0.1, 0.0], [0.1, 0.0], [0.0, SURE]])
    second = torch.tensor([[SURE, 0.0], [SURE, 0.0], [SURE, 0.0], [0.0, 0.1]])
    return [first, second, RIGHT]


@pytest.mark.parametrize(
    ("thresholds", "right", "cost", "leaves"),
    [
        ((1.01, 1.01), 1.0, 4.0, (0, 0, 1)),
        ((0.9, 1.01), 1.0, (1 + 4 + 4 + 1) / 4, (0.5, 0, 0.5)),
        ((0.9, 0.9), 0.75, (1 + 2 + 2 + 1) / 4, (0.5, 0.5, 0)),
        ((0.0, 0.0), 0.75, 1.0, (1, 0, 0)),
    ],
)
def test_an_image_leaves_at_the_first_exit_that_is_sure(
    thresholds: tuple[float, float], right: float, cost: float, leaves: tuple[float, ...]
) -> None:
    assert accuracy.routed(outputs(), LABELS, COSTS, thresholds) == (right, cost, leaves)


@pytest.mark.parametrize(
    ("limit", "right", "cost"), [(4.0, 1.0, None), (2.5, 1.0, 2.5), (1.2, 0.75, 1.0), (0.5, 0.75, 1.0)]
)
def test_thresholds_are_the_best_within_a_cost(limit: float, right: float, cost: float | None) -> None:
    thresholds = accuracy.best_thresholds(outputs(), LABELS, COSTS, limit)
    found = accuracy.routed(outputs(), LABELS, COSTS, thresholds)
    assert found.accuracy == right
    assert found.cost <= max(limit, 1.0)
    assert cost is None or found.cost == cost


@pytest.mark.slow
def test_a_network_is_trained_as_the_study_trains_it(tmp_path: Path) -> None:
    changes = [
        *("data.name=cifar10-mini", "data.num_train=256", "train.epochs=2", "schedule.warmup_epochs=1"),
        *("model.kwargs.width=0.0625", "family.cuts=[]", "loss.weights={}", 'train.models=["base"]'),
    ]
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.0625)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    recipe = load_recipe(accuracy.RECIPE, [*changes, f"train.init={tmp_path / 'start.safetensors'}"])
    done = detachnet.train(recipe, tmp_path / "run")
    study = accuracy.Study(load_recipe(accuracy.RECIPE, changes), None, tmp_path)
    assert len(study.held_out) == 384
    study.fit(model, seed=0)
    trained = detachnet.load(done.folder.last).detach("base").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=1e-4, atol=1e-5, msg=name)
    row = study.row("vgg", 0, model, effort=1.0)
    assert row.test == pytest.approx(done.table[0]["last_accuracy"], abs=0.002)
    assert row.macs == done.table[0]["macs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20-half", "pruned-40", "exits"])
def test_quick(tmp_path: Path, name: str) -> None:
    peer = {"pruned-40": "torch_pruning", "exits": "earlyon"}.get(name)
    if peer and find_spec(peer) is None:
        pytest.skip(f"not installed: {peer} (see accuracy.py)")
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.25)
    net = detachnet.make_detachable(model, {}, input_size=(3, 32, 32), check="none")
    (tmp_path / "base-alone-0").mkdir()
    detachnet.save(net, tmp_path / "base-alone-0" / "last.safetensors")
    words = [name, "--quick", "--seeds", "1", "--set", "data.name=cifar10-mini", "--study", str(tmp_path)]
    assert accuracy.main([*words, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")]) == 0
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["num_test"] == 1000
    assert len(result["rows"]) == (len(accuracy.BUDGETS) if name == "exits" else 1)
    for row in result["rows"]:
        assert row["run"].startswith(name)
        assert 0 <= row["test"] <= 1
        assert sum(row["leaves"]) == pytest.approx(1 if name == "exits" else 0)


def test_runs_are_made_once_and_all_that_are_there_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def run(study: accuracy.Study, seed: int, name: str) -> Iterator[accuracy.Row]:
        made.append((name, seed))
        yield study.of(name, seed, macs=1.0, held_out=0.5, test=0.5, effort=1.0)

    monkeypatch.setattr(accuracy, "RUNS", {name: partial(run, name=name) for name in ("pruned-40", "exits")})
    words = ["--quick", "--set", "data.name=cifar10-mini", "--out", str(tmp_path), "--json", str(tmp_path / "all")]
    accuracy.main(["pruned-40", *words, "--seeds", "1"])
    accuracy.main(["exits", *words, "--seeds", "1"])
    accuracy.main(["pruned-40", *words, "--seeds", "2"])
    assert made == [("pruned-40", 0), ("exits", 0), ("pruned-40", 1)]
    rows = json.loads((tmp_path / "all").read_text())["rows"]
    assert [(row["run"], row["seed"]) for row in rows] == [("pruned-40", 0), ("pruned-40", 1), ("exits", 0)]
    with pytest.raises(SystemExit, match=r"pruned-40-0[.]json was made with other settings"):
        accuracy.main(["pruned-40", *words, "--seeds", "1", "--lr", "0.3"])
