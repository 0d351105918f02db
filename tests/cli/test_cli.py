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
from torch import nn
from typer.testing import CliRunner

import detachnet
from detachnet.report.page import Page
from detachnet.training import trainer
from tests.runs import SMALL, tenth

runner = CliRunner()
OPTIONS = [part for override in [*SMALL, "train.epochs=1"] for part in ("--set", override)]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "load_data", tenth)
    monkeypatch.setattr("detachnet.data.datasets.load_data", tenth)


def run(*args: str) -> tuple[int, str]:
    result = runner.invoke(app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "words",
    ["evaluate gone -o", "recalibrate gone -o", "detach gone --model sub1 -o", "search gone --macs 0.5 --adopt"],
)
def test_where_a_file_is_to_go_is_looked_at_first(tmp_path: Path, words: str) -> None:
    code, out = run(*words.split(), str(tmp_path / "none" / "f.safetensors"))  # there is no such run, either
    assert (code, "there is no folder" in out) == (2, True)


@pytest.mark.slow
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
    assert "n = 100" in run("evaluate", "runs/quickstart/best.safetensors", "-o", "measured.safetensors")[1]
    measured = detachnet.load("measured.safetensors").facts
    assert measured.known_data.num_test == 100
    assert measured.accuracy == detachnet.load("runs/quickstart/best.safetensors").facts.accuracy
    assert "exists already" in run("evaluate", "runs/quickstart", "-o", "measured.safetensors")[1]
    assert "there is no folder none" in run("evaluate", "runs/quickstart", "-o", "none/measured.safetensors")[1]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "quickstart.toml").read_text()
    (tmp_path / "mine.toml").write_text(text)
    assert run("train", "mine.toml", *OPTIONS, "--out", "there", "--max-minutes", "0")[0] == 0
    assert (tmp_path / "there" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "quickstar"], "there is no recipe quickstar"),
        (["compare", "runs/a", "runs/../runs/a"], "runs/../runs/a is given twice"),
        (["predict", "runs/a", "x.jpg", "--budget-ms", "0"], "0 is no positive number of ms"),
        (["train", "quickstart", "--set", "train.epoch=3"], "unknown key 'epoch' in [train]"),
        (["train", "quickstart", "--set", "model.name=timm:resnet"], "unknown model 'timm:resnet'"),
        (
            ["train", "quickstart", "--set", 'family.cuts=["features.99"]'],
            "cannot cut VGG16Cifar at 'features.99'",
        ),
        (["train", "quickstart", "--resume"], "there is no run in runs/quickstart to resume"),
        (["evaluate", "nothing.safetensors"], "there is no file nothing.safetensors"),
        (["inspect", "torchvision:resnet19"], "unknown model 'torchvision:resnet19'"),
        (["inspect", "net.py"], "the function in it that makes the model: net.py:FUNCTION"),
        (["inspect", "torchvision:resnet18", "--cut", "layer1.0.conv1"], "'maxpool' also crosses it"),
        (["inspect", "torchvision:resnet18", "--cut", "1000000000"], "at most 1000 are made"),
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


@pytest.mark.slow
def test_inspect() -> None:
    out = run("inspect", "torchvision:resnet18")[1]
    assert "torchvision:resnet18: 22 valid cuts, 12 behind modules" in out
    assert re.search(r"layer2 +best +128×28×28 +8 +8×8 stride 8×8 +841.9 M +46 % +11.0 M", out)
    out = run(
        "inspect", "torchvision:vgg16_bn", "--input-size", "3,32,32", "--cut", "features.6", "--cut", "features.20"
    )
    assert re.search(r"sub1 +features.20 +256×8×8 +4×4 stride 4×4", out[1])
    assert "hint: sub1 is cut between 'features.20' and its batch norm" in out[1]


@pytest.mark.slow
def test_inspect_marks_cuts_that_do_not_pay() -> None:
    out = run("inspect", "torchvision:mobilenet_v3_large")[1]
    assert re.search(r"avgpool +dear", out)
    assert re.search(r"features.12 +good", out)
    assert "dear: the step-down has more than it replaces" in out


@pytest.mark.slow
def test_inspect_prices_stems() -> None:
    out = run("inspect", "torchvision:resnet18", "--cut", "auto", "--stepdown", "stem")[1]
    assert re.search(r"sub1 +layer3 +\S+ +stem ", out)


