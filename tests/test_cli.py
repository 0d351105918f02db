import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet import trainer
from tests.test_trainer import SMALL, tenth

runner = CliRunner()
OPTIONS = [part for override in [*SMALL, "train.epochs=1"] for part in ("--set", override)]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "load_data", tenth)
    monkeypatch.setattr("detachnet.data.load_data", tenth)


def run(*args: str) -> tuple[int, str]:
    result = runner.invoke(app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_train_evaluate_resume(tmp_path: Path) -> None:
    code, out = run("train", "quickstart", *OPTIONS, "--max-minutes", "0")
    assert code == 0
    assert "Stopped (time is up)" in out
    resume = re.search(r"detachnet (train .* --resume)", out)
    assert resume is not None
    code, out = run(*shlex.split(resume[1]))
    assert code == 0, out
    assert "going on after step 1 of 8" in out
    assert re.search(r"base +\S+ [Mk] +100 %", out)
    code, out = run("evaluate", "runs/quickstart", "--json")
    scores = {row["model"]: row["test_accuracy"] for row in json.loads(out)["models"]}
    rows = json.loads((tmp_path / "runs/quickstart/metrics.jsonl").read_text())
    assert scores == rows["test_accuracy"]
    assert "n = 100" in run("evaluate", "runs/quickstart/best.safetensors")[1]


def test_detach_and_export(tmp_path: Path) -> None:
    run("train", "quickstart", *OPTIONS, "--max-minutes", "0")
    code, out = run("detach", "runs/quickstart", "--model", "sub1", "-o", "sub1.safetensors")
    assert code == 0, out
    assert "Read it: detachnet.load('sub1.safetensors')" in out
    assert detachnet.load("sub1.safetensors")(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    for args, message in (
        (["detach", "runs/quickstart", "--model", "sub1", "-o", "sub1.safetensors"], "exists already"),
        (["detach", "runs/quickstart", "--model", "sub9", "-o", "9.safetensors"], "no model is called 'sub9'"),
        (["evaluate", "sub1.safetensors"], "sub1.safetensors holds sub1 alone"),
        (["export", "sub1.safetensors", "-o", "out"], "sub1.safetensors holds sub1 alone"),
        (["export", "runs/quickstart", "-o", "runs"], "runs exists already"),
        (["export", "runs/quickstart", "-o", "out", "--format", "tflite"], "'tflite' is not one of"),
    ):
        code, out = run(*args)
        assert (code, message in out) == (2, True), out
    code, out = run("export", "runs/quickstart", "-o", "out", "--model", "sub1", "--format", "pt2")
    assert code == 0, out
    assert re.search(r"sub1 +sub1.pt2 +\S+ [Mk]", out)
    assert sorted(file.name for file in Path("out").iterdir()) == ["manifest.json", "sub1.pt2"]


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "recipes" / "quickstart.toml").read_text()
    (tmp_path / "mine.toml").write_text(text)
    assert run("train", "mine.toml", *OPTIONS, "--out", "there", "--max-minutes", "0")[0] == 0
    assert (tmp_path / "there" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "quickstar"], "there is no recipe quickstar"),
        (["train", "quickstart", "--set", "train.epoch=3"], "unknown key 'epoch' in [train]"),
        (["train", "quickstart", "--set", "model.name=timm:resnet"], "unknown model 'timm:resnet'"),
        (
            ["train", "quickstart", "--set", 'family.cuts=["features.99"]'],
            "cannot cut VGG16Cifar at 'features.99'",
        ),
        (["train", "quickstart", "--resume"], "there is no run in runs/quickstart to resume"),
        (["evaluate", "nothing.safetensors"], "there is no file nothing.safetensors"),
        (["inspect", "torchvision:resnet19"], "unknown model 'torchvision:resnet19'"),
        (["inspect", "torchvision:resnet18", "--cut", "layer1.0.conv1"], "'maxpool' also crosses it"),
        (["inspect", "torchvision:resnet18", "--input-size", "3,x"], "write the shape of one image as C,H,W"),
        (["inspect", "torchvision:resnet18", "--input-size", "1,32,32"], "does not run on 1×32×32 images"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_mistakes_get_a_message_and_exit_code_2(args: list[str], message: str) -> None:
    code, out = run(*args)
    assert code == 2
    assert message in out
    assert "Traceback" not in out
    assert len(out.splitlines()) < 10


def test_traceback_on_request() -> None:
    result = runner.invoke(app, ["--traceback", "evaluate", "nothing.safetensors"])
    assert isinstance(result.exception, detachnet.CheckpointError)


def test_inspect() -> None:
    out = run("inspect", "torchvision:resnet18")[1]
    assert "torchvision:resnet18: 22 valid cuts, 13 behind modules" in out
    assert re.search(r"layer2 +best +128×28×28 +8 +8×8 stride 8×8 +841.9 M +46 % +11.0 M", out)
    out = run(
        "inspect", "torchvision:vgg16_bn", "--input-size", "3,32,32", "--cut", "features.6", "--cut", "features.20"
    )
    assert re.search(r"sub1 +features.20 +256×8×8 +4×4 stride 4×4", out[1])
    assert "hint: sub1 is cut between 'features.20' and its batch norm" in out[1]


def test_inspect_every_node() -> None:
    out = run("inspect", "torchvision:resnet18", "--all")[1]
    assert re.search(r"layer1.0.conv1 +64×56×56 +'maxpool' also crosses it", out)
    assert re.search(r"layer1.0.add +64×56×56 +81 %", out)


def test_inspect_json() -> None:
    points = json.loads(run("inspect", "torchvision:resnet18", "--json")[1])
    assert points[-1]["name"] == "flatten"
    assert next(p for p in points if p["name"] == "layer2")["reduction"] == 8
    plan = json.loads(run("inspect", "torchvision:resnet18", "--cut", "auto", "--json")[1])
    assert [model["cut"] for model in plan["models"]] == [None, "layer2.0", "layer3.0"]


@pytest.mark.parametrize(("cut", "count"), [(["auto"], 2), (["3"], 3), (["0.7"], 1), (["0.7", "0.3"], 2)])
def test_inspect_finds_cuts(cut: list[str], count: int) -> None:
    options = [word for value in cut for word in ("--cut", value)]
    out = run("inspect", "timm:resnet18", *options)[1]
    assert sum(line.startswith("sub") for line in out.splitlines()) == count


def test_inspect_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torchvision\n\n"
        "def net(num_classes=3):\n    return torchvision.models.resnet18(num_classes=num_classes)\n"
    )
    assert "22 valid cuts" in run("inspect", "mine.py:net", "--num-classes", "4")[1]
    assert "mine.py has no function 'other'" in run("inspect", "mine.py:other")[1]
    assert "there is no file yours.py" in run("inspect", "yours.py:net")[1]


def test_recipes_lists_every_shipped_one() -> None:
    out = run("recipes")[1]
    for path in (Path(__file__).parents[1] / "recipes").glob("*.toml"):
        assert path.stem in out


COMMANDS = (
    *("train", "inspect", "evaluate", "compare", "recalibrate", "detach"),
    *("export", "profile", "cascade", "predict", "report", "recipes"),
)


def test_help_names_every_option_and_version() -> None:
    command = typer.main.get_command(app)
    for name in COMMANDS:
        assert run(name, "--help")[0] == 0
        assert name in command.list_commands(None)  # type: ignore[attr-defined,arg-type]
    assert run("--version")[1] == f"detachnet {detachnet.__version__}\n"


@pytest.mark.parametrize("args", [["--help"], ["recipes"], ["trian"], ["train", "quickstar"]])
def test_help_and_mistakes_do_not_wait_for_torch(args: list[str]) -> None:
    code = f"""
import sys
from detachnet_cli.app import app
try:
    app({args!r})
except SystemExit:
    pass
assert not {{"torch", "timm", "torchvision", "accelerate"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
