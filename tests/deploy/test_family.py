import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from detachnet_cli.app import app
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import detachnet
from detachnet.deploy.backends import TorchBackend
from detachnet.deploy.budget import ModelCosts, choose
from detachnet.deploy.cascade import Cascade
from detachnet.deploy.deadline import DeadlineRunner
from detachnet.deploy.family import Family
from detachnet.deploy.profile import write_profile
from detachnet.surgery.plan import BASE
from tests.families import ACCURACY, make, profile_of


@pytest.fixture(scope="module")
def net() -> detachnet.DetachableNet:
    return make()


@pytest.fixture
def family(net: detachnet.DetachableNet) -> Family:
    return Family(TorchBackend(net, 1), "family.safetensors", profile_of(net))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "model"),
    [
        ({}, "base"),
        ({"latency_ms": 10}, "base"),
        ({"latency_ms": 9.99}, "sub0"),
        ({"latency_ms": 1}, "sub1"),
        ({"memory_mb": 7}, "sub0"),
        ({"latency_ms": 7, "memory_mb": 2}, "sub1"),
        ({"accuracy": 0.6}, "sub1"),
        ({"accuracy": 0.61}, "sub0"),
        ({"accuracy": 0.61, "latency_ms": 20}, "base"),
    ],
)
def test_choose(family: Family, limits: dict[str, float], model: str) -> None:
    assert family.choose(**limits) == model


