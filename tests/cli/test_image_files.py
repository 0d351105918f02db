"""Commands that look at a bounded number of image files: search, recalibrate, export --int8."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detachnet_cli.app import app
from PIL import Image
from typer.testing import CliRunner

import detachnet
from detachnet.report import page
from detachnet.selection.images import run_images
from tests import folders, searched

CLASSES = tuple(f"{i}-{name}" for i, name in enumerate(searched.CLASSES))
"""In the order of the network's outputs."""
PER_CLASS = {"train": 30, "val": 6}
MODEL = ["--model-file", f"{searched.__file__}:Tiny"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The colours that the tiny network was trained on, as files."""
    root = tmp_path_factory.mktemp("colours")
    for seed, (split, count) in enumerate(PER_CLASS.items(), 2):
        made = searched.images(count * len(searched.CLASSES), seed)
        for i, (image, label) in enumerate(zip(made.images, made.labels.tolist(), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on them, as a training would have left it."""
    run = tmp_path / "run"
    run.mkdir()
    net = searched.trained()
    data = {"name": "folder", "image_size": 8, "crop_pct": 1.0, "holdout": 40}
    (run / "recipe.toml").write_text(folders.recipe(data=data).to_toml())
    known = {"name": "folder", "classes": CLASSES, "crop_pct": 1.0, "num_test": 24}
    info = searched.DATA.model_copy(update=known)
    net.facts = net.facts.updated(data=info, accuracy={"base": 0.5, "short": 0.5})
    detachnet.save(net, run / "last.safetensors", own=True)
    return run


def command(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in (*words, *MODEL)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.mark.slow
def test_images_that_decide_are_held_out_ones(root: Path, run: Path) -> None:
    held_out, calibration = run_images(run, 20, root)
    assert len(held_out) == len(calibration) == 20
    assert held_out.labels.bincount().tolist() == [5, 5, 5, 5]
    assert held_out.images.shape[1:] == calibration.images.shape[1:] == searched.SIZE
    both = torch.cat([held_out.images, calibration.images]).flatten(1)
    assert len(both.unique(dim=0)) == 40
    chosen = (run / "recipe.toml").read_text().replace("holdout = 40", "holdout = 0")
    (run / "recipe.toml").write_text(chosen)
    with pytest.raises(detachnet.DataError, match="was trained on all its training images: none is held out"):
        run_images(run, 20, root)


def test_a_report_shows_held_out_images(root: Path, run: Path) -> None:
    """Where the run was evaluated on these."""
    chosen, net = (
        detachnet.load_recipe(run / "recipe.toml"),
        detachnet.load(run / "last.safetensors", searched.Tiny()),
    )
    shown = page._test_images(SimpleNamespace(recipe=chosen, info={}, net=net), root)  # type: ignore[arg-type]
    held_out, _ = run_images(run, page.NUM_PICTURES, root)
    assert torch.equal(shown.images, held_out.images)


@pytest.mark.slow
def test_search(root: Path, run: Path) -> None:
    asked = ["search", run, "--macs", 0.6, "--images", 32, "--data-root", root]
    command(*asked, "--adopt", run / "found.safetensors")
    front = json.loads((run / "search.json").read_text())
    assert front["images"] == 32
    assert front["base"]["accuracy"] > 0.6
    assert front["found"][0]["macs"] <= 0.6 * front["base"]["macs"]
    before = (run / "search.jsonl").read_text()
    command(*asked)
    assert json.loads((run / "search.json").read_text()) == front
    assert (run / "search.jsonl").read_text() == before
    found = detachnet.load_recipe(run / "found.toml")
    assert (found.data.name, found.data.holdout) == ("folder", 40)


@pytest.mark.slow
def test_recalibrate(root: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "detachnet"):
        out = command("recalibrate", run, "-o", run / "new.safetensors", "--images", 30, "--data-root", root)
    assert "n = 24; statistics of 30 training images" in out
    assert "30 of 120 training images, evenly spaced" in caplog.text
    fresh, before = (
        detachnet.load(run / name, searched.Tiny()) for name in ("new.safetensors", "last.safetensors")
    )
    assert fresh.facts.known_data.num_test == 24
    assert fresh.facts.accuracy["base"] > 0.6
    statistics = [name for name, _ in before.named_buffers() if name.endswith("running_mean")]
    assert any(not torch.equal(fresh.get_buffer(name), before.get_buffer(name)) for name in statistics)


@pytest.mark.slow
def test_int8(root: Path, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    asked = ["export", run, "--model", "base", "--data-root", root]
    command(*asked, "-o", tmp_path / "out", "--int8", "--images", 12)
    manifest = detachnet.read_manifest(tmp_path / "out")
    (base,) = manifest.models
    assert (manifest.precision, manifest.num_test) == ("int8", 12)
    assert base.accuracy is not None
    assert base.accuracy > 0.6
    assert base.float_accuracy != 0.5  # that of the 12 images, not of the training's
    assert "--images is for --int8" in command(*asked, "-o", tmp_path / "more", "--images", 12, code=2)
