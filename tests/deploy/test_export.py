import importlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import detachnet
from detachnet.data.datasets import Split, describe_data, load_data
from detachnet.deploy import formats, onnx_writer
from detachnet.deploy.export import export
from detachnet.deploy.manifest import Manifest, _digest, read_manifest
from detachnet.deploy.measurement import Latency
from detachnet.deploy.opening import open_graph
from detachnet.deploy.program import trace
from detachnet.deploy.pte import separate_norms
from detachnet.deploy.quantize import CALIBRATION_IMAGES, calibration
from detachnet.deploy.verify import compare
from detachnet.facts import DataInfo
from detachnet.losses import logits as main_output
from tests import models
from tests.disks import disk_of
from tests.helpers import nightly_but

exporting = importlib.import_module("detachnet.deploy.export")
FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...]]] = {
    "vgg": (
        lambda: detachnet.create_model("detachnet:vgg16_cifar", width=0.05),
        ["features.6", "features.23"],
        (3, 32, 32),
    ),
    "resnet": (lambda: detachnet.create_model("timm:test_resnet", num_classes=7), ["layer1"], (3, 32, 32)),
    "mobilenetv3": (
        lambda: detachnet.create_model("timm:mobilenetv3_small_050", num_classes=7),
        ["blocks.3"],
        (3, 32, 32),
    ),
    "efficientnet": (
        lambda: detachnet.create_model("timm:test_efficientnet", num_classes=7),
        ["blocks.0"],
        (3, 32, 32),
    ),
    "convnext": (lambda: detachnet.create_model("timm:test_convnext", num_classes=7), ["stages.1"], (3, 32, 32)),
}

HEADS: dict[str, Literal["private"]] = {"vgg": "private"}


def family(name: str) -> detachnet.DetachableNet:
    """A family whose batch norms differ from model to model, as after training."""
    make, cuts, size = FAMILIES[name]
    net = detachnet.make_detachable(make(), cuts, size, head=HEADS.get(name, "shared"), check="none").eval()
    for parameter in net.heads.parameters():
        parameter.data += 0.1
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.add_(0.1 * torch.randn_like(tensor))
    return net


@pytest.fixture(scope="module")
def toy() -> detachnet.DetachableNet:
    torch.manual_seed(0)
    net = detachnet.make_detachable(models.Plain(), ["conv1", "pool"], (3, 8, 8)).eval()
    net.facts = net.facts.updated(accuracy={"base": 0.5})
    return net


@pytest.fixture(scope="module")
def exported(toy: detachnet.DetachableNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "toy"
    export(toy, folder)
    return folder


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(["vgg", "efficientnet"], FAMILIES))
def test_pytorch_detached_reloaded_onnx_runtime_and_torch_export_agree(name: str, tmp_path: Path) -> None:
    net = family(name)
    detachnet.export(net, tmp_path / "onnx")
    detachnet.export(net, tmp_path / "pt2", "pt2", models=net.names[-1:])
    for model in net.names:
        detachnet.save(net, tmp_path / model, which=model)
        reloaded = detachnet.load(tmp_path / model)
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / f"{model}.onnx")
        for batch in (1, 2, 5):
            images = torch.randn(batch, 3, 32, 32)
            with torch.no_grad():
                wanted = net(images, which=model)
                assert torch.equal(net.detach(model)(images), wanted)
                assert torch.equal(reloaded(images), wanted)
            close(torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), wanted)
    close(open_graph(tmp_path / "pt2" / f"{model}.pt2")(images), wanted)
    everything = sum(t.nbytes for t in net.state_dict().values())
    weights = (tmp_path / "onnx" / "weights.bin").stat().st_size
    assert weights <= 1.02 * everything  # what models share is there once, batch norms are not folded