@pytest.mark.slow
def test_inspect_a_route() -> None:
    out = run("inspect", "torchvision:resnet18", "--drop", "layer3.0:layer3.1", "--drop", ":layer1")[1]
    assert re.search(r"sub0 +:layer1, layer3.0:layer3.1 +4×4 stride 4×4, – +[\d,.]+ M +\d+ % +0 ", out)
    code, out = run("inspect", "torchvision:resnet18", "--drop", "layer1:layer2", "--cut", "layer1")
    assert (code, "ask for one of --cut, --sub-models, --drop or --width, --all" in out) == (2, True)
    assert run("inspect", "torchvision:resnet18", "--spans", "--widths")[0] == 2


@pytest.mark.slow
def test_inspect_prices_widths() -> None:
    out = run(
        "inspect", "torchvision:resnet18", "--width", "0.75", "--width", "0.5", "--drop", "layer3.0:layer3.1"
    )
    rows = [line.split() for line in out[1].splitlines() if line.startswith("sub")]
    assert [row[:3] for row in rows] == [
        ["sub0", "layer3.0:layer3.1", "0.75"],
        ["sub1", "layer3.0:layer3.1", "0.5"],
    ]
    plan = json.loads(run("inspect", "torchvision:resnet18", "--width", "0.5", "--json")[1])
    base, half = plan["models"]
    assert half["macs"] < 0.3 * base["macs"]
    assert half["num_params"] > 50 * half["own_params"]
    code, text = run("inspect", "torchvision:resnet18", "--width", "1.5")
    assert (code, "a width is a share of the filters, in (0, 1]" in text) == (2, True)


@pytest.mark.slow
def test_inspect_chooses_routes() -> None:
    out = run("inspect", "torchvision:resnet18", "--sub-models", "0.8,0.5")[1]
    assert "[family.models.sub1]" in out
    drop = json.loads(out.partition("[family.models.sub0]")[2].splitlines()[1].partition(" = ")[2])
    plan = json.loads(run("inspect", "torchvision:resnet18", "--sub-models", "0.8,0.5", "--json")[1])
    assert [f"{span['start']}:{span['end']}" for span in plan["models"][1]["spans"]] == drop
    assert [model["macs"] / plan["models"][0]["macs"] for model in plan["models"]][2] <= 0.5
    two = run("inspect", "torchvision:resnet18", "--sub-models", "2")[1]
    assert "sub1" in two
    assert run("inspect", "torchvision:resnet18", "--sub-models", "auto")[1] == two
    code, out = run("inspect", "torchvision:resnet18", "--sub-models", "half")
    assert code == 2
    assert "example 2 or 0.7,0.4" in out


@pytest.mark.slow
def test_inspect_spans() -> None:
    out = run("inspect", "torchvision:resnet18", "--spans")[1]
    assert re.search(r"layer3.0:layer3 +256×14×14 +– +[\d.]+ M +13 % +1.2 M", out)
    assert re.search(r"layer2:layer3.0 +256×14×14 +2×2 stride 2×2", out)
    points = json.loads(run("inspect", "torchvision:resnet18", "--spans", "--json")[1])
    assert points[0]["name"] == "maxpool:layer1.0"
    assert points[0]["bridge"] is None


@pytest.mark.slow
def test_inspect_widths() -> None:
    out = run("inspect", "torchvision:resnet18", "--widths")[1]
    assert "torchvision:resnet18: 13 groups of filters, 12 can be cut" in out
    assert re.search(r"layer2.0.conv2 +128 +3 +6 +417.5 M +23 % +779.0 k", out)
    groups = json.loads(run("inspect", "torchvision:resnet18", "--widths", "--json")[1])
    assert groups[-1]["reason"] == "it is the output"
    assert groups[0]["makers"][0] == {"layer": "conv1", "ranges": [[0, 64]], "of": 64}


def test_inspect_every_node() -> None:
    out = run("inspect", "torchvision:resnet18", "--all")[1]
    assert re.search(r"layer1.0.conv1 +64×56×56 +'maxpool' also crosses it", out)
    assert re.search(r"layer1.0.add +64×56×56 +81 %", out)


@pytest.mark.slow
def test_inspect_json() -> None:
    points = json.loads(run("inspect", "torchvision:resnet18", "--json")[1])
    assert points[-1]["name"] == "flatten"
    assert next(p for p in points if p["name"] == "layer2")["reduction"] == 8
    plan = json.loads(run("inspect", "torchvision:resnet18", "--cut", "auto", "--json")[1])
    assert [model["cut"] for model in plan["models"]] == [None, "layer2.0", "layer3.0"]