@pytest.mark.slow
class InPlace(nn.Module):
    """Changes the image, and each feature that models part at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3 if i == 0 else 8, 8, 3, 1, 1) for i in range(3))
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x.sub_(0.5)))
        x = self.b(x.mul_(2).add_(1))
        logits: Tensor = self.fc(self.c(x.relu_()).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    "asked",
    [
        ["a"],
        {"short": detachnet.SubModel(drop=["a:b"]), "shorter": detachnet.SubModel(drop=["act:c"])},
        {"narrow": detachnet.SubModel(width=0.5)},
    ],
)
def test_what_models_change_in_place_is_their_own(asked: Any) -> None:
    net = detachnet.make_detachable(InPlace(), asked, (3, 8, 8)).eval()
    images = torch.randn(4, 3, 8, 8)
    expected = {name: net.detach(name)(images.clone()) for name in net.names}
    family, given = Family(TorchBackend(net), "f", None), images.clone()
    for order in (net.names, net.names[::-1]):
        work = family.resumable(given)
        for name in order:
            torch.testing.assert_close(work.run(name).output, expected[name])
            torch.testing.assert_close(family.run(given, name).output, expected[name])
    answer = Cascade(family, (*net.names[1:], BASE), 1.1).run(given)
    torch.testing.assert_close(answer.output, expected["base"])
    assert torch.equal(given, images)


def test_models_go_on_from_where_another_parted() -> None:
    torch.manual_seed(0)
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.05)
    subs = {"late": ["features.16:features.22"], "front": [":features.6"]}
    net = detachnet.make_detachable(
        model, {n: detachnet.SubModel(drop=drop) for n, drop in subs.items()}, check="none"
    ).eval()
    family, images = Family(TorchBackend(net), "f", None), torch.randn(4, 3, 32, 32)
    work = family.resumable(images)
    for name, macs in (
        ("late", net.plan["late"].macs),
        ("base", net.plan["base"].macs - net.plan["late"].shared_macs),
        ("front", net.plan["front"].macs),
    ):
        before = work.macs
        assert torch.equal(work.run(name).output, family.run(images, name).output)
        assert work.macs - before == 4 * macs
    with pytest.raises(detachnet.CutError, match=r"no model is called 'big'[\s\S]*base, late, front"):
        work.run("big")
    one = family.resumable(images[0])
    assert torch.equal(one.run("late").output, family.run(images[0], "late").output)
    with pytest.raises(detachnet.DataError, match="a single image has no others to select it from"):
        one.select(torch.tensor([True]))
    with pytest.raises(detachnet.DataError, match="the family takes images 3×32×32"):
        family.resumable(images[:, :1])


def test_choose_by_macs_needs_no_measurement(net: detachnet.DetachableNet) -> None:
    family = Family(TorchBackend(net), "family.safetensors", None)
    assert family.choose(macs=net.plan["sub0"].macs) == "sub0"
    for budget in ({"latency_ms": 5.0}, {"memory_mb": 5.0}, {"accuracy": 0.5}):
        with pytest.raises(
            detachnet.MeasurementError,
            match=r"was not measured on a device yet[\s\S]*detachnet profile family.safetensors",
        ):
            family.choose(**budget)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"latency_ms": 0.5}, r"no model keeps latency_ms=0.5: sub1 comes nearest with latency_ms=1\n"),
        ({"accuracy": 0.95}, r"no model keeps accuracy=0.95: base comes nearest with accuracy=0.9\n"),
        ({"latency_ms": 4, "accuracy": 0.79}, r"sub0 comes nearest with latency_ms=5\n[\s\S]*accuracy 80.00 %"),
        ({"memory_mb": -1}, "memory_mb=-1: a budget is a positive number"),
        ({"latency_ms": "5"}, "latency_ms='5': a budget is a positive number"),
        ({"latency_ms": float("nan")}, "latency_ms=nan: a budget is a positive number"),
        ({"accuracy": 90}, r"accuracy=90 is not a share in \[0, 1\][\s\S]*0.9"),
    ],
)
def test_an_impossible_budget(family: Family, limits: dict[str, float], message: str) -> None:
    with pytest.raises(detachnet.BudgetError, match=message):
        family.choose(**limits)


def test_the_nearest_model_is_an_attribute(family: Family) -> None:
    with pytest.raises(detachnet.BudgetError) as caught:
        family.choose(macs=1)
    assert caught.value.candidates == ("sub1",)


def test_of_equally_accurate_models_the_cheaper() -> None:
    assert choose([ModelCosts("large", 0.8, 100), ModelCosts("small", 0.8, 10)], {}) == "small"


def test_an_array_is_no_image(family: Family, net: detachnet.DetachableNet) -> None:
    with pytest.raises(detachnet.DataError, match=r"not a ndarray[\s\S]*torch.from_numpy"):
        family.run(torch.zeros(3, 32, 32).numpy())
    with pytest.raises(detachnet.CutError, match=r"the plan has no model 'sub9'[\s\S]*the models are base, sub0"):
        net.plan["sub9"]


@pytest.mark.slow
def test_models_of_unknown_accuracy_are_not_chosen(net: detachnet.DetachableNet) -> None:
    other = make()
    other.facts = other.facts.updated(accuracy={"sub1": 0.6})
    assert Family(TorchBackend(other), "f", profile_of(other)).choose(latency_ms=100) == "sub1"
    other.facts = other.facts.updated(accuracy={})
    with pytest.raises(detachnet.MeasurementError, match="f does not say how accurate its models are"):
        Family(TorchBackend(other), "f", profile_of(other)).choose(latency_ms=100)
    with pytest.raises(detachnet.MeasurementError, match=r"data.holdout[\s\S]*detachnet evaluate f -o measured"):
        Family(TorchBackend(other), "f", profile_of(other)).choose(latency_ms=100)


def test_peak_memory_that_was_not_measured(net: detachnet.DetachableNet) -> None:
    family = Family(TorchBackend(net), "f", profile_of(net, peak_memory_bytes=None))
    with pytest.raises(detachnet.MeasurementError, match=r"without its peak memory\n  what     told"):
        family.choose(memory_mb=5)


def test_a_profile_of_another_family_or_device(
    net: detachnet.DetachableNet, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(detachnet.MeasurementError, match=r"f.profile.json was measured on another family than f"):
        Family(TorchBackend(net), "f", profile_of(net, macs=1))
    family = Family(TorchBackend(net), "f", profile_of(net, device="cuda:0"))
    with pytest.raises(detachnet.MeasurementError, match="f runs on cpu, but was measured on cuda"):
        family.choose(latency_ms=5)
    elsewhere = profile_of(net).model_copy(update={"hardware": {"device": "cpu (another)"}})
    with caplog.at_level(logging.WARNING):
        Family(TorchBackend(net), "f", elsewhere)
    assert "f was measured on cpu (another), but runs on cpu" in caplog.text


def test_what_several_images_take_at_once_says_nothing_of_one(net: detachnet.DetachableNet) -> None:
    several = Family(TorchBackend(net), "f", profile_of(net, batch=32))
    said = (
        r"f was measured on 32 images at once; what one takes is not known\n  try +detachnet profile f --batch 1"
    )
    for asked in (
        lambda: several.choose(latency_ms=20),
        lambda: several.choose(accuracy=0.7),
        lambda: several.run(torch.zeros(3, 32, 32), budget_ms=20),
        lambda: several.latency_s("base"),
        lambda: DeadlineRunner(several, target_ms=20),
    ):
        with pytest.raises(detachnet.MeasurementError, match=said):
            asked()
    assert several.choose(memory_mb=5) == "sub0"


def test_run(family: Family, net: detachnet.DetachableNet) -> None:
    images = torch.randn(3, 3, 32, 32)
    for budget, model in ((10, "base"), (6, "sub0"), (2, "sub1")):
        answer = family.run(images, budget_ms=budget)
        assert answer.model == model
        assert torch.equal(answer.output, net(images, which=model))
    assert family.run(images).model == "base"
    one = family.run(images[0], "sub0").output
    assert one.shape == (10,)
    torch.testing.assert_close(one, net(images, which="sub0")[0], rtol=1e-4, atol=1e-5)
    assert not one.requires_grad


def test_run_takes_pictures(family: Family, net: detachnet.DetachableNet, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (51, 51, 51)).save(tmp_path / "grey.png")
    expected = net(torch.full((1, 3, 32, 32), (0.2 - 0.5) / 0.2), which="base")[0]
    for picture in (tmp_path / "grey.png", str(tmp_path / "grey.png"), Image.open(tmp_path / "grey.png")):
        torch.testing.assert_close(family.run(picture).output, expected, rtol=1e-4, atol=1e-5)


def test_run_uses_the_threads_it_was_measured_with(
    net: detachnet.DetachableNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    seen = []
    hook = net.base.classifier.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    Family(TorchBackend(net, threads + 1), "f", None).run(torch.zeros(3, 32, 32))
    hook.remove()
    assert (seen, torch.get_num_threads()) == ([threads + 1], threads)


def test_what_cannot_be_run(family: Family) -> None:
    image = torch.zeros(3, 32, 32)
    with pytest.raises(detachnet.BudgetError, match="or what a budget of 5 ms allows; not both"):
        family.run(image, "base", budget_ms=5)
    with pytest.raises(detachnet.CutError, match=r"no model is called 'sub9'[\s\S]*nearest"):
        family.run(image, "sub9")
    for shape in ((3, 32, 31), (32, 32), (1, 1, 3, 32, 32)):
        with pytest.raises(detachnet.DataError, match="takes images 3×32×32 or batches of them, not"):
            family.run(torch.zeros(shape))
    with pytest.raises(detachnet.DataError, match="nothing"):
        family.run("nothing.png")
    family.data = None
    with pytest.raises(detachnet.DataError, match="does not say how pictures are normalized"):
        family.run("nothing.png")


def test_a_family_is_no_path(net: detachnet.DetachableNet) -> None:
    with pytest.raises(detachnet.CheckpointError, match="read from a path, not from DetachableNet"):
        Family.load(net)  # type: ignore[arg-type]


@pytest.mark.slow
def test_load(tmp_path: Path, net: detachnet.DetachableNet) -> None:
    path = tmp_path / "last.safetensors"
    detachnet.save(net, path)
    assert Family.load(path).profile is None
    write_profile(profile_of(net), path)
    for given in (path, tmp_path, str(path)):
        family = Family.load(given)
        assert family.choose(latency_ms=6) == "sub0"
        assert family.names == net.names
        image = torch.randn(3, 32, 32)
        assert torch.equal(family.run(image, "sub1").output, net(image[None], which="sub1")[0])


def storage_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["shared", "private"])
def test_all_models_in_memory_cost_the_base_and_the_stepdowns(norm: str, tmp_path: Path) -> None:
    model = detachnet.create_model("detachnet:vgg16_cifar", width=0.25)
    detachnet.save(
        detachnet.make_detachable(model, ["features.6", "features.23"], norm=norm, check="none"),
        tmp_path / "f.safetensors",
    )
    family = Family.load(tmp_path / "f.safetensors")
    for name in family.names:
        family.run(torch.randn(2, 3, 32, 32), name)
    net = family._backend.net  # type: ignore[attr-defined]
    tensors = [t for name in net.names for t in net.detach(name, share=True).state_dict(keep_vars=True).values()]
    base, stepdowns, norms = (
        storage_bytes(*part.state_dict(keep_vars=True).values()) for part in (net.base, net.stepdowns, net.norms)
    )
    assert storage_bytes(*tensors) == base + stepdowns + norms
    assert (norms == 0) == (norm == "shared")
    assert storage_bytes(*tensors) < 1.05 * base


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, detachnet.DetachableNet]:
    pytest.importorskip("onnxruntime")
    net, folder = make(), tmp_path_factory.mktemp("export") / "family"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's libraries about each other
        detachnet.export(net, folder, models=["base", "sub1"])
    return folder, net


@pytest.mark.slow
def test_an_export_is_profiled_chosen_from_and_run(exported: tuple[Path, detachnet.DetachableNet]) -> None:
    folder, net = exported
    done = CliRunner().invoke(
        app, ["profile", str(folder), "--n", "3", "--warmup", "1", "--threads", "1", "--json"]
    )
    assert done.exit_code == 0, done.output
    family = Family.load(folder)
    assert repr(family) == f"Family({str(folder)!r}, names=['base', 'sub1'])"
    assert family.profile is not None
    assert [row.runtime for row in family.profile.rows] == ["onnx", "onnx"]
    assert family.profile["sub1"].accuracy == ACCURACY["sub1"]
    if Path("/proc/self/clear_refs").exists():
        assert (family.profile["base"].peak_memory_bytes or 0) > 0
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    for budget, model in (({"latency_ms": 1e6}, "base"), ({"macs": net.plan["sub1"].macs}, "sub1")):
        answer = family.run(images, family.choose(**budget))
        torch.testing.assert_close(answer.output, net(images, which=model), rtol=1e-4, atol=1e-5)
    Image.new("RGB", (32, 32)).save(folder.parent / "black.png")
    assert family.run(folder.parent / "black.png").output.shape == (10,)


@pytest.mark.slow
def test_what_an_export_refuses(exported: tuple[Path, detachnet.DetachableNet], tmp_path: Path) -> None:
    folder, net = exported
    with pytest.raises(detachnet.MeasurementError, match="run on the CPU here, not on cuda"):
        Family.load(folder, device="cuda")
    with pytest.raises(detachnet.MeasurementError, match="ONNX graphs are measured on the CPU, not on meta"):
        detachnet.profile(folder, device="meta")
    broken = shutil.copytree(folder, tmp_path / "broken")
    content = (broken / "weights.bin").read_bytes()
    (broken / "weights.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(detachnet.ExportError, match=r"weights\.bin is damaged"):
        Family.load(broken)
    detachnet.save(net, tmp_path / "f.safetensors")
    for path, runtime, message in (
        (folder, "torch", "is an export; torch runs a checkpoint"),
        (tmp_path / "f.safetensors", "onnx", "ONNX Runtime runs an export, not"),
    ):
        done = CliRunner().invoke(app, ["profile", str(path), "--runtime", runtime])
        assert (done.exit_code, message in done.output) == (2, True)


@pytest.mark.slow
def test_only_onnx_graphs_are_run(exported: tuple[Path, detachnet.DetachableNet], tmp_path: Path) -> None:
    detachnet.export(make(), tmp_path / "pt2", "pt2", models=["sub1"])
    with pytest.raises(detachnet.ExportError, match=r"holds graphs of format 'pt2'[\s\S]*--format onnx"):
        Family.load(tmp_path / "pt2")


@pytest.mark.parametrize("values", [("nan",), ("inf",), ("inf", "-inf")])
def test_an_image_that_is_not_finite_is_refused(family: Family, values: tuple[str, ...]) -> None:
    image = torch.zeros(3, 32, 32)
    image[0, 0, : len(values)] = torch.tensor([float(value) for value in values])
    with pytest.raises(detachnet.DataError, match=f"the image holds {values[0]}: no model has an answer"):
        family.run(image)


def test_huge_pixels_are_finite_all_the_same(family: Family) -> None:
    huge = torch.full((3, 32, 32), 3e38)
    assert huge.sum().isinf()
    assert family.run(huge).model == "base"


def test_pixels_are_no_normalized_images(family: Family) -> None:
    with pytest.raises(detachnet.DataError, match=r"not uint8 pixels[\s\S]*normalize"):
        family.run(torch.zeros(3, 32, 32, dtype=torch.uint8))
