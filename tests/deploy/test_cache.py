"""An export's graphs optimized for this processor, with one file of weights."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

import detachnet
from detachnet.deploy import cache
from detachnet.deploy.backends import OnnxBackend
from detachnet.deploy.cache import OPTIMIZED_WEIGHTS, optimized_folder
from detachnet.deploy.manifest import read_manifest
from tests import models

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "detachnet" / "onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with norms that differ from model to model, and legs."""
    torch.manual_seed(0)
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    subs = {"late": detachnet.SubModel(drop=["features.16:features.22"])}
    net = detachnet.make_detachable(model, subs, check="none").eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("cache") / "family"
    detachnet.export(net, folder, legs=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_model_maps_the_same_weights(exported: Path, home: Path) -> None:
    before = contents(exported)
    alone, shared = detachnet.Family.load(exported), detachnet.Family.load(exported, shared_memory=True)
    assert contents(exported) == before  # it may be read only
    images = torch.randn(2, *alone.input_size)
    together = shared.resumable(images)
    for name in alone.names:
        wanted = alone.run(images, name).output
        torch.testing.assert_close(shared.run(images, name).output, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.run(name).output, wanted, rtol=1e-5, atol=1e-5)  # through legs
    (folder,) = home.iterdir()
    weights, graphs = folder / OPTIMIZED_WEIGHTS, list(folder.glob("*.onnx"))
    assert {path.name for path in graphs} == {path.name for path in exported.glob("*.onnx")}
    assert weights.stat().st_size < 1.1 * (exported / "weights.bin").stat().st_size + 4096 * 60  # whole pages
    assert all(path.stat().st_size < 0.2 * weights.stat().st_size for path in graphs)
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert str(weights) in maps


def test_made_once_and_again_if_something_changed(exported: Path, tmp_path: Path, home: Path) -> None:
    folder = optimized_folder(exported, read_manifest(exported))
    before = (folder / "index.json").stat().st_mtime_ns
    assert optimized_folder(exported, read_manifest(exported)) == folder
    assert (folder / "index.json").stat().st_mtime_ns == before
    weights = (folder / OPTIMIZED_WEIGHTS).read_bytes()
    (folder / OPTIMIZED_WEIGHTS).write_bytes(bytes([weights[0] ^ 1]) + weights[1:])
    assert optimized_folder(exported, read_manifest(exported)) == folder
    assert (folder / OPTIMIZED_WEIGHTS).read_bytes() == weights
    other = shutil.copytree(exported, tmp_path / "other")
    assert optimized_folder(other, read_manifest(other)) == folder  # the same files
    net = detachnet.make_detachable(
        detachnet.create_model("detachnet:vgg16_cifar", width=0.05), ["features.6"], check="none"
    )
    detachnet.export(net.eval(), tmp_path / "changed", models=["sub0"])
    changed = optimized_folder(tmp_path / "changed", read_manifest(tmp_path / "changed"))
    assert changed != folder
    assert sorted(home.iterdir()) == sorted([folder, changed])


def test_what_was_made_of_exports_that_are_gone_is_removed(exported: Path, tmp_path: Path, home: Path) -> None:
    kept = optimized_folder(exported, read_manifest(exported))
    torch.manual_seed(0)
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8)).eval()
    made = []
    for seed in range(3):  # exported anew into the same folder, then gone
        torch.nn.init.constant_(net.base.fc.bias, seed)  # type: ignore[union-attr, arg-type]
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)
        detachnet.export(net, tmp_path / "mine", models=["sub0"])
        made.append(optimized_folder(tmp_path / "mine", read_manifest(tmp_path / "mine")))
        assert sorted(home.iterdir()) == sorted([kept, made[-1]])
    assert len(set(made)) == 3
    (home / "strange").mkdir()
    (home / "strange" / "index.json").write_text("{}")
    (tmp_path / "mine").rename(tmp_path / "moved")
    cache._remove_old(home)
    assert sorted(home.iterdir()) == sorted([kept, home / "strange"])


@pytest.mark.parametrize("what", ["hardware", "versions"])
def test_another_processor_or_runtime(exported: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    here = cache._key(exported)
    monkeypatch.setattr(cache, what, lambda *_: {"device": "another"})
    assert cache._key(exported) != here


def test_optimized_graphs_are_compared(exported: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cache._runner
    monkeypatch.setattr(
        cache,
        "_runner",
        lambda session, path: lambda images: right(session, path)(images) + (path.parent != exported),
    )
    with pytest.raises(
        detachnet.ExportError, match=r"the optimized base\.onnx does not compute what the exported one"
    ):
        OnnxBackend(exported, shared_memory=True)
    assert list(home.iterdir()) == []


def test_no_place_for_a_cache(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(detachnet.ExportError, match=r"cannot write .*file/detachnet/onnx"):
        OnnxBackend(exported, shared_memory=True)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", fails)
    with pytest.raises(detachnet.ExportError, match=r"no home folder[\s\S]*XDG_CACHE_HOME"):
        OnnxBackend(exported, shared_memory=True)


def fails() -> Path:
    raise RuntimeError("could not determine home directory")
