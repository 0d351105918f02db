"""Whatever is typed or damaged: a message of detachnet's, of a few lines, and no traceback."""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detachnet_cli.app import app
from PIL import Image
from typer.testing import CliRunner

import detachnet
from detachnet.deploy.profile import write_profile
from detachnet.errors import LONGEST, CheckpointError, DetachNetError, shorten
from detachnet.evaluation import predict
from detachnet.storage import locate
from detachnet.text import MOST_NESTED, parse_json
from detachnet.training.recipe import load_recipe
from detachnet.training.trainer import train
from tests import models
from tests.runs import QUICKSTART, recipe

DEEP = "[" * 100_000
LONG = "X" * 5000


def told(*words: str) -> str:
    """What a command says that refuses."""
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.output
    assert all(len(line) < 2 * LONGEST for line in result.output.splitlines())
    return result.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, little_data: None) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    chosen = recipe("train.epochs=1", "schedule.warmup_epochs=0")
    train(chosen, folder)
    net = detachnet.load(folder / "last.safetensors")
    write_profile(detachnet.profile(net, n=2, warmup=0, peak_memory=False), folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("str=1", "unknown key 'str' in the recipe"),
        ("int.x=1", "unknown key 'int' in the recipe"),
        ("a(b=1", "unknown key 'a(b' in the recipe"),
        ("a[b=1", "unknown key 'a[b' in the recipe"),
        ("train.(=1", r"unknown key '\(' in \[train\]"),
        ("family.models.x.nothing=1", r"unknown key 'nothing' in \[family.models.x\]"),
        ("model.kwargs.float=[1]", "model.kwargs.float = "),
        ("train.seed=" + "9" * 5000, "cannot be read"),
        ("train.seed=0x" + "f" * 5000, "cannot be read"),
        ("a=" + "[" * 3000, "nested too deeply"),
        ("optimizer.lr=" + LONG, "optimizer.lr = "),
    ],
)
def test_overrides(override: str, said: str) -> None:
    with pytest.raises(detachnet.RecipeError, match=said.replace("(b", r"\(b").replace("[b", r"\[b")) as error:
        load_recipe(QUICKSTART, [override])
    assert all(len(line) <= LONGEST + 11 for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    "text", ["a = " + DEEP, "a." * 5000 + "b = 1", "seed = 0x" + "f" * 5000, "\x00", "a = [[[[[[1]]]]]]"]
)
def test_recipes(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(detachnet.RecipeError):
        load_recipe(tmp_path / "f.toml")


ROW: dict[str, Any] = {"epoch": 1, "lr": 0.1, "test_loss": {}}
VALUES = {
    "results.json": ["{}", "[]", "[1]", "junk", "\xff", DEEP, "9" * 5000, '[{"model": "base"}]', "null"],
    "metrics.jsonl": [
        *("1", "{}", '"a"', DEEP, "null", "[]"),
        json.dumps(ROW | {"train_loss": {"base": 1.0}, "test_accuracy": {"base": 0.5}}),
        json.dumps(ROW | {"train_loss": dict.fromkeys(("base", "sub0", "sub1"), 1e308), "test_accuracy": {}}),
        json.dumps(ROW | {"train_loss": {"base": "x"}, "test_accuracy": {}}),
        '{"epoch": 1, "train_loss": {"base": NaN}, "test_accuracy": {"base": NaN}}',
    ],
    "run.json": ["[1]", "5", DEEP, '{"device": [1]}', "\xff"],
    "last.profile.json": [
        '{"rows": [], "hardware": {"device": "x"}, "versions": {}, "memory": ""}',
        *("[]", DEEP, "9" * 5000, "{}"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in VALUES.items() for text in texts])
def test_damaged_files_of_a_run(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text, encoding="latin-1")
    command = ["compare", str(run)] if name == "results.json" else ["report", str(run), "-o", str(run / "p.html")]
    assert name in told(*command)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "run.json", "last.profile.json"])
def test_flipped_bits_are_refused_or_harmless(run: Path, name: str) -> None:
    from detachnet.report.comparison import compare
    from detachnet.report.record import read_run

    generator = random.Random(0)
    whole = (run / name).read_bytes()
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (run / name).write_bytes(damaged)
        try:
            compare([run]) if name == "results.json" else read_run(run)
        except DetachNetError:
            continue


@pytest.mark.slow
def test_a_network_without_numbers_has_no_accuracy(run: Path, tmp_path: Path) -> None:
    """Of outputs that are no numbers the first class is the largest: a tenth of them would be right."""
    net = detachnet.load(run / "last.safetensors")
    net.get_submodule("stepdowns.sub1").weight.data.view(-1)[0] = math.nan  # type: ignore[union-attr,operator]
    detachnet.save(net, run / "last.safetensors")
    (run / "last.profile.json").unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for words in (["evaluate", str(run)], ["predict", str(run), str(tmp_path / "a.png"), "--model", "sub1"]):
        assert "Error: sub1 gives no finite numbers" in told(*words)
    assert predict(net, torch.zeros(1, 3, 32, 32), "base")[0].probabilities[0] > 0


