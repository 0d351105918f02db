"""The command and the library run the same thing, recipes that come along by name included."""

from pathlib import Path

import pytest
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.training.shipped import find_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
SMALL = ["data.name=cifar10-mini", "data.num_train=200", "data.holdout=50", "train.batch_size=50"]
TINY = {
    "airbench_cifar10": ["model.kwargs.width=0.1"],
    "quickstart": ["model.kwargs.width=0.05"],
    "resnet20_cifar10": ["model.kwargs.depth=8", "family.models={}"],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_recipe_is_found_by_its_name() -> None:
    assert set(shipped_recipes()) == {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    for name, path in shipped_recipes().items():
        recipe = detachnet.load_recipe(name)
        assert recipe == detachnet.load_recipe(path) == detachnet.load_recipe(f"{name}.toml")
        assert recipe.name == name


def test_a_file_goes_before_a_name_and_a_path_is_none() -> None:
    Path("quickstart.toml").write_text((ROOT / "recipes" / "nsn_mnist.toml").read_text())
    assert detachnet.load_recipe("quickstart.toml") == detachnet.load_recipe("nsn_mnist")
    assert find_recipe("quickstart") == shipped_recipes()["quickstart"]
    with pytest.raises(detachnet.RecipeError, match=r"there is no recipe there/quickstart.toml"):
        detachnet.load_recipe("there/quickstart.toml")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_command_and_the_library_run_the_same(name: str) -> None:
    overrides = [*SMALL, *TINY[name], "train.epochs=2", "schedule.warmup_epochs=1"]
    words = [word for override in overrides for word in ("--set", override)]
    out = CliRunner().invoke(app, ["train", name, *words])
    assert out.exit_code == 0, out.output
    result = detachnet.train(detachnet.load_recipe(name, overrides), "library")
    theirs = Path("runs") / name
    for file in ("recipe.toml", "metrics.jsonl", "results.json", "table.md"):
        assert (theirs / file).read_bytes() == (result.folder.path / file).read_bytes()
    with pytest.raises(detachnet.CheckpointError, match=rf"there is a run in runs/{name} already"):
        detachnet.train(detachnet.load_recipe(name, overrides))


def test_a_recipe_without_a_file_names_no_folder() -> None:
    recipe = detachnet.Recipe.model_validate_json(detachnet.load_recipe("quickstart").model_dump_json())
    assert recipe == detachnet.load_recipe("quickstart")
    assert hash(recipe) == hash(detachnet.load_recipe("quickstart"))
    with pytest.raises(detachnet.RecipeError, match="the recipe comes from no file"):
        detachnet.train(recipe)
