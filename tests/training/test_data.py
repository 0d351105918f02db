"""Trainings on image files, and averaged weights."""

import json
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from detachnet_cli.app import app
from PIL import Image
from typer.testing import CliRunner

import detachnet
from detachnet.data import images
from detachnet.data.images import read_image, to_tensor
from detachnet.evaluation import evaluate
from detachnet.training.data import FileSource, open_test_files, open_train_files
from detachnet.training.loop import Listener
from detachnet.training.optimizer import AveragedWeights
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.trainer import train
from tests.folders import CLASSES, make_shards, recipe, write_folder
from tests.helpers import nightly_but
from tests.runs import DETACHNET, KillAfter, Killed, assert_same_run, torchrun

EVERYTHING = {"data__mixup": 0.2, "data__cutmix": 1.0, "data__reprob": 0.25, "train__ema_decay": 0.9}
RECIPE = Path(__file__).parents[2] / "recipes" / "resnet50_imagenet.toml"
STEPS = 3
"""Per epoch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with all there is."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe(**EVERYTHING), out, data_root=folder).status == "finished"
    return out


def rows(run: Path) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def killed_and_resumed(chosen: Recipe, root: Path, out: Path, kill_at: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
        with pytest.raises(Killed):
            train(chosen, out, data_root=root, listener=KillAfter(kill_at))
    assert train(chosen, out, data_root=root, resume=True).status == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, STEPS + 2])
def test_resumed_equals_uninterrupted(folder: Path, whole: Path, tmp_path: Path, kill_at: int) -> None:
    killed_and_resumed(recipe(**EVERYTHING), folder, tmp_path / "run", kill_at)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(folder: Path, whole: Path, tmp_path: Path) -> None:
    train(recipe(**EVERYTHING, data__num_workers=2), tmp_path / "run", data_root=folder)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", nightly_but([2], [0, 2]))
def test_shards_resume_exactly(folder: Path, tmp_path: Path, workers: int) -> None:
    pytest.importorskip("webdataset")
    shards = make_shards(folder, tmp_path / "shards", 10)
    chosen = recipe(**EVERYTHING, data__name="wds/x", data__num_workers=workers, train__batch_size=8)
    train(chosen, tmp_path / "whole", data_root=shards)
    killed_and_resumed(chosen, shards, tmp_path / "killed", 8)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


class Weights(Listener):
    """Keeps the trained weights of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_start(self, net: detachnet.DetachableNet, done: int, total: int) -> None:
        self.net = net

    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        self.steps.append({name: tensor.clone() for name, tensor in self.net.state_dict().items()})


@pytest.mark.slow
def test_what_is_written_are_the_averaged_weights(folder: Path, tmp_path: Path) -> None:
    seen = Weights()
    result = train(
        recipe(train__ema_decay=0.5, train__epochs=1), tmp_path / "run", data_root=folder, listener=seen
    )
    written = detachnet.load(result.folder.last)
    for name, tensor in written.state_dict().items():
        average = seen.steps[0][name]
        for step, live in enumerate(seen.steps[1:], 1):
            decay = min(0.5, 1 - (1 + step) ** (-2 / 3))  # timm's warm-up
            average = decay * average + (1 - decay) * live[name] if average.is_floating_point() else live[name]
        torch.testing.assert_close(tensor, average)
    test = {row["model"]: row["last_accuracy"] for row in result.table}
    assert written.facts.accuracy == detachnet.load(result.folder.best).facts.accuracy == test


@pytest.mark.slow
def test_averaged_weights_of_a_data_set_in_memory(tmp_path: Path) -> None:
    data = {"name": "cifar10-mini", "num_train": 64, "holdout": 50}
    kwargs = {"depth": 8, "width": 0.25}
    chosen = recipe(train__ema_decay=0.9, train__epochs=1, data=data, model__kwargs=kwargs)
    killed_and_resumed(chosen, tmp_path, tmp_path / "killed", 2)
    train(chosen, tmp_path / "whole")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_family_knows_how_its_images_are_read(folder: Path, whole: Path) -> None:
    net = detachnet.load(whole / "best.safetensors")
    assert net.plan.input_size == (3, 32, 32)
    assert net.facts.data is not None
    assert net.facts.data.classes == ("9", "10", "cat", "dog")
    assert (net.facts.data.name, net.facts.data.num_test, net.facts.data.test_split, net.facts.data.crop_pct) == (
        "folder",
        12,
        "validation",
        0.875,
    )
    right = 0
    for path in sorted((folder / "val").rglob("*.*")):
        image = to_tensor(read_image(path), net.facts.data, net.plan.input_size)
        right += net.facts.data.classes[int(net(image[None]).argmax())] == path.parent.name
    assert right / 12 == net.facts.accuracy["base"]


