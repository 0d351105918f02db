"""The n-th operation on the disk fails: the old file or the new one is there, whole."""

import copy
import hashlib
import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from detachnet_cli.app import app
from typer.testing import CliRunner

import detachnet
from detachnet.checkpoint.content import read
from detachnet.deploy import formats, onnx_writer
from detachnet.storage import MANIFEST, replace_file, write_new
from detachnet.training.trainer import train
from tests.disks import Failing, each_failure
from tests.helpers import nightly_but
from tests.models import Plain
from tests.runs import KillAfter, Killed, assert_same_run, recipe


def make(width: float = 0.05) -> detachnet.DetachableNet:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=width)
    return detachnet.make_detachable(model, ["features.6"], check="none").eval()


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_saving(tmp_path: Path) -> None:
    path, other = tmp_path / "f.safetensors", tmp_path / "g.safetensors"
    old, new = make(), make()
    detachnet.save(old, path)
    detachnet.save(new, other)
    before, after = path.read_bytes(), other.read_bytes()
    failures = 0
    for failing in each_failure():
        path.write_bytes(before)
        with failing:
            try:
                detachnet.save(new, path)
            except detachnet.CheckpointError as error:
                failures += 1
                said = str(error)
                assert ("the previous file is unchanged" in said) == (path.read_bytes() == before)
        assert path.read_bytes() in (before, after)
        assert failing.failed or path.read_bytes() == after
        assert hidden(tmp_path) == []
    assert failures == 8  # write, fsync, rename, fsync of the folder; once and for good


@pytest.mark.slow
def test_exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, folder = detachnet.make_detachable(Plain(), ["pool"], (3, 8, 8), check="none").eval(), tmp_path / "out"
    graph = onnx_writer.onnx_model(formats.Piece("sub0", net.detach("sub0"), torch.zeros(3, 3, 8, 8)))
    monkeypatch.setattr(onnx_writer, "onnx_model", lambda piece: copy.deepcopy(graph))  # it takes most of the time
    for failing in each_failure():
        with failing:
            try:
                detachnet.export(net, folder, models=["sub0"])
            except detachnet.ExportError:
                assert failing.failed
        if folder.exists():
            assert detachnet.read_manifest(folder).names == ("sub0",)
            shutil.rmtree(folder)
        else:
            assert failing.failed
        assert hidden(tmp_path) == []


SHORT = ("train.epochs=1", "schedule.warmup_epochs=0", "data.num_train=250")


@pytest.fixture(scope="module")
def runs(little_data: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs: one `whole`, and one `killed` after three steps, each of which was saved."""
    folder = tmp_path_factory.mktemp("runs")
    train(recipe(*SHORT), folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
        with pytest.raises(Killed):
            train(recipe(*SHORT), folder / "killed", listener=KillAfter(3))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "for_good"),
    nightly_but(
        [(1, False), (6, False), (9, True), (14, True)],
        itertools.product([1, 4, 6, 9, 12, 14], [False, True]),
    ),
)
def test_training_goes_on_after_any_failure(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, for_good: bool
) -> None:
    chosen = recipe(*SHORT)
    monkeypatch.setattr("detachnet.training.loop.SAVE_EVERY_S", 0)
    shutil.copytree(runs / "killed", tmp_path / "run")
    with Failing(number, for_good=for_good) as failing, pytest.raises(detachnet.DetachNetError):
        train(chosen, tmp_path / "run", resume=True)
    assert failing.failed
    detachnet.load(tmp_path / "run" / "last.safetensors")
    assert train(chosen, tmp_path / "run", resume=True).status == "finished"
    assert_same_run(tmp_path / "run", runs / "whole")
    assert hidden(tmp_path / "run") == []


@pytest.mark.slow
def test_a_report(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for failing in each_failure():
        page.write_text("old")
        with failing:
            result = CliRunner().invoke(app, ["report", str(runs / "whole"), "-o", str(page)])
        assert result.exit_code == 0 or (result.exit_code == 2 and failing.failed), result.output
        is_new = page.read_text().rstrip().endswith("</html>")
        assert is_new or (page.read_text() == "old" and result.exit_code == 2)
        assert hidden(tmp_path) == []


def test_equal_families_are_equal_files(tmp_path: Path) -> None:
    net, digests = make(), set()
    for i in range(6):
        detachnet.save(net, tmp_path / f"{i}.safetensors")
        digests.add(hashlib.sha256((tmp_path / f"{i}.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert torch.equal(next(detachnet.load(tmp_path / "0.safetensors").parameters()), next(net.parameters()))


@pytest.mark.slow
def test_several_savers_and_readers_of_one_path(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    nets = [make(), make()]
    detachnet.save(nets[0], path)
    errors: list[BaseException] = []

    def work(run: int) -> None:
        try:
            for _ in range(10):
                detachnet.save(nets[run], path) if run < 2 else read(path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(run,)) for run in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert hidden(tmp_path) == []


def test_planted_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda count: "known")
    (tmp_path / f".f.{os.getpid()}.known.tmp").symlink_to(mine)
    with pytest.raises(detachnet.CheckpointError, match="cannot write"):
        replace_file(tmp_path / "f", b"content")
    with pytest.raises(FileExistsError):
        write_new(mine, b"content")
    assert mine.read_text() == "mine"
    monkeypatch.undo()
    (tmp_path / f".f.{os.getpid()}.tmp").symlink_to(mine)  # as it was called once
    replace_file(tmp_path / "f", b"content")
    assert (mine.read_text(), (tmp_path / "f").read_text()) == ("mine", "content")
    assert not (tmp_path / "f").is_symlink()


@pytest.mark.slow
def test_a_folder_is_complete_or_not_there(tmp_path: Path) -> None:
    detachnet.export(make(), tmp_path / "out", models=["sub0"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MANIFEST, "sub0.onnx", "weights.bin"}