@pytest.mark.slow
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
    for path in (Path(__file__).parents[2] / "recipes").glob("*.toml"):
        assert path.stem in out


COMMANDS = (
    *("init", "train", "inspect", "evaluate", "compare", "search", "recalibrate", "detach"),
    *("export", "profile", "cascade", "predict", "report", "demo", "push", "recipes"),
)


@pytest.mark.slow
def test_help_names_every_option_and_version() -> None:
    command = typer.main.get_command(app)
    for name in COMMANDS:
        assert run(name, "--help")[0] == 0
        assert name in command.list_commands(None)  # type: ignore[attr-defined,arg-type]
    assert run("--version")[1].startswith(f"detachnet {detachnet.__version__}\n")


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
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "3?32?32"), ("latin-1", "3\xd732\xd732"), ("utf-8", "3×32×32")]
)
def test_terminals_of_other_encodings(encoding: str, shown: str) -> None:
    command = [
        str(Path(sys.executable).with_name("detachnet")),
        "inspect",
        "detachnet:vgg16_cifar",
        "--cut",
        "features.6",
    ]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert shown in done.stdout.decode(encoding)


@pytest.mark.skipif(os.name == "nt", reason="streams are closed by a shell of POSIX")
@pytest.mark.parametrize(("words", "code"), [("recipes >&-", 0), ("evaluate nothing 2>&-", 2)])
def test_a_closed_stream(words: str, code: int) -> None:
    detachnet_ = Path(sys.executable).with_name("detachnet")
    done = subprocess.run(f"'{detachnet_}' {words}", shell=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (code, b"")


def test_version_names_what_matters() -> None:
    out = run("--version")[1]
    for package in ("detachnet", "python", "torch", "torchvision", "timm", "safetensors"):
        assert re.search(rf"^{package} \d", out, re.MULTILINE)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(typed: str) -> list[str]:
        asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        asked |= {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        env = asked | {"_DETACHNET_COMPLETE": f"complete_{shell}"}
        return runner.invoke(app, [], prog_name="detachnet", env=env).output.split()

    assert any("evaluate" in word for word in completed("detachnet eva"))
    assert not any("recalibrate" in word for word in completed("detachnet eva"))
    assert any("--resume" in word for word in completed("detachnet train --re"))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = runner.invoke(app, ["--show-completion", shell], prog_name="detachnet").output
    assert "_DETACHNET_COMPLETE=complete_" in script


def test_show_a_recipe() -> None:
    root = Path(__file__).parents[2]
    assert run("recipes", "--show", "quickstart")[1] == (root / "recipes" / "quickstart.toml").read_text()
    code, out = run("recipes", "--show", "quickstar")
    assert code == 2
    assert "nearest  'quickstart'" in out


@pytest.mark.slow
def test_a_family_alone_has_as_many_classes_as_its_data(tmp_path: Path) -> None:
    """A function that makes another number by itself, and no recipe beside the file."""
    (tmp_path / "mine.py").write_text(
        "from detachnet.models import VGG16Cifar\n\n\nclass Net(VGG16Cifar):\n    pass\n\n\n"
        "def net(num_classes=7):\n    return Net(width=0.05, num_classes=num_classes)\n"
    )
    own = ["--set", "model.name=mine.py:net", "--set", "model.kwargs={}"]
    code, out = run("train", "quickstart", *OPTIONS, *own, "--max-minutes", "0", "--out", "run")
    assert code == 0, out
    (tmp_path / "run" / "last.safetensors").rename(tmp_path / "alone.safetensors")
    code, out = run("detach", "alone.safetensors", "--model", "sub1", "-o", "sub1", "--model-file", "mine.py:net")
    assert code == 0, out
    code, out = run("train", "quickstart", *OPTIONS, *own, "--set", "train.init=sub1", "--out", "other")
    assert "it holds sub1 alone, detached from its family" in out


def test_a_search_adopts_into_a_family_s_file() -> None:
    assert "try      --adopt x.safetensors" in run("search", "run", "--macs", "0.5", "--adopt", "x.toml")[1]


def test_a_folder_without_a_run_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "try      give the run's folder" in run("compare", "empty")[1]


@pytest.mark.slow
def test_dry_run_trains_nothing(tmp_path: Path) -> None:
    options = ["--set", "family.cuts=[]", "--set", "family.sub_models=[0.7]"]
    code, out = run("train", "quickstart", *OPTIONS, *options, "--dry-run")
    assert code == 0, out
    assert "Data: cifar10-mini, 400 training images, 100 test images, 10 classes" in out
    assert re.search(r"Trained: base, sub0: (\S+ k) of \1 parameters", out)
    assert "Steps: 1 epochs of 8, 8 together, of 50 images" in out
    assert "Folder: runs/quickstart" in out
    assert "Chosen for sub_models = [0.7]" in out
    assert not list(tmp_path.iterdir())
    code, out = run("train", "quickstart", *OPTIONS, "--set", "train.log_with=foo", "--dry-run")
    assert code == 2
    assert "train.log_with = 'foo' is no experiment tracker" in out


@pytest.mark.slow
def test_a_model_of_ones_own_through_every_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from detachnet.models import VGG16Cifar\n\n\nclass Net(VGG16Cifar):\n    pass\n\n\n"
        "def net(**kwargs):\n    return Net(**kwargs)\n"
    )
    own = ["--set", "model.name=mine.py:net", "--set", "data.num_train=60"]
    code, out = run("train", "quickstart", *OPTIONS, *own, "--out", "run")
    assert code == 0, out
    code, out = run("evaluate", "run")
    assert code == 2
    assert "--model-file FILE.py:FUNCTION" in out
    file = ["--model-file", "mine.py:net"]
    for args in (
        ["evaluate", "run"],
        ["profile", "run", "--n", "2", "--warmup", "0"],
        ["cascade", "run"],
        ["detach", "run", "--model", "sub1", "-o", "sub1.safetensors"],
        ["recalibrate", "run", "-o", "fresh.safetensors"],
        ["report", "run"],
    ):
        code, out = run(*args, *file)
        assert code == 0, (args, out)
        assert (
            args[0] != "recalibrate" or "statistics of 60 training images" in out
        )  # those that it was trained on
        assert args[0] != "detach" or "Read it: detachnet.load('sub1.safetensors', model=Net(...))" in out
    code, out = run("profile", "run", "--runtime", "onnx", *file)
    assert "try      detachnet export run --model-file mine.py:net -o DIR" in out
    code, out = run("evaluate", "run", "--model-file", "timm:resnet18")
    assert code == 2
    assert "is no FILE.py:FUNCTION" in out
    code, out = run("evaluate", "run", "--model-file", "mine.py")
    assert code == 2
    assert "try      the function in it that makes the model" in out


def test_report_makes_each_runs_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "from torch import nn\n\n\ndef net(num_classes):\n    return nn.Linear(2, num_classes)\n"
    (tmp_path / "mine.py").write_text(own)
    for name, count in (("one", 2), ("two", 3)):
        (tmp_path / name).mkdir()
        table = f'[model]\nname = "mine.py:net"\nkwargs = {{ num_classes = {count} }}\n'
        (tmp_path / name / "recipe.toml").write_text(table)
    given: list[int] = []

    def make_page(_runs: object, _root: object, models: list[nn.Linear]) -> Page:
        given.extend(model.out_features for model in models)
        return Page("", ())

    monkeypatch.setattr("detachnet.report.page.make_page", make_page)
    code, out = run("report", "one", "two", "--model-file", "mine.py:net")
    assert (code, given) == (0, [2, 3]), out


@pytest.mark.slow
def test_what_the_library_says_is_shown(tmp_path: Path) -> None:
    state = detachnet.create_model("detachnet:vgg16_cifar", width=0.05, num_classes=3).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    code, out = run("train", "quickstart", *OPTIONS, "--set", "train.init=weights.pth", "--max-minutes", "0")
    assert code == 0
    assert re.search(r"Note: weights.pth: '\S+' stays new, with 10 outputs; the file has 3 outputs", out)


@pytest.mark.slow
def test_where_the_data_is_need_not_be_said_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(_name: str, root: object = None, *_: object) -> object:
        asked.append(root)
        return tenth()

    (tmp_path / "images").mkdir()
    run("train", "quickstart", *OPTIONS, "--data-root", "images", "--max-minutes", "0")
    monkeypatch.setattr("detachnet.data.datasets.load_data", load)
    run("evaluate", "runs/quickstart")
    run("evaluate", "runs/quickstart", "--data-root", "elsewhere")
    monkeypatch.setattr(trainer, "load_data", load)
    run("train", "quickstart", *OPTIONS, "--resume", "--max-minutes", "0")
    (tmp_path / "images").rmdir()
    run("evaluate", "runs/quickstart")
    assert asked == [tmp_path / "images", Path("elsewhere"), tmp_path / "images", None]