@pytest.mark.slow
def test_legs_join_to_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    subs = {"late": ["layer3.0:layer3.1"], "early": ["layer1.0:layer1.1"], "front": [":layer1"]}
    model = detachnet.create_model("detachnet:resnet_cifar", depth=14)
    net = detachnet.make_detachable(
        model, {n: detachnet.SubModel(drop=d) for n, d in subs.items()}, (3, 32, 32), check="none"
    ).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    manifest = detachnet.export(net, tmp_path / "onnx", legs=True)
    assert {file.name for file in (tmp_path / "onnx").iterdir()} == {
        *(f"{name}.onnx" for name in net.names),
        *(f"leg.{i}.onnx" for i in range(5)),
        "manifest.json",
        "weights.bin",
    }
    whole = detachnet.export(net, tmp_path / "whole")
    assert manifest.weights == whole.weights  # all of it is there already
    assert read_manifest(tmp_path / "onnx") == manifest
    assert (manifest.legs_of, whole.legs) == (net.legs, ())
    images = torch.randn(3, 3, 32, 32)
    family, runs = detachnet.Family.load(tmp_path / "onnx"), dict[str, int]()
    for order in (net.names, tuple(reversed(net.names))):
        work = family.resumable(images)
        for name in order:
            before = work.macs
            with torch.no_grad():
                close(work.run(name).output, net(images, which=name))
            runs[name] = work.macs - before
        assert work.macs == 3 * sum(leg.macs for leg in {leg for legs in net.legs.values() for leg in legs})
    assert runs["base"] < 3 * net.plan["base"].macs
    part = work.select(torch.tensor([True, False, True]))
    close(part.run("late").output, work.run("late").output[[0, 2]])


@pytest.mark.slow
def test_legs_of_two_widths_that_part_at_the_same_place(tmp_path: Path) -> None:
    """Features of both widths have the cut's name, and other numbers of channels."""
    drop = ["features.16:features.22"]
    subs = {
        "half": detachnet.SubModel(width=0.5),
        "late": detachnet.SubModel(drop=drop),
        "both": detachnet.SubModel(drop=drop, width=0.5),
    }
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.25)
    net = detachnet.make_detachable(model, subs, (3, 32, 32), check="none").eval()
    manifest = detachnet.export(net, tmp_path / "onnx", legs=True)
    assert [leg.models for leg in manifest.legs if leg.end] == [("base", "late"), ("half", "both")]
    images = torch.randn(2, 3, 32, 32)
    work = detachnet.Family.load(tmp_path / "onnx").resumable(images)
    for name in net.names:
        with torch.no_grad():
            close(work.run(name).output, net(images, which=name))


@pytest.mark.slow
def test_a_changed_leg_is_noticed(tmp_path: Path) -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    net = detachnet.make_detachable(
        model, {"late": detachnet.SubModel(drop=["features.16:features.22"])}, check="none"
    ).eval()
    detachnet.export(net, tmp_path / "onnx", legs=True)
    path = tmp_path / "onnx" / "leg.1.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(detachnet.ExportError, match=r"leg.1.onnx is damaged"):
        read_manifest(tmp_path / "onnx")


@pytest.mark.slow
def test_a_family_is_hardly_larger_than_its_base(tmp_path: Path) -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.25)
    net = detachnet.make_detachable(model, ["features.6"], check="none").eval()
    sizes = {}
    for name, chosen in (("family", None), ("alone", ["base"])):
        detachnet.export(net, tmp_path / name, models=chosen)
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
    assert sizes["family"] <= 1.02 * sizes["alone"]


@pytest.mark.slow
def test_manifest(toy: detachnet.DetachableNet, exported: Path) -> None:
    manifest = read_manifest(exported)
    assert manifest.names == ("base", "sub0", "sub1")
    assert (manifest.format, manifest.precision, manifest.output) == ("onnx", "float32", "logits")
    assert (manifest.input.name, manifest.input.shape, manifest.input.max_batch) == ("images", (3, 8, 8), None)
    assert manifest["base"].accuracy == 0.5
    with pytest.raises(detachnet.ExportError, match=r"no model 'bas'[\s\S]*nearest  'base'"):
        manifest["bas"]
    assert manifest["sub1"].accuracy is None
    for model in manifest.models:
        plan = toy.plan[model.name]
        assert (model.macs, model.num_params) == (plan.macs, plan.num_params)
    assert sorted(file.name for file in exported.iterdir()) == [
        "base.onnx",
        "manifest.json",
        "sub0.onnx",
        "sub1.onnx",
        "weights.bin",
    ]