@pytest.mark.slow
def test_numbers_that_are_none(run: Path) -> None:
    vgg = ("inspect", "detachnet:vgg16_cifar")
    assert "no node has that name" in told(*vgg, "--cut", "9" * 5000)
    assert "'a:b:c' is no span" in told(*vgg, "--drop", "a:b:c")  # and no picture of a letter
    assert "threads=99999999999: it is at most 4096" in told("profile", str(run), "--threads", "99999999999")
    assert "batch=99999999999: it is at most 1000000" in told("profile", str(run), "--batch", "99999999999")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_command_that_finds_no_memory(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def short(*_: object) -> None:
        raise error

    monkeypatch.setattr("detachnet.report.comparison.compare", short)
    assert "Error: there is no memory left for that" in told("compare", "runs/a")


def test_a_profile_with_a_median_of_nothing(run: Path) -> None:
    path = run / "last.profile.json"
    fields = json.loads(path.read_text())
    fields["rows"][0]["p50_s"] = 0
    path.write_text(json.dumps(fields))
    with pytest.raises(detachnet.MeasurementError, match=r"not a profile this version reads\n  what .*p50_s"):
        detachnet.Family.load(run)


@pytest.mark.parametrize(
    "words",
    [
        *(["profile", LONG], ["cascade", LONG], ["predict", LONG, "a.png"], ["evaluate", LONG], ["report", LONG]),
        *(["compare", LONG], ["train", LONG], ["export", LONG, "-o", "y"], ["train", "quickstart", "--out", LONG]),
    ],
    ids=lambda words: " ".join(words)[:20],
)
def test_names_that_are_none(words: list[str]) -> None:
    assert "Error: " in told(*words)


@pytest.mark.slow
def test_other_names_that_are_none(run: Path) -> None:
    assert "Skipped: " in told("predict", str(run), LONG)
    assert "Error: " in told("report", str(run), "-o", LONG + ".html")
    net = detachnet.load(run / "last.safetensors")
    for path in ("", "a\0b", LONG, "..", "/"):
        with pytest.raises(CheckpointError, match="cannot write"):
            detachnet.save(net, path)
        with pytest.raises(DetachNetError):
            detachnet.load(path)
    for path in ("", "a\0b", LONG):
        with pytest.raises(detachnet.ExportError):
            detachnet.export(net, path)


def test_a_large_folder_is_not_searched_through(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"nearest  .*f\.safetensors"):
        locate(tmp_path)
    for i in range(3000):
        (tmp_path / f"{i}").mkdir()
    began = time.process_time()
    with pytest.raises(CheckpointError, match="there is no family in the folder"):
        locate("/")
    with pytest.raises(CheckpointError, match="there is no family in the folder"):
        locate(tmp_path)
    assert time.process_time() - began < 5


SIZES: list[Any] = [
    (3, 2**62, 1),
    (2**64, 1, 2),
    3.0,
    "abc",
    (3, "a", 1),
    (3, -1, 2),
    (),
    (3, 0, 0),
    {1: 2},
    [2**39, 2],
]


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_sizes(size: Any) -> None:
    with pytest.raises(detachnet.TraceError, match="input_size is the shape of one image"):
        detachnet.make_detachable(models.Plain(), ["conv1"], size)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: detachnet.make_detachable(m, 10**9, (3, 8, 8)),
        lambda m: detachnet.make_detachable(m, [0.5] * 1001, (3, 8, 8)),
        lambda m: detachnet.make_detachable(m, sub_models=10**9, input_size=(3, 8, 8)),
        lambda m: detachnet.make_detachable(m, {1: "conv1"}, (3, 8, 8)),
    ],
)
def test_numbers_of_sub_models(make: Callable[[object], object]) -> None:
    with pytest.raises(detachnet.CutError, match=r"at most 1000 are made|the name 1; a name is a string|1 to 16"):
        make(models.Plain())


def test_json_of_anybody() -> None:
    inside: Any = 1
    for _ in range(MOST_NESTED - 1):
        inside = [inside]
    assert parse_json(json.dumps(inside)) == inside
    for text in (json.dumps([[inside]]), DEEP, "9" * 5000, "", b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)


def test_messages_quote_a_line_at_most() -> None:
    error = DetachNetError("a" * 10_000 + "end", what="b" * 10_000, hint="c", nearest=["d" * 10_000])
    assert all(len(line) <= LONGEST + 11 for line in str(error).splitlines())
    assert str(error).splitlines()[0].endswith("aend")
    assert shorten("abc", 3) == "abc"
    assert len(shorten("abcdefghij", 6)) == 6


def test_a_disk_that_fails_is_no_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detachnet.report.comparison.compare", lambda runs: os.stat(run / "nothing"))
    assert "Error: cannot read or write: [Errno 2]" in told("compare", str(run))
