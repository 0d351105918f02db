"""What the study's networks cost: which are measured, and that each is the network it is called."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import accuracy
import costs
import detachnet
from detachnet.training.recipe import load_recipe

MISSING = [name for name in ("earlyon", "torch_pruning") if find_spec(name) is None]


def train(name: str, folder: Path, *changes: str) -> None:
    """A run of the study's folder, of a few images."""
    little = ("data.name=cifar10-mini", "data.num_train=128", "train.epochs=1", "schedule.warmup_epochs=0")
    recipe = load_recipe(accuracy.RECIPE, [*little, "family.cuts=[]", "loss.weights={}", *changes])
    detachnet.train(recipe, folder / name)


def test_without_the_trained_base_model_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python scripts/study\.py base-alone"):
        costs.main(["--study", str(tmp_path)])


def test_only_finished_runs_of_the_first_seed_are_measured(tmp_path: Path) -> None:
    for name in ("base-alone-0", "late-0", "late-1", "stopped-0"):
        (tmp_path / name).mkdir()
        if name != "stopped-0":
            (tmp_path / name / "results.json").write_text("{}")
    assert list(costs.finished(tmp_path)) == ["base-alone", "late"]


@pytest.mark.skipif("earlyon" in MISSING, reason="not installed: earlyon (see costs.py)")
def test_what_an_image_needs_gives_the_answers_of_the_exits() -> None:
    exits, images = costs.early_exits(), torch.randn(2, *costs.IMAGE)
    whole = exits(images, mode="training")
    for count in (1, 2, 3):
        for answer, same in zip(costs.UpTo(exits, count).eval()(images), whole[:count], strict=True):
            torch.testing.assert_close(answer, same)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see costs.py)")
def test_every_network_is_measured(tmp_path: Path) -> None:
    train("base-alone-0", tmp_path, 'train.models=["base"]')
    train("narrow-0", tmp_path, "family.models.narrow.width=0.5")
    costs.main(["--study", str(tmp_path), "--quick", "--json", str(tmp_path / "costs.json")])
    result = json.loads((tmp_path / "costs.json").read_text())
    rows = {row["network"]: row for row in result["rows"]}
    base, narrow = rows[costs.BASE], rows["narrow: narrow"]
    assert rows["narrow: base"]["macs"] == base["macs"] == rows["base-alone: base"]["macs"]
    assert narrow["bytes"] < base["bytes"] / 3
    assert base["bytes"] < result["files"]["base-alone"] < result["files"]["narrow"] < 1.1 * base["bytes"]
    for name, share in costs.PRUNED.items():
        assert share - 0.02 < rows[name]["macs"] / base["macs"] <= share
    exits = [rows[f"exits: {name}"] for name in costs.exit_names()]
    assert exits[0]["macs"] < exits[1]["macs"] < base["macs"] < exits[2]["macs"]
    assert exits[0]["onnx_ms"] < exits[2]["onnx_ms"]
    assert set(accuracy.SMALL) < set(rows)
    assert all(row["torch_ms"] > 0 and row["onnx_ms"] > 0 for row in rows.values())