@pytest.mark.slow
def test_graphs_say_what_they_are_and_nothing_about_the_machine(tmp_path: Path) -> None:
    net = family("vgg")
    info = describe_data("cifar10-mini", load_data("cifar10-mini"))
    net.facts = net.facts.updated(data=info.model_copy(update={"crop_pct": 0.9}))
    manifest = export(net, tmp_path / "out", models=["sub1"])
    assert manifest.input.crop_pct == 0.9
    exported = detachnet.Family.load(tmp_path / "out").data
    assert exported is not None
    assert (exported.crop_pct, exported.mean) == (0.9, info.mean)
    assert manifest.labels == net.facts.data.classes
    assert (manifest.input.mean, manifest.input.std, manifest.num_test) == (
        net.facts.data.mean,
        net.facts.data.std,
        1000,
    )
    path = tmp_path / "out" / "sub1.onnx"
    said = {prop.key: prop.value for prop in onnx.load(path, load_external_data=False).metadata_props}
    assert said["model"] == "sub1"
    assert json.loads(said["labels"]) == list(net.facts.data.classes)
    assert json.loads(said["mean"]) == list(net.facts.data.mean)
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("options", [{"format": "pt2"}, {"int8": (None, None)}], ids=str)
def test_legs_are_onnx_and_not_int8(toy: detachnet.DetachableNet, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(
        detachnet.ExportError, match="legs are written for the format 'onnx' only, and not in int8"
    ):
        export(toy, tmp_path / "legs", legs=True, **options)


@pytest.mark.slow
def test_some_models_and_their_latency(toy: detachnet.DetachableNet, tmp_path: Path) -> None:
    latency = Latency(runtime="torch", device="cpu", batch=1, threads=1, n=9, p50_s=0.1, p90_s=0.2, p99_s=0.3)
    manifest = export(toy, tmp_path / "out", "pt2", ["sub1", "base"], latency={"sub1": latency})
    assert manifest.names == ("base", "sub1")
    assert manifest.weights is None
    assert [model.latency for model in manifest.models] == [None, latency]
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.slow
def test_the_family_comes_back_as_it_was(toy: detachnet.DetachableNet, tmp_path: Path) -> None:
    net = detachnet.make_detachable(models.Plain(), ["pool"], (3, 8, 8)).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    export(net, tmp_path / "out", models=["sub0"])
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_name_stays_a_function() -> None:
    assert callable(detachnet.export)
    assert detachnet.export is exporting.export


@pytest.mark.parametrize("count", [100, 300, 511, 1000])
def test_int8_is_calibrated_on_images_of_all_classes(count: int) -> None:
    """Images of folders lie class by class."""
    labels = torch.arange(count) * 10 // count
    split = Split(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), labels, tuple("0123456789"))
    info = DataInfo(name="n", classes=split.classes, mean=(0.5,) * 3, std=(0.5,) * 3)
    taken = torch.cat([labels for _, labels in calibration(split, info).epoch()])
    assert len(taken) == min(count, CALIBRATION_IMAGES)
    assert taken.bincount().amin() >= len(taken) // 10 - 1