@pytest.mark.slow
def test_evaluate_and_predict(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    out = runner.invoke(app, ["evaluate", str(whole), "--data-root", str(folder), "--json"])
    assert out.exit_code == 0, out.output
    answer = json.loads(out.stdout)
    assert (answer["data"], answer["n"]) == ("folder", 12)
    assert {r["model"]: r["test_accuracy"] for r in answer["models"]} == rows(whole)[-1]["test_accuracy"]
    out = runner.invoke(app, ["predict", str(whole), str(folder / "val" / "cat"), "--json"])
    assert out.exit_code == 0, out.output
    assert {row["classes"][0]["name"] for row in json.loads(out.stdout)["images"]} <= set(CLASSES)
    out = runner.invoke(app, ["cascade", str(whole), "--data-root", str(folder)])
    assert out.exit_code == 0, out.output
    assert "on folder, n = 6" in out.output


@pytest.mark.slow
def test_a_report_of_a_run_on_files(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = CliRunner().invoke(
        app, ["report", str(whole), "-o", str(tmp_path / "r.html"), "--data-root", str(folder)]
    )
    assert out.exit_code == 0, out.output
    page = (tmp_path / "r.html").read_text()
    assert "share of it waiting for images" in page
    assert "No predictions" not in page
    assert page.count('alt="A test image of class ') == 12
    assert page.count("A test image of class cat") == 3


@pytest.mark.slow
def test_the_time_spent_waiting_is_measured(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = images.read_image

    def slower(*args: object) -> Image.Image:
        import time

        time.sleep(0.02)
        return slow(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("detachnet.data.folders.read_image", slower)
    (tmp_path / "recipe.toml").write_text(recipe(train__epochs=1).to_toml())
    words = ["train", str(tmp_path / "recipe.toml"), "--data-root", str(folder), "--out", str(tmp_path / "run")]
    out = CliRunner().invoke(app, words)
    share = json.loads((tmp_path / "run" / "run.json").read_text())["wait_share"]
    assert 0.1 < share < 1
    assert f"{100 * share:.0f} % of the time went into waiting for images" in out.output


@pytest.mark.slow
def test_a_broken_image_ends_a_training_that_goes_on(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pictures")
    picture = root / "val" / "cat" / "1.jpg"
    good = picture.read_bytes()
    picture.write_bytes(good[:300])
    with pytest.raises(detachnet.DataError, match=r"val/cat/1.jpg cannot be read: it is truncated or damaged"):
        train(recipe(data__num_workers=1), tmp_path / "run", data_root=root)
    picture.write_bytes(good)
    assert train(recipe(data__num_workers=1), tmp_path / "run", data_root=root, resume=True).status == "finished"


@pytest.mark.nightly
def test_the_recipe_for_imagenet_on_a_little_folder(folder: Path, tmp_path: Path) -> None:
    """Thinner and on smaller images, all else as shipped."""
    options = ["data.image_size=32", "data.num_workers=1", "train.epochs=1", "train.batch_size=24"]
    options += ["schedule.warmup_epochs=0", "model.kwargs={num_classes=4, width_per_group=8}"]
    result = train(load_recipe(RECIPE, options), tmp_path / "run", data_root=folder)
    assert [row["model"] for row in result.table] == ["base", "sub0", "sub1", "shallow"]


@pytest.mark.slow
def test_outputs_are_those_of_the_classes(folder: Path, tmp_path: Path) -> None:
    wrong = recipe(model__kwargs={"depth": 8, "width": 0.25, "num_classes": 10})
    with pytest.raises(detachnet.RecipeError, match=r"has 10 outputs, but folder has 4 classes\n.*num_classes=4"):
        train(wrong, tmp_path / "run", data_root=folder)
    assert not (tmp_path / "run").exists()


class Interrupt(Listener):
    """Ctrl-C, which a terminal sends to the workers too."""

    def on_step(self, epoch: int, images: int, losses: Mapping[str, torch.Tensor]) -> None:
        for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
            os.kill(process.pid or 0, signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_saves_whatever_the_workers_get(folder: Path, whole: Path, tmp_path: Path) -> None:
    chosen = recipe(**EVERYTHING, data__num_workers=2)
    assert train(chosen, tmp_path / "run", data_root=folder, listener=Interrupt()).status == "interrupted"
    train(chosen, tmp_path / "run", data_root=folder, resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_half_precision_with_all_there_is(folder: Path, tmp_path: Path) -> None:
    chosen = recipe(**EVERYTHING, train__precision="bf16", train__epochs=1, loss__label_smoothing=0.1)
    assert train(chosen, tmp_path / "run", data_root=folder).status == "finished"


def test_held_out_images_in_place_of_the_validation_images(folder: Path) -> None:
    source = FileSource(recipe(data__holdout=12).data, folder, "timm:resnet18")  # type: ignore[arg-type]
    assert (source.num_train, source.test.num_images, source.info.num_test) == (36, 12, 0)
    files = open_train_files(source.info, folder)
    names = [{files.numbers[i] for i in range(files.num_images)} for files in (source.train, source.test)]
    assert names[0] | names[1] == set(range(files.num_images))
    assert open_test_files(source.info, folder).num_images == 12


def test_images_of_one_class_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    """Such as folders of classes that lie one folder too deep."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images").symlink_to(folder / "train", target_is_directory=True)
    with pytest.raises(detachnet.DataError, match=r"are of one class, 'images'\n  try .* right below DIR/train"):
        FileSource(recipe().data, tmp_path, "timm:resnet18")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "train_split", "val_split"),
    [("folder", "train", "train"), ("a.csv", "val", "validation"), ("wds/x", "training", "train")],
)
def test_training_images_are_not_tested_on(name: str, train_split: str, val_split: str) -> None:
    said = f"data.train_split = '{train_split}' and data.val_split = '{val_split}' are the same images"
    with pytest.raises(detachnet.RecipeError, match=said):
        recipe(data={"name": name, "train_split": train_split, "val_split": val_split})


def test_folders_and_shards_are_not_trained_and_tested_on(folder: Path, tmp_path: Path) -> None:
    """Whatever they are called."""
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(folder / "train", target_is_directory=True)
    with pytest.raises(detachnet.DataError, match=r"'train' and 'validation' both have the images of .*val$"):
        FileSource(recipe().data, tmp_path, "timm:resnet18")  # type: ignore[arg-type]
    pytest.importorskip("webdataset")
    shards = make_shards(folder, tmp_path / "shards", 12)
    splits = {"train_split": "train-{000000..000002}.tar|36", "val_split": "train-{000002..000003}.tar|24"}
    chosen = recipe(data={"name": "wds/x", **splits}).data
    with pytest.raises(detachnet.DataError, match=r"both have the images of .*train-000002.tar$"):
        FileSource(chosen, shards, "timm:resnet18")  # type: ignore[arg-type]


def test_evaluating_batches_directly(folder: Path, whole: Path) -> None:
    from detachnet.data.folders import open_files
    from detachnet.training.data import evaluation_batches

    net = detachnet.load(whole / "last.safetensors")
    assert net.facts.data is not None
    files = open_files("folder", folder, net.facts.data.test_split, net.facts.data.classes)
    scores = evaluate(net, evaluation_batches(files, net.facts.data, (32, 32), "cpu", 0))
    assert {name: score["accuracy"] for name, score in scores.items()} == net.facts.accuracy


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["folder", "wds/x"])
def test_two_processes(folder: Path, tmp_path: Path, name: str) -> None:
    """From a folder a run goes on with one process, from shards two make all of it."""
    if name != "folder":
        pytest.importorskip("webdataset")
    root = folder if name == "folder" else make_shards(folder, tmp_path / "shards", 7)
    chosen = recipe(**EVERYTHING, data__name=name, data__num_workers=1)
    (tmp_path / "recipe.toml").write_text(chosen.to_toml())
    run = [
        DETACHNET,
        "train",
        str(tmp_path / "recipe.toml"),
        "--data-root",
        str(root),
        "--out",
        str(tmp_path / "run"),
    ]
    torchrun(2, *run, *(["--max-minutes", "0"] if name == "folder" else []))
    train(chosen, tmp_path / "run", data_root=root, resume=True)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2]
    family = detachnet.load(tmp_path / "run" / "last.safetensors")
    assert family.facts.accuracy == rows(tmp_path / "run")[-1]["test_accuracy"]
    out = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--data-root", str(root), "--json"])
    assert {r["model"]: r["test_accuracy"] for r in json.loads(out.stdout)["models"]} == family.facts.accuracy


def test_a_tensor_with_two_names_is_averaged_once_a_step() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
            self.again = self.one

    model = Tied()
    averaged = AveragedWeights(model, 0.9)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data += 1
    before = {name: tensor.clone() for name, tensor in averaged.module.state_dict().items()}
    averaged.update(model)
    for name, tensor in averaged.module.state_dict().items():
        expected = before[name] + (0.1 if tensor.is_floating_point() else 1)
        torch.testing.assert_close(tensor, expected)