@pytest.mark.slow
def test_int8(tmp_path: Path) -> None:
    splits = load_data("cifar10-mini")
    few = Split(splits[1].images[:64], splits[1].labels[:64], splits[1].classes)
    net = family("vgg")
    net.facts = net.facts.updated(data=describe_data("cifar10-mini", splits), accuracy={"sub1": 0.25})
    whole = export(net, tmp_path / "float32", models=["sub1"])
    manifest = export(net, tmp_path / "int8", models=["sub1"], int8=(splits[0], few))
    model = manifest["sub1"]
    assert (manifest.precision, manifest.num_test) == ("int8", 64)
    assert model.num_bytes < 0.6 * whole["sub1"].num_bytes
    session = onnxruntime.InferenceSession(tmp_path / "int8" / "sub1.onnx")
    mean, std = (np.array(c, np.float32)[None, :, None, None] for c in (net.facts.data.mean, net.facts.data.std))
    images = ((few.images.numpy() / 255 - mean) / std).astype(np.float32)
    outputs = session.run(None, {"images": images})[0]
    assert model.accuracy == np.mean(outputs.argmax(1) == few.labels.numpy())
    with torch.no_grad():
        wanted = net(torch.from_numpy(images), which="sub1").numpy()
    assert model.float_accuracy == np.mean(wanted.argmax(1) == few.labels.numpy())  # not that of all, 0.25
    assert np.abs(outputs - wanted).mean() < 0.2 * np.abs(wanted).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base.onnx", "weights.bin"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:99] + bytes([b[99] ^ 4]) + b[100:]])
def test_a_cut_or_flipped_file(
    exported: Path, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(detachnet.ExportError, match=f"{name} is damaged: its content does not match"):
        read_manifest(folder)
    (folder / name).unlink()
    with pytest.raises(detachnet.ExportError, match=f"{name} cannot be read"):
        read_manifest(folder)


def rewrite(folder: Path, change: dict[str, object]) -> None:
    """Change a manifest and give it a right checksum, as a malicious writer would."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text()) | change
    del fields["sha256"]
    path.write_text(json.dumps(fields | {"sha256": _digest(fields)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2; this version of detachnet reads 1"),
        ({"run_this": "import os"}, r"is no manifest of detachnet's\n  what     there is no field run_this"),
        ({"weights": {"file": "../../etc/passwd", "num_bytes": 1, "sha256": ""}}, "is no manifest of detachnet's"),
    ],
)
def test_a_manifest_that_says_something_unknown(
    exported: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    rewrite(folder, change)
    with pytest.raises(detachnet.ExportError, match=message):
        read_manifest(folder)


def test_a_damaged_or_missing_manifest(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("0.5", "0.9"))
    with pytest.raises(detachnet.ExportError, match="is damaged: its content does not match its checksum"):
        read_manifest(folder)
    (folder / "manifest.json").write_text(text[:50])
    with pytest.raises(detachnet.ExportError, match="is no manifest of detachnet's"):
        read_manifest(folder)
    with pytest.raises(detachnet.ExportError, match=r"is no export folder: it has no manifest\.json"):
        read_manifest(tmp_path)


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("no such operator")


def interrupts(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def wrong(*_: object) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: torch.zeros(len(images), 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stand_in", "error", "message"),
    [
        ("onnx_model", fails, detachnet.ExportError, "base cannot be exported as onnx"),
        ("onnx_model", interrupts, KeyboardInterrupt, "^$"),
        ("open_onnx", wrong, detachnet.ExportError, "the exported base does not compute what PyTorch does"),
    ],
)
def test_nothing_is_left_of_an_export_that_failed(
    toy: detachnet.DetachableNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stand_in: Callable[..., object],
    error: type[BaseException],
    message: str,
) -> None:
    monkeypatch.setattr(onnx_writer, name, stand_in)
    with pytest.raises(error, match=message):
        export(toy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk(toy: detachnet.DetachableNet, tmp_path: Path) -> None:
    with disk_of(1000), pytest.raises(detachnet.ExportError, match="cannot write"):
        export(toy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_made(toy: detachnet.DetachableNet, tmp_path: Path) -> None:
    with pytest.raises(detachnet.ExportError, match="exists already"):
        export(toy, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(detachnet.ExportError, match=r"cannot write .*file/out"):
        export(toy, tmp_path / "file" / "out")


@pytest.mark.slow
def test_what_was_not_trained_is_exported_where_it_is_named(
    toy: detachnet.DetachableNet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = toy.copied()
    net.facts = net.facts.updated(trained=net.names[1:])
    assert [model.name for model in export(net, tmp_path / "trained").models] == list(net.names[1:])
    assert "not trained" not in caplog.text
    export(net, tmp_path / "all", models=net.names)
    assert "base is exported as it was made: it was not trained" in caplog.text


def test_a_name_that_is_none_of_a_file(tmp_path: Path) -> None:
    net = detachnet.make_detachable(models.Around(nn.Identity()), {"grün": "a"}, (3, 16, 16), check="none")
    with pytest.raises(detachnet.ExportError, match=r"'grün' is no name for a file[\s\S]*letters, digits and _"):
        export(net, tmp_path / "out")


def test_what_cannot_be_asked_for(toy: detachnet.DetachableNet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    splits = load_data("cifar10-mini")
    for call, message in (
        (lambda: export(toy, out, "onx"), r"unknown format 'onx'[\s\S]*'onnx'"),
        (lambda: export(toy, out, "pt2", int8=splits), "int8 is for the format 'onnx' only"),
        (lambda: export(toy, out, models=[]), "no model to export was named"),
    ):
        with pytest.raises(detachnet.ExportError, match=message):
            call()
    with pytest.raises(detachnet.CheckpointError, match="does not say what it was trained on"):
        export(toy, out, int8=splits)
    known = toy.copied()
    known.facts = known.facts.updated(data=describe_data("cifar10-mini", splits))
    turned = Split(splits[1].images, splits[1].labels, splits[1].classes[::-1])
    for pair in ((splits[0], turned), (turned, splits[1])):
        with pytest.raises(detachnet.DataError, match="the classes of the images are in another order"):
            export(known, out, int8=pair)
    with pytest.raises(detachnet.CutError, match="no model is called 'sub9'"):
        export(toy, out, models=["sub9"])
    half = detachnet.make_detachable(models.Plain().double(), ["pool"], (3, 8, 8))
    with pytest.raises(detachnet.ExportError, match=r"weights in float64; export writes float32"):
        export(half, out)
    nested = detachnet.make_detachable(Nested(), ["conv1"], (3, 8, 8))
    with pytest.raises(detachnet.ExportError, match="base returns a tuple that does not begin with a tensor"):
        export(nested, out)
    assert not out.exists()


class Nested(models.Plain):
    def forward(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor], None]:  # type: ignore[override]
        return (super().forward(x),), None


class TwoOutputs(models.Plain):
    """Probabilities and logits in evaluation mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits if self.training else (logits.softmax(1), logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [TwoOutputs(), models.DictOutput(), models.Auxiliary()], ids=["two", "dict", "one"]
)
def test_of_several_outputs_the_main_one_is_written(model: nn.Module, tmp_path: Path) -> None:
    net = detachnet.make_detachable(model, ["conv1"], (3, 8, 8)).eval()
    export(net, tmp_path / "out")
    graph = open_graph(tmp_path / "out" / "sub0.onnx")
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted = main_output(net(images, which="sub0"))
    torch.testing.assert_close(graph(images), wanted, rtol=1e-4, atol=1e-5)


def test_a_hint_where_probabilities_are_returned() -> None:
    assert detachnet.make_detachable(TwoOutputs(), ["pool"], (3, 8, 8)).plan.hints == (
        "in evaluation mode it returns probabilities; what takes logits normalizes again",
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_what_a_graph_does_not_take(toy: detachnet.DetachableNet, tmp_path: Path, format: str) -> None:
    export(toy, tmp_path / "out", format)
    graph = open_graph(tmp_path / "out" / f"base.{format}")
    channels, height, width = toy.plan.input_size
    with pytest.raises(detachnet.ExportError, match=r"cannot run .*base"):
        graph(torch.zeros(1, channels, 2 * height, width))
    with pytest.raises(detachnet.ExportError, match=r"a tensor of images, not ndarray\n  try +torch.from_numpy"):
        graph(torch.zeros(1, channels, height, width).numpy())  # type: ignore[arg-type]
    with pytest.raises(detachnet.ExportError, match=r"manifest.json is a file\n  try +give the folder"):
        detachnet.read_manifest(tmp_path / "out" / "manifest.json")
    with pytest.raises(
        detachnet.CheckpointError, match=r"that detachnet export wrote\n  try +detachnet.Family.load"
    ):
        detachnet.load(tmp_path / "out")


@pytest.mark.parametrize(("format", "extra"), [("onnx", "export"), ("pte", "executorch")])
def test_a_missing_extra(
    toy: detachnet.DetachableNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, extra: str
) -> None:
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(detachnet.ExportError, match=rf"is not installed[\s\S]*pip install 'detachnet\[{extra}\]'"):
        export(toy, tmp_path / "out", format)
    with pytest.raises(detachnet.ExportError, match="is not installed"):
        open_graph(f"base.{format}")


def test_not_a_number_is_a_mismatch() -> None:
    with pytest.raises(detachnet.ExportError, match="does not compute what PyTorch does"):
        compare(formats.Piece("base", nn.Identity(), torch.ones(3, 2)), lambda images: images * float("nan"))
    with pytest.raises(detachnet.ExportError, match="differ by inf"):
        compare(formats.Piece("base", nn.Identity(), torch.ones(3, 2)), lambda images: images[:, :1])


@pytest.mark.parametrize("wrong", [1, 3])
def test_graphs_are_compared_at_one_image_and_at_three(wrong: int) -> None:
    with pytest.raises(detachnet.ExportError, match=f"outputs differ by .* on {wrong} images"):
        compare(formats.Piece("base", nn.Identity(), torch.ones(3, 2)), lambda x: x + (len(x) == wrong))


@pytest.mark.parametrize(
    ("largest", "difference", "fine"),
    [
        *[(1.0, 0.9e-5, True), (1.0, 1.2e-5, False)],
        *[(0.1, 0.9e-5, True), (0.1, 1.1e-5, False)],
        *[(10.0, 0.8e-4, True), (10.0, 1.3e-4, False)],
    ],
)
def test_what_a_graph_may_differ_by(largest: float, difference: float, fine: bool) -> None:
    """1e-5, and that of the largest output where it is above 1."""
    images = torch.tensor([[0.0, -largest]] * 3)
    run = lambda x: x + torch.tensor([difference, 0.0])  # noqa: E731
    if fine:
        compare(formats.Piece("base", nn.Identity(), images), run)
    else:
        with pytest.raises(detachnet.ExportError, match="does not compute what PyTorch does"):
            compare(formats.Piece("base", nn.Identity(), images), run)


class Evil:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


def test_no_pt2_file_is_unpickled(
    toy: detachnet.DetachableNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(toy, tmp_path / "out", "pt2", ["sub1"])
    path = tmp_path / "out" / "sub1.pt2"
    with zipfile.ZipFile(path) as archive:
        assert not [m for m in archive.infolist() if m.filename.endswith((".pt", ".pkl")) and m.file_size]
        members = {name: archive.read(name) for name in archive.namelist()}
    sample = next(name for name in members if name.endswith(".pt"))
    config = next(name for name in members if name.endswith("weights_config.json"))
    pickled = members[config].replace(b'"use_pickle": false', b'"use_pickle": true')
    for change in ({sample: pickle.dumps(Evil())}, {config: pickled}, {"serialized_state_dict.pt": b"1"}):
        with zipfile.ZipFile("evil.pt2", "w") as archive:
            for name, content in (members | change).items():
                archive.writestr(name, content)
        with pytest.raises(detachnet.ExportError, match=r"evil\.pt2 holds what detachnet never writes"):
            open_graph("evil.pt2")
    assert not Path("touched").exists()
    Path("cut.pt2").write_bytes(path.read_bytes()[:500])
    with pytest.raises(detachnet.ExportError, match="is no complete pt2 file"):
        open_graph("cut.pt2")
    with pytest.raises(detachnet.ExportError, match="is no graph of a known format"):
        open_graph("model.h5")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_executorch(tmp_path: Path) -> None:
    """One program with a method for each model, hardly larger than that of the base-model."""
    pytest.importorskip("executorch", reason="executorch is not installed")
    net = family("efficientnet")
    manifest = export(net, tmp_path / "out", "pte")
    alone = export(net, tmp_path / "base", "pte", ["base"])
    assert manifest.input.max_batch == 8
    assert {model.file for model in manifest.models} == {"family.pte"}
    assert read_manifest(tmp_path / "out") == manifest
    path = tmp_path / "out" / "family.pte"
    rest = alone["base"].num_bytes - (tmp_path / "base" / "family.pte").stat().st_size
    assert path.stat().st_size + rest < 1.25 * alone["base"].num_bytes  # graphs weigh more in a network as small
    images = torch.randn(2, 3, 32, 32)
    for name in net.names:
        with torch.no_grad():
            close(open_graph(path, name)(images), net(images, which=name))
    with pytest.raises(detachnet.ExportError, match="holds base, sub0"):
        open_graph(path)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_become_a_scale_and_a_shift(affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, affine=affine).eval()
    for tensor in (norm.running_mean, norm.running_var, *norm.parameters()):
        tensor.data.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    module = nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.ReLU(), norm)  # the same one twice
    images = torch.randn(2, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    program = trace(formats.Piece("base", module, images), "pte")
    separate_norms(program)
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    with torch.no_grad():
        close(program.module()(images), module(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_only_a_program_holds_several_models(tmp_path: Path) -> None:
    with pytest.raises(detachnet.ExportError, match="holds one model"):
        open_graph(tmp_path / "base.onnx", "base")


def test_manifest_is_its_own_json(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", nightly_but(["timm:test_efficientnet"], ["timm:test_efficientnet", "timm:test_convnext"])
)
def test_sub_models_with_fewer_filters(name: str, tmp_path: Path) -> None:
    """They read parts of the base-model's tensors in the one file; alone they have small ones."""
    model = detachnet.create_model(name, num_classes=7)
    subs = {"half": detachnet.SubModel(width=0.5), "best": detachnet.SubModel(width=0.75, filters="important")}
    net = detachnet.make_detachable(model, subs, (3, 32, 32), check="none").eval()
    manifest = export(net, tmp_path / "all", legs=True)
    assert manifest.legs == ()  # no two of them share anything in front
    images = torch.randn(3, 3, 32, 32)
    for sub in net.names:
        run = open_graph(tmp_path / "all" / f"{sub}.onnx")
        torch.testing.assert_close(run(images), net(images, which=sub), rtol=1e-4, atol=1e-5)
    weights, alone = manifest.weights, export(net, tmp_path / "half", models=["half"]).weights
    only_base = export(net, tmp_path / "base", models=["base"]).weights
    assert weights is not None
    assert alone is not None
    assert only_base is not None
    assert weights.num_bytes < only_base.num_bytes + 0.1 * alone.num_bytes
    assert alone.num_bytes < 0.5 * only_base.num_bytes
    found = {sub: graphs_nodes(tmp_path / "all" / f"{sub}.onnx") for sub in net.names}
    assert "Slice" in found["half"]
    assert "Gather" in found["best"]
    assert "Slice" not in graphs_nodes(tmp_path / "half" / "half.onnx")
    by_name = {model.name: model for model in manifest.models}
    assert by_name["half"].macs == net.plan["half"].macs
    assert by_name["half"].num_bytes - (tmp_path / "all" / "half.onnx").stat().st_size < 1.02 * alone.num_bytes


@pytest.mark.slow
@pytest.mark.parametrize("channels", [16, 64])
def test_a_part_of_a_tensor_that_several_layers_read_counts_once(channels: int, tmp_path: Path) -> None:
    layers = [nn.Conv2d(3 if i == 0 else channels, channels, 3, 1, 1) for i in range(3)]
    layers[2].weight = layers[1].weight
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, 5))
    subs = {"narrow": detachnet.SubModel(width=0.5)}
    net = detachnet.make_detachable(model, subs, (3, 8, 8), check="none").eval()
    together = export(net, tmp_path / "all")["narrow"]
    alone = export(net, tmp_path / "narrow", models=["narrow"])["narrow"]
    graphs = [(tmp_path / folder / "narrow.onnx").stat().st_size for folder in ("all", "narrow")]
    assert together.num_bytes - graphs[0] == pytest.approx(alone.num_bytes - graphs[1], abs=1000)


def graphs_nodes(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
